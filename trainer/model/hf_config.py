"""The config and tokenizer of a model, read from a checkpoint folder or made from sizes, and checked against each other."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from medtrain.trainer.config.settings import ModelConfig
from medtrain.trainer.data.tokenizer import read_tokenizer
from medtrain.trainer.errors import bad_input, user_path

# Decoders whose weights are named model.* and lm_head.weight and whose layers all attend to the whole document.
SUPPORTED_TYPES = ("qwen2", "qwen3", "llama", "mistral")

_WIDTHS = ("hidden_size", "intermediate_size", "head_dim", "vocab_size")
_NUMBERS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of ``model.tokenizer`` or of the checkpoint, with ``model.eos_token`` applied.

    Raises InputError: no such folder, no tokenizer in it, unknown or missing end-of-sequence token.
    """
    field = "model.path" if config.tokenizer is None else "model.tokenizer"
    folder = config.tokenizer or config.path or ""
    tokenizer: Any = read_tokenizer(folder, field=field)  # the base class does not declare get_added_vocab
    if config.eos_token is not None:
        where: dict[str, Any] = {"field": "model.eos_token", "found": config.eos_token}
        if config.eos_token not in tokenizer.get_vocab():
            raise bad_input("not in the vocabulary", **where, expected=f"a token of {folder}")
        if config.eos_token not in tokenizer.get_added_vocab():
            problem = "an ordinary token: whoever reads the export would cut it out of every text"
            raise bad_input(problem, **where, expected=f"a special token of {folder}")
        tokenizer.eos_token = config.eos_token
    if tokenizer.eos_token_id is None:
        raise bad_input("the tokenizer has no end-of-sequence token", file=folder, expected="model.eos_token to name it")
    return tokenizer


