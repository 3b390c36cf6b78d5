"""The exam's part of a report: points over steps with intervals, the table, and explanations before and after."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from medtrain.trainer.intervals import bootstrap_interval
from medtrain.trainer.run.report_charts import Series, line_chart, series
from medtrain.trainer.run.report_page import charts, section, table

MODES = {"answer": "answer only", "explain": "with explanation"}
_NUM_SAMPLES = 6

# Rows of outputs (medtrain.trainer.exam.during) by step, then by mode; and (name, exam.json) of whole examinations.
Exams = dict[int, dict[str, list[dict]]]
Evals = Sequence[tuple[str, dict[str, Any]]]

_ABOUT = (
    "Shares of points, sat greedily by the model in training; bands and brackets: 95 % bootstrap intervals over the "
    "questions. The gap is what having to explain costs."
)


def exam_sections(exams: Exams, evals: Evals) -> list[str]:
    """HTML of the exam and of the samples, ``""`` where there is nothing to show."""
    return [
        section("Exam", charts(*_charts(exams)), _table(exams, evals), about=_ABOUT),
        section("Explanations before and after", *_samples(exams), about=_about_samples(exams)),
    ]


def points_interval(rows: Sequence[dict], against: Sequence[dict] | None = None) -> tuple[float, float]:
    """95 % bootstrap interval over questions of the share of points, or with ``against`` (the same questions) of the
    difference to it. The same rows give the same interval."""
    others = [False] * len(rows) if against is None else [row["correct"] for row in against]
    points = [row["points"] for row in rows]
    gained = [(row["correct"] - other) * row["points"] for row, other in zip(rows, others, strict=True)]
    return bootstrap_interval(gained, points)


def _share(rows: Sequence[dict]) -> float:
    return sum(row["points"] for row in rows if row["correct"]) / (sum(row["points"] for row in rows) or 1)


def _charts(exams: Exams) -> list[str]:
    if not exams:
        return []
    lines = []
    for color, (mode, name) in enumerate(MODES.items(), start=1):
        points = [(step, _share(rows[mode]), *points_interval(rows[mode])) for step, rows in exams.items()]
        lines.append(Series(name, tuple(points), color, marks=True))
    gap = [
        (step, _share(rows["answer"]) - _share(rows["explain"]), *points_interval(rows["answer"], rows["explain"]))
        for step, rows in exams.items()
    ]
    num = len(next(iter(exams.values()))["answer"])
    note = f"{num} questions; band: 95 % interval"
    return [
        line_chart("Share of points", lines, note=note),
        line_chart("Explanation gap", [Series("gap", tuple(gap), 4, marks=True)], note=note, zero=True),
        line_chart(
            "Explanations cut off or without an answer, share",
            [
                series("cut off", _shares_of(exams, "truncated"), "share", color=2, marks=True),
                series("no answer read", _shares_of(exams, "failure"), "share", color=6, marks=True),
            ],
            zero=True,
        ),
    ]


def _shares_of(exams: Exams, name: str) -> list[dict]:
    return [
        {"step": step, "share": sum(bool(row[name]) for row in rows["explain"]) / len(rows["explain"])}
        for step, rows in exams.items()
    ]


def _table(exams: Exams, evals: Evals) -> str:
    lines = []
    ends = [step for step in exams if step in (min(exams), max(exams))]
    for step in ends:
        for mode, name in MODES.items():
            rows = exams[step][mode]
            low, high = points_interval(rows)
            points = sum(row["points"] for row in rows if row["correct"])
            total = sum(row["points"] for row in rows)
            lines.append(
                [
                    f"step {step:,}",
                    name,
                    f"{_share(rows):.3f} [{low:.3f}, {high:.3f}]",
                    f"{points} of {total}",
                    sum(row["truncated"] for row in rows),
                    sum(row["failure"] is not None for row in rows),
                ]
            )
        answer, explain = (exams[step][mode] for mode in MODES)
        low, high = points_interval(answer, explain)
        value = f"{_share(answer) - _share(explain):+.3f} [{low:+.3f}, {high:+.3f}]"
        lines.append([f"step {step:,}", "gap", value, "", "", ""])
    for name, result in evals:
        for mode in MODES:
            if mode in result:
                one = result[mode]
                value = f"{one['points_ratio']:.3f}"
                if "points_ratio_low" in one:
                    value += f" [{one['points_ratio_low']:.3f}, {one['points_ratio_high']:.3f}]"
                by_choice = result.get("settings", {}).get("method") == "choice_logp"
                how = MODES[mode] + (", by choice log-prob" if by_choice else "")
                lines.append(
                    [
                        f"eval: {name}",
                        how,
                        value,
                        f"{one['points']} of {one['max_points']}",
                        one.get("truncated", ""),
                        one["parse_failures"],
                    ]
                )
        if result.get("explanation_gap") is not None:
            value = f"{result['explanation_gap']:+.3f}"
            if "explanation_gap_low" in result:
                value += f" [{result['explanation_gap_low']:+.3f}, {result['explanation_gap_high']:+.3f}]"
            lines.append([f"eval: {name}", "gap", value, "", "", ""])
    columns = ["when", "mode", "share of points, 95 %#", "points#", "cut off#", "no answer read#"]
    return table(columns, lines, label="Exam results")


def _about_samples(exams: Exams) -> str:
    steps = [*exams] or [0]
    return f"The model's own texts at steps {steps[0]:,} and {steps[-1]:,}; those whose result changed come first."


def _samples(exams: Exams) -> list[str]:
    steps = [*exams]
    if len(steps) < 2:
        return []
    pairs = list(zip(*(exams[step]["explain"] for step in (steps[0], steps[-1])), strict=True))
    kinds: dict[tuple[bool, bool], list] = {(False, True): [], (True, False): [], (True, True): [], (False, False): []}
    for before, after in pairs:
        kinds[before["correct"], after["correct"]].append((before, after))
    # One of each kind in turn, so that what got worse is shown beside what got better.
    chosen = [kind[turn] for turn in range(_NUM_SAMPLES) for kind in kinds.values() if turn < len(kind)][:_NUM_SAMPLES]
    chosen.sort(key=lambda pair: pair[0]["correct"] == pair[1]["correct"])
    return [
        f'<article class="sample"><div><h3>{escape(before["question"])}</h3>'
        f'<p class="small">key: {escape(", ".join(before["key"]))}</p></div>'
        f"{_side('before', before)}{_side('after', after)}</article>"
        for before, after in chosen
    ]


def _side(name: str, row: dict) -> str:
    verdict = "✓ right" if row["correct"] else "✗ wrong"
    parsed = row["parsed"]
    read = ", ".join(parsed) if isinstance(parsed, list) else parsed
    more = [f"read: {read}" if read else row["failure"]] + ["cut off"] * row["truncated"]
    kind = "right" if row["correct"] else "wrong"
    return (
        f'<div><div class="small">{name} · <span class="{kind}">{verdict}</span> · {escape(" · ".join(more))}</div>'
        f'<pre tabindex="0">{escape(row["output"].strip() or "(nothing)")}</pre></div>'
    )
