"""The log-probability op in all its modes beside its peers and a floor of bare GEMMs: time, memory and error.

medtrain bench kernels [--quick] [--out DIR] [--shapes NxHxV,...] [--impl NAME,...]
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from medtrain.benchmarks import report
from medtrain.benchmarks.inputs import Inputs, Reference, make_inputs, num_pairs, reference
from medtrain.benchmarks.kernel_tables import shape_name
from medtrain.benchmarks.measure import Calls, Memory, Times, clocks, measure_memory, time_rounds, why_not
from medtrain.benchmarks.peers import IMPLEMENTATIONS, KEEP_ALL, Implementation, Unavailable, floor, floor_flops
from medtrain.kernels.logps import select_path
from medtrain.trainer.errors import bad_input
from medtrain.trainer.files import write_json

Shape = tuple[int, int, int]
_Found = tuple[Calls, dict[str, float | None], Memory]

# (H, V) of Qwen2.5 0.5B, 1.5B, 7B and 72B.
QWEN = ((896, 151_936), (1536, 151_936), (3584, 152_064), (8192, 152_064))
FULL = tuple((rows, *model) for model in QWEN for rows in (2048, 8192, 32_768))
# The shape of the goals first: when time runs out, it is the others that are cut.
QUICK = ((8192, 3584, 152_064), (2048, 896, 151_936))
SMALL = ((1024, 64, 4096),)

HEADS = ("frozen", "trained", None)
# Quick: no implementation is begun after so many seconds; what has begun is finished.
QUICK_SECONDS = 150.0


def names() -> list[str]:
    """The values of ``--impl``."""
    return [*dict.fromkeys(implementation.impl for implementation in IMPLEMENTATIONS), "floor"]


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """``"8192x3584x152064,2048x896x151936"`` as (N, H, V) each.

    Raises:
        InputError: not of this form, or rows that do not make sequences of one length.
    """
    shapes = []
    for part in text.split(","):
        sizes = part.strip().split("x")
        if len(sizes) != 3 or not all(size.isdecimal() and int(size) for size in sizes):
            raise bad_input("not a shape", field="--shapes", found=part, expected="NxHxV, such as 8192x3584x152064")
        shapes.append(tuple(map(int, sizes)))
        num_pairs(shapes[-1][0])
    return tuple(shapes)


def parse_names(text: str) -> tuple[str, ...]:
    """``"medtrain,trl"`` as a tuple.

    Raises:
        InputError: an unknown name.
    """
    chosen = tuple(part.strip() for part in text.split(","))
    for name in chosen:
        if name not in names():
            raise bad_input("unknown implementation", field="--impl", found=name, expected=", ".join(names()))
    return chosen


def run_kernels(
    out: str | Path,
    *,
    quick: bool = False,
    shapes: tuple[Shape, ...] | None = None,
    impls: tuple[str, ...] | None = None,
    commit: str | None = None,
    implementations: Iterable[Implementation] = IMPLEMENTATIONS,
    device: torch.device | None = None,
    echo: Callable[[str], None] = print,
) -> tuple[dict[str, Any], Path]:
    """Run the benchmark; write ``OUT/kernels-DEVICE-DATE.json`` and, beside it, its tables as Markdown.

    Args:
        out: folder, made if need be. Files there are never overwritten: a second run of a day gets a number.
        quick: on CUDA, ``QUICK`` shapes, and no new work after ``QUICK_SECONDS``; the CPU has one form, which is quick.
        shapes: (N, H, V) each, instead of the usual ones.
        impls: names to run, instead of all. Without ``floor`` there is no share of it.
        commit: recorded where the source tree is not a git checkout.
        device: where to run; the GPU if there is one.

    Returns:
        (what the JSON holds, its path). The file is written anew after every shape, so a killed run leaves what it had.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_cuda = device.type == "cuda"
    form, usual = ("small", SMALL) if not on_cuda else ("quick", QUICK) if quick else ("full", FULL)
    chosen = [i for i in implementations if impls is None or i.impl in impls]
    with_floor = impls is None or "floor" in impls
    deadline = time.monotonic() + QUICK_SECONDS if quick and on_cuda else math.inf
    result = report.header("kernels", device, commit) | {
        "form": form if shapes is None else "chosen shapes",
        "clocks": [],
        "rows": [],
    }
    path = report.free_path(out, "kernels", device)
    for shape in shapes or usual:
        for dtype in (torch.bfloat16,) if on_cuda else (torch.float32, torch.bfloat16):
            echo(f"{shape_name(*shape, str(dtype)[6:])} on {result['device']}")
            try:
                rows, seen = _run_shape(shape, dtype, device, chosen, with_floor, quick, deadline, echo)
                result["rows"] += rows
                result["clocks"] += seen
            except torch.OutOfMemoryError:
                reason = "out of memory for the inputs and float64's answer"
                result["rows"] += [_row(one, head, shape, dtype, reason=reason) for one in chosen for head in one.heads]
            _free(device)
            write_json(path, result)
            path.with_suffix(".md").write_text(report.markdown(result), encoding="utf-8")
    return result, path


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """Rows of our own op that have no result, but for want of memory or time: what must not pass unseen."""
    return [
        f"{shape_name(row['N'], row['H'], row['V'], row['dtype'])}, {row['head']}: {row['reason']}"
        for row in rows
        if row["impl"] == "medtrain"
        and row["reason"]
        and not row["reason"].startswith(("out of memory", "left out", "cannot run here"))
    ]


