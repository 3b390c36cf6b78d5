"""Comparing two sittings of one exam, question by question: differences, their intervals, and a paired test."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from medtrain.trainer.errors import bad_input, user_path
from medtrain.trainer.exam.prompts import MODES
from medtrain.trainer.files import read_jsonl
from medtrain.trainer.intervals import bootstrap_interval, p_text, paired_p_value


@dataclass(frozen=True)
class Marks:
    """What one sitting gave, a question: points had, points to be had, and whether it was right."""

    points: dict[str, int]
    max_points: dict[str, int]
    correct: dict[str, bool]

    @property
    def ratio(self) -> float:
        total = sum(self.max_points.values())
        return sum(self.points.values()) / total if total else 0.0


def compare(a: str | Path, b: str | Path) -> dict:
    """Compare B with A: each an out folder of ``medtrain eval`` or a details file of ``medtrain score``.

    For each mode that both have: ``a`` and ``b`` (points ratios), ``difference`` (b minus a) with ``low`` and ``high``
    (95 %, bootstrap over questions) and ``p_value`` (exact paired test on points), ``only_a`` and ``only_b`` (questions
    that one alone had right) and ``mcnemar_p_value`` (the same test on right and wrong). ``explanation_gap`` has
    the same figures of the two gaps (answer minus explain) where both sat both modes. Raises :class:`InputError` where
    there is nothing to compare or the questions are not the same.
    """
    ours, theirs = _sitting(Path(a)), _sitting(Path(b))
    modes = [mode for mode in ours if mode in theirs]
    if not modes:
        found = f"{', '.join(ours)} in {a}; {', '.join(theirs)} in {b}"
        raise bad_input("the two have no mode in common", found=found)
    result: dict = {"a": str(a), "b": str(b), "modes": {}}
    for mode in modes:
        one, other = ours[mode], theirs[mode]
        if one.max_points != other.max_points:
            raise bad_input("not the same questions", file=b, field=mode, **_differing(one, other, a))
        right = [other.correct[i] - one.correct[i] for i in one.points]
        result["modes"][mode] = {
            "questions": len(one.points),
            "a": one.ratio,
            "b": other.ratio,
            **_difference([other.points[i] - one.points[i] for i in one.points], one.max_points),
            "only_a": right.count(-1),
            "only_b": right.count(1),
            "mcnemar_p_value": paired_p_value(right),
        }
    if all(mode in modes for mode in MODES):
        gaps = [{i: s["answer"].points[i] - s["explain"].points[i] for i in s["answer"].points} for s in (ours, theirs)]
        result["explanation_gap"] = {
            "a": ours["answer"].ratio - ours["explain"].ratio,
            "b": theirs["answer"].ratio - theirs["explain"].ratio,
            **_difference([gaps[1][i] - gaps[0][i] for i in gaps[0]], ours["answer"].max_points),
        }
    result["settings_that_differ"] = _settings_that_differ(Path(a), Path(b))
    return result


def _difference(differences: list[int], max_points: dict[str, int]) -> dict:
    low, high = bootstrap_interval(differences, list(max_points.values()))
    total = sum(max_points.values())
    ratio = sum(differences) / total if total else 0.0
    return {"difference": ratio, "low": low, "high": high, "p_value": paired_p_value(differences)}


def _differing(one: Marks, other: Marks, a: str | Path) -> dict:
    alone = sorted(set(other.max_points) ^ set(one.max_points))
    if alone:
        return {"found": f"{len(alone)} questions that only one has, such as {alone[0]}", "expected": f"those of {a}"}
    changed = next(i for i in one.max_points if one.max_points[i] != other.max_points[i])
    return {"found": f"other points for question {changed}", "expected": f"those of {a}"}


def _sitting(path: Path) -> dict[str, Marks]:
    """The marks of each mode; a details file has one, called predictions."""
    files = {mode: path / f"outputs-{mode}.jsonl" for mode in MODES}
    with user_path(path):
        if path.is_file():
            files = {"predictions": path}
        found = {name: _marks(file) for name, file in files.items() if file.is_file()}
    if not found:
        raise bad_input(
            "no finished exam here", file=path, expected="an out folder of medtrain eval, or a details file of medtrain score"
        )
    return found


def _marks(file: Path) -> Marks:
    marks = Marks({}, {}, {})
    for row, value in read_jsonl(file):
        for name, kind in (("problem_id", str), ("points", int), ("max_points", int), ("correct", bool)):
            if not isinstance(value.get(name), kind):
                raise bad_input(
                    "missing or of another type",
                    file=file,
                    row=row,
                    field=name,
                    found=value.get(name),
                    expected="a row of medtrain eval's outputs or medtrain score's details",
                )
        if value["problem_id"] in marks.points:
            raise bad_input("this question twice", file=file, row=row, field="problem_id", found=value["problem_id"])
        marks.points[value["problem_id"]] = value["points"]
        marks.max_points[value["problem_id"]] = value["max_points"]
        marks.correct[value["problem_id"]] = value["correct"]
    # In one order, so that A's and B's questions meet whatever the order of their files.
    return Marks(*(dict(sorted(one.items())) for one in (marks.points, marks.max_points, marks.correct)))


def _settings_that_differ(a: Path, b: Path) -> list[str]:
    """Names of the settings, beside the model, in which two out folders differ: what else a difference may come from."""
    identities = []
    for folder in (a, b):
        try:
            identities.append(json.loads((folder / "run.json").read_text(encoding="utf-8"))["identity"])
        except (OSError, ValueError, KeyError, TypeError):
            return []
    one, other = identities
    return sorted(name for name in {*one, *other} - {"model"} if one.get(name) != other.get(name))


def as_text(result: dict) -> str:
    """The comparison as a few lines for the screen."""
    lines = [f"A = {result['a']}", f"B = {result['b']}", ""]
    lines.append(f"{'':16}{'A':>8}{'B':>8}{'B - A':>8}  {'95 %':18}{'p':>7}   right in one alone")
    rows = dict(result["modes"])
    if "explanation_gap" in result:
        rows["gap"] = result["explanation_gap"]
    for name, row in rows.items():
        alone = f"   A {row['only_a']}, B {row['only_b']}" if "only_a" in row else ""
        interval = f"[{row['low']:+.3f}, {row['high']:+.3f}]"
        lines.append(
            f"{name:16}{row['a']:8.3f}{row['b']:8.3f}{row['difference']:+8.3f}  {interval:18}{p_text(row['p_value']):>7}{alone}"
        )
    lines.append(
        f"Shares of points over the same {next(iter(result['modes'].values()))['questions']} questions; gap = "
        "answer - explain; p: exact paired permutation test."
    )
    if result["settings_that_differ"]:
        lines.append(f"Beside the model these settings differ: {', '.join(result['settings_that_differ'])}")
    return "\n".join(lines)
