"""Time and memory of a forward and its backward, on CUDA and on the CPU, and what to say of one that failed."""

from __future__ import annotations

import gc
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function


@dataclass(frozen=True)
class Calls:
    """One implementation on one batch: ``forward() -> output``, ``backward(output) -> gradients`` (None: no gradient)."""

    forward: Callable[[], Any]
    backward: Callable[[Any], tuple[torch.Tensor, ...]] | None = None


@dataclass(frozen=True)
class Times:
    """Milliseconds of one stage over the rounds: median, and the distance from the 10th to the 90th percentile."""

    median: float
    spread: float
    rounds: int


def time_rounds(
    calls: dict[Any, Calls], device: torch.device, seconds: float, num_rounds: tuple[int, int]
) -> dict[Any, dict[str, Times]]:
    """Time every implementation once a round, in turn, so that a drift of the clock meets all alike.

    Rounds go on for about ``seconds``, but at least and at most ``num_rounds``; a first one is not counted, in which the
    allocator settles on what all of them need. Returns, by name, the stages ``forward``, ``backward`` and ``both``
    (``forward`` alone without a backward), on CUDA by events around the two halves of one call; a name is missing if it
    ran out of memory.
    """
    samples: dict[Any, list[tuple[float, ...]]] = {name: [] for name in calls}
    least, most = num_rounds
    started = time.perf_counter()
    for done in range(-1, most):
        if done >= least and time.perf_counter() - started > seconds:
            break
        for name in list(samples):
            try:
                sample = _time_once(calls[name], device)
            except torch.OutOfMemoryError:
                del samples[name]
                continue
            if done >= 0:
                samples[name].append(sample)
    return {
        name: {stage: times_of(values) for stage, values in zip(_STAGES, zip(*rows, strict=True), strict=False)}
        for name, rows in samples.items()
    }


_STAGES = ("forward", "backward", "both")


def _time_once(call: Calls, device: torch.device) -> tuple[float, ...]:
    if device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        torch.cuda.synchronize(device)
        # The device waits a moment, so that what the host needs to launch is not counted as the device's time.
        torch.cuda._sleep(1_000_000)
        marks[0].record()
        output = call.forward()
        marks[1].record()
        gradients = call.backward(output) if call.backward else None
        marks[2].record()
        torch.cuda.synchronize(device)
        first, second = marks[0].elapsed_time(marks[1]), marks[1].elapsed_time(marks[2])
    else:
        start = time.perf_counter()
        output = call.forward()
        middle = time.perf_counter()
        gradients = call.backward(output) if call.backward else None
        first, second = 1e3 * (middle - start), 1e3 * (time.perf_counter() - middle)
    del output, gradients
    return (first, second, first + second) if call.backward else (first,)


def times_of(values: Sequence[float]) -> Times:
    """Median and spread of some milliseconds."""
    if len(values) == 1:
        return Times(values[0], 0.0, 1)
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return Times(statistics.median(values), tenths[-1] - tenths[0], len(values))


@dataclass(frozen=True)
class Memory:
    """Bytes of tensors beyond those there before the call: the most at any moment, and those left after the forward."""

    peak: int
    kept: int


def measure_memory(call: Calls, device: torch.device) -> Memory:
    """Memory of one forward and backward, output and gradients included, as torch's own allocator counts it.

    On CUDA the allocator's statistics (in blocks of 512 bytes), on the CPU every allocation and release that the
    profiler saw; scratch memory of the BLAS library is in neither.
    """
    gc.disable()  # garbage of earlier calls must not be given back in the middle
    try:
        return _cuda_memory(call, device) if device.type == "cuda" else _cpu_memory(call)
    finally:
        gc.enable()


def _cuda_memory(call: Calls, device: torch.device) -> Memory:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    output = call.forward()
    kept = torch.cuda.memory_allocated(device) - before
    gradients = call.backward(output) if call.backward else None
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del output, gradients
    return Memory(peak, kept)


_AFTER_FORWARD = "medtrain: after the forward"


def _cpu_memory(call: Calls) -> Memory:
    with cpu_memory() as found:
        output = call.forward()
        with record_function(_AFTER_FORWARD):
            pass
        gradients = call.backward(output) if call.backward else None
    del output, gradients
    return found[0]


@contextmanager
def cpu_memory() -> Iterator[list[Memory]]:
    """Profile the allocations of what runs within; the list yielded holds the one result after the end."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # a line on stderr at each start and stop otherwise
    found: list[Memory] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        yield found
    events = [
        (event.start_ns(), event.name(), event.nbytes())
        for event in profiled.profiler.kineto_results.events()
        if event.name() in ("[memory]", _AFTER_FORWARD)
    ]
    now = peak = kept = 0
    for _, name, nbytes in sorted(events, key=lambda event: event[0]):
        if name == _AFTER_FORWARD:
            kept = now
        else:
            now += nbytes
            peak = max(peak, now)
    found.append(Memory(peak, kept))


def why_not(error: Exception) -> str:
    """The reason in a benchmark row for what raised ``error``."""
    if isinstance(error, ImportError):
        return f"not installed: {error}"
    text = str(error).strip() or "no message"
    # Not by type alone: the CPU's allocator and compiled code have no exception of their own for it.
    if "out of memory" in text.lower() or "can't allocate memory" in text:
        return "out of memory"
    return f"{type(error).__name__}: {text.splitlines()[0][:160]}"


def clocks(device: torch.device) -> dict[str, str] | None:
    """What nvidia-smi says of the device's clocks, power and temperature right now; None where it cannot be read."""
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return None
    fields = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu", "driver_version")
    which = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", "-i", which, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(fields, values, strict=True)) if done.returncode == 0 and len(values) == len(fields) else None
