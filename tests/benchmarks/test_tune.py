"""The search for launch choices: picks the fastest of each round and survives a candidate that fails."""

import pytest
import torch
from click.testing import CliRunner

from medtrain.benchmarks import tune as tuning
from medtrain.benchmarks.measure import Times
from medtrain.kernels import logps as op
from medtrain.kernels.logps_launch import ExpGemm
from medtrain.trainer.cli import main

BLOCKS = (ExpGemm(16, 32, 16, 2), ExpGemm(16, 16, 16, 2))


def fastest_are(monkeypatch, **wanted):
    """Times by made-up rule: each wanted field that a candidate has makes it faster."""

    def time_rounds(calls, device, seconds, rounds):
        for call in calls.values():
            output = call.forward()  # what is timed does run
            if call.backward:
                call.backward(output)
        return {
            launch: {"forward": Times(10.0 - sum(getattr(launch, k) == v for k, v in wanted.items()), 0.1, 5)} for launch in calls
        }

    monkeypatch.setattr(tuning, "time_rounds", time_rounds)


def test_each_round_keeps_the_best_of_the_one_before(monkeypatch):
    pytest.importorskip("triton", reason="Triton exists on Linux alone")
    monkeypatch.setattr(op, "select_path", lambda hidden: "triton")
    wanted = {"gemm": "fused", "exp_gemm": BLOCKS[1], "rows": 16, "slab_bytes": 2**12, "grad_slab_bytes": 2**13}
    fastest_are(monkeypatch, **wanted)
    lines = []
    (launch,) = tuning.tune(
        [(32, 16, 64)], torch.device("cpu"), blocks=BLOCKS, rows=(32, 16), slab_bytes=(2**12, 2**13), echo=lines.append
    ).values()
    assert {name: getattr(launch, name) for name in wanted} == wanted
    assert sum("ms" in line for line in lines) == 2 + 4 + 2 + 2


def test_a_candidate_that_fails_is_a_line_and_not_the_end(monkeypatch):
    fastest_are(monkeypatch)
    calls = tuning._calls

    def broken(launch, inputs, keep_bytes):
        if launch.rows == 16:
            raise_it = lambda: (_ for _ in ()).throw(RuntimeError("too large\nand more"))  # noqa: E731
            return tuning.Calls(raise_it)
        return calls(launch, inputs, keep_bytes)

    monkeypatch.setattr(tuning, "_calls", broken)
    lines = []
    (launch,) = tuning.tune(
        [(32, 16, 64)], torch.device("cpu"), blocks=BLOCKS, rows=(16, 32), slab_bytes=(2**12,), echo=lines.append
    ).values()
    assert launch.rows == 32
    assert any("rows=16" in line and "RuntimeError: too large" in line for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so():
    result = CliRunner().invoke(main, ["bench", "tune"])
    assert result.exit_code == 2 and "no CUDA device" in result.output
