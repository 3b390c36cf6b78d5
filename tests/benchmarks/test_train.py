"""The training benchmark on the CPU: that it times the step that trains, that TRL does the same work, what it writes."""

import importlib.util
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import read_metrics
from transformers import AutoConfig

from medtrain.benchmarks import train as bench
from medtrain.benchmarks.report import failures, markdown
from medtrain.benchmarks.tables import SHEETS
from medtrain.benchmarks.train import FP8, OURS, SEPARATE, TRAINER, TRL, run_train
from medtrain.benchmarks.train_arms import run_medtrain
from medtrain.benchmarks.train_inputs import CPT_MODELS, MODELS, Arm, Job, config, make_inputs, token_ids
from medtrain.trainer.cli import main
from medtrain.trainer.model.flops import num_parameters
from medtrain.trainer.model.hf_config import parameter_shapes
from medtrain.trainer.train.loop import train

CPU = torch.device("cpu")
TINY = MODELS["tiny"]
LORA = replace(TINY, lora_rank=4, lr=1e-2)
CPT = replace(CPT_MODELS["tiny"], lr=1e-2)
CONTRACT = {"impl", "model", "precision", "tokens_per_second", "pairs_per_second", "mfu", "max_memory_gib", "useful_token_share"}


@pytest.fixture(autouse=True)
def one_thread_and_few_steps(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the rows' processes
    monkeypatch.setitem(bench.STEPS, "small", (1, 4))


def find(result, impl, variant=""):
    (row,) = [row for row in result["rows"] if (row["impl"], row["variant"]) == (impl, variant)]
    return row


def run(tmp_path, *models, **options):
    return run_train(tmp_path, models=models or (TINY,), device=CPU, **options)


# --- the whole ----------------------------------------------------------------------------------------------------------


def test_tiny_form_end_to_end_without_the_peer(tmp_path, monkeypatch):
    shadow = tmp_path / "shadow"
    for name in ("datasets", "trl"):  # as if they were not installed, wherever this runs
        (shadow / name).mkdir(parents=True)
        (shadow / name / "__init__.py").write_text(f"raise ModuleNotFoundError(\"No module named '{name}'\")")
    monkeypatch.setenv("PYTHONPATH", str(shadow))
    result, path = run(tmp_path, arms=(OURS, TRL))
    assert path.name == f"train-rpo-cpu-{result['date']}.json"
    assert json.loads(path.read_text()) == result
    assert {"device", "date", "commit", "versions", "rows"} <= result.keys()
    assert all(CONTRACT <= row.keys() for row in result["rows"])

    row = find(result, "medtrain")
    assert row["reason"] is None and failures(result) == []
    assert (row["model"], row["precision"], row["trained"]) == ("tiny", "float32", "all weights")
    assert row["steps"] == 4 and row["micro_batches_a_step"] == 1 and len(row["losses"]) == 5
    assert row["pairs_per_second"] == pytest.approx(8e3 / row["ms_median"])
    assert row["useful_token_share"] == 1  # one micro-batch, prompts shared
    assert row["step_extra_bytes"] > 4 * row["parameters"]  # the gradients at least
    assert row["mfu"] is row["max_memory_gib"] is None
    assert row["loss_difference"] == 0 and abs(row["margins"][0]) < 1e-5 < 1e-3 < abs(row["margins"][-1])
    assert row["lengths"]["prompt"]["min"] >= 10 and row["lengths"]["completion"]["max"] <= 91

    assert find(result, "trl")["reason"].startswith("not installed: ")
    (goal,) = SHEETS["train-rpo"].goals(result["rows"])
    assert goal.startswith("not judged: ") and "(measured: trl was not measured: not installed: " in goal
    text = path.with_suffix(".md").read_text()
    assert text == markdown(result) and text.count("trl did not run: not installed") == 1
    drawn = CliRunner().invoke(main, ["bench", "table", str(path)])
    assert drawn.exit_code == 0 and drawn.stdout == text


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--stage", "sft"], ["--stage", "'sft' is not one of 'cpt', 'rpo'"]),
        (["--stage", "cpt", "--model", "9b"], ["medtrain: ", "--model", "9b", "tiny | 0.5b | 1.5b | 7b"]),
        (["--model", "9b"], ["medtrain: ", "--model", "9b", "tiny | 1.5b | 7b"]),
        (["--model", "7b"], ["medtrain: ", "--model", "needs a GPU", "expected tiny"]),
        (["--out", __file__], ["medtrain: ", "--out", "not a folder"]),
    ],
)
def test_a_wrong_option_is_refused(words, parts, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(main, ["bench", "train", *words])
    assert result.exit_code == 2, result.output
    assert all(part in result.stderr for part in parts), result.stderr


def test_a_row_whose_process_dies_or_that_comes_late_has_the_reason(tmp_path, monkeypatch):
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\necho first\necho Bus error >&2\nexit 135\n")
    stub.chmod(0o755)
    monkeypatch.setattr(bench.sys, "executable", str(stub))
    result, _ = run(tmp_path, arms=(OURS, TRL))
    reasons = [row["reason"] for row in result["rows"]]
    assert reasons == ["its process ended with status 135: Bus error"] * 2
    assert failures(result) == ["medtrain (tiny, all weights, float32): its process ended with status 135: Bus error"]
    monkeypatch.setitem(bench.BEGIN_SECONDS, "small", -1.0)
    result, _ = run(tmp_path, arms=(OURS,))
    assert result["rows"][0]["reason"].startswith("left out: ") and failures(result) == []


# --- the same work ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [TINY, LORA], ids=["all weights", "lora"])
def test_what_is_timed_is_what_trains(model, tmp_path):
    inputs = make_inputs(model, tmp_path, 5, CPU)
    found = run_medtrain(Job(OURS, model, inputs, 4, CPU))
    train(config(model, inputs, 5), quiet=True)
    rows = read_metrics(tmp_path / "run")
    assert [row["loss"] for row in rows] == found.losses
    assert [row["rewards/margin"] for row in rows] == found.margins
    assert len(found.ms) == 4 and found.extra_bytes > 0


def test_rows_of_ours_differ_in_what_is_computed_and_not_in_the_loss(tmp_path):
    model = replace(TINY, few_tokens=400)
    inputs = make_inputs(model, tmp_path, 4, CPU)
    arms = (OURS, SEPARATE, Arm("medtrain", "few", few=True, checkpointing=False))
    ours, separate, few = (run_medtrain(Job(arm, model, inputs, 3, CPU)) for arm in arms)
    assert ours.computed == [work.tokens for work in inputs.works[:3]]
    # Twice the prompts and no padding; small micro-batches part few pairs of one prompt, or none.
    assert all(a + 8 * 10 <= b for a, b in zip(ours.computed, separate.computed, strict=True))
    assert all(a <= b < c for a, b, c in zip(ours.computed, few.computed, separate.computed, strict=True))
    assert min(few.micro_batches) > 1 and ours.micro_batches == separate.micro_batches == [1, 1, 1]
    assert few.losses == pytest.approx(ours.losses, rel=1e-5) and separate.losses == pytest.approx(ours.losses, rel=1e-5)


@pytest.mark.parametrize("model", [TINY, LORA], ids=["all weights", "lora"])
def test_trl_has_the_same_losses(model, tmp_path):
    if importlib.util.find_spec("trl") is None:  # imported in the row's process alone
        pytest.skip("TRL is an optional extra: pip install -e '.[bench]'")
    result, _ = run(tmp_path, model, arms=(OURS, TRL))
    ours, theirs = find(result, "medtrain"), find(result, "trl")
    assert theirs["reason"] is None
    assert theirs["losses"] == pytest.approx(ours["losses"], rel=1e-4)
    assert theirs["loss_difference"] < 1e-4
    # The part of the loss that only the updates move: without them every margin is 0.
    assert theirs["margins"] == pytest.approx(ours["margins"], abs=1e-4)
    assert max(map(abs, ours["margins"])) > 1e-2
    assert theirs["useful_token_share"] < ours["useful_token_share"] and theirs["micro_batches_a_step"] == 1
    assert [goal.split(":")[0] for goal in SHEETS["train-rpo"].goals(result["rows"])] == ["met"]


def test_cpt_does_the_same_work_as_trainer_and_learns(tmp_path):
    if importlib.util.find_spec("accelerate") is None:  # imported in the row's process alone
        pytest.skip("Hugging Face's Trainer needs accelerate: pip install -e '.[bench]'")
    together = replace(TRAINER, variant="documents not apart", apart=False)
    result, path = run(tmp_path, CPT, stage="cpt", arms=(OURS, FP8, TRAINER, together))
    assert path.name.startswith("train-cpt-cpu-") and all(CONTRACT <= row.keys() for row in result["rows"])
    ours, theirs, other = (find(result, *key) for key in (("medtrain",), ("trainer",), ("trainer", together.variant)))
    assert ours["reason"] is theirs["reason"] is None
    assert theirs["losses"] == pytest.approx(ours["losses"], rel=1e-5) and len(theirs["losses"]) == 5
    assert max(abs(a / b - 1) for a, b in zip(other["losses"], ours["losses"], strict=True)) > 1e-4
    # Without updates every loss would be the first one.
    assert abs(ours["losses"][0] - np.log(512)) < 0.1 < ours["losses"][0] - ours["losses"][-1]
    assert ours["useful_token_share"] == 1 > theirs["useful_token_share"] > 0.9
    assert ours["micro_batches_a_step"] == theirs["micro_batches_a_step"] == 1
    assert ours["pairs_per_second"] is None and ours["tokens_per_second"] > 0
    assert find(result, "medtrain", "FP8 tensorwise")["reason"].startswith("left out: this device has no FP8")
    assert failures(result) == []
    (goal,) = SHEETS["train-cpt"].goals(result["rows"])
    assert goal.startswith("met: ")
    text = path.with_suffix(".md").read_text()
    assert text == markdown(result) and "6 x (parameters that multiply) x tokens" in text
    worse = [row | {"loss_difference": 1e-3} if row["impl"] == "trainer" else row for row in result["rows"]]
    assert [goal.split(":")[0] for goal in SHEETS["train-cpt"].goals(worse)] == ["missed"]


def test_what_is_timed_of_cpt_is_what_trains(tmp_path):
    inputs = make_inputs(CPT, tmp_path, 5, CPU)
    found = run_medtrain(Job(OURS, CPT, inputs, 4, CPU))
    train(config(CPT, inputs, 5), quiet=True)
    rows = read_metrics(tmp_path / "run")
    assert [row["loss"] for row in rows] == found.losses
    lines = [token_ids(json.loads(line)["text"]) for line in inputs.rows.read_text().splitlines()]
    for row, items, each in zip(rows, inputs.order, inputs.works, strict=True):
        # Every word but the first is predicted, and the end token.
        assert row["tokens"] == each.tokens == each.head_tokens == sum(len(lines[i]) for i in items)
        assert each.attended == sum(len(lines[i]) ** 2 for i in items)


def test_inputs_are_the_same_on_every_run_and_some_pairs_share_their_prompt(tmp_path):
    model = replace(TINY, pairs_a_step=64)
    first, second = (make_inputs(model, tmp_path / name, 3, CPU) for name in ("a", "b"))
    assert first.rows.read_bytes() == second.rows.read_bytes() and first.works == second.works
    assert first.order == second.order
    assert sorted(i for items in first.order for i in items) == list(range(192))
    rows = [json.loads(line) for line in first.rows.read_text().splitlines()]
    prompts = [row["prompt"] for row in rows]
    alone = sum(prompts.count(prompt) == 1 for prompt in prompts)
    assert 0.3 < alone / len(prompts) < 0.7
    lengths = [len(token_ids(row[side])) for row in rows for side in ("chosen", "rejected")]
    assert min(lengths) >= 15 and max(lengths) == 90 and 35 < np.median(lengths) < 50
    assert len(set(lengths)) > 30
    assert sorted(first.lengths["completion"]) == sorted(length + 1 for length in lengths)


def test_work_counts_a_shared_prompt_once_and_no_last_token(tmp_path):
    inputs = make_inputs(TINY, tmp_path, 4, CPU)
    rows = [json.loads(line) for line in inputs.rows.read_text().splitlines()]
    shared = 0
    for items, work in zip(inputs.order, inputs.works, strict=True):
        prompts = {rows[i]["prompt"]: len(token_ids(rows[i]["prompt"])) for i in items}
        sides = [(rows[i]["prompt"], len(token_ids(rows[i][side])) + 1) for i in items for side in ("chosen", "rejected")]
        assert work.tokens == sum(prompts.values()) + sum(length - 1 for _, length in sides)
        assert work.head_tokens == sum(length for _, length in sides)
        # Causal attention: a completion's tokens see their prompt and themselves. Twice the number of seen places, but for ends.
        squares = sum(n**2 for n in prompts.values())
        assert work.attended == squares + sum((prompts[p] + length - 1) ** 2 - prompts[p] ** 2 for p, length in sides)
        shared += len(items) - len(prompts)
    assert shared > 0


# --- goals --------------------------------------------------------------------------------------------------------------


def made_up_rows(model="1.5b", **changes):
    """Rows that meet every goal, but for changes {"impl variant": {column: value}}."""
    rows = []
    for impl, variant, speed, gib in (
        ("medtrain", "", 10.0, 40.0),
        ("medtrain", "no recomputing", 12.0, 50.0),
        ("trl", "", 5.0, 45.0),
        ("trl", "few pairs", 6.0, 55.0),
    ):
        row = {
            "impl": impl,
            "variant": variant,
            "model": model,
            "precision": "bfloat16",
            "trained": "all weights",
            "pairs_per_second": speed,
            "max_memory_gib": gib,
            "reason": None,
            "same_pooling": variant != "few pairs",
            "loss_difference": 0.0 if impl == "medtrain" else 1e-3 if variant == "" else 0.5,
        }
        rows.append(row | changes.get(f"{impl} {variant}".strip(), {}))
    return rows


def test_goals_follow_the_fastest_rows():
    def goals(model="1.5b", **changes):
        return list(SHEETS["train-rpo"].goals(made_up_rows(model, **changes)))

    def verdicts(**changes):
        return [goal.split(": ")[0] for goal in goals(**changes)]

    assert verdicts() == ["met"] * 3
    for key, change, goal in [
        ("medtrain no recomputing", {"pairs_per_second": 11.9}, "at least twice"),
        ("trl", {"pairs_per_second": 6.1, "max_memory_gib": 99.0}, "at least twice"),
        ("medtrain no recomputing", {"max_memory_gib": 56.0}, "less memory"),
        ("trl", {"loss_difference": 6e-3}, "the same loss curve"),
    ]:
        (missed,) = [text for text in goals(**{key: change}) if not text.startswith("met: ")]
        assert goal in missed and missed.startswith("missed: ")
    # A row out of memory does not count, and with none left nothing is judged.
    gone = {"pairs_per_second": None, "max_memory_gib": None, "loss_difference": None, "reason": "out of memory"}
    assert verdicts(**{"trl few pairs": gone}) == ["met", "missed", "met"]
    nobody = goals(**{"trl": gone, "trl few pairs": gone})
    assert len(nobody) == 3 and all(goal.startswith("not judged: ") for goal in nobody)
    assert all(goal.endswith("(measured: trl was not measured: out of memory)") for goal in nobody)
    # The goals of speed and memory are about 1.5B and 7B.
    assert ["curve" in goal for goal in goals("tiny")] == [True]


@pytest.mark.parametrize(
    ("models", "name", "count"),
    [
        (MODELS, "1.5b", 1_543_714_304),
        (MODELS, "7b", 7_615_616_512),
        (CPT_MODELS, "0.5b", 494_032_768),
        (CPT_MODELS, "7b", 7_615_616_512 - 20 * 233_057_792),
    ],
)
def test_models_have_the_shapes_of_qwen(models, name, count):
    shapes = parameter_shapes(AutoConfig.for_model(**models[name].sizes))
    assert num_parameters(shapes)[0] == count
