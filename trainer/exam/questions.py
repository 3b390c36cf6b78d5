"""Exam questions: reading a file into checked, immutable :class:`Question` objects.

The forms of IgakuQA (``problem_id``, ``problem_text``) and JMLE2026-Bench (``question_id``, ``question_text``, ``context``)
are read as they stand and may be mixed; others through a mapping (:mod:`medtrain.trainer.exam.mapping`).
"""

from __future__ import annotations

import re
import string
import unicodedata
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from medtrain.trainer.errors import bad_input
from medtrain.trainer.exam.mapping import Mapping, known_form, load_mapping, read_csv
from medtrain.trainer.files import read_jsonl

_NUMBER = re.compile(r"[+-]?[0-9]{1,30}(\.[0-9]{1,30})?")
SLOTS = "①②③④⑤⑥⑦⑧⑨⑩"
_EXAM_ID = re.compile(r"(\d{3})([A-Z])-?\d+")  # "112A1", "120F-14": numbers of the examination and the question, and section


@dataclass(frozen=True)
class Question:
    """One exam question."""

    problem_id: str
    problem_text: str
    choices: tuple[str, ...]  # empty for a numeric question
    answer: tuple[str, ...]  # the official key as published: letters, one number, or ("a or d",) where either counts
    points: int = 1  # 0 for a withdrawn question
    text_only: bool = True  # False where the question cannot be answered without an image
    kinki: tuple[str, ...] = ()  # forbidden letters: choices that would harm the patient
    explanation: str | None = None
    year: int | None = None  # of the examination

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
        """The number that a numeric question's key stands for. Some keys list only the digits for the boxes of the answer sheet,
        which end the question ("解答：①.②"): "04" for boxes ``①.②`` means 0.4, and "130" for ``1, ①②③`` means 1130."""
        return Decimal(self.fill_boxes([c for c in self.answer[0] if c.isdigit()]) or self.answer[0])

    def fill_boxes(self, digits: list[str]) -> str | None:
        """The number that ``digits`` make in the answer-sheet boxes (``"①.②"``) that end a numeric question; None where there
        are not as many boxes."""
        found = re.findall(rf"解答\s*[:：]\s*([\d.．,，\s{SLOTS}]*[{SLOTS}])", self.problem_text)
        boxes = re.sub(r"[,，\s]", "", found[-1]).replace("．", ".") if found else ""
        if not boxes or sum(c in SLOTS for c in boxes) != len(digits):
            return None
        filling = iter(digits)
        return "".join(next(filling) if c in SLOTS else c for c in boxes)


def load_questions(path: str | Path, *, points_required: bool = True, mapping: str | Path | None = None) -> list[Question]:
    """Read the questions of an exam file, in file order: JSON Lines, or CSV by its ending .csv or .tsv. Where nothing is scored
    (demonstrations, pairs), ``points_required`` is False: a row without ``points`` counts one point. ``mapping`` is a YAML file,
    for an exam in none of the known forms. Raises :class:`InputError` with file, row and field for whatever is wrong."""
    suffix = Path(path).suffix.lower()
    if suffix in (".xlsx", ".xls", ".ods", ".parquet"):
        raise bad_input("not a form of exam that is read", file=path, found=suffix, expected=".jsonl, .csv or .tsv")
    is_csv = suffix in (".csv", ".tsv")
    rows = list(read_csv(path) if is_csv else read_jsonl(path))
    form = load_mapping(mapping, path, rows) if mapping is not None else known_form(path, rows)
    if form is None and is_csv and rows:
        raise bad_input("which columns hold what is not known", file=path, expected="a mapping (docs/exam.md)")
    questions: dict[str, Question] = {}
    row_of: dict[str, int] = {}
    for number, value in rows:
        row = RowReader(path, number, value if form is None else form.apply(path, number, value), form)
        question = row.question(points_required)
        row.check_new(question.problem_id, "problem_id" if "problem_id" in row.value else "question_id", row_of)
        questions[question.problem_id] = question
    if not questions:
        raise bad_input("no questions", file=path, expected="one question per row")
    return list(questions.values())


