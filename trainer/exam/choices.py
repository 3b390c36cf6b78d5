"""Scoring by choice log-prob: each possible answer's log-probability after the prompt, nothing generated.

For small models, whose generated text says little. The candidates of a question are all answers with as many letters as
the exam's own text asks for ("2つ選べ", "select two"; else one), written as the prompt style writes answers. Two figures,
named as in lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness, ``lm_eval/api/task.py``): ``acc``
takes the candidate with the highest sum of log-probs, ``acc_norm`` the highest sum per character of the candidate. They
differ only where candidates differ in length, that is, where answers are texts (``answer_as: text``).

A numeric question, and one that asks for all that apply, has no such list: its output is empty, a parse failure.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from medtrain.trainer.exam.generate import HFEngine, Output
from medtrain.trainer.exam.prompts import PromptStyle
from medtrain.trainer.exam.questions import Question

_HOW_MANY = re.compile(
    r"([2-5２-５二三四五])\s*つ(?:を)?選|(?:select|choose|pick|mark)\s+(?:the\s+)?(two|three|four|[2-5])\b", re.IGNORECASE
)
_ALL = re.compile(r"(?:すべて|全て)(?:を)?選|(?:select|choose|mark) all", re.IGNORECASE)
_NUMERALS = {"二": 2, "三": 3, "四": 4, "五": 5, "two": 2, "three": 3, "four": 4}


def candidates(question: Question) -> list[tuple[str, ...]]:
    """The letter sets that may be the answer, by the exam's own text; none where it does not say how many."""
    if _ALL.search(question.problem_text):
        return []
    asked = _HOW_MANY.search(question.problem_text)
    said = (asked[1] or asked[2]).lower() if asked else "1"
    return list(itertools.combinations(question.letters, _NUMERALS.get(said) or int(said)))


def score_choices(
    engine: HFEngine, questions: Sequence[Question], prompts: Sequence[str], style: PromptStyle
) -> tuple[list[Output], list[dict[str, float]]]:
    """The most likely answer of each question as an output, and the log-prob (nats) of each candidate, "a,c" -> logp."""
    lead = style.lead
    if style.chat:
        lead = "" if style.marker_in_turn else style.answer_marker + style.lead
    asked = [(i, letters) for i, question in enumerate(questions) for letters in candidates(question)]
    texts = [lead + style.answer(letters, questions[i]) for i, letters in asked]
    logps = engine.logps([prompts[i] for i, _ in asked], texts)
    tables: list[dict[str, float]] = [{} for _ in questions]
    for (i, letters), logp in zip(asked, logps, strict=True):
        tables[i][",".join(letters)] = logp
    outputs = []
    for question, table in zip(questions, tables, strict=True):
        best = max(table, key=table.__getitem__).split(",") if table else None
        outputs.append(Output(lead + style.answer(best, question) if best else "", False, 0))
    return outputs, tables


def summarize_choices(questions: Sequence[Question], tables: Sequence[dict[str, float]], style: PromptStyle) -> dict:
    """``acc`` and ``acc_norm`` of the tables of :func:`score_choices`, over all questions."""
    right = {"acc": 0, "acc_norm": 0}
    for question, table in zip(questions, tables, strict=True):
        lengths = {key: len(style.answer(key.split(","), question)) for key in table}
        for name, scores in (("acc", table), ("acc_norm", {key: table[key] / max(1, lengths[key]) for key in table})):
            best = max(scores, key=scores.__getitem__, default=None)
            right[name] += best is not None and tuple(best.split(",")) in question.accepted
    return {name: count / len(questions) for name, count in right.items()}