def _run_shape(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    implementations: list[Implementation],
    with_floor: bool,
    quick: bool,
    deadline: float,
    echo: Callable[[str], None],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of one shape, and the clocks right after each of its timings."""
    inputs = make_inputs(*shape, dtype, device)
    wanted = reference(inputs)
    if wanted.inputs.num_pairs == inputs.num_pairs:
        inputs = wanted.inputs
    path = select_path(inputs.hidden)
    rows, seen = [], []
    for head in HEADS:
        _free(device)
        inputs.require_grad(head), wanted.inputs.require_grad(head)
        calls: dict[Any, Calls] = {}
        checked: dict[Implementation, tuple[dict[str, float | None], Memory]] = {}
        for implementation in implementations:
            if head not in implementation.heads:
                continue
            found = "left out: the time of the quick form was up"
            if time.monotonic() < deadline:
                found = _check(implementation, inputs, wanted, device)
            if isinstance(found, str):
                rows.append(_row(implementation, head, shape, dtype, reason=found))
            else:
                calls[implementation], *checked[implementation] = found
        if with_floor:
            calls[_FLOOR] = floor(inputs)
            calls[_FLOOR].forward()
        seconds, rounds = (8.0 if quick else 20.0, (7, 40)) if device.type == "cuda" else (0.5, (3, 10))
        times = time_rounds(calls, device, seconds, rounds)
        if device.type == "cuda":
            seen.append({"shape": list(shape), "head": head, "nvidia_smi": clocks(device)})
        floor_ms = times[_FLOOR]["forward"].median if _FLOOR in times else None
        for implementation, (errors, memory) in checked.items():
            if implementation not in times:
                rows.append(_row(implementation, head, shape, dtype, reason="out of memory beside the others"))
                continue
            for stage, measured in times[implementation].items():
                row = _row(implementation, head, shape, dtype, stage, measured, path=path)
                whole = stage == "both" or head is None
                if whole:
                    dw_bytes = inputs.weight.nbytes if head == "trained" else 0
                    row |= {"extra_bytes": memory.peak - dw_bytes} | errors
                    row["error_tokens"] = len(wanted.inputs.hidden)
                    if floor_ms:
                        row["floor_share"] = floor_ms / measured.median
                elif stage == "forward":
                    row["kept_bytes"] = memory.kept
                rows.append(row)
        if floor_ms:
            row = _row(_FLOOR, head, shape, dtype, times=times[_FLOOR]["forward"])
            rows.append(row | {"floor_share": 1.0, "tflops": floor_flops(inputs) / floor_ms / 1e9})
        echo(f"  {head or 'no gradient'}: timed {', '.join(f'{one.impl} {one.variant}'.strip() for one in times) or 'none'}")
    return rows, seen


def _check(implementation: Implementation, inputs: Inputs, wanted: Reference, device: torch.device) -> _Found | str:
    """What a first call finds, or the reason why there is none."""
    try:
        found = _first_calls(implementation, inputs, wanted, device)
        finite = all(math.isfinite(value) for value in found[1].values() if value is not None)
        return found if finite else "its result is not finite"
    except Unavailable as error:
        return f"cannot run here: {error}"
    except Exception as error:  # whatever a peer does on this machine is a line of the table, not the end of the run
        reason = why_not(error)
    _free(device)
    return reason


def _first_calls(implementation: Implementation, inputs: Inputs, wanted: Reference, device: torch.device) -> _Found:
    prepared = implementation.prepare(wanted.inputs)
    output = prepared.calls.forward()
    gradients = prepared.calls.backward(output) if prepared.calls.backward else ()
    errors = wanted.errors(prepared.margins(output), gradients)
    del output, gradients
    if inputs is not wanted.inputs:
        prepared = implementation.prepare(inputs)
    for _ in range(2):  # the warm-up
        output = prepared.calls.forward()
        if prepared.calls.backward:
            prepared.calls.backward(output)
        del output
    return prepared.calls, errors, measure_memory(prepared.calls, device)


def _row(
    implementation: Implementation,
    head: str | None,
    shape: Shape,
    dtype: torch.dtype,
    stage: str | None = None,
    times: Times | None = None,
    *,
    reason: str | None = None,
    path: str | None = None,
) -> dict[str, Any]:
    """One row of the benchmark file. Rows of one impl, head, stage and shape differ in ``gradient`` or ``variant``."""
    num_rows, hidden_size, vocab_size = shape
    return {
        "impl": implementation.impl,
        "variant": implementation.variant,
        "head": head or "frozen",
        "gradient": head is not None,
        "stage": stage or ("forward" if head is None else "both"),
        "N": num_rows,
        "H": hidden_size,
        "V": vocab_size,
        "dtype": str(dtype).removeprefix("torch."),
        "keep_bytes": "all" if implementation.keep_bytes == KEEP_ALL else implementation.keep_bytes,
        "path": path if implementation.impl == "medtrain" else None,
        "ms_median": times and times.median,
        "ms_spread": times and times.spread,
        "rounds": times and times.rounds,
        "extra_bytes": None,
        "kept_bytes": None,
        "floor_share": None,
        "tflops": None,
        "margin_error_nats": None,
        "dx_error": None,
        "dw_error": None,
        "error_tokens": None,
        "note": implementation.note,
        "reason": reason,
    }


_FLOOR = Implementation("floor", floor, note="bare torch.mm calls: 2NVH, 4NVH frozen, 6NVH trained")


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
