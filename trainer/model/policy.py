"""The policy: a Hugging Face decoder whose head gives log-probabilities, built on meta and sharded by FSDP2.

Order matters (each step was got wrong by someone): build on the meta device, put in adapters, wrap for activation
checkpointing, compile, shard, ``to_empty``, rebuild the rotary tables (``to_empty`` leaves them as garbage), then fill in the
weights.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from medtrain.kernels.head import LogpsHead
from medtrain.trainer.config.settings import ModelConfig, ParallelConfig
from medtrain.trainer.data.tokenizer import read_tokenizer
from medtrain.trainer.distributed import World
from medtrain.trainer.errors import bad_input, user_path
from medtrain.trainer.model import attention
from medtrain.trainer.model.compile import compile_layers
from medtrain.trainer.model.fsdp import shard_model
from medtrain.trainer.model.liger import use_liger
from medtrain.trainer.model.lora import Adapters, add_adapters
from medtrain.trainer.model.precision import Fp8
from medtrain.trainer.model.recompute import checkpoint_layers

# Decoders whose weights are named model.* and lm_head.weight and whose layers all attend to the whole document.
SUPPORTED_TYPES = ("qwen2", "qwen3", "llama", "mistral")


class PolicyModel(nn.Module):
    """A causal LM that returns the log-probabilities of given next tokens, and logits for generation alone.

    Its parameters carry the names of the Hugging Face model (``model.*``, ``lm_head.weight``). Backbone and head run
    inside this one forward, because FSDP gathers parameters at the forward of its root.
    """

    def __init__(self, hf_model: nn.Module, keep_bytes: int | None, backend: str, compute_dtype: torch.dtype):
        super().__init__()
        self.config: PreTrainedConfig = hf_model.config
        self.backend = backend
        self.compute_dtype = compute_dtype
        self.model = hf_model.model
        self.lm_head = LogpsHead(hf_model.lm_head.weight, keep_bytes=keep_bytes)

    @property
    def tied(self) -> bool:
        return bool(self.config.tie_word_embeddings)

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def reshard_all(self) -> None:
        """Put every parameter back to its shard. FSDP leaves some whole after a forward without backward, and then
        ``parameters()`` are not the ones to load, save or optimize. Its own ``reshard`` is of the root alone."""
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def forward(self, batch=None, *, padded: dict[str, Any] | None = None) -> torch.Tensor | tuple[torch.Tensor, dict]:
        """Log-probabilities (nats, float32 [N]) of ``batch.targets`` at positions ``batch.counted``.

        Args:
            batch: a :class:`~medtrain.trainer.data.batch.MicroBatch` on the model's device.
            padded: instead, what transformers' ``generate`` hands a backbone: rows padded on the left, and their KV cache.
                Gives the logits [rows, 1, V] of the last position, and the decoder's other outputs, its KV cache, by name
                (medtrain.trainer.exam.during).
        """
        if padded is not None:
            rest = dict(self.model(**padded))
            return self.lm_head(rest.pop("last_hidden_state")[:, -1:], None), rest
        layout = attention.packed_layout(batch, self.backend)
        output = self.model(
            input_ids=batch.input_ids.unsqueeze(0), position_ids=batch.position_ids.unsqueeze(0), use_cache=False, layout=layout
        )
        # Only the positions that count go into the head.
        return self.lm_head(output.last_hidden_state.squeeze(0).index_select(0, batch.counted), batch.targets)


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of ``model.tokenizer`` or of the checkpoint, with ``model.eos_token`` applied.

    Raises:
        InputError: no such folder, no tokenizer in it, unknown or missing end-of-sequence token.
    """
    folder = config.tokenizer or config.path
    tokenizer = read_tokenizer(folder, field="model.tokenizer" if config.tokenizer else "model.path")
    if config.eos_token is not None:
        where = {"field": "model.eos_token", "found": config.eos_token}
        if config.eos_token not in tokenizer.get_vocab():
            raise bad_input("not in the vocabulary", **where, expected=f"a token of {folder}")
        if config.eos_token not in tokenizer.get_added_vocab():
            raise bad_input(
                "an ordinary token: whoever reads the export would cut it out of every text",
                **where,
                expected=f"a special token of {folder}",
            )
        tokenizer.eos_token = config.eos_token
    if tokenizer.eos_token_id is None:
        raise bad_input("the tokenizer has no end-of-sequence token", file=folder, expected="model.eos_token to name it")
    return tokenizer


_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


