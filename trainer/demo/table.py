"""The demo's result: a table on the screen, a picture, and sentences that claim no more than the numbers show.

Intervals are 95 % bootstrap intervals over the questions of one run: they say how much the draw of questions matters,
not how much another seed would. ``medtrain demo --seeds`` runs several.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medtrain.trainer.exam.prompts import MODES
from medtrain.trainer.files import replacing
from medtrain.trainer.intervals import bootstrap_interval

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
_MOVED = ("raised", "lowered", "did not clearly move")

# Of one arm: mode -> one 0 or 1 per question, in the order of the exam.
Marks = dict[str, list[int]]


def marks_of(rows: dict[str, list[dict]]) -> Marks:
    """Right (1) or wrong (0), per question, from the rows that an examination left."""
    return {mode: [int(row["correct"]) for row in of_mode] for mode, of_mode in rows.items()}


def interval(one: Sequence[int], other: Sequence[int] | None = None) -> tuple[float, float]:
    """Interval of the mean of ``one``, or of its difference to ``other`` on the same questions."""
    differences = [a - b for a, b in zip(one, other, strict=True)] if other is not None else one
    return bootstrap_interval(differences, [1] * len(differences))


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
        low, high = interval(marks[arm]["answer"], marks[arm]["explain"])
        lines.append(
            f"{LABELS[arm]:12}{row['answer']['points_ratio']:8.3f}{row['explain']['points_ratio']:9.3f}{row['gap']:+8.3f}"
            f"  {f'[{low:+.3f}, {high:+.3f}]':18}{row['explain']['parse_failures']:16}{row['explain']['truncated']:9}"
        )
    return "\n".join(lines)


def conclusions(table: dict, marks: dict[str, Marks], num_parameters: int) -> str:
    """What the table shows and does not show, each sentence decided by an interval."""

    def compare(one: str, other: str, mode: str, words: tuple[str, str, str] = _MOVED, joint: str = "->") -> tuple[str, str]:
        low, high = interval(marks[other][mode], marks[one][mode])
        ratios = f"{table[one][mode]['points_ratio']:.3f} {joint} {table[other][mode]['points_ratio']:.3f}"
        return words[0] if low > 0 else words[1] if high < 0 else words[2], ratios

    low, high = interval(marks["cpt"]["answer"], marks["cpt"]["explain"])
    costs = "costs" if low > 0 else "gains" if high < 0 else "neither clearly costs nor gains"
    answers, answer_ratios = compare("base", "cpt", "answer")
    explained, explain_ratios = compare("cpt", "cpt_rpo", "explain")
    lines = [
        f"CPT {answers} the answers ({answer_ratios}).",
        f"After CPT, explaining {costs} points (gap {table['cpt']['gap']:+.3f}).",
        f"RPO after CPT {explained} the score with explanation ({explain_ratios}; gap {table['cpt_rpo']['gap']:+.3f}).",
    ]
    alone, ratios = compare("cpt", "cpt_rpo", "answer")
    if alone != _MOVED[2]:
        lines.append(f"It {alone} the answers alone, too ({ratios}).")
    alone, ratios = compare("base", "rpo", "explain")
    lines.append(f"RPO without CPT {alone} the score with explanation ({ratios}).")
    for arm, what in (("cpt_sft", "Plain imitation of the same explanations"), ("cpt_dpo", "DPO without the NLL term")):
        does, _ = compare("cpt_rpo", arm, "explain", ("better than", "worse than", "about as well as"))
        _, ratios = compare(arm, "cpt_rpo", "explain", joint="to")
        lines.append(f"{what} does {does} RPO with explanation ({ratios}).")
    size = f"{num_parameters / 1e6:.1f} M parameters"
    lines.append(f"One made-up world, one seed, a model of {size}: a picture of the recipe, no proof about real ones.")
    return "\n".join(lines)


def draw_table(table: dict, marks: dict[str, Marks], path: Path, *, title: str) -> None:
    """Write the picture of one run: two bars per arm, each with its 95 % interval over the questions."""
    bars = {arm: {mode: (row[mode]["points_ratio"], *interval(marks[arm][mode])) for mode in MODES} for arm, row in table.items()}
    questions = table["base"]["answer"]["questions"]
    draw_bars(bars, path, title=title, note=f"n = {questions} questions per bar; lines: 95 % bootstrap interval over questions")


def draw_bars(bars: dict[str, dict[str, tuple[float, float, float]]], path: Path, *, title: str, note: str) -> None:
    """Write a PNG of ``bars[arm][mode] = (mean, low, high)``. Figures are labelled in English: fonts may lack Japanese."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(9.0, 1.3 * len(bars)), 4.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    looks = {"answer": (-0.19, "#4c78a8", "answer only"), "explain": (0.19, "#f58518", "must explain first")}
    places = [x + (0.5 if arm in CONTROLS else 0.0) for x, arm in enumerate(bars)]  # the controls stand apart
    for mode, (offset, color, name) in looks.items():
        means, lows, highs = zip(*(bars[arm][mode] for arm in bars), strict=True)
        errors = [[max(0.0, m - low) for m, low in zip(means, lows, strict=True)]]
        errors += [[max(0.0, high - m) for m, high in zip(means, highs, strict=True)]]
        xs = [x + offset for x in places]
        axes.bar(xs, means, 0.36, yerr=errors, capsize=3, color=color, label=name, ecolor="#333333")
        for x, mean, high in zip(xs, means, highs, strict=True):
            axes.text(x, max(mean, high) + 0.015, f"{mean:.2f}", ha="center", va="bottom", fontsize=8.5)
    axes.axhline(0.2, color="#888888", linewidth=1, linestyle="--", zorder=0)
    axes.text(1.005, 0.2, "chance", transform=axes.get_yaxis_transform(), va="center", fontsize=8, color="#666666")
    gaps = {arm: f"gap {bars[arm]['answer'][0] - bars[arm]['explain'][0]:+.2f}" for arm in bars}
    labels = ["\n".join([LABELS[arm], *["(control)"] * (arm in CONTROLS), gaps[arm]]) for arm in bars]
    axes.set_xticks(places, labels)
    axes.set(ylim=(0, 1.2), yticks=[0, 0.2, 0.4, 0.6, 0.8, 1.0], ylabel="share of exam points")
    axes.set_title(title, fontsize=11, pad=28)
    axes.set_xlabel(f"gap = answer - explain.  {note}", fontsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, frameon=False)
    with replacing(path) as file:
        figure.savefig(file, format="png")
