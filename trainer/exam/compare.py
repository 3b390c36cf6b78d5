"""Comparing two evaluations of one exam, question by question: differences, their intervals, and a paired test."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from medtrain.trainer.errors import bad_input, user_path
from medtrain.trainer.exam.prompts import MODES
from medtrain.trainer.files import read_jsonl
from medtrain.trainer.intervals import bootstrap_interval, p_text, paired_p_value

# One evaluation, question by question: problem_id -> (points had, points to be had, whether it was right).
Marks = dict[str, tuple[int, int, bool]]


def compare(a: str | Path, b: str | Path) -> dict:
    """Compare B with A: each an out folder of ``medtrain eval`` or a details file of ``medtrain score``.

    For each mode that both have: ``a`` and ``b`` (points ratios), ``difference`` (b minus a) with ``low`` and ``high``
    (95 %, bootstrap over questions) and ``p_value`` (exact paired test on points), ``only_a`` and ``only_b`` (questions
    that one alone had right) and ``mcnemar_p_value`` (the same test on right and wrong). ``explanation_gap`` has
    the same figures of the two gaps (answer minus explain) where both have both modes. Raises :class:`InputError` where
    there is nothing to compare or the questions are not the same.
    """
    marks_a, marks_b = _marks_by_mode(Path(a)), _marks_by_mode(Path(b))
    modes = [mode for mode in marks_a if mode in marks_b]
    if not modes:
        found = f"{', '.join(marks_a)} in {a}; {', '.join(marks_b)} in {b}"
        raise bad_input("the two have no mode in common", found=found)
    result: dict = {"a": str(a), "b": str(b), "modes": {}}
    for mode in modes:
        one, other = marks_a[mode], marks_b[mode]
        if difference := _other_questions(one, other):
            raise bad_input("not the same questions", file=b, field=mode, found=difference, expected=f"those of {a}")
        right = [other[key][2] - one[key][2] for key in one]
        result["modes"][mode] = {
            "questions": len(one),
            "a": _ratio(one),
            "b": _ratio(other),
            **_difference([other[key][0] - one[key][0] for key in one], one),
            "only_a": right.count(-1),
            "only_b": right.count(1),
            "mcnemar_p_value": paired_p_value(right),
        }
    if all(mode in modes for mode in MODES):
        gap_a, gap_b = (
            {key: marks["answer"][key][0] - marks["explain"][key][0] for key in marks["answer"]} for marks in (marks_a, marks_b)
        )
        result["explanation_gap"] = {
            "a": _ratio(marks_a["answer"]) - _ratio(marks_a["explain"]),
            "b": _ratio(marks_b["answer"]) - _ratio(marks_b["explain"]),
            **_difference([gap_b[key] - gap_a[key] for key in gap_a], marks_a["answer"]),
        }
    result["settings_that_differ"] = _settings_that_differ(Path(a), Path(b))
    return result


def _max_points(marks: Marks) -> list[int]:
    return [max_points for _, max_points, _ in marks.values()]


def _ratio(marks: Marks) -> float:
    return sum(points for points, _, _ in marks.values()) / (sum(_max_points(marks)) or 1)


def _difference(points: list[int], marks: Marks) -> dict:
    low, high = bootstrap_interval(points, _max_points(marks))
    ratio = sum(points) / (sum(_max_points(marks)) or 1)
    return {"difference": ratio, "low": low, "high": high, "p_value": paired_p_value(points)}


def _other_questions(one: Marks, other: Marks) -> str | None:
    """In what the questions of ``other`` are not those of ``one``."""
    if alone := sorted(other.keys() ^ one.keys()):
        return f"{len(alone)} questions that only one has, such as {alone[0]}"
    changed = next((key for key in one if one[key][1] != other[key][1]), None)
    return f"other points for question {changed}" if changed is not None else None


def _marks_by_mode(path: Path) -> dict[str, Marks]:
    """The marks of each mode; a details file has one, called predictions."""
    files = {mode: path / f"outputs-{mode}.jsonl" for mode in MODES}
    with user_path(path):
        if path.is_file():
            files = {"predictions": path}
        marks = {name: _marks(file) for name, file in files.items() if file.is_file()}
    if not marks:
        expected = "an out folder of medtrain eval, or a details file of medtrain score"
        raise bad_input("no finished exam here", file=path, expected=expected)
    return marks


def _marks(file: Path) -> Marks:
    """The marks in a file, sorted by question, so that A's and B's meet whatever the order of their files."""
    marks: Marks = {}
    for row, value in read_jsonl(file):
        error = partial(bad_input, file=file, row=row)
        for name, kind in (("problem_id", str), ("points", int), ("max_points", int), ("correct", bool)):
            if not isinstance(found := value.get(name), kind):
                expected = "a row of medtrain eval's outputs or medtrain score's details"
                raise error("missing or of another type", field=name, found=found, expected=expected)
        problem_id = value["problem_id"]
        if problem_id in marks:
            raise error("this question twice", field="problem_id", found=problem_id)
        marks[problem_id] = (value["points"], value["max_points"], value["correct"])
    return dict(sorted(marks.items()))


def _settings_that_differ(a: Path, b: Path) -> list[str]:
    """Names of the settings, besides the model, in which two out folders differ: what else a difference may come from."""
    try:
        one, other = (json.loads((folder / "run.json").read_text(encoding="utf-8"))["identity"] for folder in (a, b))
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return sorted(name for name in {*one, *other} - {"model"} if one.get(name) != other.get(name))


def as_text(result: dict) -> str:
    """The comparison as a few lines for the screen."""
    lines = [f"A = {result['a']}", f"B = {result['b']}", ""]
    lines.append(f"{'':16}{'A':>8}{'B':>8}{'B - A':>8}  {'95 %':18}{'p':>7}   right in one alone")
    gap = {"gap": result["explanation_gap"]} if "explanation_gap" in result else {}
    for name, row in (result["modes"] | gap).items():
        alone = f"   A {row['only_a']}, B {row['only_b']}" if "only_a" in row else ""
        interval = f"[{row['low']:+.3f}, {row['high']:+.3f}]"
        ratios = f"{name:16}{row['a']:8.3f}{row['b']:8.3f}{row['difference']:+8.3f}"
        lines.append(f"{ratios}  {interval:18}{p_text(row['p_value']):>7}{alone}")
    questions = next(iter(result["modes"].values()))["questions"]
    lines.append(
        f"Shares of points over the same {questions} questions; gap = answer - explain; p: exact paired permutation test."
    )
    if result["settings_that_differ"]:
        lines.append(f"Besides the model these settings differ: {', '.join(result['settings_that_differ'])}")
    return "\n".join(lines)