def load_model_config(config: ModelConfig, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedConfig:
    """The Hugging Face config of ``model.path`` or ``model.init``, checked against the tokenizer where one is given.

    Raises InputError: unreadable or unsupported config, unknown size in ``model.init``, a tokenizer that does not fit.
    """
    if config.path is not None:
        where: dict[str, Any] = {"file": Path(config.path) / "config.json"}
        hf_config = _read_config(Path(config.path))
    else:
        where = {"field": "model.init"}
        hf_config = _config_from_sizes(config.init or {}, tokenizer)
    _check_type(hf_config.model_type, where)
    _check_sizes(hf_config, where)
    _check_supported(hf_config, where)
    if tokenizer is not None:
        check_vocabulary(tokenizer, hf_config.vocab_size, where)
        _check_own_tokens(tokenizer, config)
    return hf_config


def parameter_shapes(hf_config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's parameters, a tied head once, under the embedding's name.

    Raises InputError: transformers builds no model from this config.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    except Exception as error:  # whatever transformers raises: an activation or a rope_type that it does not know
        found = f"{type(error).__name__}: {error}"
        raise bad_input("Hugging Face builds no model from this config", field="model", found=found) from error
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def _read_config(folder: Path) -> PreTrainedConfig:
    file, adapter = folder / "config.json", folder / "adapter_config.json"
    with user_path(folder, field="model.path"):
        has_config, has_adapter = file.is_file(), adapter.is_file()
    if has_adapter:  # transformers would put it on the weights, or on others
        expected = "the model alone in model.path, its adapter in lora.path"
        raise bad_input("an adapter is no model", file=adapter, expected=expected)
    if not has_config:
        raise bad_input("not a checkpoint folder", field="model.path", found=str(folder), expected="config.json in it")
    return read_config(folder)


def read_config(folder: Path) -> PreTrainedConfig:
    """The config.json of ``folder``; InputError for one that transformers cannot read."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds here
        raise bad_input("unreadable config", file=folder / "config.json", found=" ".join(str(error).split())) from None


def _config_from_sizes(sizes: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedConfig:
    model_type = sizes["model_type"]
    _check_type(model_type, {"field": "model.init.model_type"})
    known = {*AutoConfig.for_model(model_type).to_dict(), "vocab_size"}
    for key in sizes:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            expected = f"'{near[0]}'" if near else f"a key of a {model_type} config.json"
            raise bad_input("unknown size", field=f"model.init.{key}", expected=expected)
    if tokenizer is not None:
        special = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
        sizes = {"vocab_size": len(tokenizer), **sizes, **special}
    if "num_attention_heads" in sizes:
        sizes = {"num_key_value_heads": sizes["num_attention_heads"], **sizes}
    try:
        return AutoConfig.for_model(**sizes)
    except Exception as error:
        raise bad_input("sizes that do not fit together", field="model.init", found=" ".join(str(error).split())) from None


def _check_type(model_type: str, where: dict[str, Any]) -> None:
    if model_type not in SUPPORTED_TYPES:
        expected = " | ".join(SUPPORTED_TYPES)
        raise bad_input("this kind of model is not supported", **where, found=model_type, expected=expected)


def _check_sizes(hf_config: PreTrainedConfig, where: dict[str, Any]) -> None:
    for name in (*_WIDTHS, *_NUMBERS):
        size = getattr(hf_config, name, None)
        if size is not None and not (isinstance(size, int) and size >= 1):
            raise bad_input(f"{name} is no size", **where, found=size, expected="a whole number, 1 or more")
    hidden, heads = hf_config.hidden_size, hf_config.num_attention_heads
    kv_heads = hf_config.num_key_value_heads or heads
    head_dim = getattr(hf_config, "head_dim", None) or hidden // heads
    from_sizes = "field" in where  # files may have any number of heads of any size
    if head_dim < 2 or head_dim % 2 or heads % kv_heads or (from_sizes and hidden % heads):
        raise bad_input(
            "sizes that do not fit together",
            **where,
            found=f"hidden_size {hidden}, {heads} heads of {head_dim}, {kv_heads} key-value heads",
            expected="heads that divide hidden_size, of an even size, and key-value heads that divide the heads",
        )


def _check_supported(hf_config: PreTrainedConfig, where: dict[str, Any]) -> None:
    if getattr(hf_config, "quantization_config", None) is not None:
        expected = "weights in float32, float16 or bfloat16"
        raise bad_input("a quantized checkpoint cannot be trained", **where, found="quantization_config", expected=expected)
    if (file := getattr(hf_config, "transformers_weights", None)) is not None:
        problem, expected = "another name for the file of weights is not supported", "model.safetensors or its index"
        raise bad_input(problem, **where, field="transformers_weights", found=file, expected=expected)
    layer_types = getattr(hf_config, "layer_types", None) or []
    window = getattr(hf_config, "sliding_window", None) if hf_config.model_type == "mistral" else None
    if window is not None or any(kind != "full_attention" for kind in layer_types):
        raise bad_input("sliding-window attention is not supported", **where, expected="full attention in every layer")
    if dropout := getattr(hf_config, "attention_dropout", 0.0):
        raise bad_input("attention dropout is not supported", **where, found=dropout, expected="0.0")


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, where: dict[str, Any]) -> None:
    """Refuse a tokenizer with ids beyond the embedding; ``where`` names the config (arguments of :func:`bad_input`)."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        found, expected = f"token ids up to {largest}, a vocabulary of {vocab_size}", "every token id below vocab_size"
        raise bad_input("the tokenizer does not fit the weights", **where, found=found, expected=expected)


def _check_own_tokens(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> None:
    """The tokens of ``model.tokenizer`` must be those of the tokenizer in ``model.path``, where there is one."""
    if config.path is None or config.tokenizer is None or not (own := Path(config.path) / "tokenizer.json").is_file():
        return
    ours = tokenizer.get_vocab()
    theirs = load_tokenizer(ModelConfig(path=config.path, eos_token=config.eos_token)).get_vocab()
    num_shared = len(ours.keys() & theirs.keys())
    if other := [token for token, index in ours.items() if theirs.get(token, index) != index]:
        found = f"token {other[0]!r} is {ours[other[0]]} here and {theirs[other[0]]} in {own}"
    elif num_shared < 0.9 * len(theirs):
        found = f"{num_shared} of the {len(theirs)} tokens of {own}"
    else:
        return
    expected = "the checkpoint's own tokens and ids"
    raise bad_input("the tokenizer does not fit the weights", field="model.tokenizer", found=found, expected=expected)
