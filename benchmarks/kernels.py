"""``medtrain bench kernels``: the log-probability op in all its modes beside its peers and a floor of bare GEMMs."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from medtrain.benchmarks import report
from medtrain.benchmarks.inputs import Inputs, Reference, make_inputs, num_pairs, reference
from medtrain.benchmarks.measure import Calls, clocks, measure_memory, time_rounds, why_not
from medtrain.benchmarks.peers import FLOOR, IMPLEMENTATIONS, KEEP_ALL, Implementation, Unavailable, floor_flops
from medtrain.benchmarks.tables import Row, shape_name
from medtrain.kernels.logps import select_path
from medtrain.trainer.errors import bad_input

log = logging.getLogger(__name__)

Shape = tuple[int, int, int]

# (H, V) of Qwen2.5 0.5B, 1.5B, 7B and 72B.
QWEN = ((896, 151_936), (1536, 151_936), (3584, 152_064), (8192, 152_064))
FULL = tuple((rows, *model) for model in QWEN for rows in (2048, 8192, 32_768))
# The shape of the goals first: when time runs out, it is the others that are cut.
QUICK = ((8192, 3584, 152_064), (2048, 896, 151_936))
SMALL = ((1024, 64, 4096),)

HEADS = ("frozen", "trained", None)
# Quick: no implementation is begun after so many seconds; what has begun is finished.
QUICK_SECONDS = 150.0


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """``"8192x3584x152064,2048x896x151936"`` as (N, H, V) each; InputError for another form, or unequal sequences."""
    shapes = []
    for part in text.split(","):
        sizes = part.strip().split("x")
        if len(sizes) != 3 or not all(size.isdecimal() and int(size) for size in sizes):
            raise bad_input("not a shape", field="--shapes", found=part, expected="NxHxV, such as 8192x3584x152064")
        num_rows, hidden_size, vocab_size = map(int, sizes)
        num_pairs(num_rows)
        shapes.append((num_rows, hidden_size, vocab_size))
    return tuple(shapes)


def parse_names(text: str) -> tuple[str, ...]:
    """``"medtrain,trl"`` as a tuple; InputError for an unknown name."""
    known = dict.fromkeys(one.impl for one in (*IMPLEMENTATIONS, FLOOR))
    chosen = tuple(part.strip() for part in text.split(","))
    if unknown := [name for name in chosen if name not in known]:
        raise bad_input("unknown implementation", field="--impl", found=unknown[0], expected=", ".join(known))
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
) -> tuple[dict[str, Any], Path]:
    """Run the benchmark; write ``OUT/kernels-DEVICE-DATE.json``, a new file on every run, and its tables as Markdown.

    ``quick`` is for CUDA alone. ``shapes``, (N, H, V) each, and ``impls``, names, replace the usual ones; without ``floor``
    there is no share of it. ``commit`` is recorded where the source tree is not a git checkout. Returns what the JSON holds
    and its path; the file is written anew after every shape, so a killed run leaves what it had.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_cuda = device.type == "cuda"
    form, usual = ("small", SMALL) if not on_cuda else ("quick", QUICK) if quick else ("full", FULL)
    chosen = [one for one in (*implementations, FLOOR) if impls is None or one.impl in impls]
    deadline = time.monotonic() + QUICK_SECONDS if quick and on_cuda else math.inf
    result = report.header("kernels", device, commit) | {"form": "chosen shapes" if shapes else form, "clocks": [], "rows": []}
    path = report.free_path(out, "kernels", device)
    for shape in shapes or usual:
        for dtype in (torch.bfloat16,) if on_cuda else (torch.float32, torch.bfloat16):
            log.info(f"{shape_name(*shape, str(dtype)[6:])} on {result['device']}")
            try:
                rows, seen = _run_shape(shape, dtype, device, chosen, quick, deadline)
            except torch.OutOfMemoryError:
                reason, ours = "out of memory for the inputs and float64's answer", [one for one in chosen if one is not FLOOR]
                rows, seen = [_row(one, head, shape, dtype, reason=reason) for one in ours for head in one.heads], []
            result["rows"] += rows
            result["clocks"] += seen
            _free(device)
            report.save(path, result)
    return result, path


def _run_shape(
    shape: Shape, dtype: torch.dtype, device: torch.device, chosen: list[Implementation], quick: bool, deadline: float
) -> tuple[list[Row], list[Row]]:
    """Rows of one shape, and the clocks right after each of its timings."""
    inputs = make_inputs(*shape, dtype, device)
    wanted = reference(inputs)
    if wanted.inputs.num_pairs == inputs.num_pairs:
        inputs = wanted.inputs
    rows, seen = [], []
    for head in HEADS:
        rows += _run_head(head, [one for one in chosen if head in one.heads], inputs, wanted, quick, deadline)
        if device.type == "cuda":
            seen.append({"shape": list(shape), "head": head, "nvidia_smi": clocks(device)})
    return rows, seen


