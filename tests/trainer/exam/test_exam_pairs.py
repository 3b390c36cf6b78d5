"""Pairs from sampled reasoning: strategies, the cap, balance in length, provenance, and going on after a kill."""

import json
from dataclasses import replace

import pytest
import torch
from exam_models import CHAIN, QUESTIONS, STYLE, chain_model, generate, write_exam, write_style
from helpers import write_jsonl

from medtrain.trainer.config.exam import PairsConfig
from medtrain.trainer.errors import InputError
from medtrain.trainer.exam.generate import HFEngine, Output
from medtrain.trainer.exam.pairs import build
from medtrain.trainer.exam.pairs import run as pairs_module


@pytest.fixture
def checkpoint(tmp_path, unsure_model, tokenizer):
    unsure_model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def paths(*outputs):
    return [Output(output, truncated=False) for output in outputs]


def build_pairs(questions, paths_by_question, prompts=None, style=STYLE, **settings):
    """Grade paths and pair them up."""
    config = PairsConfig(model="", questions="", out="", **{"balance_length": False} | settings)
    graded = {q.problem_id: build.grade_paths(q, paths_by_question.get(q.problem_id, ()), style, config) for q in questions}
    return build.build_pairs(questions, prompts or ["P"] * len(questions), graded, style, config)


RIGHT = [f" 理由{i}。答え: b" for i in range(3)]
WRONG = [f" 理由{i}。答え: c" for i in range(4)]


def test_the_ground_truth_is_preferred_over_each_wrong_path():
    rows, summary = build_pairs(QUESTIONS[:1], {"1": paths(*RIGHT, *WRONG)}, strategy="explanation")
    assert {row["chosen"] for row in rows} == {" 青は薬。。答え: b"}
    assert sorted(row["rejected"] for row in rows) == WRONG
    assert all((row["prompt"], row["question_id"], row["strategy"]) == ("P", "1", "explanation") for row in rows)
    assert summary["pairs"] == {"explanation": 4} and summary["paths"]["right"] == 3


def test_right_paths_are_preferred_over_wrong_ones_and_none_is_used_twice_too_early():
    rows, _ = build_pairs(QUESTIONS[:1], {"1": paths(*RIGHT, *WRONG)}, strategy="sampled", max_per_question=3)
    assert len({row["chosen"] for row in rows}) == len({row["rejected"] for row in rows}) == 3
    rows, summary = build_pairs(QUESTIONS[:1], {"1": paths(*RIGHT, *WRONG)}, strategy="sampled", max_per_question=99)
    pairs = [(row["chosen"], row["rejected"]) for row in rows]
    assert len(set(pairs)) == len(pairs) == 12 and summary["left_out_by_cap"] == 0
    assert {c for c, _ in pairs} == set(RIGHT) and {r for _, r in pairs} == set(WRONG)


def test_both_strategies_share_the_cap():
    for cap, kinds in ((4, (2, 2)), (5, (3, 2)), (1, (1, 0)), (99, (4, 12))):
        rows, summary = build_pairs(
            QUESTIONS[:1], {"1": paths(*RIGHT, *WRONG)}, strategy="both", max_per_question=cap, style=STYLE
        )
        made = [row["strategy"] for row in rows]
        assert (made.count("explanation"), made.count("sampled")) == kinds
        assert summary["left_out_by_cap"] == 16 - len(rows)
    rows, _ = build_pairs(QUESTIONS[:1], {"1": paths(*WRONG)}, strategy="both", max_per_question=4)
    assert [row["strategy"] for row in rows] == ["explanation"] * 4


