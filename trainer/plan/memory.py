"""Memory of a run by formula: the most that a GPU holds during a step, from settings and a model's sizes alone, without torch.

Counted is what torch's allocator hands out; CUDA's own memory and fragmentation are an assumed allowance. Every term is an
upper bound, and ``benchmarks/plan_check.py`` holds the sum against measured peaks.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from medtrain.trainer.config.settings import Config, ModelConfig
from medtrain.trainer.errors import bad_input

KNOWN = {file.stem: file for file in (Path(__file__).resolve().parents[2] / "configs" / "models").glob("*.json")}
_NUMBERS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
GIB = 2**30
CONTEXT_BYTES, FRAGMENTATION = 2 * GIB, 0.05  # assumed: CUDA, NCCL and cuBLAS; blocks of unlike sizes, a pool per stream
NF4_BYTES = 4 / 8 + 4 / 64  # per weight: 4 bits, and a float32 scale per 64 weights
MOMENT_BLOCK = 128  # 8-bit moments that share a float32 scale
KEEP_BYTES = 2**30  # model.keep_bytes by default
SLAB_BYTES = 3 * 2**28  # logits and exponentials that the head op holds at a time, at most


class Plan(NamedTuple):
    """Bytes per rank: ``peak``, in the largest ``phase`` of a step, and its ``parts``; in host memory, a checkpoint's copy."""

    peak: float
    phase: str
    parts: dict[str, float]
    host: float


def read_sizes(model: ModelConfig, source: str | None = None) -> SimpleNamespace:
    """Sizes named as in a config.json: those of ``source`` (a name in configs/models, or a config.json), else of ``model.init``,
    of config.json in ``model.path``, or of the known model whose name stands in ``model.path``. Added to them:

    ``linears``, shapes by name in a layer; ``vectors``, weights in a layer's norms and biases; ``ends``, weights of embedding,
    last norm and head; ``parameters``, all weights; ``source``, where the sizes are from.

    Raises:
        InputError: none of these, no config.json, a model that is not supported.
    """
    content: Any = model.init
    if source is not None or content is None:
        named = [KNOWN[name] for name in sorted(KNOWN, key=len, reverse=True) if name in str(model.path).lower()]
        files = [Path(str(model.path), "config.json"), *named] if source is None else [KNOWN.get(source, Path(source))]
        file = next(filter(os.path.isfile, files), files[0])
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            content["model_type"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            expected = f"a config.json, or --sizes with one or a name of {', '.join(sorted(KNOWN))}"
            field = "model.path" if source is None else "--sizes"
            reason = getattr(error, "strerror", None) or error
            raise bad_input("no sizes of a model", field=field, found=f"{file}: {reason}", expected=expected) from None
        if source is not None or file in named:
            model = ModelConfig(init=content)
        source = str(file)
    plain = content["model_type"] in ("qwen2", "qwen3", "llama", "mistral") and isinstance(
        content.get("tie_word_embeddings"), bool
    )
    if not plain or any(type(content.get(name)) is not int or content[name] < 1 for name in _NUMBERS):
        from medtrain.trainer.model.hf_config import load_model_config, load_tokenizer  # transformers: seconds

        by_tokenizer = model.tokenizer is not None and "vocab_size" not in content
        content = load_model_config(model, load_tokenizer(model) if by_tokenizer else None).to_dict()
    sizes = SimpleNamespace(**{name: content[name] for name in ("model_type", "tie_word_embeddings", *_NUMBERS)})
    hidden, inner, layers = sizes.hidden_size, sizes.intermediate_size, sizes.num_hidden_layers
    sizes.head_dim = content.get("head_dim") or (128 if sizes.model_type == "qwen3" else hidden // sizes.num_attention_heads)
    queries, keys = sizes.num_attention_heads * sizes.head_dim, sizes.num_key_value_heads * sizes.head_dim
    sizes.linears = {f"self_attn.{name}_proj": (rows, hidden) for name, rows in (("q", queries), ("k", keys), ("v", keys))}
    sizes.linears |= {"self_attn.o_proj": (hidden, queries), "mlp.down_proj": (hidden, inner)}
    sizes.linears |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)}
    sizes.vectors = 2 * hidden + {"qwen2": queries + 2 * keys, "qwen3": 2 * sizes.head_dim}.get(sizes.model_type, 0)
    sizes.ends = hidden + sizes.vocab_size * hidden * (1 if sizes.tie_word_embeddings else 2)
    sizes.parameters = layers * (sum(rows * columns for rows, columns in sizes.linears.values()) + sizes.vectors) + sizes.ends
    sizes.source = source or "model.init"
    return sizes


def adapters_of(config: Config, sizes: SimpleNamespace):
    """The adapters that are trained; None where all weights are."""
    if not config.lora.on:
        return None
    from medtrain.trainer.model.lora import plan_adapters  # imports torch

    layers = [f"model.layers.{i}" for i in range(sizes.num_hidden_layers)]
    return plan_adapters(config.lora, {f"{i}.{name}.weight": shape for i in layers for name, shape in sizes.linears.items()})


def micro_batch(config: Config, world_size: int) -> tuple[int, bool]:
    """(tokens of the fullest micro-batch, whether a step has several); in RPO, prompts are counted as completions are."""
    capacity, batch = config.optim.micro_batch_tokens, config.optim.batch_tokens
    if config.stage == "rpo":
        return capacity, True
    # data/packing.py spreads a step's windows evenly: no micro-batch is fuller than the mean and one window.
    number = max(1, math.ceil(batch / (capacity * world_size)))
    return min(capacity, math.ceil(batch / (number * world_size)) + config.data.seq_len), number > 1


