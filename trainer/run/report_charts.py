"""Line charts as inline SVG, drawn from numbers alone: no library, no network, readable at phone width and without colour.

A chart is a ``<figure>`` with a title, a legend and an ``<svg>`` whose text keeps its size within a column of 300 to 450
pixels. Colours are CSS variables of the page (report_page.py), so that light and dark are one drawing. What the pointer
reads out stands in ``data-chart``, as JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 420, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 10, 8, 26
_MOST_POINTS = 200  # of a line; a longer one is drawn as means with a band

# x, y, and the lower and upper edge of a band around y, or None twice.
Point = tuple[float, float, float | None, float | None]


@dataclass(frozen=True)
class Series:
    """One line. ``color`` is 1 to 6; ``marks`` draws a dot at each point, for values that stand alone."""

    name: str
    points: tuple[Point, ...]
    color: int = 1
    marks: bool = False


def series(name: str, rows: Sequence[dict], key: str, *, color: int = 1, marks: bool = False) -> Series:
    """The finite values of ``key`` over ``step``; more than 200 become means of neighbours, banded by least and largest."""
    found = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    found = [(x, float(y)) for x, y in found if math.isfinite(y)]
    if len(found) <= _MOST_POINTS:
        return Series(name, tuple((x, y, None, None) for x, y in found), color, marks)
    points, at_once = [], -(-len(found) // _MOST_POINTS)
    for first in range(0, len(found), at_once):
        part = found[first : first + at_once]
        ys = [y for _, y in part]
        points.append((part[len(part) // 2][0], sum(ys) / len(ys), min(ys), max(ys)))
    return Series(name, tuple(points), color, marks)


def line_chart(title: str, lines: Sequence[Series], *, note: str = "", zero: bool = False) -> str:
    """A ``<figure>`` of the lines that have points, or ``""`` where none has; ``zero`` draws a line at 0.

    The figure's caption ends with what a reader without the picture needs: the first and last value of each line.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, *_ in line.points]
    ys = [y for line in lines for _, *values in line.points for y in values if y is not None]
    x_ticks = ticks(min(xs), max(xs), 4, whole=True)
    y_ticks = ticks(min([*ys, 0] if zero else ys), max([*ys, 0] if zero else ys), 4)
    x_range = (min(xs), max(max(xs), min(xs) + 1))
    y_range = (y_ticks[0], y_ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_range[0]) / (x_range[1] - x_range[0])
        up = (y - y_range[0]) / (y_range[1] - y_range[0])
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    drawn = [_axes(x_ticks, y_ticks, x_range, place)]
    if zero:
        (x0, y0), (x1, _) = place(x_range[0], 0), place(x_range[1], 0)
        drawn.append(f'<path class="zero" d="M{x0:.1f} {y0:.1f}H{x1:.1f}"/>')
    drawn += [_band(line, place) for line in lines] + [_line(line, _dash(i), place) for i, line in enumerate(lines)]
    spans = "; ".join(f"{line.name} {short(line.points[0][1])} → {short(line.points[-1][1])}" for line in lines)
    dot = '<circle cx="11" cy="5" r="3"/>'
    legend = "".join(
        f'<li class="k{line.color}"><svg viewBox="0 0 22 10" aria-hidden="true"><path d="M1 5H21"{_dash(i)}/>'
        f"{dot if line.marks else ''}</svg>{escape(line.name)}</li>"
        for i, line in enumerate(lines)
    )
    data = {
        "range": x_range,
        "left": _LEFT,
        "right": _WIDTH - _RIGHT,
        "width": _WIDTH,
        "lines": [{"name": line.name, "points": [[x, short(y)] for x, y, *_ in line.points]} for line in lines],
    }
    banded = any(low is not None for line in lines for *_, low, _ in line.points) and not note
    note = note or ("means of neighbouring steps; band: the least and the largest" if banded else "")
    label = escape(f"{title} over steps: {spans}", quote=True)
    return (
        f'<figure class="chart"><figcaption><h3>{escape(title)}</h3><ul class="legend">{legend}</ul></figcaption>'
        f'<div class="plot" data-chart="{escape(json.dumps(data, ensure_ascii=False), quote=True)}">'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(drawn)}</svg></div>'
        f'<p class="small">{escape(f"{spans} ({note})" if note else spans)}</p></figure>'
    )


def _axes(x_ticks, y_ticks, x_range, place) -> str:
    parts = []
    for y in y_ticks:
        x0, at = place(x_range[0], y)
        parts.append(f'<path class="grid" d="M{x0:.1f} {at:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_tick(y, y_ticks)}</text>')
    for x in x_ticks:
        at, bottom = place(x, y_ticks[0])
        anchor = "end" if at > _WIDTH - _RIGHT - 14 else "middle"
        parts.append(f'<text x="{at:.1f}" y="{bottom + 18:.1f}" text-anchor="{anchor}">{short(x)}</text>')
    return "".join(parts)


def _line(line: Series, dash: str, place) -> str:
    at = [place(x, y) for x, y, *_ in line.points]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
    dots = at if line.marks or len(at) == 1 else []
    circles = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>' for x, y in dots)
    return f'<g class="k{line.color}"><path d="{path}"{dash}/>{circles}</g>'


def _band(line: Series, place) -> str:
    edged = [(x, low, high) for x, _, low, high in line.points if low is not None and high is not None]
    if len(edged) < 2:
        return ""
    upper = [place(x, high) for x, _, high in edged]
    lower = [place(x, low) for x, low, _ in reversed(edged)]
    return f'<path class="band b{line.color}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in upper + lower)}Z"/>'


def _dash(place: int) -> str:
    """Lines of one chart differ without colour, too."""
    pattern = ("", "6 3", "2 3", "9 3 2 3", "1 4", "12 4")[place % 6]
    return f' stroke-dasharray="{pattern}"' if pattern else ""


def ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """Round numbers about ``count`` apart, the first at or below ``low`` and the last at or above ``high``; with ``whole``
    whole numbers within the two."""
    if not high > low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * k for k in (1, 2, 2.5, 5, 10) if power * k >= rough * 0.999)
    if whole:
        step = max(1.0, round(step))
        return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [k * step for k in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _tick(value: float, of: Sequence[float]) -> str:
    """As many decimals as tell neighbours apart."""
    step, largest = of[1] - of[0], max(map(abs, of))
    decimals = next((d for d in range(4) if abs(round(step, d) - step) < 1e-6 * step), None)
    return short(value) if decimals is None or largest >= 1e4 else f"{value:,.{decimals}f}"


def short(value: float) -> str:
    """A number as short as a label may be: 12.3k, 0.042, 1.2e-5."""
    size = abs(value)
    if size < 1e-12:
        return "0"
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= scale and size >= 1e4:
            return f"{value / scale:.0f}{unit}" if size >= 100 * scale else f"{value / scale:.3g}{unit}"
    if size >= 1000:
        return f"{value:,.0f}"
    if size < 1e-3:
        number, _, power = f"{value:.1e}".partition("e")
        return f"{number.removesuffix('.0')}e{int(power)}"
    return f"{value:.4g}" if size >= 1 else f"{value:.3f}".rstrip("0").rstrip(".")
