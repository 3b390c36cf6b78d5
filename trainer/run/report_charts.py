"""Line charts as inline SVG, drawn by matplotlib. Axes take the colour of the page's text, light or dark; names stand in the
page's own legend, so that any script can be shown."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_MOST_POINTS = 200  # of a line; a longer one is drawn as means with a band
_INK = "#0a0b0c"  # becomes the page's colour
COLORS = ("#2f81f7", "#d4691e", "#2da44e", "#a371f7", "#d6539c", "#8590a0")
_DASHES = ("", "6 3", "2 3", "9 3 2 3", "1 4", "12 4")  # lines of one chart differ without colour, too


@dataclass(frozen=True)
class Series:
    """One line over steps, with the lower and upper edges of a band around it or without."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def series(name: str, rows: Sequence[dict], key: str) -> Series:
    """The finite values of ``key``; more than 200 become means of neighbours, in a band from least to largest."""
    found = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float) and math.isfinite(row[key])]
    size = -(-len(found) // _MOST_POINTS)
    if size <= 1:
        return Series(name, *zip(*found, strict=True)) if found else Series(name, (), ())
    parts = [found[first : first + size] for first in range(0, len(found), size)]
    values = [[value for _, value in part] for part in parts]
    middle = [part[len(part) // 2][0] for part in parts]
    return Series(name, middle, [sum(v) / len(v) for v in values], [min(v) for v in values], [max(v) for v in values])


def chart(title: str, lines: Sequence[Series], *, note: str = "", zero: bool = False) -> dict[str, Any] | None:
    """What the page needs of a chart, None where no line has a point; ``zero``: the axis includes 0.

    The caption has what a reader without the picture needs: the first and last value of each line.
    """
    lines = [line for line in lines if line.steps]
    if not lines:
        return None
    if not note and any(line.low for line in lines):
        note = "means of neighbouring steps; band: the least and the largest"
    spans = "; ".join(f"{line.name} {line.values[0]:.4g} → {line.values[-1]:.4g}" for line in lines)
    return {
        "title": title,
        "legend": [(line.name, *style) for line, style in zip(lines, zip(COLORS, _DASHES, strict=True), strict=False)],
        "svg": _draw(lines, zero),
        "caption": f"{spans} ({note})" if note else spans,
    }


def _draw(lines: Sequence[Series], zero: bool) -> str:
    style: Any = {"svg.fonttype": "none", "text.color": _INK, "axes.edgecolor": _INK, "xtick.color": _INK, "ytick.color": _INK}
    with rc_context(style):
        figure = Figure(figsize=(4.7, 2.5), layout="constrained")
        axes = figure.add_subplot()
        for line, color, dash in zip(lines, COLORS, _DASHES, strict=False):
            pattern = (0, [float(part) / 2 for part in dash.split()]) if dash else "solid"
            marker = "o" if len(line.steps) <= 12 else None
            axes.plot(line.steps, line.values, color=color, linestyle=pattern, marker=marker, markersize=4, linewidth=1.7)
            if line.low:
                axes.fill_between(line.steps, line.low, line.high, color=color, alpha=0.17, linewidth=0)
        if zero:
            axes.axhline(0, color=_INK, linewidth=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(color=_INK, alpha=0.12)
        axes.spines[["top", "right"]].set_visible(False)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")