def test_pairs_follow_the_seed_and_the_question_alone():
    both = {"1": paths(*RIGHT, *WRONG), "2": paths(*RIGHT, *WRONG)}
    settings = {"strategy": "sampled", "max_per_question": 2}
    runs = [build_pairs(QUESTIONS[:2], both, seed=seed, **settings)[0] for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    truths = [build_pairs(QUESTIONS[:1], both, seed=s, **settings | {"strategy": "explanation"})[0] for s in range(9)]
    assert len({row["rejected"] for rows in truths for row in rows}) == len(WRONG)
    alone, _ = build_pairs(QUESTIONS[1:2], both, seed=1, **settings)
    assert alone == [row for row in runs[0] if row["question_id"] == "2"]


def test_repeated_cut_off_and_unreadable_paths_make_no_pairs():
    given = paths(WRONG[0], WRONG[0], WRONG[0] + "\n ", " わからない") + [Output(WRONG[1], truncated=True)]
    rows, summary = build_pairs(QUESTIONS[:1], {"1": given}, strategy="both")
    assert [row["rejected"] for row in rows] == [WRONG[0]]
    assert summary["paths"] == {"right": 0, "bare": 0, "wrong": 1, "unparsed": 1, "truncated": 1, "duplicate": 2}


def test_an_answer_that_is_no_choice_is_wrong_only_where_that_is_asked_for_and_certain():
    style = replace(STYLE, answer_as="text")
    certain = [" 理由。答え: 黄", " 理由。答え: 問題薬"]
    unclear = [
        " 黄",  # no answer line
        " 理由。答え:",
        " 答え: 黄。答え: 黒",  # two answer lines
        " 答え: 黄\nわからない",  # something after it
        " 答え: 黄と白",  # a choice among others
        " 答え: b または c",
    ]
    given = paths(*certain, *unclear, " 理由。答え: 白", " 理由。答え: 青") + [Output(" 答え: 黄", truncated=True)]
    settings = {"strategy": "explanation", "style": style}
    rows, summary = build_pairs(QUESTIONS[:1], {"1": given}, **settings)
    assert [row["rejected"] for row in rows] == [" 理由。答え: 白"] and summary["paths"]["wrong"] == 1
    rows, summary = build_pairs(QUESTIONS[:1], {"1": given}, **settings, unlisted_is_wrong=True)
    assert sorted(row["rejected"] for row in rows) == sorted([*certain, " 理由。答え: 白"])
    assert summary["paths"] == {"right": 1, "bare": 0, "wrong": 3, "unparsed": len(unclear), "truncated": 1, "duplicate": 0}


def test_the_summary_says_why_questions_gave_no_pairs():
    q = [replace(QUESTIONS[0], problem_id=str(i), explanation=None if i > 2 else "青。") for i in range(6)]
    given = {"1": paths(*RIGHT), "2": paths(" わからない"), "3": paths(*WRONG), "4": paths(*RIGHT, *WRONG), "5": paths(*WRONG)}
    _, summary = build_pairs(q, given, strategy="both")
    assert summary["without_pairs"] == {
        "no paths": 1,
        "no wrong path": 1,
        "no path with a readable answer": 1,
        "no right path and no explanation": 2,
    }
    assert (summary["questions"], summary["questions_with_pairs"]) == (6, 1)
    assert build_pairs(q[3:4], given, strategy="explanation")[1]["without_pairs"] == {"no explanation": 1}
    assert build_pairs(q[3:4], given, strategy="sampled")[1]["without_pairs"] == {"no right path": 1}


def test_pairs_continue_the_prompts_of_the_exam_token_for_token(unsure_model, tokenizer):
    prompts = [STYLE.prompt(question, "explain", tokenizer) for question in QUESTIONS[:2]]
    repeated = [prompt for prompt in prompts for _ in range(12)]
    sampling = {"max_new_tokens": 40, "stop": STYLE.stop("explain"), "temperature": 0.3, "seed": 3}
    sampled = generate(HFEngine(unsure_model, tokenizer), repeated, **sampling)
    rows, summary = build_pairs(QUESTIONS[:2], {"1": sampled[:12], "2": sampled[12:]}, prompts, strategy="both")
    assert summary["questions_with_pairs"] == 2 and set(summary["pairs"]) == {"explanation", "sampled"}
    for row in rows:
        assert row["prompt"] == prompts[int(row["question_id"]) - 1]
        if row["strategy"] == "sampled":
            # Trained as the model wrote it: every token of the path is one the model could have written there.
            ids = tokenizer(row["prompt"]).input_ids + tokenizer(row["rejected"]).input_ids
            with torch.no_grad():
                logits = unsure_model(torch.tensor([ids])).logits[0]
            start = len(tokenizer(row["prompt"]).input_ids)
            assert all(logits[i - 1, ids[i]] >= logits[i - 1].max() - 1e-3 for i in range(start, len(ids)))


def test_a_ground_truth_that_is_not_read_as_right_is_not_chosen():
    question = replace(QUESTIONS[0], explanation="答え: c と思うかもしれない。答え: c")
    rows, summary = build_pairs([question], {"1": paths(*WRONG)}, strategy="both")
    assert not rows
    assert summary["without_pairs"] == {"no right path and no explanation that is read as the right answer": 1}


def test_equal_pairs_of_two_questions_are_written_once():
    twice = [QUESTIONS[0], replace(QUESTIONS[0], problem_id="9")]
    rows, summary = build_pairs(twice, {"1": paths(*WRONG), "9": paths(*WRONG)}, strategy="explanation")
    assert len(rows) == 4 and summary["duplicate_pairs"] == 4
    assert summary["without_pairs"] == {"the same pairs as another question": 1} and summary["questions_with_pairs"] == 1


def of_lengths(letter, lengths):
    return [f" {'由' * length}。答え: {letter}" for length in lengths]


def test_balance_in_length_takes_both_directions_and_reports_its_effect():
    given, many = {}, []
    for i in range(20):
        question = replace(QUESTIONS[0], problem_id=f"q{i}", problem_text=f"薬{i}はどれか。")
        many.append(question)
        # Right paths are mostly the longer ones; some short ones are there to be taken.
        right, wrong = of_lengths("b", (5, 60, 61, 62 + i)), of_lengths("c", (20, 21, 22, 23 + i))
        given[question.problem_id] = paths(*right, *wrong)
    settings = {"strategy": "sampled", "max_per_question": 2}
    prompts = [question.problem_id for question in many]
    drawn, plain = build_pairs(many, given, prompts, **settings)
    rows, summary = build_pairs(many, given, prompts, balance_length=True, **settings)
    assert len(rows) == len(drawn) == 40
    lengths = summary["lengths"]
    assert lengths["drawn"] == plain["lengths"]["written"] == plain["lengths"]["drawn"]
    assert lengths["drawn"]["chosen_longer"] > 0.6
    assert abs(lengths["written"]["chosen_longer"] - 0.5) < abs(lengths["drawn"]["chosen_longer"] - 0.5)
    for question in many:
        made = [row for row in rows if row["question_id"] == question.problem_id]
        assert len({row["chosen"] for row in made}) == len({row["rejected"] for row in made}) == 2


def test_where_the_cap_leaves_no_choice_balance_changes_nothing():
    settings = {"strategy": "both", "max_per_question": 99}
    plain, _ = build_pairs(QUESTIONS[:1], {"1": paths(*RIGHT, *WRONG)}, **settings)
    rows, summary = build_pairs(QUESTIONS[:1], {"1": paths(*RIGHT, *WRONG)}, balance_length=True, **settings)
    key = lambda row: (row["chosen"], row["rejected"])  # noqa: E731
    assert sorted(map(key, rows)) == sorted(map(key, plain)) and len(rows) == 16
    assert summary["lengths"]["drawn"] == summary["lengths"]["written"]


@pytest.fixture
def run(tmp_path, checkpoint, exam):
    """``medtrain pairs`` of the checkpoint and the exam, or of another one, with STYLE or another style."""

    def run(out="pairs.jsonl", questions=exam, style=STYLE, **settings):
        prompt = write_style(tmp_path / "style.yaml", style)
        named = {"model": str(checkpoint), "questions": str(questions), "out": str(tmp_path / out), "prompt": prompt}
        defaults = {"num_paths": 8, "temperature": 0.3, "max_new_tokens": 40, "balance_length": False}
        return pairs_module.run_pairs(PairsConfig(**named | defaults | settings))

    return run


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_writes_pairs_with_provenance_every_path_with_its_grade_and_the_summary(tmp_path, run, checkpoint, log):
    summary = run("new/pairs.jsonl")
    rows, (header, *sampled) = read(tmp_path / "new/pairs.jsonl"), read(tmp_path / "new/pairs.paths.jsonl")
    assert sum(summary["pairs"].values()) == len(rows) > 0 and summary["skipped_image_questions"] == 1
    assert json.loads((tmp_path / "new/pairs.summary.json").read_text()) == json.loads(json.dumps(summary))
    assert log.lines[:2] == ["explanations: 2 of 3 questions have one", "paths: 0/24"] and log.lines[-1] == "paths: 24/24"
    assert len(sampled) == 24
    texts = {(row["problem_id"], row["path"]): row for row in sampled}
    for row in rows:
        source = row["provenance"]
        assert source["model_digest"] == header["sampling"]["model"] and source["model"] == str(checkpoint)
        rejected = texts[row["question_id"], source["rejected_path"]]
        assert (rejected["output"].rstrip(), rejected["kind"]) == (row["rejected"], "wrong")
        assert rejected["parsed"] == source["rejected_answer"] and "答え: " in rejected["read_from"]
        assert (source["chosen_path"] is None) == (row["strategy"] == "explanation")
        if source["chosen_path"] is not None:
            assert texts[row["question_id"], source["chosen_path"]]["output"].rstrip() == row["chosen"]


def test_a_run_that_was_killed_goes_on_to_the_same_end(tmp_path, run, monkeypatch, log):
    run("whole.jsonl", batch_tokens=200)
    out, kept = tmp_path / "pairs.jsonl", tmp_path / "pairs.paths.jsonl"

    def kill_at_eight(line):
        if int(line.split()[1].split("/")[0]) >= 8:
            raise KeyboardInterrupt

    log.on_line = kill_at_eight
    with pytest.raises(KeyboardInterrupt):
        run(batch_tokens=200)
    log.on_line = lambda line: None
    assert 8 <= len(read(kept)) - 1 < 24 and not out.exists()
    with open(kept, "a") as file:
        file.write('{"problem_id": "1", "path": 7, "outp')
    rows = []
    generate = HFEngine._generate_batch
    monkeypatch.setattr(HFEngine, "_generate_batch", lambda self, ids, *a: rows.append(len(ids)) or generate(self, ids, *a))
    run(batch_tokens=200)
    assert sum(rows) < 24
    assert kept.read_bytes() == (tmp_path / "whole.paths.jsonl").read_bytes()
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_another_strategy_needs_no_new_sampling_and_another_sampling_is_refused(
    tmp_path, run, checkpoint, tokenizer, monkeypatch
):
    run()
    monkeypatch.setattr(pairs_module, "load_engine", lambda *a, **k: pytest.fail("nothing is left to sample"))
    summary = run(strategy="sampled", max_per_question=1)
    assert set(summary["pairs"]) == {row["strategy"] for row in read(tmp_path / "pairs.jsonl")} == {"sampled"}
    for change in ({"seed": 1}, {"temperature": 0.5}, {"style": replace(STYLE, lead="")}):
        with pytest.raises(InputError, match="a run with another .*" + next(iter(change))):
            run(**change)
    chain_model(tokenizer, CHAIN).save_pretrained(checkpoint)
    with pytest.raises(InputError, match="a run with another model"):
        run()
    (tmp_path / "pairs.paths.jsonl").unlink()
    with pytest.raises(InputError, match="is there already, and no paths"):
        run()


def test_where_no_pair_comes_about_the_paths_and_the_reasons_are_there_all_the_same(tmp_path, run, log):
    with pytest.raises(InputError) as error:
        run("none.jsonl", max_new_tokens=2)
    assert any("paths: no answer was read in" in line and "none.paths.jsonl" in line for line in log.lines)
    message = str(error.value)
    assert "no pair came about from 3 questions (every path was cut off: 3; paths: " in message and "\n" not in message
    assert "none.paths.jsonl" in message and "for example the path '理由'" in message
    assert not (tmp_path / "none.jsonl").exists() and (tmp_path / "none.summary.json").exists()
    assert {row["kind"] for row in read(tmp_path / "none.paths.jsonl")[1:]} == {"truncated", "duplicate"}


def test_nothing_is_sampled_where_the_cache_does_not_reach_the_model(tmp_path, run, monkeypatch):
    monkeypatch.setattr(HFEngine, "cache_agrees", lambda *_: False)
    with pytest.raises(InputError, match="nothing was sampled: with and without the KV cache"):
        run()
    assert not list(tmp_path.glob("pairs*"))


def test_an_end_token_that_is_no_id_is_one_line(run, checkpoint):
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(InputError, match="field 'eos_token_id': not token ids"):
        run()


def test_a_strategy_that_makes_nothing_leaves_the_pairs_that_are_there(tmp_path, run):
    truths = [{**row, "explanation": "赤と白は薬。"} for row in read(write_exam(tmp_path / "exam.jsonl"))]
    exam = write_jsonl(tmp_path / "truths.jsonl", [row for row in truths if row["answer"] == ["a", "c"]])
    out = tmp_path / "pairs.jsonl"
    run(questions=exam, strategy="explanation", num_paths=1, seed=3)
    before = [path.read_bytes() for path in (out, tmp_path / "pairs.summary.json")]
    with pytest.raises(InputError, match="no pair came about"):
        run(questions=exam, strategy="sampled", num_paths=1, seed=3)
    assert [path.read_bytes() for path in (out, tmp_path / "pairs.summary.json")] == before


def test_no_explanations_are_told_before_anything_is_sampled(tmp_path, run, monkeypatch, log):
    rows = read(write_exam(tmp_path / "exam.jsonl"))
    none = write_jsonl(tmp_path / "none.jsonl", [{k: v for k, v in row.items() if k != "explanation"} for row in rows])
    summary = run(questions=none, strategy="both")
    assert log.lines[0] == "explanations: 0 of 3 questions have one" and set(summary["pairs"]) == {"sampled"}
    monkeypatch.setattr(pairs_module, "load_engine", lambda *a, **k: pytest.fail("sampled"))
    with pytest.raises(InputError, match=r"none\.jsonl: field 'explanation': no question has an explanation .*strategy=sampled"):
        run("other.jsonl", questions=none, strategy="explanation")
    assert not list(tmp_path.glob("other*"))
    # The prompts are the same: explanations that come later cost no path.
    full = write_jsonl(tmp_path / "full.jsonl", [row | {"explanation": "それは薬。"} for row in rows])
    assert "explanation" in run(questions=full, strategy="explanation")["pairs"]


def test_smaller_batches_go_on_with_the_paths_that_are_there(tmp_path, run):
    run(batch_tokens=400)
    lines = (tmp_path / "pairs.paths.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "pairs.paths.jsonl").write_text("".join(lines[:6]), encoding="utf-8")
    run(batch_tokens=170)
    after = (tmp_path / "pairs.paths.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(after) == len(lines)
    assert [json.loads(line)["output"] for line in after[1:6]] == [json.loads(line)["output"] for line in lines[1:6]]
    assert json.loads(after[0])["sampling"]["batch_tokens"] == 170


def test_a_right_answer_without_an_explanation_is_not_chosen():
    bare, long = [" b", " 答え: b", " **答え: b**"], [" 理由。答え: b", " b\n青いから。"]
    wrong = [" c"]
    rows, summary = build_pairs(QUESTIONS[:1], {"1": paths(*bare, *long, *wrong)}, strategy="sampled")
    assert {row["chosen"] for row in rows} == set(long) and {row["rejected"] for row in rows} == set(wrong)
    assert (summary["paths"]["bare"], summary["paths"]["right"]) == (3, 2)
    _, summary = build_pairs(QUESTIONS[:1], {"1": paths(*bare, *wrong)}, strategy="sampled")
    assert summary["without_pairs"] == {"no right path that explains": 1}
    _, summary = build_pairs(QUESTIONS[:1], {"1": paths(*bare)}, strategy="sampled")
    assert summary["without_pairs"] == {"no path with an explanation": 1}
    _, summary = build_pairs(QUESTIONS[:1], {"1": paths(*long, *wrong)}, strategy="sampled", min_explanation=3)
    assert summary["paths"]["bare"] == 1
    rows, _ = build_pairs(QUESTIONS[:1], {"1": paths(*bare, *wrong)}, strategy="sampled", min_explanation=0)
    assert len(rows) == 3


def test_both_kinds_share_an_odd_cap_over_the_questions():
    two = [replace(question, explanation="青は薬。") for question in (QUESTIONS[0], replace(QUESTIONS[0], problem_id="4"))]
    of_both = {"1": paths(*RIGHT, *WRONG), "4": paths(*RIGHT, *WRONG)}
    _, summary = build_pairs(two, of_both, ["P", "Q"], strategy="both", max_per_question=1)
    assert summary["pairs"] == {"explanation": 1, "sampled": 1}
    _, summary = build_pairs(two, of_both, ["P", "Q"], strategy="both", max_per_question=3)
    assert summary["pairs"] == {"explanation": 3, "sampled": 3}


def test_a_demonstration_that_is_in_the_exam_too_is_refused(run, exam):
    with pytest.raises(InputError, match="row 1: a demonstration that is in the exam too"):
        run(demonstrations=str(exam))


def test_an_unlisted_answer_is_wrong_only_where_answers_are_texts(run):
    with pytest.raises(InputError, match="unlisted_is_wrong"):
        run(unlisted_is_wrong=True)
