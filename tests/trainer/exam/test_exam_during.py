"""The exam during training: the same answers at any world size and of the exported model, and a training that is not touched."""

import copy
import json

import pytest
import torch
from helpers import (
    EXAM_STYLE,
    TIMING,
    kill_in_a_child,
    read_metrics,
    run,
    run_on_ranks,
    stopped_after,
    without_timing,
    write_jsonl,
)

from medtrain.trainer.config.exam import EvalSettings
from medtrain.trainer.errors import InputError
from medtrain.trainer.exam.evaluate import evaluate
from medtrain.trainer.exam.generate import HFEngine
from medtrain.trainer.exam.prompts import MODES
from medtrain.trainer.exam.scoring import INVALID, read_outputs
from medtrain.trainer.run.console import evaluation_lines
from medtrain.trainer.run.folder import RunFolder
from medtrain.trainer.train import loop

TEXTS = ["熱 の 薬 は", "咳 の 患者 に 薬 を 与える 病 は", "病 は", "患者 の 理由 は 熱 。 薬 を 与えない 病 は", "咳 は"]


@pytest.fixture
def exam(tmp_path):
    rows = [
        {"problem_id": str(i), "problem_text": text, "choices": ["熱", "咳", "薬"], "answer": ["abc"[i % 3]], "points": "1"}
        for i, text in enumerate(TEXTS)
    ]
    return write_jsonl(tmp_path / "exam.jsonl", [*rows, rows[0] | {"problem_id": "picture", "text_only": False}])


@pytest.fixture
def style(tmp_path):
    """EXAM_STYLE as a YAML file, which JSON is too."""
    path = tmp_path / "style.yaml"
    path.write_text(json.dumps(EXAM_STYLE))
    return str(path)


@pytest.fixture
def tree_of(request, exam, style):
    def made(stage, **changes):
        tree = copy.deepcopy(request.getfixturevalue(f"{stage}_tree"))
        tree["optim"]["steps"] = 4
        tree["data"]["exam"] = str(exam)
        tree["eval"] = {"exam_every": 2, "exam_max_new_tokens": 9, "exam_max_answer_tokens": 3, "exam_prompt": style}
        for name, value in changes.items():
            section, key = name.split("__")
            tree.setdefault(section, {})[key] = value
        return tree

    return made


def assert_one_evaluation_a_step(run_dir):
    rows = RunFolder(run_dir).rows()
    for kind in ("loss", "exam/explanation_gap"):
        steps = [row["step"] for row in rows if kind in row]
        assert steps == sorted(set(steps)), kind
    assert not any("loss" in row and "exam/explanation_gap" in row for row in rows)


def outputs(run_dir, step):
    return read_outputs(RunFolder(run_dir).exam(step))


@pytest.mark.parametrize("stage", ["cpt", "rpo"])
def test_the_exam_changes_no_bit_of_the_training(stage, tree_of, tmp_path):
    tree = tree_of(stage)
    run(stage, tree, tmp_path / "with")
    del tree["data"]["exam"], tree["eval"]
    run(stage, tree, tmp_path / "without")
    rows = [row for row in without_timing(read_metrics(tmp_path / "with")) if row["step"] > 0]
    assert [row["step"] for row in rows if "exam/explanation_gap" in row] == [2, 4]
    plain = [{name: value for name, value in row.items() if not name.startswith("exam/")} for row in rows]
    assert plain == without_timing(read_metrics(tmp_path / "without"))
    a, b = ((tmp_path / f / "model" / "model.safetensors").read_bytes() for f in ("with", "without"))
    assert a == b


def _sharded_training_with_an_exam(stage, tree, out):
    evaluate_policy = loop.evaluate_policy

    def watched(policy, *args):
        before = torch.get_rng_state()
        found = evaluate_policy(policy, *args)
        assert torch.equal(torch.get_rng_state(), before)
        parameters = dict(policy.named_parameters())
        assert all(p.grad is None for p in parameters.values())
        assert all(hasattr(p, "placements") for p in parameters.values()), "a parameter is not its shard again"
        assert policy.config._attn_implementation == "medtrain_varlen" and policy.training
        return found

    loop.evaluate_policy = watched
    run(stage, tree, out)


