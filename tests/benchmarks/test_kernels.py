"""The kernel benchmark on the CPU: what it measures, what it says of those that cannot run, what it writes."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode

from medtrain.benchmarks import inputs as inputs_module
from medtrain.benchmarks import kernels, peers
from medtrain.benchmarks.inputs import make_inputs, reference
from medtrain.benchmarks.kernels import run_kernels
from medtrain.benchmarks.measure import Calls, measure_memory, time_rounds
from medtrain.benchmarks.peers import IMPLEMENTATIONS, Implementation, floor, floor_flops, per_token
from medtrain.benchmarks.report import failures, markdown
from medtrain.benchmarks.tables import SHEETS
from medtrain.kernels.reference import reference_logps
from medtrain.trainer.cli import main

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SHAPE = (128, 24, 700)
CONTRACT = {"impl", "head", "stage", "N", "H", "V", "ms_median", "ms_spread", "extra_bytes", "floor_share", "margin_error_nats"}


@pytest.fixture(autouse=True)
def three_rounds(monkeypatch):
    monkeypatch.setattr(kernels, "time_rounds", lambda calls, device, *_: time_rounds(calls, device, 0.0, (3, 3)))


def run(tmp_path, shape=SHAPE, **options):
    return run_kernels(tmp_path, shapes=(shape,), device=CPU, **options)


def find(result, impl, head="trained", stage="both", dtype="bfloat16", variant="", gradient=True):
    key = (impl, variant, head, stage, dtype, gradient)
    (row,) = [
        row
        for row in result["rows"]
        if (row["impl"], row["variant"], row["head"], row["stage"], row["dtype"], row["gradient"]) == key
    ]
    return row


# --- the whole ----------------------------------------------------------------------------------------------------------


def test_small_form_end_to_end(tmp_path, monkeypatch):
    for name in ("trl", "liger_kernel", "cut_cross_entropy"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed, wherever this runs
    result, path = run(tmp_path)
    assert path.name == f"kernels-cpu-{result['date']}.json"
    assert json.loads(path.read_text()) == result
    assert {"device", "date", "commit", "versions", "rows"} <= result.keys()
    keys = [tuple(row[k] for k in ("impl", "variant", "head", "gradient", "stage", "dtype")) for row in result["rows"]]
    assert len(set(keys)) == len(keys)
    for row in result["rows"]:
        assert CONTRACT <= row.keys()
        assert row["head"] in ("frozen", "trained") and row["stage"] in ("forward", "backward", "both")
        assert (row["N"], row["H"], row["V"]) == SHAPE
        assert (row["reason"] is None) == (row["ms_median"] is not None)

    # Every mode of our own op is there, and its errors are those of rounding E and the gradients, nothing more.
    for variant in ("", "keep_bytes=0", "keep all"):
        row = find(result, "medtrain", variant=variant)
        assert row["margin_error_nats"] <= 1e-3 and row["dx_error"] <= 4e-3 and row["dw_error"] <= 4e-3
        assert 0 < row["floor_share"] and row["path"] == "torch"
    frozen = find(result, "medtrain", head="frozen")
    assert frozen["dx_error"] <= 4e-3 and frozen["dw_error"] is None
    assert find(result, "medtrain", head="frozen", stage="forward", gradient=False)["dx_error"] is None
    assert find(result, "medtrain", dtype="float32")["dw_error"] <= 1e-5
    # What is kept for a trained head is E and more, without a budget less than E.
    e_bytes = 2 * SHAPE[0] * SHAPE[2]
    assert find(result, "medtrain", stage="forward")["kept_bytes"] > e_bytes
    assert find(result, "medtrain", stage="forward", variant="keep_bytes=0")["kept_bytes"] < e_bytes
    assert find(result, "plain", stage="both")["extra_bytes"] > 4 * SHAPE[0] * SHAPE[2]

    for impl in ("trl", "liger", "cce", "cce-exact"):
        assert find(result, impl)["reason"].startswith("not installed: ")
    assert failures(result) == []
    text = path.with_suffix(".md").read_text()
    assert text == markdown(result)
    assert text.count("trl did not run: not installed") == 1
    drawn = CliRunner().invoke(main, ["bench", "table", str(path)])
    assert drawn.exit_code == 0 and drawn.stdout == text


def test_a_second_run_of_the_day_overwrites_nothing(tmp_path):
    (_, first), (_, second) = (run(tmp_path, impls=("plain",)) for _ in range(2))
    assert first.exists() and second.name == first.name.replace(".json", "-2.json")


def test_only_what_was_asked_for_runs(tmp_path):
    result, _ = run(tmp_path, impls=("medtrain", "floor"))
    assert {row["impl"] for row in result["rows"]} == {"medtrain", "floor"}
    result, _ = run(tmp_path, impls=("plain",))
    assert {row["impl"] for row in result["rows"]} == {"plain"}
    assert find(result, "plain")["floor_share"] is None


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--shapes", "8x8"], ["--shapes", "not a shape", "8x8"]),
        (["--shapes", "64x8x0"], ["not a shape"]),
        (["--shapes", "7x8x9"], ["N = 7", "multiple of 2"]),
        (["--shapes", "4100x8x9"], ["N = 4100", "multiple of 8"]),
        (["--impl", "medtrain,trll"], ["--impl", "trll", "medtrain"]),
        (["--out", __file__], ["--out", "not a folder"]),
    ],
)
def test_a_wrong_option_is_one_line(words, parts):
    result = CliRunner().invoke(main, ["bench", "kernels", "--shapes", "8x4x9", *words])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("medtrain: ") and result.stderr.count("\n") == 1
    assert all(part in result.stderr for part in parts), result.stderr


def test_a_file_that_is_no_benchmark_is_one_line(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    for name in ("x.json", "none.json"):
        result = CliRunner().invoke(main, ["bench", "table", str(tmp_path / name)])
        assert result.exit_code == 2 and result.stderr.count("\n") == 1


# --- errors -------------------------------------------------------------------------------------------------------------


def test_inputs_are_peaked_like_a_trained_head():
    for shape in ((1024, 64, 4096), (512, 400, 3000), (512, 96, 1000)):
        batch = make_inputs(*shape, torch.bfloat16, CPU)
        logps = reference_logps(batch.hidden, batch.weight, batch.targets)
        assert logps.median() > -0.1
        assert -30 < logps.min() < -12
        assert (logps < -1).double().mean() > 0.08
        again = make_inputs(*shape, torch.bfloat16, CPU)
        assert torch.equal(batch.hidden, again.hidden) and torch.equal(batch.weight, again.weight)


def twist(op):
    """An implementation that is the full softmax but for ``op(logits)`` and a factor on the gradient of the weight."""

    def prepare(inputs, op=op):
        def forward():
            logits = op(inputs.hidden.float() @ inputs.weight.float().T)
            return torch.log_softmax(logits, dim=1).gather(1, inputs.targets.unsqueeze(1)).squeeze(1)

        return per_token(inputs, forward)

    return prepare


def scaled_weight_gradient(inputs):
    calls = twist(lambda logits: logits)(inputs)

    def backward(output):
        hidden, *weight = calls.backward(output)
        return (hidden, *(1.05 * gradient for gradient in weight))

    return Calls(calls.forward, calls.backward and backward, calls.margins)


def test_error_columns_tell_right_from_wrong(tmp_path):
    result, _ = run(
        tmp_path,
        implementations=(
            Implementation("plain", twist(lambda logits: logits)),
            Implementation("plain", twist(lambda logits: logits.bfloat16().float()), "rounded logits"),
            Implementation("plain", scaled_weight_gradient, "scaled"),
        ),
    )
    right, rounded, scaled = (find(result, "plain", variant=name) for name in ("", "rounded logits", "scaled"))
    assert right["margin_error_nats"] < 1e-4 and right["dw_error"] < 3e-3
    assert rounded["margin_error_nats"] > 100 * right["margin_error_nats"]
    assert scaled["margin_error_nats"] == right["margin_error_nats"] and scaled["dx_error"] == right["dx_error"]
    assert scaled["dw_error"] == pytest.approx(0.05, abs=0.005)


def test_extra_memory_is_the_peak_without_the_gradient_of_a_trained_weight(tmp_path):
    result, _ = run(tmp_path, implementations=(Implementation("plain", peers.plain),))
    batch = make_inputs(*SHAPE, torch.bfloat16, CPU)
    for head, dw_bytes in (("frozen", 0), ("trained", 2 * SHAPE[1] * SHAPE[2])):
        peak = measure_memory(peers.plain(batch.require_grad(head)), CPU).peak
        assert find(result, "plain", head=head)["extra_bytes"] == peak - dw_bytes


def test_what_cannot_run_is_a_row_with_the_reason_and_the_others_run_on(tmp_path):
    def fails(error):
        def prepare(inputs):
            raise error

        return prepare

    result, _ = run(
        tmp_path,
        implementations=(
            Implementation("trl", fails(RuntimeError("shared memory\nmore"))),
            Implementation("liger", fails(torch.OutOfMemoryError("CUDA out of memory. Tried to"))),
            Implementation("cce", twist(lambda logits: logits / 0)),
            Implementation("medtrain", fails(ValueError("broken"))),
            Implementation("plain", peers.plain),
        ),
    )
    reasons = {impl: find(result, impl)["reason"] for impl in ("trl", "liger", "cce", "plain")}
    assert reasons == {
        "trl": "RuntimeError: shared memory",
        "liger": "out of memory",
        "cce": "its result is not finite",
        "plain": None,
    }
    assert len(failures(result)) == 6 and "ValueError: broken" in failures(result)[0]


def test_errors_come_from_the_first_pairs_where_float64_would_take_long(tmp_path, monkeypatch):
    batch = make_inputs(4096, 8, 90, torch.float32, CPU)
    whole = reference(batch)
    assert len(whole.margins) == 4 and len(whole.inputs.hidden) == 4096
    monkeypatch.setattr(inputs_module, "_REFERENCE_PAIRS", 2)
    part = reference(batch)
    torch.testing.assert_close(part.margins, whole.margins[:2])
    # The mean loss is over two pairs now, not four.
    first = whole.grad_hidden.view(2, 4, 512, 8)[:, :2].reshape(2048, 8)
    torch.testing.assert_close(part.grad_hidden, 2 * first, rtol=1e-9, atol=0)
    result, _ = run(tmp_path, shape=(4096, 8, 90), impls=("medtrain",))
    row = find(result, "medtrain", dtype="float32")
    assert row["error_tokens"] == 2048 and row["dw_error"] < 1e-5 and row["margin_error_nats"] < 1e-3


def test_reference_has_the_gradient_of_the_dpo_loss_and_upstream_leads_to_it():
    batch = reference(make_inputs(256, 16, 300, torch.float32, CPU))
    hidden = batch.inputs.hidden.double().requires_grad_()
    weight = batch.inputs.weight.double().requires_grad_()
    logps = reference_logps(hidden, weight, batch.inputs.targets)
    grads = torch.autograd.grad(logps, (hidden, weight), batch.inputs.upstream.double(), retain_graph=True)
    assert batch.errors(batch.inputs.margins(logps), grads)["dw_error"] < 1e-6
    chosen, rejected = logps.view(2, -1).sum(1)
    loss = -torch.log(torch.sigmoid(inputs_module.BETA * (chosen - rejected)))
    errors = batch.errors((chosen - rejected).detach()[None], torch.autograd.grad(loss, (hidden, weight)))
    assert max(errors.values()) < 1e-9


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=lambda one: f"{one.impl} {one.variant}".strip())
def test_peers_that_are_here_agree_with_float64(implementation):
    batch = reference(make_inputs(256, 16, 300, torch.float32, CPU))
    batch.inputs.require_grad("trained")
    try:
        calls = implementation.prepare(batch.inputs, **implementation.options)
    except (ImportError, peers.Unavailable) as reason:
        pytest.skip(str(reason))
    output, gradients = calls.once()
    errors = batch.errors(calls.margins(output), gradients)
    assert errors["margin_error_nats"] < 1e-3 and errors["dx_error"] < 1e-4 and errors["dw_error"] < 1e-4


# --- memory and time ----------------------------------------------------------------------------------------------------


def test_memory_is_counted_to_the_byte():
    def forward():
        kept = torch.empty(1000)
        torch.empty(5000)
        return kept

    def backward(output):
        first = torch.empty(3000)
        del first
        return (torch.empty(2500), torch.empty(200))

    assert measure_memory(Calls(forward), CPU) == measure_memory(Calls(forward), CPU)
    found = measure_memory(Calls(forward, backward), CPU)
    assert (found.peak, found.kept) == (4 * 6000, 4 * 1000)
    found = measure_memory(Calls(lambda: torch.empty(10), lambda output: (torch.empty(70), torch.empty(7))), CPU)
    assert (found.peak, found.kept) == (4 * 87, 40)
    # Not only what an operation returns: also what it needs on the way.
    x = torch.randn(64, 1000)
    assert measure_memory(Calls(lambda: torch.logsumexp(x, 1)), CPU).peak >= x.nbytes


def test_rounds_take_turns_and_one_that_runs_out_of_memory_drops_out():
    order = []

    def short_of_memory():
        order.append("b")
        if order.count("b") == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    calls = {
        "a": Calls(lambda: order.append("a"), lambda output: ()),
        "b": Calls(short_of_memory),
        "c": Calls(lambda: order.append("c")),
    }
    times = time_rounds(calls, CPU, 0.0, (4, 9))
    assert "".join(order) == "abc" * 3 + "ac" * 2  # the first round is not counted
    assert times.keys() == {"a", "c"}
    assert times["a"].keys() == {"forward", "backward", "both"} and times["c"].keys() == {"forward"}
    assert times["a"]["both"]["rounds"] == 4
    assert len([*time_rounds({"a": calls["c"]}, CPU, math.inf, (4, 9)).values()][0]) == 1
    assert order.count("c") == 5 + 10


@pytest.mark.parametrize(("head", "factor"), [(None, 2), ("frozen", 4), ("trained", 6)])
def test_the_floor_does_the_gemms_of_its_mode_in_slabs(monkeypatch, head, factor):
    monkeypatch.setattr(peers, "_FLOOR_LOGITS", 64 * 256)
    batch = make_inputs(64, 8, 700, torch.float32, CPU).require_grad(head)
    with FlopCounterMode(display=False) as counter:
        floor(batch).forward()
    assert counter.get_total_flops() == floor_flops(batch) == factor * 64 * 8 * 700
    made = measure_memory(Calls(lambda: floor(batch).forward()), CPU).peak
    assert made < 4 * 64 * 700


# --- goals and command --------------------------------------------------------------------------------------------------


def made_up_rows(**changes):
    """Rows of the shape of the goals that meet every one, but for changes {"impl head": {column: value}}."""
    ms = {"medtrain": 100.0, "trl": 140.0, "liger": 200.0}
    rows = []
    for head in ("frozen", "trained"):
        for impl, variant in (("medtrain", ""), ("medtrain", "keep_bytes=0"), ("trl", ""), ("liger", "")):
            row = {
                "impl": impl,
                "variant": variant,
                "head": head,
                "gradient": True,
                "stage": "both",
                "reason": None,
                "N": 8192,
                "H": 3584,
                "V": 152064,
                "dtype": "bfloat16",
                "ms_median": ms[impl],
                "floor_share": 0.85,
                "extra_bytes": 390_000_000,
                "margin_error_nats": 9e-4,
            }
            rows.append(row | changes.get(f"{impl} {head}", {}))
    return rows


def test_goals_follow_the_rows():
    def goals(**changes):
        return list(SHEETS["kernels"].goals(made_up_rows(**changes)))

    assert len(goals()) == 10 and all(goal.startswith("met: ") for goal in goals())
    for key, change, goal in [
        ("trl frozen", {"ms_median": 134.0}, "frozen head: at least 1.35 x as fast as trl"),
        ("trl trained", {"ms_median": 129.0}, "trained head: at least 1.3 x as fast as trl"),
        ("liger trained", {"ms_median": 189.0}, "trained head: at least 1.9 x as fast as liger"),
        ("medtrain frozen", {"extra_bytes": 410_000_000}, "frozen head: at most 0.4 GB extra"),
        ("medtrain trained", {"extra_bytes": 710_000_000}, "trained head, keep_bytes=0: at most 0.7 GB extra beside dW"),
        ("medtrain frozen", {"floor_share": 0.79}, "frozen head: at least 80 % of the GEMM floor"),
        ("medtrain trained", {"margin_error_nats": 2e-3}, "trained head: margin error at most 1e-3 nat"),
    ]:
        (missed,) = [text for text in goals(**{key: change}) if not text.startswith("met: ")]
        assert missed.startswith(f"missed: {goal} (measured: ")
    absent = {"ms_median": None, "reason": "not installed: x"}
    (goal,) = [goal for goal in goals(**{"trl frozen": absent}) if not goal.startswith("met: ")]
    assert goal.startswith("not judged: ") and goal.endswith("(measured: trl was not measured: not installed: x)")
    assert list(SHEETS["kernels"].goals([row | {"N": 2048} for row in made_up_rows()])) == []


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(("cuda", "tests", "bench"), [(0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0)])
def test_gpu_check_goes_on_to_the_benchmark_and_fails_if_anything_did(tmp_path, cuda, tests, bench):
    stub = tmp_path / "python"
    stub.write_text(
        f'#!/bin/sh\necho "$PYTHONPATH $*" >> {tmp_path}/calls\n'
        f'case "$*" in -c*) exit {cuda};; "-m pytest"*) exit {tests};; *) exit {bench};; esac\n'
    )
    stub.chmod(0o755)
    done = subprocess.run(
        ["make", "-s", "gpu-check", f"PYTHON={stub}", f"OUT_DIR={tmp_path}/out"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": "peers"},
        capture_output=True,
        text=True,
    )
    calls = (tmp_path / "calls").read_text().splitlines()
    assert (done.returncode == 0) == (cuda == tests == bench == 0)
    if cuda:
        assert done.returncode == 2 and "no CUDA device" in done.stdout and len(calls) == 1
    else:
        assert calls[1:] == [
            ".:peers -m pytest -W default tests/kernels/test_triton.py tests/kernels/test_memory.py tests/kernels",
            f".:peers -m medtrain bench kernels --quick --out {tmp_path}/out",
        ]
