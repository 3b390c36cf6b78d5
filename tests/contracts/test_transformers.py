"""What we rely on of transformers: decoders called with a packed row through its attention interface, and ``generate``
around a policy. Each test fails where another version breaks the trainer, and first of all where it would do so silently."""

import inspect

import pytest
import torch
from exam_models import CHAIN, STYLE, chain_model, chain_tokenizer
from helpers import SIZES, documents, hf_logps
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoModelForCausalLM, GenerationConfig

from medtrain.trainer.config.settings import ModelConfig
from medtrain.trainer.data.batch import windows_batch
from medtrain.trainer.distributed import World
from medtrain.trainer.exam import during
from medtrain.trainer.exam.generate import HFEngine
from medtrain.trainer.model import attention
from medtrain.trainer.model.hf_config import SUPPORTED_TYPES, load_model_config
from medtrain.trainer.model.policy import build_model
from medtrain.trainer.weights.load import init_weights

ALONE = World(0, 1, torch.device("cpu"), None)


def policy_of(model_type, **changes):
    sizes = {**SIZES, "model_type": model_type, "vocab_size": 24, "sliding_window": None} | changes
    if model_type == "llama":
        del sizes["sliding_window"]
    config = ModelConfig(init=sizes)
    policy = build_model(config, load_model_config(config, None), ALONE, torch.float32, backend="sdpa")
    init_weights(policy, 0)
    return policy


def as_hugging_face(policy):
    model = AutoModelForCausalLM.from_config(policy.config, attn_implementation="eager")
    model.load_state_dict(policy.state_dict(), strict=not policy.tied)
    model.tie_weights()
    model.generation_config = GenerationConfig()  # some types name an end token
    return model.eval()


@pytest.mark.parametrize("model_type", SUPPORTED_TYPES)
def test_a_packed_row_has_the_log_probs_of_its_documents(model_type):
    """The decoder is ``model``, the head ``lm_head``; inputs that are not its own reach the attention function."""
    policy = policy_of(model_type)
    ours = policy(windows_batch(documents()))
    torch.testing.assert_close(ours, hf_logps(as_hugging_face(policy), documents()), rtol=0, atol=2e-5)


def test_the_attention_function_gets_the_layout_and_nothing_that_would_change_the_result(monkeypatch):
    seen = []

    def watched(module, query, key, value, mask, **inputs):
        seen.append((query.shape, key.shape, mask, inputs))
        return attention.varlen_attention(module, query, key, value, mask, **inputs)

    AttentionInterface.register(attention.NAME, watched)
    try:
        policy = policy_of("qwen2")
        batch = windows_batch(documents())
        policy(batch)
        checkpoint(policy, batch, use_reentrant=False).sum().backward()
    finally:
        AttentionInterface.register(attention.NAME, attention.varlen_attention)
    assert len(seen) == 3 * SIZES["num_hidden_layers"]  # a forward; another, and that of the backward
    for query, key, mask, inputs in seen:
        assert query == (1, 2, len(batch.input_ids), 8) and key == (1, 1, len(batch.input_ids), 8) and mask is None
        assert isinstance(inputs["layout"], attention.PackedLayout) and inputs["scaling"] == 8**-0.5


@pytest.mark.parametrize("unknown", [{"s_aux": torch.zeros(2)}, {"softcap": 30.0}, {"sliding_window": 4}, {"dropout": 0.1}])
def test_inputs_of_attention_that_are_not_known_are_refused(unknown):
    layout = attention.packed_layout(windows_batch(documents()), "sdpa")
    q = torch.zeros(1, 2, len(layout.inverse), 8)
    with pytest.raises(ValueError, match="packed attention"):
        attention.varlen_attention(torch.nn.Identity(), q, q, q, None, scaling=1.0, layout=layout, **unknown)


@pytest.mark.parametrize("model_type", SUPPORTED_TYPES)
def test_generate_around_a_policy_makes_the_tokens_of_hugging_faces_own_model(model_type):
    """With its KV cache, whatever that is called, and on rows of unlike length."""
    policy = policy_of(model_type, tie_word_embeddings=model_type == "qwen3")
    ids = torch.tensor([[0, 0, 5, 9, 4], [3, 1, 17, 8, 2]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    config = GenerationConfig(max_new_tokens=9, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True)
    theirs = as_hugging_face(policy).generate(ids, attention_mask=mask, generation_config=config)
    with during.CausalLM(policy, {}, ALONE) as model:
        ours = model.eval().generate(ids, attention_mask=mask, generation_config=config)
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), rtol=0, atol=1e-4)
    assert policy(windows_batch(documents())).requires_grad  # the packed attention is back


def test_the_cache_goes_from_token_to_token_under_a_name_that_the_decoder_knows():
    policy, passed = policy_of("qwen2"), []
    forward = policy.model.forward
    named = inspect.signature(forward).parameters.keys()
    policy.model.forward = lambda **inputs: passed.append(inputs) or forward(**inputs)
    with during.CausalLM(policy, {}, ALONE) as model:
        model.decoder_takes = named - {"kwargs"}
        config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
        model.generate(torch.tensor([[5, 9, 4]]), generation_config=config)
    assert [inputs["input_ids"].shape[1] for inputs in passed] == [3, 1, 1]
    assert all(inputs.keys() <= named for inputs in passed)


def test_an_input_of_generate_that_the_decoder_does_not_name_is_refused():
    with during.CausalLM(policy_of("qwen2"), {}, ALONE) as model, pytest.raises(TypeError, match="'kv_store'"):
        model(torch.tensor([[5, 9, 4]]), kv_store=None)


class _WithoutCache(torch.nn.Module):
    """A decoder that ignores what the tokens before left for it."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, **inputs):
        if inputs["input_ids"].shape[1] == 1:
            inputs = {name: inputs[name] for name in ("input_ids",)}
        return self.decoder(**inputs)


@pytest.mark.parametrize("broken", [False, True])
def test_a_cache_that_does_not_reach_the_model_is_seen(broken):
    tokenizer = chain_tokenizer()
    policy = policy_of("qwen2", vocab_size=len(tokenizer))
    with during.CausalLM(policy, {}, ALONE) as model:
        if broken:
            policy.model.forward = _WithoutCache(type(policy.model).forward.__get__(policy.model)).forward
        assert HFEngine(model, tokenizer).cache_agrees("問題答え", 9) is not broken


def test_a_model_of_transformers_own_agrees_with_its_cache():
    tokenizer = chain_tokenizer()
    engine = HFEngine(chain_model(tokenizer, CHAIN), tokenizer)
    assert engine.cache_agrees(f"薬はどれか。{STYLE.explain_marker}", 64)