@pytest.mark.parametrize(("stage", "size", "tied"), [("cpt", 2, True), ("rpo", 2, False), ("rpo", 3, True)])
def test_any_number_of_ranks_gives_the_answers_of_one_process(stage, size, tied, tree_of, tmp_path):
    tree = tree_of(stage)
    tree["model"]["init"]["tie_word_embeddings"] = tied
    # Budgets of one or two rows, so that there are several batches and, with 5 questions, ranks without a question.
    run(stage, tree, tmp_path / "one", optim__micro_batch_tokens=64)
    run_on_ranks(size, tmp_path, _sharded_training_with_an_exam, stage, tree, tmp_path / "many")
    assert {row["output"] for row in outputs(tmp_path / "one", 4)["explain"]} != {""}
    for step in (0, 2, 4):
        assert outputs(tmp_path / "one", step) == outputs(tmp_path / "many", step)
    one, many = (
        [{n: v for n, v in row.items() if n.startswith("exam/") and n not in TIMING} for row in read_metrics(tmp_path / f)]
        for f in ("one", "many")
    )
    assert one == many


@pytest.mark.parametrize(
    ("stage", "size", "changes"),
    [
        ("cpt", 1, {}),
        ("rpo", 1, {"model__activation_checkpointing": "full", "lora__rank": 4}),
        ("rpo", 1, {"precision__compute": "bfloat16"}),
        ("cpt", 2, {"precision__compute": "bfloat16", "model__activation_checkpointing": "full"}),
    ],
)
def test_the_answers_are_those_of_the_exported_model(stage, size, changes, tree_of, exam, style, tmp_path):
    tree = tree_of(stage, **changes)
    tree["optim"]["steps"] = 20
    if size == 1:
        run(stage, tree, tmp_path / "run")
    else:
        run_on_ranks(size, tmp_path, run, stage, tree, tmp_path / "run")
    last = read_metrics(tmp_path / "run")[-1]
    settings = EvalSettings(prompt=style, max_new_tokens=9, max_answer_tokens=3)
    result = evaluate(tmp_path / "run" / "model", exam, tmp_path / "eval", settings)
    assert last["exam/explanation_gap"] == result["explanation_gap"]
    ours = outputs(tmp_path / "run", 20)
    for mode in MODES:
        file = tmp_path / "eval" / f"outputs-{mode}.jsonl"
        theirs = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for name in ("problem_id", "output", "parsed", "correct", "truncated"):
            assert [row[name] for row in ours[mode]] == [row[name] for row in theirs], (mode, name)
        for name in ("points_ratio", "truncated", "parse_failures"):
            assert last[f"exam/{mode}/{name}"] == result[mode][name]
        assert result[mode]["questions"] == len(TEXTS)


def test_compiled_layers_answer_the_exam_as_written(tree_of, tmp_path, monkeypatch):
    monkeypatch.setattr("medtrain.trainer.model.compile.BACKEND", "eager")
    run("cpt", tree_of("cpt"), tmp_path / "plain")
    run("cpt", tree_of("cpt", model__compile=True), tmp_path / "compiled")
    assert outputs(tmp_path / "compiled", 4) == outputs(tmp_path / "plain", 4)


def test_a_resumed_run_evaluates_no_exam_twice(tree_of, tmp_path):
    tree = tree_of("rpo", checkpoint__every=1)
    tree["eval"]["exam_every"] = 1
    run("rpo", tree, tmp_path / "whole")
    tree["checkpoint"] |= {"every": 2, "async_save": False}
    kill_in_a_child("rpo", tree, tmp_path / "killed", 3)

    def written():
        return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "killed" / "exam").iterdir()}

    before = written()
    assert sorted(before) == [f"step-{step:08d}.jsonl" for step in range(3)]
    run("rpo", tree, tmp_path / "killed")
    after = written()
    assert len(after) == 5 and {name: after[name] for name in before} == before
    whole, killed = (without_timing(read_metrics(tmp_path / f)) for f in ("whole", "killed"))
    assert whole == killed
    assert_one_evaluation_a_step(tmp_path / "killed")


