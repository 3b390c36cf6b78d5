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
    for first in range(0, len(questions), _PORTION):
        portion = list(range(len(questions)))[first : first + _PORTION]
        scored = [(i, ",".join(letters)) for i in portion for letters in candidates(questions[i])]
        texts = [style.answer_lead + style.answer(answer.split(","), questions[i]) for i, answer in scored]
        logps = engine.logps([prompts[i] for i, _ in scored], texts)
        outputs = []
        for i in portion:
            table = {answer: logp for (j, answer), logp in zip(scored, logps, strict=True) if j == i}
            best = max(table, key=table.__getitem__, default=None)
            outputs.append(Output(texts[scored.index((i, best))] if best else "", truncated=False, choice_logps=table))
        yield portion, outputs


def summarize_choices(questions: Sequence[Question], tables: Sequence[dict[str, float]], style: PromptStyle) -> dict[str, float]:
    """``acc`` and ``acc_norm`` of the log-probs of each question's candidates ("a,c" -> nats), as in lm-evaluation-harness
    (``lm_eval/api/task.py``): ``acc`` takes the candidate with the highest one, ``acc_norm`` the highest per character."""
    right = {"acc": 0, "acc_norm": 0}
    for question, table in zip(questions, tables, strict=True):
        per_character = {key: logp / max(1, len(style.answer(key.split(","), question))) for key, logp in table.items()}
        for name, scores in (("acc", table), ("acc_norm", per_character)):
            best = max(scores, key=scores.__getitem__, default=None)
            right[name] += best is not None and tuple(best.split(",")) in question.accepted
    return {name: count / len(questions) for name, count in right.items()}
