"""The search for launch choices: picks the fastest of each round and survives a candidate that fails."""

import pytest
import torch
from click.testing import CliRunner

from medtrain.benchmarks import tune as tuning
from medtrain.benchmarks.measure import Calls
from medtrain.kernels import logps as op
from medtrain.kernels.logps_launch import ExpGemm
from medtrain.trainer.cli import main

BLOCKS = (ExpGemm(16, 32, 16, 2), ExpGemm(16, 16, 16, 2))


def fastest_are(monkeypatch, **wanted):
    """Times by made-up rule: each wanted field that a candidate has makes it faster."""

    def time_rounds(calls, device, **_):
        for call in calls.values():
            call.once()  # what is timed does run
        slowness = {launch: 10.0 - sum(getattr(launch, k) == v for k, v in wanted.items()) for launch in calls}
        return {launch: {"forward": {"ms_median": slowness[launch], "ms_spread": 0.1}} for launch in calls}

    monkeypatch.setattr(tuning, "time_rounds", time_rounds)


def search(caplog, **candidates):
    """The launch found for a small shape, and the lines logged on the way."""
    caplog.set_level("INFO", logger="medtrain")
    (launch,) = tuning.tune([(32, 16, 64)], torch.device("cpu"), blocks=BLOCKS, **candidates).values()
    return launch, caplog.messages


def test_each_round_keeps_the_best_of_the_one_before(monkeypatch, caplog):
    pytest.importorskip("triton", reason="Triton exists on Linux alone")
    monkeypatch.setattr(op, "select_path", lambda hidden: "triton")
    wanted = {"gemm": "fused", "exp_gemm": BLOCKS[1], "rows": 16, "slab_bytes": 2**12, "grad_slab_bytes": 2**13}
    fastest_are(monkeypatch, **wanted)
    launch, lines = search(caplog, rows=(32, 16), slab_bytes=(2**12, 2**13))
    assert {name: getattr(launch, name) for name in wanted} == wanted
    assert sum("ms" in line for line in lines) == 2 + 4 + 2 + 2


def test_a_candidate_that_fails_is_a_line_and_not_the_end(monkeypatch, caplog):
    fastest_are(monkeypatch)
    prepare = tuning.medtrain

    def refused():
        raise RuntimeError("too large\nand more")

    def broken(inputs, keep_bytes, **launch):
        return Calls(refused) if launch["rows"] == 16 else prepare(inputs, keep_bytes, **launch)

    monkeypatch.setattr(tuning, "medtrain", broken)
    launch, lines = search(caplog, rows=(16, 32), slab_bytes=(2**12,))
    assert launch.rows == 32
    assert any("rows=16" in line and "RuntimeError: too large" in line for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so():
    result = CliRunner().invoke(main, ["bench", "tune"])
    assert result.exit_code == 2 and "no CUDA device" in result.output
