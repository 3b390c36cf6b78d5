"""The exam's commands as a user types them: tables, JSON, files, and mistakes of one line."""

import json

import pytest
import torch
import yaml
from click.testing import CliRunner
from exam_models import CHAIN, chain_model, chain_tokenizer, write_exam
from helpers import write_jsonl

from medtrain.trainer.cli import main

STYLE = {"explain_marker": "説明：", "joint": "。", "instruction_answer": "", "instruction_explain": ""}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a checkpoint, an exam and a prompt style."""
    torch.set_num_threads(1)
    folder, tokenizer = tmp_path_factory.mktemp("exam"), chain_tokenizer()
    chain_model(tokenizer, CHAIN, either=" ").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_exam(folder / "exam.jsonl")
    (folder / "style.yaml").write_text(yaml.safe_dump(STYLE, allow_unicode=True))
    return folder


def call(*words, status=0):
    result = CliRunner().invoke(main, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    if status == 2 and "Usage:" not in result.stderr:
        assert [line for line in result.stderr.splitlines() if line.startswith("medtrain: ")] == [result.stderr.splitlines()[-1]]
    return result


def evaluate(place, out, *words, **settings):
    return call(
        "eval",
        "--model",
        place / "model",
        "--exam",
        place / "exam.jsonl",
        "--prompt",
        place / "style.yaml",
        "--max-new-tokens",
        40,
        "--out",
        place / out,
        *words,
        **settings,
    )


def test_eval_prints_a_table_and_the_same_command_again_prints_json(place):
    table = evaluate(place, "both").stdout
    assert len(table.splitlines()) == 5 and "explanation gap" in table and "1 questions that need an image" in table
    result = json.loads(evaluate(place, "both", "--json").stdout)
    assert result == json.loads((place / "both/exam.json").read_text())
    row = result["explain"]
    assert f"{row['points']}/{row['max_points']}" in table and f"{row['points_ratio']:.3f}" in table


def test_choice_logp_from_the_command_line_and_compared_with_generation(place):
    assert "acc_norm" in evaluate(place, "choices", "--mode", "answer", "--method", "choice_logp").stdout
    evaluate(place, "generated", "--mode", "answer")
    result = json.loads(call("compare", place / "generated", place / "choices", "--json").stdout)
    assert result["settings_that_differ"] == ["method"] and set(result["modes"]) == {"answer"}
    assert "settings differ: method" in call("compare", place / "generated", place / "choices").stdout


def test_pairs_with_a_prompt_style_of_ones_own(place, tmp_path):
    settings = {
        "model": str(place / "model"),
        "questions": str(place / "exam.jsonl"),
        "out": str(tmp_path / "p.jsonl"),
        "prompt": str(place / "style.yaml"),
        "temperature": 0.3,
        "max_new_tokens": 40,
    }
    (tmp_path / "pairs.yaml").write_text(yaml.safe_dump(settings))
    done = call("pairs", tmp_path / "pairs.yaml")
    summary = json.loads(done.stdout)
    assert sum(summary["pairs"].values()) == len((tmp_path / "p.jsonl").read_text().splitlines()) > 0
    assert "settings" not in summary and "settings" in json.loads((tmp_path / "p.summary.json").read_text())
    for change, part in (
        ("promt=x", "'prompt'"),
        ("prompt=nowhere", "no such prompt style"),
        ("unlisted_is_wrong=true", "answer_as: text"),
        ("chat=true", "no chat template"),
        ("batch_tokens=0", "1 or more"),
        ("seed=1", "a run with another seed"),
        ("strategy=x", "explanation | sampled | both"),
        ("max_per_question=0", "1 or more"),
        ("temperature=0", "more than 0"),
    ):
        assert part in call("pairs", tmp_path / "pairs.yaml", change, status=2).stderr


def test_score_through_a_mapping(tmp_path):
    exam = write_jsonl(tmp_path / "exam.jsonl", [{"q": "Which?", "c": ["x", "y"], "k": "y", "n": i} for i in "12"])
    (tmp_path / "map.yaml").write_text("{problem_id: n, problem_text: q, choices: c, answer: k, answer_as: text}")
    predictions = write_jsonl(tmp_path / "p.jsonl", [{"problem_id": "1", "output": "Answer: B"}])
    words = ["score", "--exam", exam, "--predictions", predictions]
    result = json.loads(call(*words, "--mapping", tmp_path / "map.yaml", "--details", tmp_path / "d.jsonl").stdout)
    assert (result["correct"], result["missing"], result["points_ratio"]) == (1, 1, 0.5)
    assert result["points_ratio_low"] == 0.0 and result["points_ratio_high"] == 1.0
    assert call("compare", tmp_path / "d.jsonl", tmp_path / "d.jsonl").stdout.count("predictions") == 1
    assert "problem_id" in call(*words, status=2).stderr


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--prompt", "nowhere"], "no such prompt style"),
        (["--method", "choice_logp"], "mode answer"),
        (["--chat"], "no chat template"),
        (["--dtype", "float3"], "dtype"),
        (["--mapping", "nowhere.yaml"], "nowhere.yaml"),
        (["--demonstrations", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--limit", "0"], "--limit"),
        (["--engine", "vllm"], "vllm is not installed"),
        (["--engine", "tgi"], "'tgi' is not one of 'hf', 'vllm'"),
        (["--mode", "x"], "'x' is not one of 'answer', 'explain', 'both'"),
        (["--method", "x"], "'x' is not one of 'generate', 'choice_logp'"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(place, words, part, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    assert part in evaluate(place, "mistake", *words, status=2).stderr
    assert not list(place.glob("mistake/outputs*")) and not (place / "mistake/exam.json").exists()
