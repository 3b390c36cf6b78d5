"""Held-out text: the change since the start, its error, and the alarm of forgetting."""

import numpy as np
import pytest
from helpers import made_up_text, read_metrics, run, write_jsonl

from medtrain.trainer.run.alarms import ForgettingAlarm
from medtrain.trainer.train.heldout import change


def test_of_documents_of_one_size_the_error_is_that_of_a_mean():
    nats, num_bytes = np.random.default_rng(0).normal(3, 2, 40), np.full(40, 50.0)
    found, error = change(nats, num_bytes)
    each = nats / np.log(2) / 50
    assert found == pytest.approx(each.mean()) and error == pytest.approx(each.std(ddof=1) / np.sqrt(40))
    assert change(nats[:1], num_bytes[:1])[1] is None


def test_the_error_is_that_of_many_draws_of_documents():
    rng = np.random.default_rng(1)
    num_bytes = rng.integers(20, 400, (3000, 60)).astype(float)
    nats = 0.1 * num_bytes + rng.normal(0, 5, num_bytes.shape)
    drawn = [change(n, b) for n, b in zip(nats, num_bytes, strict=True)]
    scatter = np.std([ratio for ratio, _ in drawn])
    assert np.mean([error for _, error in drawn]) == pytest.approx(scatter, rel=0.05)


def test_documents_that_all_changed_alike_leave_no_error():
    num_bytes = np.array([10.0, 30.0, 500.0])
    found, error = change(num_bytes * 0.25 * np.log(2), num_bytes)
    assert found == pytest.approx(0.25) and error == pytest.approx(0, abs=1e-12)


def row(step, **changes):
    found = {"step": step}
    for name, (value, error) in changes.items():
        key = f"heldout/{name}/bits_per_byte"
        found |= {key: 1.0 + value, f"{key}_change": value, f"{key}_change_stderr": error}
    return found


def test_forgetting_is_told_once_and_only_beyond_noise_and_while_others_learn():
    alarm = ForgettingAlarm(["medical", "replay", "one document"])
    quiet = [
        row(0, medical=(0.0, 0.0), replay=(0.0, 0.0)),
        {"step": 5, "loss": 1.0},
        row(10, medical=(-0.1, 0.01), replay=(0.02, 0.01)),
        row(20, medical=(0.1, 0.01), replay=(0.2, 0.01)),
        row(30, medical=(-0.02, 0.01), replay=(0.2, 0.01)),
        row(40, **{"medical": (-0.1, 0.01), "one document": (0.5, None)}),
    ]
    assert [alarm.watch(r) for r in quiet] == [None] * len(quiet)
    said = alarm.watch(row(50, medical=(-0.1, 0.01), replay=(0.05, 0.01)))
    assert said.startswith("warning: replay is being forgotten: at step 50 its held-out text takes 0.0500 bits per byte more")
    assert "(+5.0%; standard error 0.0100), while medical takes less" in said and "\n" not in said
    assert alarm.watch(row(60, medical=(-0.1, 0.01), replay=(0.06, 0.01))) is None


def test_a_run_that_learns_one_text_forgets_the_other(cpt_tree, tmp_path):
    """First both texts, then one of them."""
    ours = [{"text": made_up_text(i, 40)} for i in range(30)]
    theirs = [{"text": " ".join(made_up_text(i, 40).split()[::-1][:1] * 40)} for i in range(30)]
    for name, rows in (("ours", ours), ("theirs", theirs), ("both", ours + theirs)):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    cpt_tree["data"]["sources"] = [{"path": str(tmp_path / "both.jsonl")}]
    first = run("cpt", cpt_tree, tmp_path / "first", optim__steps=40)
    tree = cpt_tree | {"eval": {"every": 10}, "checkpoint": {"every": 5}}
    tree["model"] = {"path": str(first.model_dir)}
    tree["data"]["sources"] = [{"path": str(tmp_path / "ours.jsonl")}]
    tree["data"]["heldout"] = [{"path": str(tmp_path / f"{name}.jsonl")} for name in ("ours", "theirs")]
    tree["optim"]["steps"] = 40
    second = run("cpt", tree, tmp_path / "second")
    rows = [r for r in read_metrics(second.run_dir) if "heldout/ours/bits_per_byte" in r]
    assert [r["step"] for r in rows] == [0, 10, 20, 30, 40]
    for name in ("ours", "theirs"):
        key = f"heldout/{name}/bits_per_byte"
        assert rows[0][f"{key}_change"] == 0
        for r in rows:
            assert r[f"{key}_change"] == pytest.approx(r[key] - rows[0][key], abs=1e-9)
    assert rows[-1]["heldout/theirs/bits_per_byte_change"] > 0.1 > 0 > rows[-1]["heldout/ours/bits_per_byte_change"]
    alarm = ForgettingAlarm(["ours", "theirs"])
    said = [line for r in rows if (line := alarm.watch(r))]
    assert len(said) == 1 and said[0].startswith("warning: theirs is being forgotten")
