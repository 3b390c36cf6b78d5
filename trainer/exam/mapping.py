"""Exams in other forms: which fields of a row hold the question, its choices and its key, and how the key is written.

MedQA (``question``, ``options``, ``answer_idx``; Jin et al. 2020) and MedMCQA (``question``, ``opa`` to ``opd``, ``cop``;
Pal et al. 2022) are known by their fields; any other CSV or JSON Lines file is read through a :class:`Mapping` from a
YAML file.
"""

from __future__ import annotations

import csv
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from medtrain.trainer.config.reading import read_tree
from medtrain.trainer.errors import bad_input

AnswerAs = Literal["letters", "text", "index0", "index1"]


@dataclass(frozen=True)
class Mapping:
    """Names of fields. ``choices`` with one name is a field with a list or with letter -> text; () has numeric questions."""

    problem_text: tuple[str, ...]
    choices: tuple[str, ...]
    answer: str
    answer_as: AnswerAs = "letters"
    problem_id: str | None = None
    points: str | None = None
    kinki: str | None = None
    explanation: str | None = None
    text_only: str | None = None

    def check_names(self, path: str | Path, rows: list[tuple[int, dict]], mapping: str | Path) -> None:
        """Refuse a name that no row of the exam has: a choice, the points or the explanations would be lost in silence."""
        there = list(dict.fromkeys(name for _, value in rows for name in value))
        for setting in fields(self):
            named = getattr(self, setting.name)
            if setting.name == "answer_as" or named is None:
                continue
            for name in (named,) if isinstance(named, str) else named:
                if rows and name not in there:
                    raise bad_input(
                        "no row of the exam has this field",
                        file=mapping,
                        field=setting.name,
                        found=name,
                        expected=f"one of {', '.join(there)} ({path})",
                    )

    def apply(self, path: str | Path, row: int, value: dict) -> dict:
        """A row in the form of IgakuQA, to be checked as such. Raises :class:`InputError` with file, row and field."""

        def refuse(problem: str, field: str, **details):
            raise bad_input(problem, file=path, row=row, field=field, **details)

        def need(field: str):
            if value.get(field) in (None, ""):
                refuse("missing" if field not in value else "empty", field, expected="as the mapping says")
            return value[field]

        named = self._choices(need, value, refuse)
        mapped = {
            "problem_id": str(need(self.problem_id)).strip() if self.problem_id else str(row),
            "problem_text": "\n".join(str(need(field)).strip() for field in self.problem_text),
            "choices": list(named.values()),
            "answer": self._answer(need(self.answer), named, refuse),
            "points": 1,
        }
        for name in ("points", "kinki", "explanation", "text_only"):
            field = getattr(self, name)
            if field is None or value.get(field) in (None, ""):
                continue
            found = value[field]
            if name == "kinki" and isinstance(found, str):
                found = _letters(found)
            if name == "text_only" and isinstance(found, str):
                if found.strip().lower() not in ("true", "false", "1", "0"):
                    refuse("wrong type", field, found=found, expected="true or false")
                found = found.strip().lower() in ("true", "1")
            mapped[name] = found
        return mapped

    def _choices(self, need, value: dict, refuse) -> dict[str, str]:
        """Letter -> text, in order."""
        if len(self.choices) != 1:
            texts = [value.get(field) for field in self.choices]
            while texts and texts[-1] in (None, ""):
                texts.pop()
            for field, text in zip(self.choices, texts, strict=False):
                if text in (None, ""):
                    refuse("empty, and a later choice is not", field, expected="a text")
        else:
            texts = need(self.choices[0])
            if isinstance(texts, dict):
                if [str(key).lower() for key in texts] != list(string.ascii_lowercase[: len(texts)]):
                    refuse("not the letters from A on", self.choices[0], found=list(texts), expected='{"A": ..., "B": ...}')
                texts = list(texts.values())
            if not isinstance(texts, list):
                refuse("wrong type", self.choices[0], found=texts, expected="a list of texts, or letters with texts")
        return dict(zip(string.ascii_lowercase, (t if isinstance(t, str) else str(t) for t in texts), strict=False))

    def _answer(self, key, named: dict[str, str], refuse) -> list[str]:
        if not named:
            return [str(key)]
        if self.answer_as == "letters":
            return _letters(key) if isinstance(key, str) else key
        keys = key if isinstance(key, list) else [key]
        if self.answer_as == "text":
            owners = [[letter for letter, text in named.items() if text.strip() == str(one).strip()] for one in keys]
            for one, letters in zip(keys, owners, strict=True):
                if len(letters) != 1:
                    refuse("not the text of one choice", self.answer, found=one, expected=" | ".join(named.values()))
            return [letters[0] for letters in owners]
        keys = [part for one in keys for part in (one.split(",") if isinstance(one, str) else [one])]
        first, letters = int(self.answer_as == "index1"), list(named)
        for one in keys:
            if not re.fullmatch(r"\d{1,2}", str(one).strip()) or not first <= int(one) < first + len(letters):
                refuse(
                    "not the number of a choice",
                    self.answer,
                    found=one,
                    expected=f"{first} to {first + len(letters) - 1} (answer_as: {self.answer_as})",
                )
        return [letters[int(one) - first] for one in keys]