def plan_memory(config: Config, sizes: SimpleNamespace, world_size: int, slab_bytes: int = SLAB_BYTES) -> Plan:
    """The memory of one rank; ``sizes`` as read_sizes gives them."""
    precision, parallel, mode = config.precision, config.parallel, config.model.activation_checkpointing
    item, tied = 4 if precision.compute == "float32" else 2, sizes.tie_word_embeddings  # item: bytes in the compute precision
    adapters, shards, num_layers = adapters_of(config, sizes), world_size // parallel.replicate, sizes.num_hidden_layers

    # Static, of all shards: numbers of trained weights, bytes of weights and Adam's moments, bytes of a layer when gathered.
    linear, embedding = sum(map(math.prod, sizes.linears.values())), sizes.vocab_size * sizes.hidden_size
    if adapters is not None:
        base, kept = NF4_BYTES if adapters.base == "nf4" else item, 4
        trained = adapters.num_parameters * max(1, shards / adapters.rank)  # FSDP pads rows to a multiple of the shards
        in_layer, in_head = trained / num_layers, 0
        weights = num_layers * (linear * base + sizes.vectors * item) + sizes.ends * item + kept * trained
        layer = linear * base + (sizes.vectors + in_layer) * item
    else:
        trained, in_layer, in_head = sizes.parameters, linear + sizes.vectors, embedding
        kept = 2 if precision.weights == "bf16" else 4
        weights, layer = kept * trained, linear * (1 if precision.fp8_all_gather else item) + sizes.vectors * item
    moments = 8 * trained
    if config.optim.state == "8bit" and adapters is None:
        blocks = num_layers * sum(math.prod(shape) for shape in sizes.linears.values() if shape[1] % MOMENT_BLOCK == 0)
        blocks += sizes.ends - sizes.hidden_size if sizes.hidden_size % MOMENT_BLOCK == 0 else 0
        moments -= (6 - 8 / MOMENT_BLOCK) * blocks
    gradient = kept + 4 if parallel.replicate > 1 and kept == 2 else kept  # copies sum up in float32, beside the rounded

    # Numbers in hidden states, in the MLP, of logits; of queries and of keys, a shared prompt's once per side.
    tokens, accumulates = micro_batch(config, world_size)
    hidden, wide, logits = (tokens * n for n in (sizes.hidden_size, sizes.intermediate_size, sizes.vocab_size))
    queries, keys = (tokens * n * sizes.head_dim for n in (sizes.num_attention_heads, sizes.num_key_value_heads))
    sides = 2 if config.stage == "rpo" and config.data.share_prompts else 1
    # What a layer saves. A norm: its input in float32, and the normalised rows where its weight is trained.
    norm = 4 + (0 if adapters else item)
    attention = queries * item + 4 * tokens * sizes.num_attention_heads  # output, and a float32 sum per head
    saved = attention + 2 * hidden * (norm + item) + 2 * (queries + sides * keys + 2 * wide) * item
    saved += (queries + keys) * norm if sizes.model_type == "qwen3" else 0
    saved += len(adapters.targets) * tokens * adapters.rank * item if adapters else 0
    activations = num_layers * {"none": saved, "selective": attention + (2 * hidden + wide) * item}.get(mode, hidden * item)
    if not accumulates:  # a layer's gradients come as its activations go
        activations = max(0, activations - (trained - in_head) * gradient / shards)
    activations += hidden * item + tokens * (40 + 2 * sizes.head_dim * item)  # between layers; ids, positions, rotary tables

    # Gathered weights: the embedding from forward to backward, and layers besides the one at work.
    ahead = min(max(parallel.prefetch, 1), num_layers) if shards > 1 else 0
    gathered = embedding * item + layer * (ahead if parallel.reshard_after_forward else num_layers - 1)
    # A layer's backward: what it saves, computed again, and the MLP's gradients; or its end, with those of all its weights.
    matrix = sizes.hidden_size * sizes.intermediate_size
    mlp = (0 if mode == "none" else saved) + hidden * (item + norm) + 2 * wide * item + (in_layer if adapters else matrix) * item
    mlp += matrix * (8 + item) if adapters and adapters.base == "nf4" else 0  # widened twice
    if precision.fp8 != "none":  # casts, by way of float32
        mlp += 10 * wide + (4 if precision.fp8_all_gather else 8) * matrix
    backward = max(mlp, hidden * (16 + 2 * item) + in_layer * item) + (in_head * item if tied else 0)
    reduced = 4 * max(in_layer, 0 if tied else in_head)
    # The head: rows, sums, slabs, kept exponentials, its weight with the gradient or the gather's buffer; or the reduction.
    keep = KEEP_BYTES if config.model.keep_bytes is None else config.model.keep_bytes
    op = hidden * (item + 12) + min(6 * logits, slab_bytes) + (0 if adapters else min(keep, logits * item))
    op += ((0 if tied else embedding) + max(in_head, embedding if shards > 1 else 0)) * item
    head = hidden * (norm + item) + max(op, in_head * (item + 4 + (4 if kept == 4 else 6) / shards))

    phases = {"head": (gathered, head, 0), "backward of a layer": (gathered + layer, backward, reduced)}
    phase, (whole, work, buffers) = max(phases.items(), key=lambda each: sum(each[1]))
    parts = {"weights": weights / shards, "gradients": trained * gradient / shards, "optimizer": moments / shards}
    parts |= {"activations": activations, "gathered weights": whole, "working memory": work, "reduce buffers": buffers}
    parts["allowance"] = CONTEXT_BYTES + FRAGMENTATION * sum(parts.values())
    host = (trained * kept + moments) / shards if config.checkpoint.async_save else 0
    return Plan(sum(parts.values()), phase, parts, host)
