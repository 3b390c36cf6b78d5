"""Verification, before the first step, that the loaded policy is the checkpoint: its bytes, and Hugging Face's own forward.

Every tensor is gathered as the forward gathers it and compared bit for bit with the files' bytes, read anew and without the
code that loaded them. Where the model is small enough for the host, log-probabilities of a few tokens are compared with those of
``AutoModelForCausalLM`` in float32.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from medtrain.trainer.data.batch import windows_batch
from medtrain.trainer.distributed import World, whole
from medtrain.trainer.errors import bad_input
from medtrain.trainer.model.lora import Adapters, without_adapters
from medtrain.trainer.model.names import is_adapter, is_packed, weight_name
from medtrain.trainer.model.nf4 import quantize
from medtrain.trainer.model.policy import PolicyModel
from medtrain.trainer.weights.load import HEAD, Checkpoint
from medtrain.trainer.weights.safetensors import read_rows

NUM_TOKENS = 32
FORWARD_BYTES = 40_000_000_000  # of the float32 model on rank 0's host; loading a larger one would keep all ranks waiting
FORWARD_SHARE = 0.5  # of the host memory that is free
# Mean absolute difference, nats per token, to float32: this much in float32; in a lower precision, this multiple of what
# Hugging Face's own forward loses in it. A bias left out or another rope base makes a far larger one.
TOLERANCE = 1e-3
TIMES_THEIR_LOSS = 3.0


def verify_weights(
    policy: PolicyModel, checkpoint: Checkpoint, adapters: Adapters | None, world: World, *, forward: bool
) -> dict[str, Any]:
    """Compare ``policy`` as loaded with ``checkpoint``; all ranks must call this. Adapters are left out of it.

    Returns what the manifest keeps: ``tensors`` compared; ``unused``, names in the files that the model has no place for;
    ``forward``, the differences in nats per token or why there are none; ``seconds``.

    ``forward``: compare with Hugging Face's forward too, where the model fits and is not rounded to 4 bits.

    Raises InputError: the policy is not the checkpoint; says what differs.
    """
    started = time.perf_counter()
    names = _check_tensors(policy, checkpoint, world)
    return {
        "tensors": len(names),
        "unused": sorted(checkpoint.tensors.keys() - {*names, HEAD}),  # some files hold the head of tied models too
        "forward": _check_forward(policy, checkpoint, adapters, world) if forward else "not asked for",
        "seconds": time.perf_counter() - started,
    }


def describe(verification: dict[str, Any]) -> str:
    """One line for the user, of what :func:`verify_weights` and ``verify_architecture`` (under ``architecture``) returned."""
    parts, seconds = [], verification.get("seconds", 0.0)
    if small := verification.get("architecture"):
        seconds += small["seconds"]
        parts.append(
            f"a small {small['model_type']}, packed and up to position {small['positions'] - 1:,}, agrees with Hugging Face's "
            f"within {small['largest_difference']:.1e} nats per token"
        )
    if "tensors" in verification:
        unused = f", {len(verification['unused'])} tensors of the files unused" if verification["unused"] else ""
        parts.append(f"{verification['tensors']} tensors are the files' own{unused}")
        if isinstance(forward := verification["forward"], str):
            parts.append(f"not compared with Hugging Face's forward: {forward}")
        else:
            parts.append(
                f"log-probabilities of {forward['tokens']} tokens agree with Hugging Face's within "
                f"{forward['mean_difference']:.1e} nats (allowed: {forward['tolerance']:.1e})"
            )
    return f"proof: {'; '.join(parts)}; {seconds:.1f} s"


@torch.no_grad()
def _check_tensors(policy: PolicyModel, checkpoint: Checkpoint, world: World) -> list[str]:
    """Names of the tensors compared. The ranks that share one copy of the model take turns in comparing."""
    policy.reshard_all()
    named = [(name, p) for name, p in policy.named_parameters() if not is_adapter(name)]
    wrong = torch.zeros(len(named), dtype=torch.float64)
    num_sharers = world.size // world.replicas
    for i, (name, param) in enumerate(named):
        tensor = whole(param)
        if i % num_sharers == world.rank % num_sharers:
            wrong[i] = not _is_stored(tensor, checkpoint, weight_name(name), packed=is_packed(name))
        del tensor
    names = [weight_name(name) for name, _ in named]
    differ = [name for name, count in zip(names, world.sum(wrong), strict=True) if count > 0]
    if differ:
        others = f" and {len(differ) - 1} others" if len(differ) > 1 else ""
        problem = "the loaded weights are not those of the files, which changed meanwhile, or the disk or memory is defective"
        raise bad_input(problem, file=checkpoint.folder, found=f"{differ[0]}{others} differ")
    return names


def _is_stored(tensor: torch.Tensor, checkpoint: Checkpoint, name: str, *, packed: bool) -> bool:
    """Whether ``tensor`` has the bits of the stored one, cast to its dtype (packed: quantized)."""
    for first, rows in read_rows(checkpoint.tensors[name]):
        rows = rows.to(tensor.device)
        expected = quantize(rows, tensor.dtype) if packed else rows.to(tensor.dtype)
        held = tensor[first : first + len(rows)]
        if held.shape != expected.shape or not torch.equal(held.contiguous().view(torch.uint8), expected.view(torch.uint8)):
            return False
    return True


@torch.no_grad()
def _check_forward(policy: PolicyModel, checkpoint: Checkpoint, adapters: Adapters | None, world: World) -> dict[str, Any] | str:
    if adapters is not None and adapters.base == "nf4":
        return "the base is rounded to 4 bits"
    needed = 4 * sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    allowed = world.from_main(lambda: min(FORWARD_BYTES, int(FORWARD_SHARE * free_host_bytes())))
    if needed > allowed:
        return f"{needed / 1e9:,.1f} GB in float32, of {allowed / 1e9:,.1f} GB allowed"
    ids = torch.randint(policy.config.vocab_size, (NUM_TOKENS,), generator=torch.Generator().manual_seed(0))
    with without_adapters(policy):
        ours = policy(windows_batch([ids.numpy().astype("uint32")]).to(policy.device)).cpu()
    policy.reshard_all()
    return world.from_main(lambda: _compare(ours, ids, policy, checkpoint))


def _compare(ours: torch.Tensor, ids: torch.Tensor, policy: PolicyModel, checkpoint: Checkpoint) -> dict[str, Any]:
    """On rank 0, with transformers' own model in float32 on the CPU."""
    try:
        model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32, local_files_only=True)
        theirs, their_loss = _hugging_face_logps(model, ids, policy.compute_dtype)
    except Exception as error:  # whatever it is, the other ranks wait for an answer
        problem = "Hugging Face's forward failed; model.proof=tensors goes without it"
        first_line = str(error).partition("\n")[0]
        raise bad_input(problem, file=checkpoint.folder, found=f"{type(error).__name__}: {first_line}") from error
    difference = (ours.double() - theirs).abs()
    mean, largest = float(difference.mean()), float(difference.max())
    tolerance = max(TOLERANCE, TIMES_THEIR_LOSS * their_loss)
    if not mean <= tolerance:  # so that NaN is wrong too
        raise bad_input(
            "the loaded policy is not Hugging Face's model, though the tensors are the files'; model.proof=tensors goes without",
            file=checkpoint.folder,
            found=f"log-probabilities of {len(ours)} tokens {mean:.2e} nats apart on average, {largest:.2e} at most",
            expected=f"at most {tolerance:.1e} on average",
        )
    return {"tokens": len(ours), "mean_difference": mean, "largest_difference": largest, "tolerance": tolerance}


def _hugging_face_logps(model: torch.nn.Module, ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    """float64 log-probabilities of ``ids`` after the first, by ``model`` in float32; and their mean distance from those that it
    computes in ``dtype``, in which it is left."""

    def logps() -> torch.Tensor:
        logits = model(ids[:-1].unsqueeze(0), use_cache=False).logits[0].double()
        return logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]

    exact = logps()
    if dtype == torch.float32:
        return exact, 0.0
    for param in model.parameters():  # not model.to: rotary frequencies stay in float32, as transformers loads them
        param.data = param.data.to(dtype)
    return exact, float((logps() - exact).abs().mean())


def free_host_bytes() -> int:
    """Host memory that may still be taken: what Linux calls available, within this container's limit. Elsewhere half of what
    the machine has, and 0 where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except OSError:  # macOS
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        except (AttributeError, OSError, ValueError):
            return 0
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        taken = next(line for line in (group / "memory.stat").read_text().splitlines() if line.startswith("anon "))
    except (OSError, StopIteration):
        return free
    return free if limit == "max" else min(free, int(limit) - int(taken.split()[1]))