_MEDQA = Mapping(problem_text=("question",), choices=("options",), answer="answer_idx")
_MEDMCQA = Mapping(
    problem_id="id", problem_text=("question",), choices=("opa", "opb", "opc", "opd"), answer="cop", explanation="exp"
)


def known_form(path: str | Path, rows: list[tuple[int, dict]]) -> Mapping | None:
    """The mapping of a published form, by the fields of the first row; None for any other.

    MedMCQA's keys count from 1 in its own files and from 0 on the Hugging Face Hub: which, is read from all keys of the
    file, and a file that does not show it is refused, not guessed.
    """
    names = rows[0][1].keys() if rows else set()
    if {"question", "options", "answer_idx"} <= names:
        return _MEDQA
    if not {"question", "opa", "opb", "cop"} <= names:
        return None
    keys = {str(value.get("cop")).strip() for _, value in rows}
    if ("0" in keys) == ("4" in keys):
        raise bad_input(
            "whether keys count from 0 or from 1 does not show",
            file=path,
            field="cop",
            found=", ".join(sorted(keys)),
            expected="a mapping with answer_as: index0 or index1",
        )
    form = {f.name: getattr(_MEDMCQA, f.name) for f in fields(Mapping)}
    has_id = all(value.get("id") for _, value in rows)
    return Mapping(**form | {"answer_as": "index0" if "0" in keys else "index1", "problem_id": "id" if has_id else None})


def read_csv(path: str | Path) -> Iterator[tuple[int, dict]]:
    """Yield (line number, column -> text) of a .csv or .tsv file with a header; a cell may hold line breaks.

    Raises :class:`InputError` for a file that cannot be read, is not UTF-8, or has rows of another width than the header.
    """
    path = Path(path)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            for value in reader:
                if None in value or None in value.values():
                    raise bad_input(
                        "not as many cells as the header",
                        file=path,
                        row=reader.line_num,
                        expected=f"{len(reader.fieldnames or ())} cells",
                    )
                yield reader.line_num, value
    except OSError as error:
        raise bad_input("cannot be read", file=path, found=error.strerror or str(error)) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise bad_input("not a CSV file in UTF-8", file=path, found=str(error)) from error


def load_mapping(path: str | Path) -> Mapping:
    """Read a mapping from YAML. Raises :class:`InputError` for unknown names, wrong types and missing ones."""
    tree = read_tree(path, ())
    known = {field.name: field for field in fields(Mapping)}
    for name, found in tree.items():
        if name not in known:
            raise bad_input("unknown key", file=path, field=str(name), expected=", ".join(known))
        several = name in ("problem_text", "choices")
        if not isinstance(found, str) and not (
            several and isinstance(found, list) and all(isinstance(one, str) for one in found)
        ):
            raise bad_input(
                "wrong type",
                file=path,
                field=name,
                found=found,
                expected="the name of a field" + (", or a list of names" if several else ""),
            )
    for name in ("problem_text", "choices", "answer"):
        if name not in tree or (name == "problem_text" and not tree[name]):
            raise bad_input("missing", file=path, field=name, expected="the name of a field")
    if tree.get("answer_as", "letters") not in get_args(AnswerAs):
        raise bad_input(
            "not a known choice", file=path, field="answer_as", found=tree["answer_as"], expected=" | ".join(get_args(AnswerAs))
        )
    lists = {name: (tree[name],) if isinstance(tree[name], str) else tuple(tree[name]) for name in ("problem_text", "choices")}
    return Mapping(**tree | lists)


def _letters(key: str) -> list[str]:
    """Letters of a key such as "C", "a,c", "A; C" or "AC"."""
    if re.fullmatch(r"\s*[a-zA-Z]{1,26}\s*", key):
        return list(key.strip().lower())
    return [part.lower() for part in re.split(r"[,;、\s]+", key.strip()) if part]