def _run_head(
    head: str | None, implementations: list[Implementation], inputs: Inputs, wanted: Reference, quick: bool, deadline: float
) -> list[Row]:
    """The rows of one shape and head: every implementation is checked once, then all are timed in turn."""
    device, shape, dtype = inputs.hidden.device, inputs.shape, inputs.hidden.dtype
    _free(device)
    inputs.require_grad(head)
    wanted.inputs.require_grad(head)
    rows: list[Row] = []
    calls: dict[Implementation, Calls] = {}
    checked: dict[Implementation, Row] = {}
    for one in implementations:
        if one is FLOOR:
            calls[one] = one.prepare(inputs)
            calls[one].once()
            continue
        found = "left out: the time of the quick form was up"
        if time.monotonic() < deadline:
            found = _check(one, head, inputs, wanted)
        if isinstance(found, str):
            rows.append(_row(one, head, shape, dtype, reason=found))
            _free(device)
        else:
            calls[one], checked[one] = found
    seconds, rounds = (8.0 if quick else 20.0, (7, 40)) if device.type == "cuda" else (0.5, (3, 10))
    times = time_rounds(calls, device, seconds, rounds)
    floor_ms = times[FLOOR]["forward"]["ms_median"] if FLOOR in times else None
    for one, whole in checked.items():
        kept_bytes = whole.pop("kept_bytes")
        if one not in times:
            rows.append(_row(one, head, shape, dtype, reason="out of memory beside the others"))
            continue
        for stage, measured in times[one].items():
            row = _row(one, head, shape, dtype, stage, path=whole.get("path"), **measured)
            if stage == "both" or head is None:
                row |= whole | {"floor_share": floor_ms and floor_ms / measured["ms_median"]}
            elif stage == "forward":
                row["kept_bytes"] = kept_bytes
            rows.append(row)
    if floor_ms:
        tflops = floor_flops(inputs) / floor_ms / 1e9
        rows.append(_row(FLOOR, head, shape, dtype, **times[FLOOR]["forward"], floor_share=1.0, tflops=tflops))
    log.info(f"  {head or 'no gradient'}: timed {', '.join(f'{one.impl} {one.variant}'.strip() for one in times) or 'none'}")
    return rows


def _check(one: Implementation, head: str | None, inputs: Inputs, wanted: Reference) -> tuple[Calls, Row] | str:
    """The calls, and what a row says of errors and memory of the first ones; or the reason why there are none."""
    try:
        calls = one.prepare(wanted.inputs, **one.options)
        output, gradients = calls.once()
        assert calls.margins is not None
        found: Row = wanted.errors(calls.margins(output), gradients or ())
        del output, gradients
        if not all(math.isfinite(value) for value in found.values() if value is not None):
            return "its result is not finite"
        if inputs is not wanted.inputs:
            calls = one.prepare(inputs, **one.options)
        for _ in range(2):  # the warm-up
            calls.once()
        memory = measure_memory(calls, inputs.hidden.device)
    except Unavailable as error:
        return f"cannot run here: {error}"
    except Exception as error:  # whatever a peer does on this machine is a line of the table, not the end of the run
        return why_not(error)
    dw_bytes = inputs.weight.nbytes if head == "trained" else 0
    found |= {"error_tokens": len(wanted.inputs.hidden), "kept_bytes": memory.kept, "extra_bytes": memory.peak - dw_bytes}
    if one.impl == "medtrain":
        found |= {"path": select_path(inputs.hidden)}
    return calls, found


_MEASURED = ("path", "ms_median", "ms_spread", "rounds", "extra_bytes", "kept_bytes", "floor_share", "tflops")
_ERRORS = ("margin_error_nats", "dx_error", "dw_error", "error_tokens")


def _row(one: Implementation, head: str | None, shape: Shape, dtype: torch.dtype, stage: str | None = None, **values: Any) -> Row:
    """One row of the benchmark file. Rows of one impl, head, stage and shape differ in ``gradient`` or ``variant``."""
    keep_bytes = one.options.get("keep_bytes")
    row = {
        "impl": one.impl,
        "variant": one.variant,
        "head": head or "frozen",
        "gradient": head is not None,
        "stage": stage or ("forward" if head is None else "both"),
        **dict(zip(("N", "H", "V"), shape, strict=True)),
        "dtype": str(dtype).removeprefix("torch."),
        "keep_bytes": "all" if keep_bytes == KEEP_ALL else keep_bytes,
        **dict.fromkeys(_MEASURED + _ERRORS),
        "note": one.note,
        "reason": None,
    }
    return row | values


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
