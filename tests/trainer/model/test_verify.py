"""Every kind of model is computed as Hugging Face computes it, and what is computed otherwise is found, whatever its size."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig

from medtrain.trainer.errors import InputError
from medtrain.trainer.model import attention, verify
from medtrain.trainer.model.policy import build_model
from medtrain.trainer.model.verify import small_config, verify_architecture

# Qwen2.5-72B's sizes.
SIZES = {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 29568,
    "vocab_size": 152064,
    "max_position_embeddings": 131072,
    "sliding_window": None,
}
ROPES = {
    "default": {"rope_theta": 1e6},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32768},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "longrope": {
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "short_factor": [1 + i / 64 for i in range(64)],
        "long_factor": [1.0 + i for i in range(64)],
    },
}


def config_of(model_type="qwen2", rope="default", **sizes):
    rope_parameters = {"rope_type": rope, "rope_theta": 1e4} | ROPES[rope]
    return AutoConfig.for_model(**{**SIZES, "rope_parameters": rope_parameters, **sizes, "model_type": model_type})


def verified(config, longest=4096):
    return verify_architecture(config, longest, {"file": "config.json"})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama", "mistral"])
def test_every_family_passes_at_any_size_and_draws_nothing(model_type, tied):
    state = torch.get_rng_state()
    found = verified(config_of(model_type, tie_word_embeddings=tied))
    assert found["model_type"] == model_type and found["tokens"] == 64 and found["positions"] == 4096
    assert found["largest_difference"] < verify.TOLERANCE / 4
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("rope", ROPES)
def test_every_kind_of_rope_passes_where_it_does_not_depend_on_the_documents_beside(rope):
    assert verified(config_of("llama", rope))["positions"] == 4096
    if rope == "longrope":
        with pytest.raises(
            InputError, match=r"rope_type longrope has other frequencies for long .* 4096 positions \(found llama"
        ):
            verified(config_of("llama", rope), 4097)
    else:
        assert verified(config_of("llama", rope), 131072)["positions"] == 131072


def test_other_flags_pass_and_stay():
    config = config_of("llama", attention_bias=True, mlp_bias=True, hidden_act="gelu", pad_token_id=152000)
    verified(config)
    small = small_config(config)
    assert small.attention_bias and small.mlp_bias and small.hidden_act == "gelu" and small.head_dim == 128
    assert small.rope_parameters == config.rope_parameters and config.hidden_size == 8192
    apart = small_config(config_of("qwen3", head_dim=64))
    assert apart.head_dim == 64 and apart.hidden_size == 2 * apart.head_dim * apart.num_attention_heads
    verified(config_of("qwen3", head_dim=64))
    verified(config_of(num_attention_heads=1, num_key_value_heads=1, hidden_size=16, num_hidden_layers=1), 1)


def _other_attention(change):
    """``change(sdpa, q, k, v, options)`` instead of torch's."""
    real = F.scaled_dot_product_attention
    return lambda monkeypatch: monkeypatch.setattr(
        attention.F, "scaled_dot_product_attention", lambda q, k, v, **options: change(real, q, k, v, options)
    )


def _not_causal(sdpa, q, k, v, options):
    return sdpa(q, k, v, **options | {"is_causal": False})


def _causal_off_by_one(sdpa, q, k, v, options):
    mask = torch.ones(q.shape[-2], k.shape[-2]).tril(1).bool()
    return sdpa(q, k, v, **options | {"is_causal": False}, attn_mask=mask)


def _other_scale(sdpa, q, k, v, options):
    return sdpa(q, k, v, **options | {"scale": options["scale"] * 1.01})


def _other_grouping(sdpa, q, k, v, options):
    times = q.shape[1] // k.shape[1]
    return sdpa(q, k.repeat(1, times, 1, 1), v.repeat(1, times, 1, 1), **options | {"enable_gqa": False})


