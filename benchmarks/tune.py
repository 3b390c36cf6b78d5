"""Finds the launch choices of ``medtrain.kernels.logps_launch.LAUNCHES`` on the machine at hand.

medtrain bench tune [--shapes NxHxV,...] prints what it measured and, last, an entry of the table for each hidden size.

Three rounds for a shape, each keeping the best of the one before: the blocks of the fused GEMM (no gradient: that GEMM and
its epilogue are nearly all there is); cuBLAS or fused, together with the rows at once (frozen head); the bytes of a slab
(frozen head forward, then the backward that recomputes). Every candidate of a round is timed in turn, round about, so a
drift of the clock meets all alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields, replace

import torch

from medtrain.benchmarks.inputs import Inputs, make_inputs
from medtrain.benchmarks.kernel_tables import shape_name
from medtrain.benchmarks.kernels import Shape
from medtrain.benchmarks.measure import Calls, time_rounds
from medtrain.benchmarks.peers import medtrain, runs_fused
from medtrain.kernels.logps_launch import ExpGemm, Launch, choose_launch

MIB = 2**20
# Of the blocks only those that compile for Hopper without spills (medtrain.benchmarks.kernel_resources).
BLOCKS = tuple(
    ExpGemm(m, n, k, group_m, stages, warps, flatten)
    for m, n, k, stages, warps in ((128, 256, 64, 3, 8), (128, 256, 64, 4, 8), (128, 128, 64, 4, 8), (256, 128, 64, 3, 8))
    for group_m in (8, 16)
    for flatten in (True, False)
)
ROWS = (1536, 2048, 2304, 2816, 3584, 4096)
SLAB_BYTES = (64 * MIB, 128 * MIB, 192 * MIB, 256 * MIB)


def tune(
    shapes: Iterable[Shape],
    device: torch.device,
    *,
    blocks: tuple[ExpGemm, ...] = BLOCKS,
    rows: tuple[int, ...] = ROWS,
    slab_bytes: tuple[int, ...] = SLAB_BYTES,
    seconds: float = 4.0,
    echo: Callable[[str], None] = print,
) -> dict[int, Launch]:
    """The fastest ``Launch`` by hidden size, for bfloat16 shapes (N, H, V); prints a line a candidate as it goes."""
    found = {}
    for shape in shapes:
        echo(shape_name(*shape, "bfloat16"))
        inputs = make_inputs(*shape, torch.bfloat16, device)
        best = choose_launch(shape[1])
        inputs.require_grad(None)
        if fused := runs_fused(inputs):
            best = _best([replace(best, gemm="fused", exp_gemm=one) for one in blocks], inputs, None, seconds, echo)
        inputs.require_grad("frozen")
        gemms = ("cublas", "fused") if fused else ("cublas",)
        candidates = [replace(best, gemm=gemm, rows=n) for gemm in gemms for n in rows if n <= max(shape[0], rows[0])]
        best = _best(candidates, inputs, None, seconds, echo)
        best = _best([replace(best, slab_bytes=n) for n in slab_bytes], inputs, None, seconds, echo)
        inputs.require_grad("trained")
        best = _best([replace(best, grad_slab_bytes=n) for n in slab_bytes], inputs, 0, seconds, echo)
        found[shape[1]] = best
    return found


def _best(
    candidates: list[Launch], inputs: Inputs, keep_bytes: int | None, seconds: float, echo: Callable[[str], None]
) -> Launch:
    calls = {launch: _calls(launch, inputs, keep_bytes) for launch in candidates}
    for launch in list(calls):
        try:
            output = calls[launch].forward()
            if calls[launch].backward:
                calls[launch].backward(output)
        except Exception as error:  # a candidate that the device refuses is a line, not the end
            echo(f"  {_text(launch, candidates)}: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
            del calls[launch]
    times = time_rounds(calls, inputs.hidden.device, seconds, (5, 60))
    whole = {launch: stages.get("both") or stages["forward"] for launch, stages in times.items()}
    for launch, measured in whole.items():
        echo(f"  {_text(launch, candidates)}: {measured.median:.3f} ms (spread {measured.spread:.3f})")
    if not whole:
        raise RuntimeError("no candidate ran")
    return min(whole, key=lambda launch: whole[launch].median)


def _calls(launch: Launch, inputs: Inputs, keep_bytes: int | None) -> Calls:
    # Not asdict: it would turn the blocks into a dictionary too.
    return medtrain(inputs, keep_bytes, **{field.name: getattr(launch, field.name) for field in fields(launch)}).calls


def _text(launch: Launch, candidates: list[Launch]) -> str:
    """The fields in which the candidates differ."""
    differing = [
        field.name for field in fields(launch) if len({getattr(candidate, field.name) for candidate in candidates}) > 1
    ] or ["gemm"]
    return ", ".join(f"{name}={getattr(launch, name)}" for name in differing)
