"""Exams in other forms: which fields of a row hold the question, its choices and its key, and how the key is written.

MedQA (Jin et al. 2020) and MedMCQA (Pal et al. 2022) are known by their fields; any other CSV or JSON Lines file is read
through a :class:`Mapping` from a YAML file.
"""

from __future__ import annotations

import csv
import re
import string
from dataclasses import dataclass, replace
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
        read = {"kinki": _letters, "text_only": lambda flag: _FLAGS.get(flag.strip().lower(), flag)}
        for name in ("points", "kinki", "explanation", "text_only"):
            given = value.get(getattr(self, name))
            if given not in (None, ""):
                mapped[name] = read[name](given) if isinstance(given, str) and name in read else given
        return mapped

    def _choices(self, value: dict, error: partial) -> list[str]:
        if len(self.choices) != 1:
            given = [field for field in self.choices if value.get(field) not in (None, "")]
            for field, expected in zip(given, self.choices, strict=False):
                if field != expected:
                    raise error("empty, and a later choice is not", field=expected, expected="a text")
            return [str(value[field]) for field in given]
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
        if not texts:
            return [str(key)]
        if self.answer_as == "letters":
            return _letters(key) if isinstance(key, str) else key
        keys = [str(part) for part in (key if isinstance(key, list) else [key])]
        if self.answer_as == "text":
            names, problem, expected = [text.strip() for text in texts], "not the text of one choice", " | ".join(texts)
        else:
            keys = [str(int(one)) if re.fullmatch(r"\s*\d+\s*", one) else one for part in keys for one in part.split(",")]
            first = int(self.answer_as == "index1")
            names, problem = [str(first + i) for i in range(len(texts))], "not the number of a choice"
            expected = f"{names[0]} to {names[-1]} (answer_as: {self.answer_as})"
        for one in keys:
            if names.count(one.strip()) != 1:
                raise error(problem, field=self.answer, found=one, expected=expected)
        return [string.ascii_lowercase[names.index(one.strip())] for one in keys]


_MEDQA = Mapping(problem_text=["question"], choices=["options"], answer="answer_idx")
_MEDMCQA = Mapping(problem_text=["question"], choices=["opa", "opb", "opc", "opd"], answer="cop", explanation="exp")


def known_form(path: str | Path, rows: list[tuple[int, dict]]) -> Mapping | None:
    """The mapping of a published form, by the fields of the first row; None for any other. MedMCQA's keys count from 1 in its
    own files and from 0 on the Hugging Face Hub: a file whose keys do not show which is refused."""
    names = rows[0][1].keys() if rows else set()
    if {"question", "options", "answer_idx"} <= names:
        return _MEDQA
    if not {"question", "opa", "opb", "cop"} <= names:
        return None
    keys = {str(value.get("cop")).strip() for _, value in rows}
    if ("0" in keys) == ("4" in keys):
        problem, expected = "whether keys count from 0 or from 1 does not show", "a mapping with answer_as: index0 or index1"
        raise bad_input(problem, file=path, field="cop", found=", ".join(sorted(keys)), expected=expected)
    problem_id = "id" if all(value.get("id") for _, value in rows) else None
    return replace(_MEDMCQA, answer_as="index0" if "0" in keys else "index1", problem_id=problem_id)


def read_csv(path: str | Path) -> list[tuple[int, dict]]:
    """(Line number, column -> text) of each row of a .csv or .tsv file with a header; a cell may hold line breaks. Raises
    :class:`InputError` for a file that cannot be read, is not UTF-8, or has rows of another width than the header."""
    rows = []
    try:
        with user_path(path), open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t" if Path(path).suffix.lower() == ".tsv" else ",", strict=True)
            for value in reader:
                if None in value or None in value.values():
                    expected = f"{len(reader.fieldnames or ())} cells"
                    raise bad_input("not as many cells as the header", file=path, row=reader.line_num, expected=expected)
                rows.append((reader.line_num, value))
    except (UnicodeDecodeError, csv.Error) as error:
        raise bad_input("not a CSV file in UTF-8", file=path, found=str(error)) from error
    return rows


def load_mapping(mapping: str | Path, path: str | Path, rows: list[tuple[int, dict]]) -> Mapping:
    """Read the YAML file ``mapping`` for the exam ``rows`` of ``path``. Raises :class:`InputError` for unknown settings, wrong
    types, and a name that no row has: a choice, the points or the explanations would be lost in silence."""
    tree = read_tree(mapping, ())
    for name in ("problem_text", "choices"):  # one name, or several
        if isinstance(tree.get(name), str):
            tree[name] = [tree[name]]
    if tree.get("problem_text") == []:
        del tree["problem_text"]
    form = build(Mapping, tree, "", mapping, set())
    known = list(dict.fromkeys(name for _, value in rows for name in value))
    for setting, named in vars(form).items():
        for name in [named] if isinstance(named, str) else named or []:
            if rows and setting != "answer_as" and name not in known:
                problem, expected = "no row of the exam has this field", f"one of {', '.join(known)} ({path})"
                raise bad_input(problem, file=mapping, field=setting, found=name, expected=expected)
    return form


def _letters(key: str) -> list[str]:
    """Letters of a key such as "C", "a,c", "A; C" or "AC"."""
    if re.fullmatch(r"\s*[a-zA-Z]{1,26}\s*", key):
        return list(key.strip().lower())
    return [part.lower() for part in re.split(r"[,;、\s]+", key.strip()) if part]