@dataclass(frozen=True)
class RowReader:
    """One row of a file, whose fields are checked as they are read."""

    path: str | Path
    row: int
    value: dict[str, Any]
    form: Mapping | None = None

    def require(self, condition: object, problem: str, field: str, found: object = None, expected: str | None = None) -> None:
        """Raise the error unless ``condition``."""
        if not condition:
            names = getattr(self.form, field, None) or field  # as the exam's own form calls it
            field = names if isinstance(names, str) else ", ".join(names)
            raise bad_input(problem, file=self.path, row=self.row, field=field, found=found, expected=expected)

    def check_new(self, problem_id: str, field: str, row_of: dict[str, int]) -> None:
        """Note the row of a question's id; an error where an earlier one has it."""
        first = row_of.setdefault(problem_id, self.row)
        self.require(first == self.row, f"the same id as in row {first}", field, problem_id)

    def field(self, name: str, kinds: type | tuple[type, ...], expected: str, *default: Any) -> Any:
        """The value of a field, or the ``default``, if there is one: of a missing field; if it is None, also of a null."""
        if default and (name not in self.value or (self.value[name] is None and default[0] is None)):
            return default[0]
        self.require(name in self.value, "missing", name, expected=expected)
        value = self.value[name]
        # bool is an int in Python, and true is no number of points.
        fits = isinstance(value, kinds) and (kinds is bool or not isinstance(value, bool))
        self.require(fits, "wrong type", name, value, expected)
        return value

    def text(self, name: str) -> str:
        value = self.field(name, str, "a text")
        self.require(value.strip(), "empty", name, expected="a text")
        return value

    def question(self, points_required: bool) -> Question:
        jmle2026 = "question_id" in self.value and "problem_id" not in self.value
        names = ("question_id", "question_text") if jmle2026 else ("problem_id", "problem_text")
        problem_id, problem_text = map(self.text, names)
        if jmle2026 and (context := self.field("context", str, "a text", "")):
            problem_text = f"{context}\n{problem_text}"
        choices = self.field("choices", list, "a list of texts ([] for a numeric question)")
        wrong = [choice for choice in choices if not isinstance(choice, str)]
        self.require(not wrong, "wrong type", "choices", *wrong[:1], expected="a list of texts")
        letters = string.ascii_lowercase[: len(choices)]
        fits = len(choices) == len(letters) != 1
        self.require(fits, "wrong number of choices", "choices", f"{len(choices)} choices", "none, or 2 to 26")
        kinki = self.field("kinki", list, "a list of letters", None) or []
        self._check_letters("kinki", kinki, letters, "a list of letters")
        year = self.field("year", int, "a calendar year", None)
        if year is None and (match := _EXAM_ID.fullmatch(problem_id)):
            year = int(match[1]) + 1906  # the Japanese licensing examination is held once a year; its 112th was that of 2018
        return Question(
            problem_id=problem_id,
            problem_text=problem_text,
            choices=tuple(choices),
            answer=self._answer(letters),
            points=self._points(points_required),
            text_only=self.field("text_only", bool, "true or false", True),
            kinki=tuple(kinki),
            explanation=self.field("explanation", str, "a text", None),
            year=year,
        )

    def _answer(self, letters: str) -> tuple[str, ...]:
        expected = "a list of letters among the choices" if letters else "a number"
        given = answer = self.field("answer", (str, list), expected)
        if isinstance(given, str):
            answer = [given] if not letters or " or " in given else given.split(",")
        self.require(answer and all(isinstance(part, str) for part in answer), "wrong type", "answer", given, expected)
        answer = [unicodedata.normalize("NFKC", part).strip().lower() for part in answer]
        if not letters:
            fits = len(answer) == 1 and _NUMBER.fullmatch(answer[0])
            self.require(fits, "not a number", "answer", given, "one number")
            return tuple(answer)
        either = answer[0].split(" or ") if len(answer) == 1 else answer
        self._check_letters("answer", either, letters, f"letters a to {letters[-1]}")
        self.require(len(set(either)) == len(either), "a letter occurs twice", "answer", given)
        return tuple(answer)

    def _points(self, required: bool) -> int:
        expected, default = "a whole number of points, 0 or more", () if required else (1,)
        points = self.field("points", (int, str), expected, *default)
        self.require(re.fullmatch(r"-?[0-9]{1,9}", str(points).strip()), "not a number", "points", points, expected)
        self.require(int(points) >= 0, "negative", "points", points, expected)
        return int(points)

    def _check_letters(self, name: str, given: list, letters: str, expected: str) -> None:
        wrong = [letter for letter in given if letter not in list(letters)]
        self.require(not wrong, "not a letter of the choices", name, *wrong[:1], expected=expected)