@pytest.mark.parametrize("background", [False, True])
def test_an_exam_that_fails_leaves_the_checkpoint_of_its_step(background, tree_of, tmp_path, monkeypatch):
    tree = tree_of("rpo", checkpoint__every=2, checkpoint__async_save=background)
    run("rpo", tree, tmp_path / "whole")
    evaluate_policy, calls = loop.evaluate_policy, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 2:  # after step 2, the first being before step 0
            raise RuntimeError("out of memory")
        return evaluate_policy(*args)

    monkeypatch.setattr(loop, "evaluate_policy", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        run("rpo", tree, tmp_path / "failed")
    assert RunFolder(tmp_path / "failed").last_checkpoint()[0] == 2
    run("rpo", tree, tmp_path / "failed")
    assert len(calls) == 4  # that of step 2 once more, and the last
    whole, failed = (without_timing(read_metrics(tmp_path / f)) for f in ("whole", "failed"))
    assert whole == failed and "exam/explanation_gap" in failed[2]
    assert_one_evaluation_a_step(tmp_path / "failed")


def test_a_run_that_only_lacked_its_last_exam_returns_the_whole_last_step(tree_of, tmp_path, monkeypatch):
    tree, evaluate_policy = tree_of("rpo"), loop.evaluate_policy
    whole = run("rpo", tree, tmp_path / "whole")

    def failing(policy, tokenizer, exam, world, file, source):
        if file.stem.endswith("4"):
            raise RuntimeError("out of memory")
        return evaluate_policy(policy, tokenizer, exam, world, file, source)

    monkeypatch.setattr(loop, "evaluate_policy", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        run("rpo", tree, tmp_path / "failed")
    monkeypatch.setattr(loop, "evaluate_policy", evaluate_policy)
    again = run("rpo", tree, tmp_path / "failed")
    assert {"loss", "exam/explanation_gap"} <= again.metrics.keys()
    assert without_timing([again.metrics]) == without_timing([whole.metrics])


def test_an_exam_left_out_by_a_stop_is_evaluated_when_the_run_goes_on(tree_of, tmp_path):
    tree = tree_of("cpt")
    tree["data"]["heldout"] = [{"path": tree["data"]["sources"][0]["path"], "name": "h"}]
    tree["eval"]["every"] = 2
    run_on_ranks(2, tmp_path, run, "cpt", tree, tmp_path / "whole")
    run_on_ranks(2, tmp_path, stopped_after, 1, "cpt", tree, tmp_path / "stopped")
    assert not RunFolder(tmp_path / "stopped").exam(2).exists()
    run_on_ranks(2, tmp_path, run, "cpt", tree, tmp_path / "stopped")
    whole, stopped = (without_timing(read_metrics(tmp_path / f)) for f in ("whole", "stopped"))
    assert whole == stopped and "exam/explanation_gap" in stopped[2]
    assert_one_evaluation_a_step(tmp_path / "stopped")


def test_an_exam_of_an_own_form_is_read_through_its_mapping(tree_of, exam, tmp_path):
    run("rpo", tree_of("rpo"), tmp_path / "known")
    rows = [json.loads(line) for line in exam.read_text(encoding="utf-8").splitlines()]
    names = {"problem_id": "nr", "problem_text": "frage", "choices": "optionen", "answer": "loesung", "text_only": "text"}
    own = write_jsonl(tmp_path / "own.jsonl", [{names[k]: v for k, v in row.items() if k in names} for row in rows])
    mapping = tmp_path / "mapping.yaml"
    mapping.write_text(json.dumps({field: name for field, name in names.items()}))
    tree = tree_of("rpo", data__exam=str(own), eval__exam_mapping=str(mapping))
    run("rpo", tree, tmp_path / "own")
    assert outputs(tmp_path / "own", 4) == outputs(tmp_path / "known", 4)
    del tree["eval"]["exam_mapping"]
    with pytest.raises(InputError, match=r"own\.jsonl"):
        run("rpo", tree, tmp_path / "without")


def test_outputs_with_line_separators_of_unicode_are_read_back(tmp_path):
    rows = [{"mode": mode, "output": "a\u2028b\u0085c"} for mode in MODES]
    file = write_jsonl(tmp_path / "step-00000002.jsonl", rows)
    assert "\u2028" in file.read_text(encoding="utf-8")
    assert read_outputs(file) == {row["mode"]: [row] for row in rows}


def test_another_exam_is_another_run(tree_of, exam, tmp_path):
    tree = tree_of("rpo")
    run("rpo", tree, tmp_path / "run")
    moved = exam.rename(exam.with_name("moved.jsonl"))
    tree["data"]["exam"] = str(moved)
    run("rpo", tree, tmp_path / "run")
    moved.write_text(moved.read_text(encoding="utf-8").replace('"points": "1"', '"points": "2"'), encoding="utf-8")
    with pytest.raises(InputError, match=r"data\.exam has changed"):
        run("rpo", tree, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__exam": "nowhere.jsonl"}, r"nowhere\.jsonl.*cannot be read"),
        ({"eval__exam_prompt": "japanese"}, r"no such prompt style.*japanese.*official"),
        ({"eval__exam_chat": True}, r"no chat template"),
        ({"eval__exam_max_new_tokens": 40_000}, r"eval\.exam_max_new_tokens.*leaves no room.*40000.*below 32768"),
        ({"eval__exam_questions": 0}, r"eval\.exam_questions.*1 or more"),
        ({"eval__exam_demonstrations": "nowhere.jsonl"}, r"nowhere\.jsonl.*cannot be read"),
        ({"data__exam": None}, r"eval\.exam_every.*no effect without an exam.*data\.exam"),
    ],
)
def test_a_wrong_exam_is_refused_before_the_folder_is_made(changes, words, tree_of, tmp_path):
    with pytest.raises(InputError, match=words):
        run("cpt", tree_of("cpt", **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_figures_of_a_kv_cache_that_does_not_agree_are_marked_invalid_everywhere(tree_of, tmp_path, monkeypatch):
    monkeypatch.setattr(HFEngine, "cache_agrees", lambda *_: False)
    run("cpt", tree_of("cpt", optim__steps=1, optim__warmup_steps=0), tmp_path / "run")
    for row in read_metrics(tmp_path / "run"):
        file = RunFolder(tmp_path / "run").exam(row["step"])
        assert row["exam/invalid"] == 1
        assert evaluation_lines(row, file)[-1] == f"the exam's figures at step {row['step']} are invalid: {INVALID}"
        assert all(one["invalid"] == INVALID for rows in read_outputs(file).values() for one in rows)
    assert "its figures are invalid" in (tmp_path / "run" / "report.html").read_text()


def test_an_exam_of_which_most_was_cut_off_is_told_with_where_to_look(tmp_path):
    counts = {"points_ratio": 0.0, "parse_failures": 3, "truncated": 0}
    row = {f"exam/{mode}/{name}": value for mode in MODES for name, value in counts.items()}
    row |= {"step": 2, "exam/questions": 5, "exam/explanation_gap": 0.0, "exam/seconds": 1.0, "exam/answer/parse_failures": 2}
    lines = evaluation_lines(row, tmp_path / "step-2.jsonl")
    assert [line.split(":")[1] for line in lines if line.startswith("note:")] == [" explain"]
    assert "no answer was read in 3 of 5 outputs" in lines[-1] and str(tmp_path / "step-2.jsonl") in lines[-1]
