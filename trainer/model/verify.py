"""Verification, before any weights are read, that a model of this architecture is computed as Hugging Face computes it.

A small random model with the run's own config but for its sizes, packed, against Hugging Face's eager forward on the CPU.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from medtrain.trainer.config.settings import ModelConfig
from medtrain.trainer.data.batch import pair_batch
from medtrain.trainer.data.pairs import PairSet
from medtrain.trainer.distributed import World
from medtrain.trainer.errors import InputError, bad_input
from medtrain.trainer.model.policy import PolicyModel, build_model

# Largest difference of one log-probability, nats, both in float32: rounding makes up to 2e-5 of it. A bias left out, a scale
# or a rope base off by a hundredth makes 1e-2 and more.
TOLERANCE = 1e-4
VOCABULARY = 96
# Tokens of prompt, chosen and rejected. The second pair's prompt is one token: its sides are documents of which all counts.
LENGTHS = ((20, 20, 14), (1, 24, 6))
REACH = 38  # the last position of the first pair's longer side

_PROBLEM = "this architecture is not computed as Hugging Face computes it"


@torch.no_grad()
def verify_architecture(hf_config: PreTrainedConfig, longest: int, where: dict[str, Any]) -> dict[str, Any]:
    """Compare log-probabilities of packed sequences, with and without a shared prompt; on one rank.

    Returns what the manifest keeps: ``model_type``; ``tokens`` compared; ``positions`` that they reach;
    ``largest_difference`` and ``tolerance`` in nats; ``seconds``.

    ``longest``: tokens of the run's longest document or pair. Two sequences leave out positions to reach as far.
    ``where``: says in an error whose config it is (arguments of :func:`bad_input`).

    Raises InputError: the packed path computes another model than Hugging Face does, or that computes none of this config.
    """
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    pairs = _random_pairs(generator)
    try:
        theirs = _random_model(hf_config, generator)
        expected = {last: _hugging_face_logps(theirs, pairs, last) for last in sorted({REACH, max(REACH, longest - 1)})}
    except Exception as error:  # whatever transformers raises
        found = f"{type(error).__name__}: {error}"
        raise bad_input("Hugging Face computes no model of this config", **where, found=found) from error
    alone = World(0, 1, torch.device("cpu"), None)
    ours = build_model(ModelConfig(), small_config(hf_config), alone, torch.float32, backend="sdpa")
    weights, params = dict(theirs.named_parameters()), dict(ours.named_parameters())
    if differing := sorted(params.keys() ^ weights.keys()):
        found = f"{hf_config.model_type}, whose parameters have other names here: {differing[0]}"
        raise bad_input(_PROBLEM, **where, found=found)
    for name, param in params.items():
        param.copy_(weights[name])
    largest = 0.0
    for last, logps in expected.items():
        for share in (False, True):
            difference = float((_packed_logps(ours, pairs, last, share=share) - logps).abs().max())
            if not difference <= TOLERANCE:  # so that NaN is wrong too
                raise _mismatch(hf_config, where, difference, last, share)
            largest = max(largest, difference)
    return {
        "model_type": hf_config.model_type,
        "tokens": len(expected[REACH]),
        "positions": max(expected) + 1,
        "largest_difference": largest,
        "tolerance": TOLERANCE,
        "seconds": time.perf_counter() - started,
    }


def small_config(hf_config: PreTrainedConfig) -> PreTrainedConfig:
    """``hf_config`` with every kind of layer, its own head size and grouping of heads, and otherwise few of everything.

    Its epsilon is large: the real one is lost next to activations of order 1, and another would not show.
    """
    kv_heads = min(2, hf_config.num_key_value_heads)
    heads = kv_heads * min(2, hf_config.num_attention_heads // hf_config.num_key_value_heads)
    kinds = list(dict.fromkeys(getattr(hf_config, "layer_types", None) or []))
    layers = max(2, len(kinds))
    hidden = hf_config.hidden_size * heads // hf_config.num_attention_heads
    sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": 96, "vocab_size": VOCABULARY, "rms_norm_eps": 1.0}
    sizes |= {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    sizes |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if kinds:
        sizes["layer_types"] = (kinds * layers)[:layers]
    return type(hf_config).from_dict(hf_config.to_dict() | sizes)


def _random_model(hf_config: PreTrainedConfig, generator: torch.Generator) -> torch.nn.Module:
    """Hugging Face's small model, all its weights random: also what would start at 0 or 1, where leaving it out would not
    show."""
    with torch.random.fork_rng(devices=[]):  # Hugging Face draws weights too
        model = AutoModelForCausalLM.from_config(small_config(hf_config), dtype=torch.float32, attn_implementation="eager")
    for name, param in model.named_parameters():
        if param.ndim == 1:
            param.normal_(float(name.endswith(".weight")), 0.5, generator=generator)
        else:
            param.normal_(0.0, 2 * param.shape[-1] ** -0.5, generator=generator)
    return model.eval()


def _random_pairs(generator: torch.Generator) -> PairSet:
    lengths = [length for pair in LENGTHS for length in pair]
    tokens = torch.randint(VOCABULARY, (sum(lengths),), generator=generator).numpy().astype(np.int32)
    return PairSet("random", None, "", tokens, np.cumsum([0, *lengths]), np.arange(len(LENGTHS)), "", {}, {})


def _packed_logps(policy: PolicyModel, pairs: PairSet, last: int, *, share: bool) -> torch.Tensor:
    """float64, of chosen_0, rejected_0, chosen_1, rejected_1; the first pair's positions are spread to reach ``last``."""
    batch = pair_batch([pairs], [(0, 0), (0, 1)], share=share)
    first = (pairs.lengths if share else pairs.separate_lengths)[0]
    positions = torch.cat([batch.position_ids[:first] * last // REACH, batch.position_ids[first:]])
    return policy(dataclasses.replace(batch, position_ids=positions)).double()


def _hugging_face_logps(model: torch.nn.Module, pairs: PairSet, last: int) -> torch.Tensor:
    """The same, each sequence computed alone."""
    pieces = []
    for i in range(pairs.num_pairs):
        for completion in (pairs.chosen(i), pairs.rejected(i)):
            ids = torch.from_numpy(np.concatenate([pairs.prompt(i), completion]).astype(np.int64))
            positions = torch.arange(len(ids) - 1) * (last if i == 0 else REACH) // REACH
            # The mask says that it is one sequence: without it, transformers takes a gap in the positions for a new one.
            mask = torch.ones_like(positions)[None]
            logits = model(ids[None, :-1], mask, position_ids=positions[None], use_cache=False).logits[0, -len(completion) :]
            pieces.append(logits.double().log_softmax(-1).gather(1, ids[-len(completion) :, None])[:, 0])
    if not (logps := torch.cat(pieces)).isfinite().all():
        raise ValueError("log-probabilities that are not finite")
    return logps


def _mismatch(hf_config: PreTrainedConfig, where: dict[str, Any], difference: float, last: int, share: bool) -> InputError:
    cause = "attention to a shared prompt" if share else "a setting of this config that packed attention does not know"
    rope = getattr(hf_config, "rope_parameters", None) or {}
    if last > REACH:
        cause = f"rope_type {rope.get('rope_type')} has other frequencies for long documents, and all lengths are packed together"
        cause += f"; right up to {rope.get('original_max_position_embeddings')} positions"
    found = f"{hf_config.model_type} up to position {last}: {difference:.1e} nats per token apart"
    return bad_input(f"{_PROBLEM}; likely cause: {cause}", **where, found=found, expected=f"at most {TOLERANCE:.0e}")
