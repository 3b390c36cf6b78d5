"""The demo end to end, a few steps a stage: its files, its table, and what it does with a folder that is not its own."""

import dataclasses
import json
import shutil

import pytest

from medtrain.benchmarks.evidence import seeds
from medtrain.trainer.demo import run as run_module
from medtrain.trainer.demo.recipe import Recipe
from medtrain.trainer.demo.run import ARMS, Demo, run_demo
from medtrain.trainer.demo.table import conclusions, format_table, interval
from medtrain.trainer.demo.texts import Corpus, names_in
from medtrain.trainer.demo.world import WorldSizes, make_world
from medtrain.trainer.errors import InputError

# A world so small that a model of some hundred steps writes readable answers, most of them wrong.
TINY = Recipe(
    sizes=WorldSizes(general=10, train=5, dev=5, test=5, values=6),
    corpus=Corpus(prose=300, answer=200, explain=300, textbook=200, questions=2),
    hidden_size=64,
    base_steps=100,
    base_tokens=600,
    base_lr=1e-2,
    cpt_steps=5,
    num_paths=4,
    rpo_steps=3,
    rpo_pairs=8,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, run_demo(out, seed=3, quiet=True, recipe=TINY)


def test_table_has_every_arm_in_the_form_of_exam_json(finished):
    out, table = finished
    assert table == json.loads((out / "table.json").read_text(encoding="utf-8"))
    assert list(table) == list(ARMS)
    for arm, row in table.items():
        assert set(row) == {"answer", "explain", "gap"}
        for mode in ("answer", "explain"):
            assert set(row[mode]) >= {
                *("points", "max_points", "points_ratio", "correct", "questions", "accuracy"),
                *("parse_failures", "forbidden_choices", "truncated"),
            }
            assert row[mode]["questions"] == 25
            exam = json.loads((out / "exams" / "test" / arm / "exam.json").read_text(encoding="utf-8"))
            assert exam[mode] == row[mode]
        assert row["gap"] == pytest.approx(row["answer"]["points_ratio"] - row["explain"]["points_ratio"])
    assert (out / "table.png").read_bytes().startswith(b"\x89PNG")


def test_pairs_prefer_the_ground_truth_and_name_no_tested_disease(finished):
    out, _ = finished
    world = make_world(3, TINY.sizes)
    tested = set(world.diseases["test"]) | set(world.diseases["dev"])
    for start in ("base", "cpt"):
        rows = [json.loads(line) for line in (out / "pairs" / f"{start}.jsonl").read_text("utf-8").splitlines()]
        assert rows
        for row in rows:
            assert not names_in(world, row["prompt"] + row["chosen"] + row["rejected"]) & tested
            right = row["chosen"].rsplit("答え:", 1)[1]
            assert right in row["prompt"] and row["chosen"].count(right) == 2
            assert row["rejected"].rsplit("答え:", 1)[-1] != right


def test_controls_start_from_cpt_and_differ_only_in_their_loss(finished):
    out, _ = finished
    settings = {
        arm: json.loads((out / arm / "manifest.json").read_text(encoding="utf-8"))["settings"]
        for arm in ("cpt_rpo", "cpt_sft", "cpt_dpo")
    }
    assert settings["cpt_sft"]["rpo"] == settings["cpt_rpo"]["rpo"] | {"loss": "sft"}
    assert settings["cpt_dpo"]["rpo"] == settings["cpt_rpo"]["rpo"] | {"alpha": 0.0}
    for control in ("cpt_sft", "cpt_dpo"):
        for section in ("model", "data", "optim"):
            assert settings[control][section] == settings["cpt_rpo"][section]


def test_further_arms_are_added_to_a_finished_demo(finished, tmp_path):
    out, table = finished
    more = tmp_path / "out"
    shutil.copytree(out, more)
    longer = run_demo(more, seed=3, quiet=True, recipe=TINY, extra_arms=("cpt_ipo", "cpt_simpo"))
    assert list(longer) == [*ARMS, "cpt_ipo", "cpt_simpo"]
    assert {arm: longer[arm] for arm in ARMS} == table
    settings = json.loads((more / "cpt_simpo" / "manifest.json").read_text(encoding="utf-8"))["settings"]
    assert settings["rpo"]["loss"] == "simpo" and settings["rpo"]["alpha"] == 0
    scores = {arm: seeds.scores(Demo(more, 3, TINY), arm, row) for arm, row in longer.items()}
    assert all(0 <= row["stated"] <= 1 for row in scores.values())
    found = seeds.result({3: scores}, [1.0], 25, TINY)
    assert {"cpt_rpo - cpt_ipo", "cpt_rpo - cpt_simpo"} <= set(found["contrasts"])
    assert "CPT + SimPO" in seeds.format_result(found)


def test_a_finished_demo_is_not_trained_again(finished, monkeypatch):
    out, table = finished

    def no_training(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr("medtrain.trainer.train.loop.train", no_training)
    assert run_demo(out, seed=3, quiet=True, recipe=TINY) == table


def test_another_seed_or_another_folder_is_refused_before_anything_is_written(finished, tmp_path):
    out, _ = finished
    with pytest.raises(InputError, match="another seed"):
        run_demo(out, seed=4, quiet=True, recipe=TINY)
    with pytest.raises(InputError, match="another recipe"):
        run_demo(out, seed=3, quiet=True, recipe=dataclasses.replace(TINY, beta=0.2))
    (tmp_path / "letter.txt").write_text("not yours")
    with pytest.raises(InputError, match="no record"):
        run_demo(tmp_path, seed=3, quiet=True, recipe=TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_what_is_printed_is_decided_by_the_intervals(finished, capsys):
    _, table = finished

    def marks(answer, explain):
        return {"answer": [1] * answer + [0] * (25 - answer), "explain": [1] * explain + [0] * (25 - explain)}

    of_arm = {"base": marks(9, 9), "cpt": marks(24, 10), "rpo": marks(9, 10), "cpt_rpo": marks(24, 24)}
    of_arm |= {"cpt_sft": marks(24, 24), "cpt_dpo": marks(20, 8)}
    text = conclusions(table, of_arm, 567_890)
    assert "CPT raised the answers" in text
    assert "a model of 0.6 M parameters" in text
    assert "explaining costs points" in text
    assert "RPO after CPT raised the score with explanation" in text
    assert "RPO without CPT did not clearly move" in text
    assert "imitation of the same explanations does about as well as RPO" in text
    assert "DPO without the NLL term does worse than RPO" in text
    assert "neither clearly costs nor gains" in conclusions(table, of_arm | {"cpt": marks(20, 20)}, 567_890)
    assert format_table(table, of_arm).count("\n") >= 9


def test_interval_of_paired_questions_is_narrower_where_both_forms_agree():
    agreeing = {"answer": [1, 0] * 50, "explain": [1, 0] * 50}
    opposed = {"answer": [1, 0] * 50, "explain": [0, 1] * 50}
    assert interval(agreeing["answer"], agreeing["explain"]) == (0.0, 0.0)
    low, high = interval(opposed["answer"], opposed["explain"])
    assert low < 0 < high
    assert interval([1] * 10) == (1.0, 1.0)


def test_an_interrupted_stage_stops_the_demo(tmp_path, monkeypatch):
    from medtrain.trainer.train.loop import TrainResult

    stopped = TrainResult(tmp_path, tmp_path / "model", {}, interrupted=True)
    monkeypatch.setattr("medtrain.trainer.train.loop.train", lambda *_, **__: stopped)
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path / "out", quiet=True, recipe=TINY)
    assert not (tmp_path / "out" / "table.json").exists()


def test_four_arms_averages_over_seeds_and_pairs_arms_by_seed(finished):
    out, table = finished
    scores = {arm: seeds.scores(Demo(out, 3, TINY), arm, row) for arm, row in table.items()}
    worse = {arm: row | {"answer": row["answer"] - 0.1, "gap": row["gap"] - 0.1} for arm, row in scores.items()}
    found = seeds.result({0: scores, 1: worse}, [1.0, 2.0], 25)
    assert set(found) >= {"device", "date", "commit", "versions", "seeds", "arms"}
    assert found["seeds"] == [0, 1]
    for arm in ARMS:
        value = found["arms"][arm]["answer"]
        assert value["mean"] == pytest.approx(table[arm]["answer"]["points_ratio"] - 0.05)
        assert value["low"] < value["mean"] < value["high"]
        # One degree of freedom: t is 12.706, the standard error of 0, -0.1 is 0.05.
        assert value["high"] - value["mean"] == pytest.approx(12.706 * 0.05, rel=1e-6)
        assert found["arms"][arm]["explain"]["low"] == pytest.approx(found["arms"][arm]["explain"]["mean"])
    # Both seeds fell alike, so an arm against another has no spread.
    for contrast in found["contrasts"].values():
        assert contrast["answer"]["high"] - contrast["answer"]["low"] == pytest.approx(0, abs=1e-9)
    assert "CPT + RPO" in seeds.format_result(found)


def test_several_seeds_leave_a_table_over_them_and_go_on_where_they_were(finished, tmp_path, capsys):
    out, table = finished
    work = tmp_path / "work"
    work.mkdir()
    (work / "seed-3").symlink_to(out)
    found = seeds.run_seeds(work, 3, 1, recipe=TINY)
    assert found == json.loads((work / "four-arms.json").read_text(encoding="utf-8"))
    assert found["seeds"] == [3] and found["arms"]["cpt"]["gap"]["mean"] == pytest.approx(table["cpt"]["gap"])
    assert (work / "four-arms.png").read_bytes().startswith(b"\x89PNG")
    assert "cpt_rpo - cpt" in capsys.readouterr().out
    with pytest.raises(InputError, match="demo of one seed"):
        seeds.run_seeds(out, 3, 2, recipe=TINY)
    with pytest.raises(InputError, match="no record"):
        run_demo(work, seed=3, quiet=True, recipe=TINY)


def test_seeds_at_the_same_time_give_what_one_alone_gives(finished, tmp_path, capsys):
    found = seeds.run_seeds(tmp_path, 3, 2, recipe=TINY, jobs=2)
    assert json.loads((tmp_path / "seed-3" / "table.json").read_text(encoding="utf-8")) == finished[1]
    assert found["seeds"] == [3, 4] and all(len(arm["by_seed"]) == 2 for arm in found["arms"].values())
    printed = capsys.readouterr().err
    assert "seed 3: gap of CPT" in printed and "seed 4: gap of CPT" in printed


def test_a_seed_that_is_refused_ends_the_others_too(tmp_path):
    for seed in range(2, 40):  # more than are under way when the first is refused
        (tmp_path / f"seed-{seed}").mkdir()
        (tmp_path / f"seed-{seed}" / "letter.txt").write_text("not yours")
    with pytest.raises(InputError, match=r"seed-\d+: holds results, and no record"):
        seeds.run_seeds(tmp_path, 2, 39, recipe=TINY, jobs=2, quiet=True)
    assert not (tmp_path / "four-arms.json").exists() and not (tmp_path / "seed-40").exists()


def test_the_exam_while_training_asks_about_no_tested_disease(finished):
    out, _ = finished
    tested = set(make_world(3, TINY.sizes).diseases["test"])
    for arm in ("cpt", "cpt_rpo"):
        rows = [json.loads(line) for line in (out / arm / "exam" / "step-00000000.jsonl").read_text("utf-8").splitlines()]
        assert rows and not any(name in row["question"] for row in rows for name in tested)
        assert (out / arm / "report.html").is_file()


def test_arms_of_the_table_are_those_of_the_run():
    from medtrain.trainer.demo.table import LABELS

    assert list(LABELS) == [*run_module.ARMS, *run_module.EXTRA_ARMS]
    assert set(run_module.ARMS) == {"base", "cpt"} | set(run_module.PREFERENCE_ARMS)
