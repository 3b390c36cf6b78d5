"""Time and memory of a forward and its backward, on CUDA and on the CPU, and the reason where one failed."""

from __future__ import annotations

import gc
import os
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
    """One implementation on one batch: ``forward() -> output``, ``backward(output) -> gradients`` (None: no gradient) and
    ``margins(output) -> [P] float64``, the preference margins."""

    forward: Callable[[], Any]
    backward: Callable[[Any], tuple[torch.Tensor, ...]] | None = None
    margins: Callable[[Any], torch.Tensor] | None = None

    def once(self, between: Callable[[], None] = lambda: None) -> tuple[Any, Any]:
        """(output, gradients) of one call; ``between`` is called after the forward."""
        output = self.forward()
        between()
        return output, self.backward(output) if self.backward else None


def time_rounds(
    calls: dict[Any, Calls], device: torch.device, seconds: float, num_rounds: tuple[int, int]
) -> dict[Any, dict[str, dict[str, Any]]]:
    """Time every implementation once per round, in turn, so that a drift of the clock meets all alike.

    Rounds go on for about ``seconds``, but at least and at most ``num_rounds``; a first one, in which the allocator settles,
    is not counted. Returns, by name, the :func:`spread_of` the stages ``forward``, ``backward`` and ``both`` (``forward``
    alone without a backward), on CUDA by events around the halves of a call; a name that ran out of memory is missing.
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
        name: {stage: spread_of([row[i] for row in rows]) for i, stage in enumerate(_STAGES) if i < len(rows[0])}
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
        kept = call.once(marks[1].record)
        marks[2].record()
        torch.cuda.synchronize(device)
        first, second = marks[0].elapsed_time(marks[1]), marks[1].elapsed_time(marks[2])
    else:
        clock = [time.perf_counter()]
        kept = call.once(lambda: clock.append(time.perf_counter()))
        first, second = 1e3 * (clock[1] - clock[0]), 1e3 * (time.perf_counter() - clock[1])
    del kept  # output and gradients, not before the clock was read
    return (first, second, first + second) if call.backward else (first,)


def spread_of(ms: Sequence[float]) -> dict[str, Any]:
    """``ms_median``, ``ms_spread`` (from the 10th to the 90th percentile) and ``rounds`` of some milliseconds."""
    tenths = statistics.quantiles(ms, n=10, method="inclusive") if len(ms) > 1 else ms
    return {"ms_median": statistics.median(ms), "ms_spread": tenths[-1] - tenths[0], "rounds": len(ms)}


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
        if device.type != "cuda":
            with cpu_memory() as found:
                kept = call.once(_mark_end_of_forward)
            del kept
            return found[0]
        before, after_forward = _settled_bytes(device), []
        torch.cuda.reset_peak_memory_stats(device)
        kept = call.once(lambda: after_forward.append(torch.cuda.memory_allocated(device)))
        torch.cuda.synchronize(device)
        return Memory(torch.cuda.max_memory_allocated(device) - before, after_forward[0] - before)
    finally:
        gc.enable()


def _settled_bytes(device: torch.device) -> int:
    """Bytes allocated, once they have stayed the same for 0.1 seconds (or 5 are over): autograd's own thread lets go of a
    graph's tensors a moment after the backward has returned."""
    torch.cuda.synchronize(device)
    found = torch.cuda.memory_allocated(device)
    for _ in range(50):
        time.sleep(0.1)
        before, found = found, torch.cuda.memory_allocated(device)
        if before == found:
            break
    return found


def _mark_end_of_forward() -> None:
    with record_function(_AFTER_FORWARD):
        pass


_AFTER_FORWARD = "medtrain: after the forward"


@contextmanager
def cpu_memory() -> Iterator[list[Memory]]:
    """Profile the allocations of what runs within; the list yielded holds the one result after the end."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # a line on stderr at each start and stop otherwise
    found: list[Memory] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        yield found
    now = peak = kept = 0
    profiler: Any = profiled.profiler  # its stubs know neither the results nor the bytes of an event
    for event in sorted(profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == _AFTER_FORWARD:
            kept = now
        elif event.name() == "[memory]":
            now += event.nbytes()
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
    """nvidia-smi's clocks, power and temperature of the device right now; None where they cannot be read."""
    if device.type != "cuda":
        return None
    fields = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu", "driver_version")
    which = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", "-i", which, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return dict(zip(fields, map(str.strip, text.split(",")), strict=True))
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
