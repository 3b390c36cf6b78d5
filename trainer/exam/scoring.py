"""Exam scoring: the official rule of IgakuQA, per question and summed up.

The rule (``scripts/evaluate_main.py`` of https://github.com/jungokasai/IgakuQA; Kasai et al. 2023): a question is right
when ``sorted(prediction.split(","))`` equals ``sorted(answer)``; for 112B30 either of two letters counts; 116A71 counts
whatever was predicted. A question without a prediction is wrong, and counted as ``missing``. A model's text is parsed first,
and a number is right where it is the key or has the value that the key stands for (0.4 where "04" fills the boxes ``①.②``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from medtrain.trainer.errors import bad_input, user_path
from medtrain.trainer.exam.parse import parse_output
from medtrain.trainer.exam.prompts import MODES
from medtrain.trainer.exam.questions import Question, RowReader, load_questions
from medtrain.trainer.exam.statements import Parsed
from medtrain.trainer.files import read_jsonl, read_rows, write_jsonl
from medtrain.trainer.intervals import bootstrap_interval

# Declared void after the examination: the official scorer counts it as right for every prediction.
_ALWAYS_RIGHT = frozenset({"116A71"})
_NO_PREDICTION = "no prediction"

# Why figures are marked invalid (HFEngine.cache_agrees).
INVALID = "with and without the KV cache the model goes on in different ways after the first question"

Row = dict[str, Any]


def is_right(question: Question, parsed: Parsed) -> bool:
    """Whether a parsed output answers ``question`` rightly."""
    if question.problem_id in _ALWAYS_RIGHT:
        return True
    if parsed.number is None or not question.is_numeric:
        return parsed.letters in question.accepted
    try:
        return parsed.number == question.answer[0] or Decimal(parsed.number) == question.sheet_number
    except InvalidOperation:
        return False


def scored(question: Question, parsed: Parsed, correct: bool | None = None) -> Row:
    """A row of scores: ``parsed``, ``correct`` (as :func:`is_right` unless given), ``points`` of ``max_points``, ``read_from``,
    ``failure`` (why no answer could be read, else None)."""
    correct = is_right(question, parsed) if correct is None else correct
    points = {"points": question.points if correct else 0, "max_points": question.points}
    return {"parsed": parsed.value, "correct": correct, **points, "read_from": parsed.read_from, "failure": parsed.failure}


def _score_prediction(question: Question, prediction: str) -> Row:
    """Score one prediction in the official form, letters joined by "," without blanks, or a number."""
    parts = sorted(prediction.split(","))
    either = len(question.accepted) > 1 and tuple(parts) in question.accepted
    correct = question.problem_id in _ALWAYS_RIGHT or parts == sorted(question.answer) or either
    parsed = Parsed(read_from=prediction, failure='not letters of the choices joined by ","')
    if question.is_numeric:
        is_number = prediction.strip().replace(".", "", 1).lstrip("+-").isdigit()
        parsed = Parsed((), prediction, prediction) if is_number else Parsed(read_from=prediction, failure="not a number")
    elif all(len(part) == 1 and part in question.letters for part in parts):
        parsed = Parsed(tuple(parts), None, prediction)
    return scored(question, parsed, correct)


def score_rows(questions: Sequence[Question], predictions: Mapping[str, Mapping[str, str]]) -> list[Row]:
    """Score ``predictions`` (problem_id -> row with ``prediction`` or ``output``): the rows of ``--details``."""
    rows = []
    for question in questions:
        given = predictions.get(question.problem_id, {})
        row = scored(question, Parsed(failure=_NO_PREDICTION), correct=False)
        if "prediction" in given:
            row = _score_prediction(question, given["prediction"])
        elif given:
            row = scored(question, parse_output(given["output"], question))
        rows.append({"problem_id": question.problem_id} | row)
    return rows


def summarize(questions: Sequence[Question], rows: Sequence[Row]) -> dict[str, Any]:
    """Sum up the scored ``rows`` of ``questions``: the figures of one mode in ``exam.json``. ``points_ratio_low`` and ``_high``
    are a 95 % bootstrap interval. Withdrawn questions count in ``correct``, ``questions`` and ``accuracy``, as the official
    scorer does it. ``missing``: questions without an output."""
    points, max_points = [row["points"] for row in rows], [row["max_points"] for row in rows]
    correct = sum(row["correct"] for row in rows)
    missing = sum(row["failure"] == _NO_PREDICTION for row in rows)
    taken = [set(question.kinki) & set(row["parsed"] or ()) for question, row in zip(questions, rows, strict=True)]
    low, high = bootstrap_interval(points, max_points)
    return {
        "points": sum(points),
        "max_points": sum(max_points),
        "points_ratio": sum(points) / sum(max_points) if any(max_points) else 0.0,
        "points_ratio_low": low,
        "points_ratio_high": high,
        "correct": correct,
        "questions": len(rows),
        "accuracy": correct / len(rows) if rows else 0.0,
        "parse_failures": sum(row["failure"] is not None for row in rows) - missing,
        "forbidden_choices": sum(map(bool, taken)),
        "missing": missing,
    }


def unread_note(mode: str, result: Mapping[str, int], where: str | Path) -> str | None:
    """A line where more than half of a mode's outputs were not read or were cut off: its figures tell little of the model.
    ``where`` are the outputs to look at."""
    unread, truncated, total = result["parse_failures"], result["truncated"], result["questions"]
    if 2 * max(unread, truncated) <= total:
        return None
    counts = f"no answer was read in {unread} of {total} outputs, {truncated} were cut off at their length limit"
    return f"note: {mode}: {counts}; look at some in {where} before you trust these figures"


def summarize_groups(questions: Sequence[Question], rows: Sequence[Row]) -> dict[str, Any]:
    """:func:`summarize`, and, where every question has a section and a year, ``mean_points_per_year``, ``by_year`` and
    ``by_section``."""
    result = summarize(questions, rows)
    if all(question.section and question.year for question in questions):
        result["mean_points_per_year"] = result["points"] / len({question.year for question in questions})
        for name in ("year", "section"):
            groups: dict[str, list[tuple[Question, Row]]] = {}
            for question, row in zip(questions, rows, strict=True):
                groups.setdefault(str(getattr(question, name)), []).append((question, row))
            result[f"by_{name}"] = {key: summarize(*zip(*group, strict=True)) for key, group in groups.items()}
    return result


def load_predictions(path: str | Path, questions: Sequence[Question]) -> dict[str, dict[str, Any]]:
    """Read a predictions file: rows with ``problem_id`` and ``prediction`` or ``output``; other fields are ignored. Raises
    :class:`InputError` with file, row and field for a broken row, and an id that is not in the exam or occurs twice."""
    known = {question.problem_id for question in questions}
    predictions: dict[str, dict[str, Any]] = {}
    row_of: dict[str, int] = {}
    for number, value in read_jsonl(path):
        row = RowReader(path, number, {"problem_id": value["question_id"]} | value if "question_id" in value else value)
        problem_id = row.text("problem_id")
        row.require(problem_id in known, "the exam has no such question", "problem_id", problem_id)
        row.check_new(problem_id, "problem_id", row_of)
        given = [name for name in ("prediction", "output") if name in value]
        if len(given) != 1:
            found = "both" if given else "neither"
            raise bad_input("one of 'prediction' and 'output' is needed", file=path, row=number, found=found)
        content: Any = value[given[0]]
        if given == ["prediction"] and isinstance(content, list) and all(isinstance(part, str) for part in content):
            content = ",".join(content)
        row.require(isinstance(content, str), "wrong type", given[0], content, "a text")
        predictions[problem_id] = {given[0]: content}
    return predictions


def read_outputs(file: Path) -> dict[str, list[Row]]:
    """The rows of one exam during training, by mode, as :mod:`medtrain.trainer.exam.during` wrote them."""
    rows = read_rows(file)
    return {mode: [row for row in rows if row["mode"] == mode] for mode in MODES}


def run_score(
    exam: str | Path, predictions: str | Path, details: str | Path | None = None, mapping: str | Path | None = None
) -> dict[str, Any]:
    """``medtrain score``: score a predictions file against an exam file; ``details`` gets one row per question."""
    questions = load_questions(exam, mapping=mapping)
    rows = score_rows(questions, load_predictions(predictions, questions))
    if details is not None:
        details = Path(details)
        with user_path(details, "cannot be written"):
            details.parent.mkdir(parents=True, exist_ok=True)
            write_jsonl(details, rows)
    return summarize_groups(questions, rows)
