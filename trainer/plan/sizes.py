"""A decoder's sizes and parameter shapes from plain data, for ``medtrain plan``: transformers gives the same ones, after
seconds of imports. Whatever is not as plain as here is left to it, and so is every error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_NUMBERS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
# Keys of all supported kinds that change no shape.
_OTHERS = {
    "model_type",
    "head_dim",
    "tie_word_embeddings",
    "max_position_embeddings",
    "hidden_act",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}
# Of these a plain decoder has none.
_SPECIAL = ("attention_bias", "mlp_bias", "attention_dropout", "quantization_config", "use_sliding_window")


@dataclass(frozen=True)
class Sizes:
    """What a plan reads of a Hugging Face config, under the same names."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    head_dim: int
    tie_word_embeddings: bool


def read_sizes(content: dict[str, Any], *, from_user: bool) -> Sizes | None:
    """The sizes of a config.json's content; None where transformers must be asked.

    ``from_user``: of ``model.init``, where an unknown key is an error (transformers knows which ones are).
    """
    kind, tied = content.get("model_type"), content.get("tie_word_embeddings")
    numbers = {name: content.get(name) for name in _NUMBERS}
    if kind not in ("qwen2", "qwen3", "llama", "mistral") or not isinstance(tied, bool):
        return None
    if any(type(number) is not int or number < 1 for number in numbers.values()):
        return None
    hidden, heads, kv_heads = (numbers[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if hidden % heads or hidden // heads % 2 or heads % kv_heads:
        return None
    head_dim = content.get("head_dim", None if kind == "qwen3" else hidden // heads)  # Qwen3 has a default of its own
    if type(head_dim) is not int or head_dim < 1:
        return None
    if any(content.get(name) for name in _SPECIAL) or set(content.get("layer_types") or ()) - {"full_attention"}:
        return None
    if kind == "mistral" and content.get("sliding_window", "its default") is not None:
        return None
    if from_user and content.keys() - _OTHERS - {*_NUMBERS, "sliding_window" if kind == "mistral" else ""}:
        return None
    return Sizes(model_type=kind, head_dim=head_dim, tie_word_embeddings=tied, **numbers)


def shapes_of(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters, as medtrain.trainer.model.policy.parameter_shapes gives them."""
    hidden, inner, width = sizes.hidden_size, sizes.intermediate_size, sizes.head_dim
    query, key = sizes.num_attention_heads * width, sizes.num_key_value_heads * width
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key, hidden),
        "self_attn.v_proj.weight": (key, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if sizes.model_type == "qwen2":
        layer |= {f"self_attn.{name}_proj.bias": (size,) for name, size in (("q", query), ("k", key), ("v", key))}
    if sizes.model_type == "qwen3":
        layer |= {f"self_attn.{name}_norm.weight": (width,) for name in ("q", "k")}
    layers = range(sizes.num_hidden_layers)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (sizes.vocab_size, hidden)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in layers for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    return shapes if sizes.tie_word_embeddings else shapes | {"lm_head.weight": (sizes.vocab_size, hidden)}
