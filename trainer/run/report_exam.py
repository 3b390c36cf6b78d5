"""The exam's part of a report: points over steps with intervals, the table, and explanations before and after."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from medtrain.trainer.intervals import bootstrap_interval
from medtrain.trainer.run.report_charts import Series, chart

MODES = {"answer": "answer only", "explain": "with explanation"}
_NUM_SAMPLES = 6

# Rows of outputs (medtrain.trainer.exam.during) by step, then by mode; and (name, exam.json) of whole examinations.
Exams = dict[int, dict[str, list[dict]]]
Evals = Sequence[tuple[str, dict[str, Any]]]
Figure = tuple[float, float, float]  # a share of points and its interval


def share(rows: Sequence[dict], less: Sequence[dict] | None = None) -> Figure:
    """The share of points, or its difference to ``less`` (the same questions), with its 95 % bootstrap interval."""
    others = [False] * len(rows) if less is None else [row["correct"] for row in less]
    points = [row["points"] for row in rows]
    gained = [(row["correct"] - other) * row["points"] for row, other in zip(rows, others, strict=True)]
    return sum(gained) / (sum(points) or 1), *bootstrap_interval(gained, points)


def exam_charts(exams: Exams) -> list[dict | None]:
    if not exams:
        return []

    def line(name: str, figures: Iterable[Figure]) -> Series:
        return Series(name, [*exams], *zip(*figures, strict=True))

    def rate(name: str, field: str) -> Series:
        outputs = [rows["explain"] for rows in exams.values()]
        return Series(name, [*exams], [sum(bool(row[field]) for row in rows) / len(rows) for rows in outputs])

    note = f"{len(next(iter(exams.values()))['answer'])} questions; band: 95 % interval"
    shares = [line(name, (share(rows[mode]) for rows in exams.values())) for mode, name in MODES.items()]
    gap = line("gap", (share(rows["answer"], rows["explain"]) for rows in exams.values()))
    return [
        chart("Share of points", shares, note=note),
        chart("Explanation gap", [gap], note=note, zero=True),
        chart(
            "Explanations cut off or without an answer, share",
            [rate("cut off", "truncated"), rate("no answer read", "failure")],
            zero=True,
        ),
    ]


def exam_table(exams: Exams, evals: Evals) -> list[tuple]:
    """(when, mode, share with interval, points, cut off, no answer read): the first and last step, and each eval."""
    lines: list[tuple] = []
    for step in [step for step in exams if step in (min(exams), max(exams))]:
        for mode, name in MODES.items():
            rows = exams[step][mode]
            had, most = (sum(row["points"] for row in rows if row["correct"] or all_) for all_ in (False, True))
            unread = sum(row["failure"] is not None for row in rows)
            cut_off = sum(row["truncated"] for row in rows)
            lines.append((f"step {step:,}", name, _interval(*share(rows)), f"{had} of {most}", cut_off, unread))
        gap = share(exams[step]["answer"], exams[step]["explain"])
        lines.append((f"step {step:,}", "gap", _interval(*gap, sign="+"), "", "", ""))
    for name, result in evals:
        by_choice = ", by choice log-prob" if result.get("settings", {}).get("method") == "choice_logp" else ""
        for mode, one in ((mode, result[mode]) for mode in MODES if mode in result):
            value = _interval(*(one.get(f"points_ratio{end}") for end in ("", "_low", "_high")))
            points, cut_off = f"{one['points']} of {one['max_points']}", one.get("truncated", "")
            lines.append((f"eval: {name}", MODES[mode] + by_choice, value, points, cut_off, one["parse_failures"]))
        if result.get("explanation_gap") is not None:
            value = _interval(*(result.get(f"explanation_gap{end}") for end in ("", "_low", "_high")), sign="+")
            lines.append((f"eval: {name}", "gap", value, "", "", ""))
    return lines


def _interval(value: Any, low: float | None, high: float | None, sign: str = "") -> str:
    return f"{value:{sign}.3f}" + (f" [{low:{sign}.3f}, {high:{sign}.3f}]" if low is not None else "")


def exam_samples(exams: Exams) -> list[tuple[dict, dict]]:
    """Outputs with explanation at the first and last step, one of each kind of change in turn, so that what became worse
    is shown as well as what became better; those that changed come first."""
    if len(exams) < 2:
        return []
    first, last = ([*exams.values()][place]["explain"] for place in (0, -1))
    kinds: dict[tuple[bool, bool], list] = {(False, True): [], (True, False): [], (True, True): [], (False, False): []}
    for before, after in zip(first, last, strict=True):
        kinds[before["correct"], after["correct"]].append((before, after))
    chosen = [kind[turn] for turn in range(_NUM_SAMPLES) for kind in kinds.values() if turn < len(kind)][:_NUM_SAMPLES]
    return sorted(chosen, key=lambda pair: pair[0]["correct"] == pair[1]["correct"])


def exam_warnings(exams: Exams, evals: Evals, much: float = 0.05) -> Iterator[str]:
    """Invalid figures, and of the last exam the modes of which more than ``much`` was cut off or without an answer."""
    for step, exam in exams.items():
        if any("invalid" in row for row in exam["explain"]):
            yield f"exam at step {step:,}: its figures are invalid: {exam['explain'][0]['invalid']}"
    yield from (f"eval {name}: its figures are invalid: {result['invalid']}" for name, result in evals if "invalid" in result)
    for step in [*exams][-1:]:
        for mode, rows in exams[step].items():
            cut_off, unread = (sum(bool(row[name]) for row in rows) for name in ("truncated", "failure"))
            for number, problem in ((cut_off, "were cut off at their length limit"), (unread, "have no readable answer")):
                if number > much * len(rows):
                    yield f"exam at step {step:,}, {MODES[mode]}: {number} of {len(rows)} outputs {problem}"
