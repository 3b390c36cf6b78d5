"""Finds the launch choices of ``medtrain.kernels.logps_launch.LAUNCHES`` on the machine at hand.

Rounds for a shape, each keeping the best of the one before: the blocks of the fused GEMM (no gradient: that GEMM and its
epilogue are nearly all there is); cuBLAS or fused, together with the rows at once (frozen head); the bytes of a slab
(frozen head forward, then the backward that recomputes). The candidates of a round are timed in turn.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from medtrain.benchmarks.inputs import Inputs, make_inputs
from medtrain.benchmarks.kernels import Shape
from medtrain.benchmarks.measure import time_rounds
from medtrain.benchmarks.peers import medtrain, runs_fused
from medtrain.benchmarks.tables import shape_name
from medtrain.kernels.logps_launch import ExpGemm, Launch, choose_launch

log = logging.getLogger(__name__)

MIB = 2**20
# Of the blocks only those that compile for Hopper without spills (tests/kernels/hopper.py).
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
    blocks: Sequence[ExpGemm] = BLOCKS,
    rows: Sequence[int] = ROWS,
    slab_bytes: Sequence[int] = SLAB_BYTES,
) -> dict[int, Launch]:
    """The fastest ``Launch`` by hidden size, for bfloat16 shapes (N, H, V); logs a line per candidate as it goes."""
    found = {}
    for shape in shapes:
        log.info(shape_name(*shape, "bfloat16"))
        inputs = make_inputs(*shape, torch.bfloat16, device).require_grad(None)
        best, fused = choose_launch(shape[1]), runs_fused(inputs)
        if fused:
            best = _best([replace(best, gemm="fused", exp_gemm=one) for one in blocks], inputs)
        inputs.require_grad("frozen")
        gemms = ("cublas", "fused") if fused else ("cublas",)
        best = _best([replace(best, gemm=gemm, rows=n) for gemm in gemms for n in rows if n <= max(shape[0], rows[0])], inputs)
        best = _best([replace(best, slab_bytes=n) for n in slab_bytes], inputs)
        inputs.require_grad("trained")
        found[shape[1]] = _best([replace(best, grad_slab_bytes=n) for n in slab_bytes], inputs, keep_bytes=0)
    return found


def _best(candidates: list[Launch], inputs: Inputs, keep_bytes: int | None = None) -> Launch:
    differing = [name for name in vars(candidates[0]) if len({getattr(one, name) for one in candidates}) > 1] or ["gemm"]
    texts = {launch: ", ".join(f"{name}={getattr(launch, name)}" for name in differing) for launch in candidates}
    calls = {launch: medtrain(inputs, keep_bytes, **vars(launch)) for launch in candidates}
    for launch in candidates:
        try:
            calls[launch].once()
        except Exception as error:  # a candidate that the device refuses is a line, not the end
            log.info(f"  {texts[launch]}: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
            del calls[launch]
    times = time_rounds(calls, inputs.hidden.device, seconds=4.0, num_rounds=(5, 60))
    whole = {launch: stages.get("both") or stages["forward"] for launch, stages in times.items()}
    for launch, measured in whole.items():
        log.info(f"  {texts[launch]}: {measured['ms_median']:.3f} ms (spread {measured['ms_spread']:.3f})")
    if not whole:
        raise RuntimeError("no candidate ran")
    return min(whole, key=lambda launch: whole[launch]["ms_median"])
