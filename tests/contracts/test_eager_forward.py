"""We rely on transformers' eager forward as the one to compare with: positions may have gaps under a mask of ones, a config
goes through its dict unharmed, and ``from_config`` takes its sizes from there."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "vocab_size": 24,
    "sliding_window": None,
    "rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
}


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama", "mistral"])
def test_positions_with_gaps_are_one_sequence_under_a_mask_of_ones(model_type):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES, initializer_range=0.5)
    again = type(config).from_dict(config.to_dict() | {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2})
    assert again.rope_parameters == config.rope_parameters and again.num_hidden_layers == 2
    model = AutoModelForCausalLM.from_config(again, dtype=torch.float32, attn_implementation="eager").eval()
    ids, mask, positions = torch.arange(6)[None], torch.ones(1, 6, dtype=torch.long), torch.arange(6)[None]

    def last(ids, positions):
        return model(ids, mask, position_ids=positions, use_cache=False).logits[0, -1]

    with torch.no_grad():
        first_token = torch.cat([ids[:, :1] + 9, ids[:, 1:]], 1)
        assert not torch.allclose(last(ids, positions * 7), last(first_token, positions * 7), atol=1e-4)
        assert not torch.allclose(last(ids, positions * 7), last(ids, positions), atol=1e-4)
        torch.testing.assert_close(last(ids, positions + 100), last(ids, positions))