def _check_sizes(hf_config: PreTrainedConfig, where: dict[str, Any]) -> None:
    for size in _SIZES:
        found = getattr(hf_config, size, None)
        if found is not None and not (isinstance(found, int) and found >= 1):
            raise bad_input(f"{size} is no size", **where, found=found, expected="a whole number, 1 or more")
    hidden, heads = hf_config.hidden_size, hf_config.num_attention_heads
    kv_heads = hf_config.num_key_value_heads or heads
    head_dim = getattr(hf_config, "head_dim", None) or hidden // heads
    if head_dim < 2 or head_dim % 2 or heads % kv_heads:
        raise bad_input(
            "sizes that do not fit together",
            **where,
            found=f"{heads} heads of {head_dim}, {kv_heads} key-value heads",
            expected="an even size a head, key-value heads that divide the heads",
        )


def load_model_config(config: ModelConfig, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedConfig:
    """The Hugging Face config of ``model.path`` or ``model.init``, checked against the tokenizer where one is given.

    Raises:
        InputError: unreadable or unsupported config, unknown size in ``model.init``, a tokenizer that does not fit.
    """
    if config.path is not None:
        folder = Path(config.path)
        with user_path(folder, field="model.path"):
            there = (folder / "config.json").is_file()
            adapter = (folder / "adapter_config.json").is_file()
        if adapter:  # transformers would put it on the weights, or on others
            raise bad_input(
                "an adapter is no model",
                file=folder / "adapter_config.json",
                expected="the model alone in model.path, its adapter in lora.path",
            )
        if not there:
            raise bad_input("not a checkpoint folder", field="model.path", found=str(folder), expected="config.json in it")
        try:
            hf_config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            raise bad_input("unreadable config", file=folder / "config.json", found=" ".join(str(error).split())) from None
        where = {"file": folder / "config.json"}
    else:
        hf_config = _config_from_sizes(config.init, tokenizer)
        where = {"field": "model.init"}
    if hf_config.model_type not in SUPPORTED_TYPES:
        raise bad_input(
            "this kind of model is not supported", **where, found=hf_config.model_type, expected=" | ".join(SUPPORTED_TYPES)
        )
    _check_sizes(hf_config, where)
    if getattr(hf_config, "quantization_config", None) is not None:
        raise bad_input(
            "a quantized checkpoint cannot be trained",
            **where,
            found="quantization_config",
            expected="weights in float32, float16 or bfloat16",
        )
    if getattr(hf_config, "transformers_weights", None) is not None:
        raise bad_input(
            "another name for the file of weights is not supported",
            **where,
            field="transformers_weights",
            found=hf_config.transformers_weights,
            expected="model.safetensors or its index",
        )
    layer_types = getattr(hf_config, "layer_types", None) or []
    window = getattr(hf_config, "sliding_window", None) if hf_config.model_type == "mistral" else None
    if any(kind != "full_attention" for kind in layer_types) or window is not None:
        raise bad_input("sliding-window attention is not supported", **where, expected="full attention in every layer")
    if getattr(hf_config, "attention_dropout", 0.0):
        raise bad_input("attention dropout is not supported", **where, found=hf_config.attention_dropout, expected="0.0")
    if tokenizer is not None:
        _check_tokenizer_fits(config, hf_config, tokenizer, where)
    return hf_config


def _config_from_sizes(sizes: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedConfig:
    model_type = sizes["model_type"]
    if model_type not in SUPPORTED_TYPES:
        raise bad_input(
            "this kind of model is not supported",
            field="model.init.model_type",
            found=model_type,
            expected=" | ".join(SUPPORTED_TYPES),
        )
    known = set(AutoConfig.for_model(model_type).to_dict()) | {"vocab_size"}
    for key in sizes:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise bad_input(
                "unknown size",
                field=f"model.init.{key}",
                expected=f"'{near[0]}'" if near else f"a key of a {model_type} config.json",
            )
    if tokenizer is not None:
        sizes = {"vocab_size": len(tokenizer), **sizes}
    if "num_attention_heads" in sizes:
        sizes.setdefault("num_key_value_heads", sizes["num_attention_heads"])
    try:
        hf_config = AutoConfig.for_model(**sizes)
    except Exception as error:
        raise bad_input("sizes that do not fit together", field="model.init", found=" ".join(str(error).split())) from None
    _check_sizes(hf_config, {"field": "model.init"})
    if hf_config.hidden_size % hf_config.num_attention_heads:
        raise bad_input(
            "sizes that do not fit together",
            field="model.init",
            found=f"hidden_size {hf_config.hidden_size}, {hf_config.num_attention_heads} heads",
            expected="heads that divide it",
        )
    if tokenizer is not None:
        hf_config.eos_token_id = tokenizer.eos_token_id
        hf_config.bos_token_id = tokenizer.bos_token_id
    return hf_config


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, where: dict[str, Any]) -> None:
    """Refuse a tokenizer with ids beyond the embedding."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise bad_input(
            "the tokenizer does not fit the weights",
            **where,
            found=f"token ids up to {largest}, a vocabulary of {vocab_size}",
            expected="every token id below vocab_size",
        )


def _check_tokenizer_fits(config: ModelConfig, hf_config, tokenizer, where) -> None:
    check_vocabulary(tokenizer, hf_config.vocab_size, where)
    own = Path(config.path) / "tokenizer.json" if config.path else None
    if own is None or config.tokenizer is None or not own.is_file():
        return
    theirs = load_tokenizer(ModelConfig(path=config.path, eos_token=config.eos_token)).get_vocab()
    ours = tokenizer.get_vocab()
    for token, index in ours.items():
        if token in theirs and theirs[token] != index:
            raise bad_input(
                "the tokenizer does not fit the weights",
                field="model.tokenizer",
                found=f"token {token!r} is {index} here and {theirs[token]} in {own}",
                expected="the checkpoint's own token ids",
            )
    if len(set(ours) & set(theirs)) < 0.9 * len(theirs):
        raise bad_input(
            "the tokenizer does not fit the weights",
            field="model.tokenizer",
            found=f"{len(set(ours) & set(theirs))} of the {len(theirs)} tokens of {own}",
            expected="the checkpoint's own tokens",
        )


def build_model(
    config: ModelConfig,
    hf_config: PreTrainedConfig,
    world: World,
    compute_dtype: torch.dtype,
    *,
    backend: str,
    adapters: Adapters | None = None,
    fp8: Fp8 | None = None,
    weights_dtype: torch.dtype = torch.float32,
    layers: str = "torch",
    parallel: ParallelConfig | None = None,
) -> PolicyModel:
    """An empty (unfilled) policy on ``world.device``, sharded as ``parallel`` says where there is a mesh. What is trained is
    kept in ``weights_dtype`` (adapters in float32); what ``adapters`` freeze is kept in ``compute_dtype``. ``layers``: as
    :func:`medtrain.trainer.model.liger.select_layers` chose.
    """
    with torch.device("meta"):
        hf_model = AutoModelForCausalLM.from_config(
            hf_config,
            dtype=compute_dtype if adapters else weights_dtype,
            attn_implementation=attention.NAME,
            trust_remote_code=False,
        )
        if adapters:
            add_adapters(hf_model, adapters)
        policy = PolicyModel(hf_model, config.keep_bytes, backend, compute_dtype)
        if fp8 is not None:
            from medtrain.trainer.model.fp8 import add_fp8  # torchao, for those who ask for it

            add_fp8(policy.model.layers, fp8, "model.layers")
    if layers == "liger":
        use_liger(policy.model)
    policy.train()
    checkpoint_layers(policy.model.layers, config.activation_checkpointing, adapters.rank if adapters is not None else None)
    if layers == "compiled":
        compile_layers(policy.model.layers, budget=config.activation_budget)
    if world.mesh is not None:
        shard_model(policy, parallel or ParallelConfig(), world, compute_dtype)
    elif compute_dtype != weights_dtype and not adapters:
        raise ValueError("computing in a lower precision than the master weights needs a mesh")
    elif fp8 is not None and fp8.all_gather:
        raise ValueError("gathering in FP8 needs a mesh")
    policy.to_empty(device=world.device)
    if policy.tied and world.mesh is None:
        policy.lm_head.weight = policy.model.embed_tokens.weight  # to_empty unties plain parameters
    with world.device:
        policy.model.rotary_emb = type(policy.model.rotary_emb)(hf_config)
    return policy


def parameter_shapes(hf_config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's parameters, a tied head once, under the embedding's name.

    Raises:
        InputError: transformers builds no model from this config.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    except Exception as error:  # of transformers, whatever it is: an activation or a rope_type that it does not know
        raise bad_input(
            "Hugging Face builds no model from this config", field="model", found=f"{type(error).__name__}: {error}"
        ) from error
    return {name: tuple(p.shape) for name, p in model.named_parameters()}
