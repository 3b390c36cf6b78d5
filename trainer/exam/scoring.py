"""Exam scoring: the official rule of IgakuQA, per question and summed up.

The rule (``scripts/evaluate_main.py`` of https://github.com/jungokasai/IgakuQA; Kasai et al. 2023): a question is right
when ``sorted(prediction.split(","))`` equals ``sorted(answer)``; for 112B30 either of two letters counts; 116A71 counts
whatever was predicted. A question that was not answered at all is wrong, 116A71 too, and is counted as ``missing``.

A row of predictions is scored by that rule to the letter: ``{"problem_id": ..., "prediction": "a,c"}``. A row
``{"problem_id": ..., "output": ...}`` holds a model's raw text; it is parsed first, and a number is right where it is
the key or has the value that the key stands for (0.4 where the key "04" fills the boxes ``①.②``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

from medtrain.trainer.errors import bad_input, user_path
from medtrain.trainer.exam.parse import Parsed, parse_output
from medtrain.trainer.exam.questions import Question, load_questions, read_jsonl
from medtrain.trainer.files import write_bytes
from medtrain.trainer.intervals import bootstrap_interval

# Declared void after the examination: the official scorer counts it as right for every prediction.
_ALWAYS_RIGHT = frozenset({"116A71"})

# Why figures are marked invalid (HFEngine.cache_agrees).
INVALID = "with and without the KV cache the model goes on in different ways after the first question"


@dataclass(frozen=True)
class Graded:
    """One question, scored. ``parsed`` is None where there is no prediction."""

    question: Question
    parsed: Parsed | None
    correct: bool

    @property
    def points(self) -> int:
        return self.question.points if self.correct else 0

    @property
    def forbidden(self) -> bool:
        """Whether a forbidden choice was taken."""
        return self.parsed is not None and bool(set(self.parsed.letters) & set(self.question.kinki))

    def details(self) -> dict:
        """The row of ``--details``."""
        return {
            "problem_id": self.question.problem_id,
            "parsed": self.parsed.value if self.parsed else None,
            "correct": self.correct,
            "points": self.points,
            "max_points": self.question.points,
            "read_from": self.parsed.read_from if self.parsed else "",
            "failure": self.parsed.failure if self.parsed else "no prediction",
        }


def grade_output(question: Question, parsed: Parsed) -> bool:
    """Whether a parsed output answers ``question`` rightly."""
    if question.problem_id in _ALWAYS_RIGHT:
        return True
    if not question.is_numeric:
        return parsed.letters in question.accepted
    if parsed.number is None:
        return False
    if parsed.number == question.answer[0]:
        return True
    try:
        return Decimal(parsed.number) == question.sheet_number
    except InvalidOperation:
        return False


def grade_prediction(question: Question, prediction: str) -> Graded:
    """Score one prediction in the official form, letters joined by "," without blanks, or a number."""
    parts = sorted(prediction.split(","))
    correct = (
        question.problem_id in _ALWAYS_RIGHT
        or parts == sorted(question.answer)
        or (len(question.accepted) > 1 and tuple(parts) in question.accepted)
    )
    if question.is_numeric:
        is_number = prediction.strip().replace(".", "", 1).lstrip("+-").isdigit()
        parsed = (
            Parsed(number=prediction, read_from=prediction) if is_number else Parsed(read_from=prediction, failure="not a number")
        )
    elif parts and all(len(part) == 1 and part in question.letters for part in parts):
        parsed = Parsed(letters=tuple(parts), read_from=prediction)
    else:
        parsed = Parsed(read_from=prediction, failure='not letters of the choices joined by ","')
    return Graded(question, parsed, correct)


def grade(questions: Sequence[Question], predictions: Mapping[str, Mapping]) -> list[Graded]:
    """Score ``predictions`` (problem_id -> row with ``prediction`` or ``output``), one :class:`Graded` a question.

    Raises :class:`InputError` for a prediction of a question that the exam does not have.
    """
    unknown = set(predictions) - {question.problem_id for question in questions}
    if unknown:
        raise bad_input("the exam has no such question", field="problem_id", found=sorted(unknown)[0])
    graded = []
    for question in questions:
        row = predictions.get(question.problem_id)
        if row is None:
            graded.append(Graded(question, None, False))
        elif "prediction" in row:
            graded.append(grade_prediction(question, row["prediction"]))
        else:
            parsed = parse_output(row["output"], question)
            graded.append(Graded(question, parsed, grade_output(question, parsed)))
    return graded


def summarize(graded: Iterable[Graded]) -> dict:
    """Sum up: the figures of one mode in ``exam.json``.

    ``points`` of ``max_points`` and their ratio (0 where no question gives points) with its 95 % interval
    ``points_ratio_low`` and ``points_ratio_high`` (:func:`bootstrap_interval`); ``correct`` of ``questions`` and
    ``accuracy``, which count withdrawn questions too, as the official scorer does; ``parse_failures`` (outputs without
    a readable answer), ``missing`` (no output), ``forbidden_choices`` (questions where a forbidden choice was taken).
    """
    graded = list(graded)
    points, max_points = sum(g.points for g in graded), sum(g.question.points for g in graded)
    correct = sum(g.correct for g in graded)
    low, high = bootstrap_interval([g.points for g in graded], [g.question.points for g in graded])
    return {
        "points": points,
        "max_points": max_points,
        "points_ratio": points / max_points if max_points else 0.0,
        "points_ratio_low": low,
        "points_ratio_high": high,
        "correct": correct,
        "questions": len(graded),
        "accuracy": correct / len(graded) if graded else 0.0,
        "parse_failures": sum(g.parsed is not None and g.parsed.failure is not None for g in graded),
        "forbidden_choices": sum(g.forbidden for g in graded),
        "missing": sum(g.parsed is None for g in graded),
    }


def unread_note(mode: str, result: Mapping[str, int], where: str | Path) -> str | None:
    """A line where more than half of a mode's outputs were not read or were cut off: its figures say little of the model.

    ``result`` has ``questions``, ``parse_failures`` and ``truncated``; ``where`` are the outputs to look at.
    """
    unread, truncated, total = result["parse_failures"], result["truncated"], result["questions"]
    if 2 * max(unread, truncated) <= total:
        return None
    return (
        f"note: {mode}: no answer was read in {unread} of {total} outputs, {truncated} were cut off at their length limit; "
        f"look at some in {where} before you trust these figures"
    )


def summarize_by(graded: Iterable[Graded], key: str) -> dict[str, dict]:
    """:func:`summarize` for each ``"section"`` or ``"year"`` in exam order; questions without one are left out."""
    groups: dict[str, list[Graded]] = {}
    for one in graded:
        group = getattr(one.question, key)
        if group is not None:
            groups.setdefault(str(group), []).append(one)
    return {group: summarize(members) for group, members in groups.items()}


def score(questions: Sequence[Question], predictions: Mapping[str, Mapping]) -> dict:
    """Score a whole exam: :func:`summarize`, and ``by_section``, ``by_year`` and ``mean_points_per_year``.

    The last three are there only where every question has a section and a year.
    """
    return _with_years(grade(questions, predictions))


def _with_years(graded: list[Graded]) -> dict:
    result = summarize(graded)
    if all(one.question.section and one.question.year for one in graded):
        by_year = summarize_by(graded, "year")
        result["mean_points_per_year"] = result["points"] / len(by_year)
        result["by_year"] = by_year
        result["by_section"] = summarize_by(graded, "section")
    return result


def load_predictions(path: str | Path, questions: Sequence[Question]) -> dict[str, dict]:
    """Read a predictions file: rows with ``problem_id`` and ``prediction`` or ``output``; other fields are ignored.

    Raises :class:`InputError` with file, row and field for broken rows, an id that is not in the exam or occurs twice.
    """
    known = {question.problem_id for question in questions}
    predictions: dict[str, dict] = {}
    row_of: dict[str, int] = {}
    for row, value in read_jsonl(path):
        problem_id = value.get("problem_id", value.get("question_id"))
        if not isinstance(problem_id, str):
            raise bad_input("missing or no text", file=path, row=row, field="problem_id", found=problem_id)
        if problem_id not in known:
            raise bad_input("the exam has no such question", file=path, row=row, field="problem_id", found=problem_id)
        if problem_id in row_of:
            raise bad_input(
                f"the same id as in row {row_of[problem_id]}", file=path, row=row, field="problem_id", found=problem_id
            )
        fields = [name for name in ("prediction", "output") if name in value]
        if len(fields) != 1:
            found = "both" if fields else "neither"
            raise bad_input("one of 'prediction' and 'output' is needed", file=path, row=row, found=found)
        content = value[fields[0]]
        if fields == ["prediction"] and isinstance(content, list) and all(isinstance(part, str) for part in content):
            content = ",".join(content)
        if not isinstance(content, str):
            raise bad_input("wrong type", file=path, row=row, field=fields[0], found=content, expected="a text")
        predictions[problem_id], row_of[problem_id] = {fields[0]: content}, row
    return predictions


def write_atomically(path: str | Path, content: str) -> None:
    """Write a text file so that a reader sees the old content or the new, never a part."""
    path = Path(path)
    with user_path(path, "cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content.encode())


def to_jsonl(rows: Iterable[Mapping]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def run_score(
    exam: str | Path, predictions: str | Path, details: str | Path | None = None, mapping: str | Path | None = None
) -> dict:
    """``medtrain score``: score a predictions file against an exam file; ``details`` gets one row a question."""
    questions = load_questions(exam, mapping=mapping)
    graded = grade(questions, load_predictions(predictions, questions))
    if details is not None:
        write_atomically(details, to_jsonl(one.details() for one in graded))
    return _with_years(graded)
