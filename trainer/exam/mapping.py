"""Exams in other forms: which fields of a row hold the question, its choices and its key, and how the key is written.

MedQA (``question``, ``options``, ``answer_idx``; Jin et al. 2020) and MedMCQA (``question``, ``opa`` to ``opd``, ``cop``;
Pal et al. 2022) are known by their fields; any other CSV or JSON Lines file is read through a :class:`Mapping` from a
YAML file.
"""

from __future__ import annotations

import csv
import io
import re
import string
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal

from medtrain.trainer.config.reading import build, read_tree
from medtrain.trainer.errors import bad_input, user_path

_FLAGS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True)
class Mapping:
    """Names of fields. ``choices`` with one name is a field with a list or with letter -> text; [] has numeric questions."""

    problem_text: list[str]
    choices: list[str]
    answer: str
    answer_as: Literal["letters", "text", "index0", "index1"] = "letters"
    problem_id: str | None = None
    points: str | None = None
    kinki: str | None = None
    explanation: str | None = None
    text_only: str | None = None

    def check_names(self, path: str | Path, rows: list[tuple[int, dict]], mapping: str | Path) -> None:
        """Refuse a name that no row of the exam has: a choice, the points or the explanations would be lost in silence."""
        known = list(dict.fromkeys(name for _, value in rows for name in value))
        for setting in fields(self):
            named = getattr(self, setting.name)
            for name in [named] if isinstance(named, str) else named or []:
                if rows and setting.name != "answer_as" and name not in known:
                    expected = f"one of {', '.join(known)} ({path})"
                    raise bad_input(
                        "no row of the exam has this field", file=mapping, field=setting.name, found=name, expected=expected
                    )

    def apply(self, path: str | Path, row: int, value: dict) -> dict:
        """A row in the form of IgakuQA, to be checked as such. Raises :class:`InputError` with file, row and field."""
        error = partial(bad_input, file=path, row=row)
        one_field = self.choices if len(self.choices) == 1 else []
        for name in (*one_field, self.problem_id, *self.problem_text, self.answer):
            if name is not None and value.get(name) in (None, ""):
                raise error("empty" if name in value else "missing", field=name, expected="as the mapping says")
        texts = self._choices(value, error)
        mapped = {
            "problem_id": str(value[self.problem_id]).strip() if self.problem_id else str(row),
            "problem_text": "\n".join(str(value[name]).strip() for name in self.problem_text),
            "choices": texts,
            "answer": self._answer(value[self.answer], texts[: len(string.ascii_lowercase)], error),
            "points": 1,
        }
        for name in ("points", "kinki", "explanation", "text_only"):
            if (field := getattr(self, name)) and value.get(field) not in (None, ""):
                mapped[name] = value[field]
        if isinstance(mapped.get("kinki"), str):
            mapped["kinki"] = _letters(mapped["kinki"])
        if isinstance(flag := mapped.get("text_only"), str):
            if flag.strip().lower() not in _FLAGS:
                raise error("wrong type", field=self.text_only, found=flag, expected="true or false")
            mapped["text_only"] = _FLAGS[flag.strip().lower()]
        return mapped

    def _choices(self, value: dict, error: partial) -> list[str]:
        if len(self.choices) != 1:
            texts = [value.get(field) for field in self.choices]
            while texts and texts[-1] in (None, ""):
                texts.pop()
            for field, text in zip(self.choices, texts, strict=False):
                if text in (None, ""):
                    raise error("empty, and a later choice is not", field=field, expected="a text")
            return [str(text) for text in texts]
        error = partial(error, field=self.choices[0])
        texts = value[self.choices[0]]
        if isinstance(texts, dict):
            if [str(key).lower() for key in texts] != list(string.ascii_lowercase[: len(texts)]):
                raise error("not the letters from A on", found=list(texts), expected='{"A": ..., "B": ...}')
            texts = list(texts.values())
        if not isinstance(texts, list):
            raise error("wrong type", found=texts, expected="a list of texts, or letters with texts")
        return [str(text) for text in texts]

    def _answer(self, key, texts: list[str], error: partial) -> list[str]:
        """The key as letters of ``texts``, or as one number where there are none."""
        error = partial(error, field=self.answer)
        if not texts:
            return [str(key)]
        if self.answer_as == "letters":
            return _letters(key) if isinstance(key, str) else key
        letters, keys = [], [str(part) for part in (key if isinstance(key, list) else [key])]
        if self.answer_as == "text":
            stripped = [text.strip() for text in texts]
            for text in keys:
                if stripped.count(text.strip()) != 1:
                    raise error("not the text of one choice", found=text, expected=" | ".join(texts))
                letters.append(string.ascii_lowercase[stripped.index(text.strip())])
            return letters
        first = int(self.answer_as == "index1")
        numbers = range(first, first + len(texts))
        for number in (number for part in keys for number in part.split(",")):
            if not re.fullmatch(r"\s*\d{1,2}\s*", number) or int(number) not in numbers:
                expected = f"{numbers[0]} to {numbers[-1]} (answer_as: {self.answer_as})"
                raise error("not the number of a choice", found=number, expected=expected)
            letters.append(string.ascii_lowercase[numbers.index(int(number))])
        return letters


_MEDQA = Mapping(problem_text=["question"], choices=["options"], answer="answer_idx")
_MEDMCQA = Mapping(problem_text=["question"], choices=["opa", "opb", "opc", "opd"], answer="cop", explanation="exp")


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
    problem_id = "id" if all(value.get("id") for _, value in rows) else None
    return replace(_MEDMCQA, answer_as="index0" if "0" in keys else "index1", problem_id=problem_id)


def read_csv(path: str | Path) -> list[tuple[int, dict]]:
    """(Line number, column -> text) of each row of a .csv or .tsv file with a header; a cell may hold line breaks.

    Raises :class:`InputError` for a file that cannot be read, is not UTF-8, or has rows of another width than the header.
    """
    rows, path = [], Path(path)
    with user_path(path):
        content = path.read_bytes()
    try:
        file = io.StringIO(content.decode("utf-8-sig"), newline="")
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        for value in reader:
            if None in value or None in value.values():
                expected = f"{len(reader.fieldnames or ())} cells"
                raise bad_input("not as many cells as the header", file=path, row=reader.line_num, expected=expected)
            rows.append((reader.line_num, value))
    except (UnicodeDecodeError, csv.Error) as error:
        raise bad_input("not a CSV file in UTF-8", file=path, found=str(error)) from error
    return rows


def load_mapping(path: str | Path) -> Mapping:
    """Read a mapping from YAML. Raises :class:`InputError` for unknown names, wrong types and missing ones."""
    tree = read_tree(path, ())
    for name in ("problem_text", "choices"):  # one name, or several
        if isinstance(tree.get(name), str):
            tree[name] = [tree[name]]
    if tree.get("problem_text") == []:
        del tree["problem_text"]
    return build(Mapping, tree, "", path, set())


def _letters(key: str) -> list[str]:
    """Letters of a key such as "C", "a,c", "A; C" or "AC"."""
    if re.fullmatch(r"\s*[a-zA-Z]{1,26}\s*", key):
        return list(key.strip().lower())
    return [part.lower() for part in re.split(r"[,;、\s]+", key.strip()) if part]