def _built_otherwise(change):
    def plant(monkeypatch):
        def build(*args, **options):
            policy = build_model(*args, **options)
            forward = policy.forward

            def changed(batch):
                with torch.no_grad():
                    change(policy)
                return forward(batch)

            policy.forward = changed
            return policy

        monkeypatch.setattr(verify, "build_model", build)

    return plant


def _no_bias(name):
    return _built_otherwise(lambda policy: getattr(policy.model.layers[1].self_attn, name).bias.zero_())


def _set(get, attribute, value):
    return _built_otherwise(lambda policy: setattr(get(policy), attribute, value))


def _other_base(policy):
    frequencies = policy.model.rotary_emb.inv_freq
    frequencies.copy_((1e6 * 1.01) ** -(torch.arange(len(frequencies)) / len(frequencies)))


def _positions_go_on(monkeypatch):
    make = verify.pair_batch

    def batch(*args, **options):
        made = make(*args, **options)
        return verify.dataclasses.replace(made, position_ids=torch.arange(len(made.position_ids)))

    monkeypatch.setattr(verify, "pair_batch", batch)


def _no_prompt(monkeypatch):
    """A further completion sees itself alone."""
    make = verify.pair_batch

    def batch(*args, share):
        made = make(*args, share=share)
        return verify.dataclasses.replace(made, key_cu_seqlens=made.cu_seqlens, max_key_seqlen=made.max_seqlen, key_index=None)

    monkeypatch.setattr(verify, "pair_batch", batch)


FAULTS = {
    "q bias left out": _no_bias("q_proj"),
    "k bias left out": _no_bias("k_proj"),
    "v bias left out": _no_bias("v_proj"),
    "norm weight left out": _built_otherwise(lambda policy: policy.model.norm.weight.fill_(1)),
    "eps of the first norm": _set(lambda policy: policy.model.layers[0].input_layernorm, "variance_epsilon", 1.01),
    "eps of the last norm": _set(lambda policy: policy.model.norm, "variance_epsilon", 1e-6),
    "rope base": _built_otherwise(_other_base),
    "rope factor": _built_otherwise(lambda policy: policy.model.rotary_emb.inv_freq[-24:].copy_(torch.zeros(24))),
    "rope scaling": _set(lambda policy: policy.model.rotary_emb, "attention_scaling", 1.01),
    "activation": _set(lambda policy: policy.model.layers[1].mlp, "act_fn", torch.nn.GELU()),
    "another head": _built_otherwise(lambda policy: policy.lm_head.weight[7].mul_(1.5)),
    "a layer left out": _built_otherwise(lambda policy: policy.model.layers[1].mlp.down_proj.weight.zero_()),
    "not causal": _other_attention(_not_causal),
    "causal off by one": _other_attention(_causal_off_by_one),
    "attention scale": _other_attention(_other_scale),
    "heads grouped otherwise": _other_attention(_other_grouping),
    "positions go on": _positions_go_on,
    "no prompt before the second completion": _no_prompt,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_computed_otherwise_is_refused_and_named(monkeypatch, fault):
    FAULTS[fault](monkeypatch)
    with pytest.raises(InputError, match=r"config\.json: this architecture is not computed .*found qwen2") as caught:
        verified(config_of())
    assert "\n" not in str(caught.value)


def test_a_head_that_is_not_tied_is_refused(monkeypatch):
    def untied(settings, small, *args, **options):
        small.tie_word_embeddings = False
        return build_model(settings, small, *args, **options)

    monkeypatch.setattr(verify, "build_model", untied)
    with pytest.raises(InputError, match=r"qwen2, whose parameters have other names here: lm_head\.weight"):
        verified(config_of(tie_word_embeddings=True))


def test_what_hugging_face_cannot_compute_is_refused():
    config = config_of()
    config.rope_parameters["rope_theta"] = 0.0
    with pytest.raises(InputError, match=r"computes no model of this config .*not finite"):
        verified(config)
