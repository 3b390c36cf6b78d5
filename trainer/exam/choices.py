"""Scoring by choice log-prob: each possible answer's log-probability after the prompt, nothing generated.

The candidates of a question are all answers with as many letters as its text asks for ("2つ選べ", "select two"; else one).
A numeric question, and one that asks for all that apply, has none: its output is empty, a parse failure.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from medtrain.trainer.exam.generate import Batches, HFEngine, Output
from medtrain.trainer.exam.prompts import PromptStyle
from medtrain.trainer.exam.questions import Question

_HOW_MANY = re.compile(
    r"([2-5２-５二三四五])\s*つ(?:を)?選|(?:select|choose|pick|mark)\s+(?:the\s+)?(two|three|four|[2-5])\b", re.IGNORECASE
)
_ALL = re.compile(r"(?:すべて|全て)(?:を)?選|(?:select|choose|mark) all", re.IGNORECASE)
_NUMERALS = {"二": 2, "三": 3, "四": 4, "五": 5, "two": 2, "three": 3, "four": 4}
_PORTION = 64  # questions that are scored at once


def candidates(question: Question) -> list[tuple[str, ...]]:
    """The letter sets that may be the answer; none where the question does not tell how many."""
    if _ALL.search(question.problem_text):
        return []
    found = _HOW_MANY.search(question.problem_text)
    number = (found[1] or found[2]).lower() if found else "1"
    return list(itertools.combinations(question.letters, _NUMERALS.get(number) or int(number)))


def score_choices(engine: HFEngine, questions: Sequence[Question], prompts: Sequence[str], style: PromptStyle) -> Batches:
    """Yield the most likely answer of each question as an output, portion by portion."""
    lead = style.lead
    if style.chat:
        lead = "" if style.marker_in_turn else style.answer_marker + style.lead
    for first in range(0, len(questions), _PORTION):
        portion = list(range(first, min(first + _PORTION, len(questions))))
        scored = [(i, letters) for i in portion for letters in candidates(questions[i])]
        texts = [lead + style.answer(letters, questions[i]) for i, letters in scored]
        tables: dict[int, dict[str, float]] = {i: {} for i in portion}
        for (i, letters), logp in zip(scored, engine.logps([prompts[i] for i, _ in scored], texts), strict=True):
            tables[i][",".join(letters)] = logp
        outputs = []
        for i, table in tables.items():
            best = max(table, key=table.__getitem__) if table else None
            text = lead + style.answer(best.split(","), questions[i]) if best else ""
            outputs.append(Output(text, truncated=False, choice_logps=table))
        yield portion, outputs


def summarize_choices(questions: Sequence[Question], tables: Sequence[dict[str, float]], style: PromptStyle) -> dict[str, float]:
    """``acc`` and ``acc_norm``, as in lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness,
    ``lm_eval/api/task.py``), of the log-probs of each question's candidates ("a,c" -> nats): ``acc`` takes the candidate with
    the highest one, ``acc_norm`` the highest per character. They differ only where answers are texts (``answer_as: text``)."""
    right = {"acc": 0, "acc_norm": 0}
    for question, table in zip(questions, tables, strict=True):
        per_character = {key: logp / max(1, len(style.answer(key.split(","), question))) for key, logp in table.items()}
        for name, scores in (("acc", table), ("acc_norm", per_character)):
            best = max(scores, key=scores.__getitem__, default=None)
            right[name] += best is not None and tuple(best.split(",")) in question.accepted
    return {name: count / len(questions) for name, count in right.items()}
