"""Comparing two evaluations of one exam, question by question: differences, their intervals, and a paired test."""

from __future__ import annotations

import json
from pathlib import Path

from medtrain.trainer.errors import bad_input, user_path
from medtrain.trainer.exam.prompts import MODES
from medtrain.trainer.files import read_jsonl
from medtrain.trainer.intervals import bootstrap_interval, p_text, paired_p_value

# One evaluation, question by question: problem_id -> (points had, points to be had, whether it was right).
Marks = dict[str, tuple[int, int, bool]]


def compare(a: str | Path, b: str | Path) -> dict:
    """Compare B with A: each an out folder of ``medtrain eval`` or a details file of ``medtrain score``.

    For each mode that both have: points ratios ``a`` and ``b``, ``difference`` (b minus a) with ``low`` and ``high`` (95 %,
    bootstrap over questions) and ``p_value`` (exact paired test on points), ``only_a`` and ``only_b`` (questions that one
    alone had right) and ``mcnemar_p_value`` (the same test on right and wrong). ``explanation_gap`` has the same figures of
    the gaps (answer minus explain). Raises :class:`InputError` where there is nothing to compare or the questions differ.
    """
    marks_a, marks_b = _marks_by_mode(Path(a)), _marks_by_mode(Path(b))
    modes = [mode for mode in marks_a if mode in marks_b]
    if not modes:
        found = f"{', '.join(marks_a)} in {a}; {', '.join(marks_b)} in {b}"
        raise bad_input("the two have no mode in common", found=found)
    result: dict = {"a": str(a), "b": str(b), "modes": {}}
    for mode in modes:
        one, other = marks_a[mode], marks_b[mode]
        alone = sorted(other.keys() ^ one.keys())
        changed = [key for key in one if not alone and one[key][1] != other[key][1]]
        if alone or changed:
            found = f"{len(alone)} questions that only one has, such as {alone[0]}" if alone else None
            found = found or f"other points for question {changed[0]}"
            raise bad_input("not the same questions", file=b, field=mode, found=found, expected=f"those of {a}")
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
        (answer_a, explain_a), (answer_b, explain_b) = ([marks[mode] for mode in MODES] for marks in (marks_a, marks_b))
        changes = [answer_b[key][0] - explain_b[key][0] - answer_a[key][0] + explain_a[key][0] for key in answer_a]
        gaps = {"a": _ratio(answer_a) - _ratio(explain_a), "b": _ratio(answer_b) - _ratio(explain_b)}
        result["explanation_gap"] = gaps | _difference(changes, answer_a)
    result["settings_that_differ"] = _settings_that_differ(Path(a), Path(b))
    return result


def _ratio(marks: Marks) -> float:
    return sum(points for points, _, _ in marks.values()) / (sum(most for _, most, _ in marks.values()) or 1)


def _difference(points: list[int], marks: Marks) -> dict:
    max_points = [most for _, most, _ in marks.values()]
    low, high = bootstrap_interval(points, max_points)
    return {"difference": sum(points) / (sum(max_points) or 1), "low": low, "high": high, "p_value": paired_p_value(points)}


def _marks_by_mode(path: Path) -> dict[str, Marks]:
    """The marks of each mode; a details file has one, called predictions."""
    with user_path(path):
        files = {"predictions": path} if path.is_file() else {mode: path / f"outputs-{mode}.jsonl" for mode in MODES}
        marks = {name: _marks(file) for name, file in files.items() if file.is_file()}
    if not marks:
        expected = "an out folder of medtrain eval, or a details file of medtrain score"
        raise bad_input("no finished exam here", file=path, expected=expected)
    return marks


def _marks(file: Path) -> Marks:
    """The marks in a file, sorted by question, so that A's and B's meet whatever the order of their files."""
    marks: Marks = {}
    for row, value in read_jsonl(file):
        for name, kind in (("problem_id", str), ("points", int), ("max_points", int), ("correct", bool)):
            if not isinstance(found := value.get(name), kind):
                expected = "a row of medtrain eval's outputs or medtrain score's details"
                raise bad_input("missing or of another type", file=file, row=row, field=name, found=found, expected=expected)
        marks[value["problem_id"]] = (value["points"], value["max_points"], value["correct"])
    return dict(sorted(marks.items()))


def _settings_that_differ(a: Path, b: Path) -> list[str]:
    """Names of the settings, besides the model, in which two out folders differ: what else a difference may come from."""
    files = [folder / "run.json" for folder in (a, b)]
    if not all(file.is_file() for file in files):
        return []
    one, other = (json.loads(file.read_bytes())["identity"] for file in files)
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
