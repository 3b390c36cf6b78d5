"""The demo's result: a table on the screen, a picture, and sentences that claim no more than the numbers show.

Intervals are 95 % bootstrap intervals over the questions of one run: they say how much the draw of questions matters,
not how much another seed would. ``medtrain demo --seeds`` runs several.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

LABELS = {
    "base": "base",
    "cpt": "CPT",
    "rpo": "RPO only",
    "cpt_rpo": "CPT + RPO",
    "cpt_sft": "CPT + SFT",
    "cpt_dpo": "CPT + DPO",
    "cpt_ipo": "CPT + IPO",
    "cpt_simpo": "CPT + SimPO",
}
CONTROLS = ("cpt_sft", "cpt_dpo", "cpt_ipo", "cpt_simpo")
_NUM_RESAMPLES = 2000

# Of one arm: mode -> one 0 or 1 a question, in the order of the exam.
Marks = dict[str, list[int]]


def marks_of(rows: dict[str, list[dict]]) -> Marks:
    """Right (1) or wrong (0), a question, from the rows that an examination left."""
    return {mode: [int(row["correct"]) for row in of_mode] for mode, of_mode in rows.items()}


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean, over questions. The same numbers give the same interval."""
    values = np.asarray(differences, dtype=float)
    draws = np.random.default_rng(0).integers(len(values), size=(_NUM_RESAMPLES, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def gap_interval(marks: Marks) -> tuple[float, float]:
    """Interval of answer minus explain; each question is asked both ways, so questions are drawn in pairs."""
    return interval([a - e for a, e in zip(marks["answer"], marks["explain"], strict=True)])


def format_table(table: dict, marks: dict[str, Marks]) -> str:
    """The arms as lines of text, controls apart; ratios of points, and the gap with its interval."""
    questions = table["base"]["answer"]["questions"]
    lines = [
        f"Exam: {questions} questions on diseases of the textbook that no pair and no training question names; chance is 0.20.",
        "Shares of points. gap = answer - explain, what having to explain costs, with its 95 % interval over the questions.",
        "",
        f"{'':12}{'answer':>8}{'explain':>9}{'gap':>8}  {'':18}{'no answer read':>16}{'cut off':>9}",
    ]
    for arm, row in table.items():
        if arm == CONTROLS[0]:
            lines.append("controls, trained on the same pairs as CPT + RPO:")
        low, high = gap_interval(marks[arm])
        lines.append(
            f"{LABELS[arm]:12}{row['answer']['points_ratio']:8.3f}{row['explain']['points_ratio']:9.3f}{row['gap']:+8.3f}"
            f"  {f'[{low:+.3f}, {high:+.3f}]':18}{row['explain']['parse_failures']:16}{row['explain']['truncated']:9}"
        )
    return "\n".join(lines)


def conclusions(table: dict, marks: dict[str, Marks], num_parameters: int) -> str:
    """What the table shows and does not show, each sentence decided by an interval."""
    lines = []
    cpt, both = table["cpt"], table["cpt_rpo"]
    low, high = interval([a - b for a, b in _paired(marks, "cpt", "base", "answer")])
    lines.append(
        f"CPT {_moved(low, high, 'raised', 'lowered', 'did not clearly move')} the answers "
        f"({table['base']['answer']['points_ratio']:.3f} -> {cpt['answer']['points_ratio']:.3f})."
    )
    low, high = gap_interval(marks["cpt"])
    lines.append(
        f"After CPT, explaining {_moved(low, high, 'costs', 'gains', 'neither clearly costs nor gains')} points "
        f"(gap {cpt['gap']:+.3f})."
    )
    low, high = interval([b - a for a, b in _paired(marks, "cpt", "cpt_rpo", "explain")])
    lines.append(
        f"RPO after CPT {_moved(low, high, 'raised', 'lowered', 'did not clearly move')} the score with explanation "
        f"({cpt['explain']['points_ratio']:.3f} -> {both['explain']['points_ratio']:.3f}; gap {both['gap']:+.3f})."
    )
    low, high = interval([b - a for a, b in _paired(marks, "cpt", "cpt_rpo", "answer")])
    if low > 0 or high < 0:
        lines.append(
            f"It {'raised' if low > 0 else 'lowered'} the answers alone, too "
            f"({cpt['answer']['points_ratio']:.3f} -> {both['answer']['points_ratio']:.3f})."
        )
    low, high = interval([b - a for a, b in _paired(marks, "base", "rpo", "explain")])
    lines.append(
        f"RPO without CPT {_moved(low, high, 'raised', 'lowered', 'did not clearly move')} the score with explanation "
        f"({table['base']['explain']['points_ratio']:.3f} -> {table['rpo']['explain']['points_ratio']:.3f})."
    )
    for arm, what in (("cpt_sft", "Plain imitation of the same explanations"), ("cpt_dpo", "DPO without the NLL term")):
        low, high = interval([b - a for a, b in _paired(marks, "cpt_rpo", arm, "explain")])
        lines.append(
            f"{what} does {_moved(low, high, 'better than', 'worse than', 'about as well as')} RPO with explanation "
            f"({table[arm]['explain']['points_ratio']:.3f} to {both['explain']['points_ratio']:.3f})."
        )
    lines.append(
        f"One made-up world, one seed, a model of {num_parameters / 1e6:.1f} M parameters: a picture of the recipe, "
        "no proof about real ones."
    )
    return "\n".join(lines)


def _paired(marks: dict[str, Marks], one: str, other: str, mode: str) -> list[tuple[int, int]]:
    return list(zip(marks[one][mode], marks[other][mode], strict=True))


def _moved(low: float, high: float, up: str, down: str, neither: str) -> str:
    return up if low > 0 else down if high < 0 else neither


def draw_table(table: dict, marks: dict[str, Marks], path: Path, *, title: str) -> None:
    """Write the picture of one run: two bars an arm, each with its 95 % interval over the questions."""
    bars = {
        arm: {mode: (table[arm][mode]["points_ratio"], *interval(marks[arm][mode])) for mode in ("answer", "explain")}
        for arm in table
    }
    questions = table["base"]["answer"]["questions"]
    draw_bars(bars, path, title=title, note=f"n = {questions} questions a bar; lines: 95 % bootstrap interval over questions")


def draw_bars(bars: dict[str, dict[str, tuple[float, float, float]]], path: Path, *, title: str, note: str) -> None:
    """Write a PNG of ``bars[arm][mode] = (mean, low, high)``. Figures are labelled in English: fonts may lack Japanese."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(9.0, 1.3 * len(bars)), 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colors = {"answer": "#4c78a8", "explain": "#f58518"}
    names = {"answer": "answer only", "explain": "must explain first"}
    # The controls stand a little apart.
    places = [x + (0.5 if arm in CONTROLS else 0.0) for x, arm in enumerate(bars)]
    for offset, mode in ((-0.19, "answer"), (0.19, "explain")):
        means = [bars[arm][mode][0] for arm in bars]
        errors = [
            [max(0.0, mean - bars[arm][mode][1]) for mean, arm in zip(means, bars, strict=True)],
            [max(0.0, bars[arm][mode][2] - mean) for mean, arm in zip(means, bars, strict=True)],
        ]
        xs = [x + offset for x in places]
        axes.bar(xs, means, 0.36, yerr=errors, capsize=3, color=colors[mode], label=names[mode], ecolor="#333333")
        for x, mean, high in zip(xs, means, (bars[arm][mode][2] for arm in bars), strict=True):
            axes.text(x, max(mean, high) + 0.015, f"{mean:.2f}", ha="center", va="bottom", fontsize=8.5)
    axes.axhline(0.2, color="#888888", linewidth=1, linestyle="--", zorder=0)
    axes.text(1.005, 0.2, "chance", transform=axes.get_yaxis_transform(), va="center", fontsize=8, color="#666666")
    gaps = {arm: bars[arm]["answer"][0] - bars[arm]["explain"][0] for arm in bars}
    axes.set_xticks(
        places, ["\n".join([LABELS[arm], *(["(control)"] if arm in CONTROLS else []), f"gap {gaps[arm]:+.2f}"]) for arm in bars]
    )
    axes.set_ylim(0, 1.2)
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axes.set_ylabel("share of exam points")
    axes.set_title(title, fontsize=11, pad=28)
    axes.set_xlabel(f"gap = answer - explain.  {note}", fontsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, frameon=False)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="png")
    part.replace(path)
