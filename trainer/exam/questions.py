"""Exam questions: reading a file into checked, immutable :class:`Question` objects.

Two forms of row are read as they stand and may be mixed: that of IgakuQA (``problem_id``, ``problem_text``) and that of
JMLE2026-Bench (``question_id``, ``question_text``, ``context``); others through a mapping
(:mod:`medtrain.trainer.exam.mapping`). Whatever is wrong is an :class:`InputError` with file, row and field.
"""

from __future__ import annotations

import json
import re
import string
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from medtrain.trainer.errors import bad_input, user_path
from medtrain.trainer.exam.mapping import Mapping, known_form, load_mapping, read_csv

_NUMBER = re.compile(r"[+-]?[0-9]{1,30}(\.[0-9]{1,30})?")
SLOTS = "①②③④⑤⑥⑦⑧⑨⑩"
# "112A1", "120F-14": number of the examination, section, number of the question.
_EXAM_ID = re.compile(r"(\d{3})([A-Z])-?\d+")


@dataclass(frozen=True)
class Question:
    """One exam question.

    ``choices`` is empty for a numeric question. ``answer`` holds the official key as published: letters, one number, or
    ``("a or d",)`` where either letter counts. ``points`` is 0 for a withdrawn question. ``kinki`` holds the forbidden
    letters (choices that would harm the patient). ``text_only`` is False where the question cannot be answered without
    an image. ``year`` is the calendar year of the examination, where known.
    """

    problem_id: str
    problem_text: str
    choices: tuple[str, ...]
    answer: tuple[str, ...]
    points: int = 1
    text_only: bool = True
    kinki: tuple[str, ...] = ()
    explanation: str | None = None
    year: int | None = None

    @property
    def letters(self) -> str:
        """The letters of the choices, ``"abcde"`` for five of them and ``""`` for a numeric question."""
        return string.ascii_lowercase[: len(self.choices)]

    @property
    def is_numeric(self) -> bool:
        return not self.choices

    @property
    def accepted(self) -> tuple[tuple[str, ...], ...]:
        """The sorted letter sets that are right: one, or several for a key such as ``"a or d"``. Empty if numeric."""
        if self.is_numeric:
            return ()
        if len(self.answer) == 1 and " or " in self.answer[0]:
            return tuple((letter,) for letter in self.answer[0].split(" or "))
        return (tuple(sorted(self.answer)),)

    @property
    def section(self) -> str | None:
        """Section of the examination, such as ``"112-A"``, read from the id; None for ids of another form."""
        match = _EXAM_ID.fullmatch(self.problem_id)
        return f"{match[1]}-{match[2]}" if match else None

    @property
    def sheet_number(self) -> Decimal:
        """The number that a numeric question's key stands for.

        The answer sheet has one box a digit, and some keys list only the digits: "04" for boxes ``①.②`` means 0.4, and
        "130" for ``1, ①②③`` means 1130. The boxes are read from the end of the question ("解答：①.②").
        """
        key = self.answer[0]
        digits = [c for c in key if c.isdigit()]
        boxes = answer_boxes(self.problem_text)
        if boxes is not None and sum(c in SLOTS for c in boxes) == len(digits):
            filling = iter(digits)
            return Decimal("".join(next(filling) if c in SLOTS else c for c in boxes))
        return Decimal(key)


def answer_boxes(problem_text: str) -> str | None:
    """Return the answer-sheet boxes that end a numeric question (``"①.②"``), without blanks and thousands commas."""
    found = re.findall(rf"解答\s*[:：]\s*([\d.．,，\s{SLOTS}]*[{SLOTS}])", problem_text)
    if not found:
        return None
    return re.sub(r"[,，\s]", "", found[-1]).replace("．", ".")


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict]]:
    """Yield (row number from 1, object) for the non-blank lines of a JSONL file.

    Raises :class:`InputError` for a file that cannot be read, bytes that are not UTF-8, broken JSON and rows that are
    not objects.
    """
    path = Path(path)
    with user_path(path):
        content = path.read_bytes()
    # Split on bytes: str.splitlines would also split at U+2028 and the like, which JSON allows inside strings.
    for row, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise bad_input("not UTF-8", file=path, row=row, found=str(error)) from error
        except (ValueError, RecursionError) as error:
            raise bad_input("not valid JSON", file=path, row=row, found=str(error)) from error
        if not isinstance(value, dict):
            raise bad_input("not a JSON object", file=path, row=row, found=value, expected="an object a line")
        yield row, value


def load_questions(path: str | Path, *, points_required: bool = True, mapping: str | Path | None = None) -> list[Question]:
    """Read the questions of an exam file, in file order: JSON Lines, or CSV by its ending .csv or .tsv.

    ``mapping`` is the YAML file that says which fields hold what, where the exam is in none of the known forms.
    ``points_required=False`` is for questions that are not scored (demonstrations, questions that pairs are made from):
    a row without ``points`` then counts one point. Raises :class:`InputError` with file, row and field for broken JSON,
    missing or wrongly typed fields, an answer or forbidden letter outside the choices, an id that occurs twice, and a
    file without questions.
    """
    questions: list[Question] = []
    row_of: dict[str, int] = {}
    suffix = Path(path).suffix.lower()
    if suffix in (".xlsx", ".xls", ".ods", ".parquet"):
        raise bad_input("not a form of exam that is read", file=path, found=suffix, expected=".jsonl, .csv or .tsv")
    is_csv = suffix in (".csv", ".tsv")
    rows = list(read_csv(path) if is_csv else read_jsonl(path))
    form = load_mapping(mapping) if mapping is not None else known_form(path, rows)
    if mapping is not None:
        form.check_names(path, rows, mapping)
    if form is None and is_csv and rows:
        raise bad_input("which columns hold what is not known", file=path, expected="a mapping (docs/exam.md)")
    for row, value in rows:
        mapped = value if form is None else form.apply(path, row, value)
        question = _Row(path, row, mapped, form).question(points_required)
        if question.problem_id in row_of:
            raise bad_input(
                f"the same id as in row {row_of[question.problem_id]}",
                file=path,
                row=row,
                field="question_id" if "question_id" in value and "problem_id" not in value else "problem_id",
                found=question.problem_id,
            )
        row_of[question.problem_id] = row
        questions.append(question)
    if not questions:
        raise bad_input("no questions", file=path, expected="a row a question" if is_csv else "one JSON object a line")
    return questions


