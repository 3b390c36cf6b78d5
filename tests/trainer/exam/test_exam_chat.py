"""Exam prompts of chat templates: nothing is left out of them, and a date in them is that of the first start."""

import json
from datetime import datetime

import pytest
from exam_models import QUESTIONS, chain_tokenizer

from medtrain.trainer.config.exam import EvalSettings, PairsConfig
from medtrain.trainer.errors import InputError
from medtrain.trainer.exam import prepare
from medtrain.trainer.exam.evaluate import evaluate
from medtrain.trainer.exam.pairs.run import run_pairs
from medtrain.trainer.exam.prompts import PromptStyle

YESTERDAY = datetime(2024, 7, 6, 8, 9, 10).astimezone()
LINE = "the chat template writes a date: 2024-07-06, that of the first start"


def turns(turn):
    return "{% for m in messages %}<{{ m.role }}>" + turn + "</s>{% endfor %}<assistant>"


PLAIN = turns("{{ m.content }}")
DROPS_SYSTEM = PLAIN.replace("in messages", "in messages if m.role != 'system'")
ESCAPES = turns("{{ m.content | e }}")
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


def with_template(template):
    tokenizer = chain_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (DROPS_SYSTEM, "part of the system message, from '医師。' on"),
        (turns("{{ m.content.split('。')[-1] if m.role == 'assistant' else m.content }}"), "part of the assistant message"),
        (ESCAPES, "part of the user message, from '<薬>"),
        (turns(NO_SYSTEM + "{{ m.content }}"), "the chat template fails: System role not supported"),
    ],
)
def test_exam_prompts_hold_every_message_whole(template, words):
    style = PromptStyle(chat=True, system="医師。", question="<薬> {text}{choices}")
    shown = style.prompt(QUESTIONS[0], "explain", with_template(PLAIN), QUESTIONS[1:2])
    assert "<system>医師。</s>" in shown and "<assistant>白は薬。\n答え: c</s>" in shown
    with pytest.raises(InputError) as caught:
        style.prompt(QUESTIONS[0], "explain", with_template(template), QUESTIONS[1:2])
    assert words in str(caught.value)


@pytest.fixture
def dated(tmp_path, unsure_model):
    """A checkpoint whose prompts open with the date, and a style for it."""
    unsure_model.save_pretrained(tmp_path / "model")
    with_template("{{ strftime_now('%Y-%m-%d') }}" + PLAIN + "説明：").save_pretrained(tmp_path / "model")
    (tmp_path / "style.yaml").write_text("{chat: true, joint: 。, instruction_answer: '', instruction_explain: ''}")
    return tmp_path / "model", str(tmp_path / "style.yaml")


@pytest.mark.parametrize("method", ["generate", "choice_logp"])
def test_an_exam_begun_yesterday_goes_on_with_its_date(dated, exam, tmp_path, monkeypatch, method, log):
    model, style = dated
    out = tmp_path / "out"
    options = {"prompt": style, "max_new_tokens": 20, "mode": "answer", "method": method}
    monkeypatch.setattr(prepare, "now", lambda: YESTERDAY)
    evaluate(model, exam, out, EvalSettings(limit=1, **options))
    monkeypatch.undo()
    (out / "outputs-answer.jsonl").rename(out / "outputs-answer.partial.jsonl")
    (out / "exam.json").unlink()
    run = json.loads((out / "run.json").read_text())
    run["identity"]["limit"] = None  # as if it had been killed after the first question
    (out / "run.json").write_text(json.dumps(run))
    evaluate(model, exam, out, EvalSettings(**options))
    rows = [json.loads(line) for line in (out / "outputs-answer.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and {row["prompt"][:10] for row in rows} == {"2024-07-06"}
    assert log.lines.count(LINE) == 2
    evaluate(model, exam, tmp_path / "today", EvalSettings(**options))
    assert LINE not in log.lines[-5:] and '"prompt": "2024' not in (tmp_path / "today/outputs-answer.jsonl").read_text()


def test_a_template_that_loses_a_message_is_found_before_anything_is_written(dated, exam, tmp_path):
    model, style = dated
    with_template(turns("")).save_pretrained(model)
    for method in ("generate", "choice_logp"):
        with pytest.raises(InputError, match="part of the user message"):
            evaluate(model, exam, tmp_path / "out", EvalSettings(prompt=style, mode="answer", method=method))
    with pytest.raises(InputError, match="part of the user message"):
        run_pairs(PairsConfig(model=str(model), questions=str(exam), out=str(tmp_path / "out/pairs.jsonl"), prompt=style))
    assert not (tmp_path / "out").exists()


def test_pairs_begun_yesterday_go_on_with_their_date(dated, exam, tmp_path, monkeypatch, log):
    model, style = dated
    out = tmp_path / "pairs.jsonl"
    options = {"prompt": style, "num_paths": 2, "max_new_tokens": 12, "batch_tokens": 200}
    config = PairsConfig(model=str(model), questions=str(exam), out=str(out), **options)

    def kill(line):
        if line == "paths: 2/6":
            raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "now", lambda: YESTERDAY)
    log.on_line = kill
    with pytest.raises(KeyboardInterrupt):
        run_pairs(config)
    monkeypatch.undo()
    log.on_line = lambda line: None
    run_pairs(config)
    lines = log.lines
    assert lines.count(LINE) == 2 and lines[-1] == "paths: 6/6" and "paths: 0/6" not in lines[4:]
    assert {json.loads(line)["prompt"][:10] for line in out.read_text().splitlines()} == {"2024-07-06"}
