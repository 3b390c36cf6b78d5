"""Of transformers' configs: the rope is read the same from ``rope_theta`` and ``rope_scaling`` (as published checkpoints and
readers of version 4 have it), from ``rope_parameters`` (version 5), and from both together, as we export it."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel

ROPES = {
    "default": (10_000.0, None),
    "theta": (1e6, None),
    "linear": (20_000.0, {"type": "linear", "factor": 2.0}),
    "dynamic": (10_000.0, {"rope_type": "dynamic", "factor": 2.0}),
    "yarn": (1e6, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
    "llama3": (
        5e5,
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
}


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama", "mistral"])
@pytest.mark.parametrize("kind", ROPES)
def test_either_form_of_the_rope_is_read_the_same(tmp_path, model_type, kind):
    theta, scaling = ROPES[kind]
    sizes = {
        "model_type": model_type,
        "hidden_size": 32,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 8,
        "max_position_embeddings": 512,
    }
    old = {"rope_theta": theta, "rope_scaling": scaling}
    rope = dict(scaling or {})
    new = {"rope_parameters": {"rope_type": rope.pop("type", "default"), **rope, "rope_theta": theta}}
    tables = []
    for form in (old, new, old | new):
        (tmp_path / "config.json").write_text(json.dumps(sizes | form))
        with torch.device("meta"):
            model = AutoModel.from_config(AutoConfig.from_pretrained(tmp_path))
        rotary = type(model.rotary_emb)(model.config)
        tables.append((rotary.inv_freq, rotary.attention_scaling))
    assert all(torch.equal(table, tables[0][0]) and scale == tables[0][1] for table, scale in tables)