class _Row:
    """One row on its way to a :class:`Question`; it remembers where it stands for the error messages."""

    def __init__(self, path: str | Path, row: int, value: dict, form: Mapping | None = None):
        self.path, self.row, self.value, self.form = path, row, value, form

    def error(self, problem: str, field: str, **details):
        theirs = getattr(self.form, field, None)
        field = (theirs if isinstance(theirs, str) else ", ".join(theirs)) if theirs else field
        return bad_input(problem, file=self.path, row=self.row, field=field, **details)

    def field(self, name: str, kind: type, expected: str, default: object = ...):
        value = self.value.get(name, default)
        if value is ...:
            raise self.error("missing", name, expected=expected)
        if value is default or (value is None and default is None):
            return default
        # bool is an int in Python, and true is no number of points.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error("wrong type", name, found=value, expected=expected)
        return value

    def text(self, name: str, default: object = ...) -> str:
        value = self.field(name, str, "a text", default)
        if default is ... and not value.strip():
            raise self.error("empty", name, expected="a text")
        return value

    def question(self, points_required: bool) -> Question:
        if "problem_id" not in self.value and "question_id" in self.value:
            problem_id = self.text("question_id")
            parts = [self.text("context", ""), self.text("question_text")]
            problem_text = "\n".join(part for part in parts if part)
        else:
            problem_id, problem_text = self.text("problem_id"), self.text("problem_text")
        choices = self._choices()
        return Question(
            problem_id=problem_id,
            problem_text=problem_text,
            choices=choices,
            answer=self._answer(choices),
            points=self._points(points_required),
            text_only=self.field("text_only", bool, "true or false", True),
            kinki=self._kinki(choices),
            explanation=self.text("explanation", None),
            year=self._year(problem_id),
        )

    def _choices(self) -> tuple[str, ...]:
        choices = self.field("choices", list, "a list of texts ([] for a numeric question)")
        for choice in choices:
            if not isinstance(choice, str):
                raise self.error("wrong type", "choices", found=choice, expected="a list of texts")
        if len(choices) == 1 or len(choices) > len(string.ascii_lowercase):
            raise self.error("wrong number of choices", "choices", found=f"{len(choices)} choices", expected="none, or 2 to 26")
        return tuple(choices)

    def _answer(self, choices: tuple[str, ...]) -> tuple[str, ...]:
        expected = "a list of letters among the choices" if choices else "a number"
        answer = self.value.get("answer", ...)
        if answer is ...:
            raise self.error("missing", "answer", expected=expected)
        if isinstance(answer, str):
            answer = [answer] if not choices or " or " in answer else answer.split(",")
        if not isinstance(answer, list) or not answer or not all(isinstance(part, str) for part in answer):
            raise self.error("wrong type", "answer", found=self.value["answer"], expected=expected)
        answer = [unicodedata.normalize("NFKC", part).strip() for part in answer]
        if not choices:
            if len(answer) != 1 or not _NUMBER.fullmatch(answer[0]):
                raise self.error("not a number", "answer", found=self.value["answer"], expected="one number")
            return tuple(answer)
        answer = [part.lower() for part in answer]
        letters = string.ascii_lowercase[: len(choices)]
        either = answer[0].split(" or ") if len(answer) == 1 else answer
        for letter in either:
            if len(letter) != 1 or letter not in letters:
                raise self.error("not a letter of the choices", "answer", found=letter, expected=f"letters a to {letters[-1]}")
        if len(set(either)) < len(either):
            raise self.error("a letter occurs twice", "answer", found=self.value["answer"])
        return tuple(answer)

    def _points(self, required: bool) -> int:
        expected = "a whole number of points, 0 or more"
        if "points" not in self.value and not required:
            return 1
        points = self.field("points", (int, str), expected)
        if isinstance(points, str) and not re.fullmatch(r"[0-9]{1,9}", points.strip()):
            raise self.error("not a number", "points", found=points, expected=expected)
        if int(points) < 0:
            raise self.error("negative", "points", found=points, expected=expected)
        return int(points)

    def _kinki(self, choices: tuple[str, ...]) -> tuple[str, ...]:
        letters = string.ascii_lowercase[: len(choices)]
        kinki = self.field("kinki", list, "a list of letters", None) or []
        for letter in kinki:
            if not isinstance(letter, str) or len(letter) != 1 or letter not in letters:
                raise self.error("not a letter of the choices", "kinki", found=letter, expected="a list of letters")
        return tuple(kinki)

    def _year(self, problem_id: str) -> int | None:
        year = self.field("year", int, "a calendar year", None)
        match = _EXAM_ID.fullmatch(problem_id)
        # The Japanese licensing examination is held once a year; its 112th was that of 2018.
        return int(match[1]) + 1906 if year is None and match else year
