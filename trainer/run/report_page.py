"""The page around a report: its style and script, and the few pieces of HTML it is made of. One file, no network.

The content security policy names the script by its digest and allows nothing else: text of a run that looked like a
script could not run even if it were not escaped, which it is.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape

_STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--text:#1b1f24;--soft:#57606a;--line:#d8dee4;--grid:#e9ecef;
--good:#116329;--bad:#b42318;--goodbg:#e6f4ea;--badbg:#fdecea;--notebg:#fff6dd;--note:#6b4e00;
--c1:#0b62c4;--c2:#bc4c00;--c3:#1a7f37;--c4:#8250df;--c5:#bf3989;--c6:#57606a}
@media(prefers-color-scheme:dark){:root{--page:#0e1116;--card:#171b22;--text:#e6edf3;--soft:#9aa7b4;--line:#323a44;
--grid:#262d36;--good:#5bd27a;--bad:#ff8d85;--goodbg:#12301c;--badbg:#3b1716;--notebg:#332a10;--note:#f0d58a;
--c1:#6cb6ff;--c2:#f69d50;--c3:#57c276;--c4:#c297ff;--c5:#f47fbf;--c6:#9aa7b4}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:16px/1.55 system-ui,-apple-system,"Segoe UI","Hiragino Sans",
"Noto Sans CJK JP","Noto Sans JP",sans-serif;overflow-wrap:anywhere}
main{max-width:1240px;margin:0 auto;padding:20px 16px 56px}
h1{font-size:1.6rem;line-height:1.25;margin:0}h2{font-size:1.2rem;margin:2.2rem 0 .3rem}h3{font-size:.95rem;margin:0}
p{margin:.3rem 0}.small{font-size:.82rem;color:var(--soft)}
header .badges{display:flex;flex-wrap:wrap;gap:8px;align-items:center;margin:8px 0}
.badge{border:1px solid var(--line);border-radius:999px;padding:1px 11px;font-size:.85rem;background:var(--card)}
.badge.good{background:var(--goodbg);color:var(--good);border-color:currentColor}
.badge.bad{background:var(--badbg);color:var(--bad);border-color:currentColor}
.badge.warn{background:var(--notebg);color:var(--note);border-color:currentColor}
dl.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,230px),1fr));gap:4px 20px;margin:12px 0 0}
dl.facts div{min-width:0}dt{font-size:.8rem;color:var(--soft)}dd{margin:0}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,158px),1fr));gap:12px;margin:18px 0 0;padding:0;
list-style:none}
.cards li,.chart,.sample{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px;min-width:0}
.cards li{padding:11px 12px}.cards .value{font-size:1.2rem;display:flex;flex-wrap:wrap;align-items:baseline;
gap:0 .3em;font-weight:650;font-variant-numeric:tabular-nums;line-height:1.3}
.cards .from{font-size:.85rem;font-weight:400;color:var(--soft)}
.cards .name{font-size:.85rem}.cards .small{line-height:1.35}
.note{background:var(--notebg);color:var(--note);border-radius:10px;padding:10px 14px;margin:14px 0 0}.note ul{margin:0;
padding-left:1.1em}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:14px;margin-top:10px}
.chart{margin:0;display:flex;flex-direction:column}.chart figcaption{display:flex;flex-wrap:wrap;gap:2px 14px;
align-items:baseline;justify-content:space-between}
.legend{display:flex;flex-wrap:wrap;gap:0 12px;list-style:none;margin:0;padding:0;font-size:.82rem}
.legend svg{width:22px;height:10px;margin-right:5px}
.plot{position:relative;margin-top:6px;touch-action:pan-y}.plot>svg{display:block;width:100%;height:auto}
.chart .small{margin:6px 0 0}
svg text{font-size:12px;fill:var(--soft);font-variant-numeric:tabular-nums}
.grid{stroke:var(--grid);fill:none}.zero{stroke:var(--soft);fill:none}.cursor{stroke:var(--soft);stroke-dasharray:3 3}
[class^=k] path{fill:none;stroke-width:2;stroke-linejoin:round;stroke:currentColor}[class^=k] circle{fill:currentColor}
g[class^=k],.legend svg{color:var(--c)}
.k1{--c:var(--c1)}.k2{--c:var(--c2)}.k3{--c:var(--c3)}.k4{--c:var(--c4)}.k5{--c:var(--c5)}.k6{--c:var(--c6)}
.band{stroke:none;opacity:.17}.b1{fill:var(--c1)}.b2{fill:var(--c2)}.b3{fill:var(--c3)}.b4{fill:var(--c4)}.b5{fill:var(--c5)}
.b6{fill:var(--c6)}
.tip{position:absolute;top:0;pointer-events:none;background:var(--card);border:1px solid var(--line);border-radius:6px;
padding:3px 8px;font-size:.8rem;white-space:nowrap;box-shadow:0 2px 8px #0003}
.scroll{overflow-x:auto;margin-top:14px}
.scroll:focus-visible,summary:focus-visible,pre:focus-visible{outline:2px solid var(--c1)}
table{border-collapse:collapse;background:var(--card);border:1px solid var(--line);font-size:.9rem;min-width:100%}
th,td{padding:6px 12px;text-align:left;border-bottom:1px solid var(--grid);vertical-align:top;white-space:nowrap}
td.wrap{white-space:normal;min-width:180px}th{font-size:.8rem;color:var(--soft);font-weight:600}
.n{text-align:right;font-variant-numeric:tabular-nums}
.sample{margin-top:12px;display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,290px),1fr));gap:12px}
.sample>div{min-width:0}.sample h3{white-space:pre-wrap;font-weight:500}
pre{white-space:pre-wrap;margin:4px 0 0;padding:9px 11px;background:var(--page);border-radius:8px;max-height:19em;overflow:auto;
font:inherit;font-size:.92rem}
.right{color:var(--good);font-weight:600}.wrong{color:var(--bad);font-weight:600}
@media(max-width:600px){th,td{padding:6px 8px}}
details{margin-top:10px}summary{cursor:pointer;padding:4px 0;font-weight:600}
code{font-family:ui-monospace,SFMono-Regular,Menlo,monospace;font-size:.86em}
"""

# Reads the numbers of a chart out under the pointer.
_SCRIPT = """
for (const plot of document.querySelectorAll('.plot')) {
  const data = JSON.parse(plot.dataset.chart), svg = plot.querySelector('svg');
  const steps = [...new Set(data.lines.flatMap(line => line.points.map(p => p[0])))].sort((a, b) => a - b);
  const cursor = document.createElementNS(svg.namespaceURI, 'path');
  const tip = document.createElement('div');
  cursor.setAttribute('class', 'cursor');
  tip.className = 'tip';
  const hide = () => { cursor.remove(); tip.remove(); };
  plot.addEventListener('pointerleave', hide);
  const show = event => {
    const box = svg.getBoundingClientRect(), scale = box.width / data.width, [low, high] = data.range;
    const x = (event.clientX - box.left) / scale;
    const wanted = low + (x - data.left) / (data.right - data.left) * (high - low);
    const step = steps.reduce((a, b) => Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a);
    const at = data.left + (step - low) / (high - low) * (data.right - data.left);
    cursor.setAttribute('d', `M${at} 8V194`);
    tip.replaceChildren();
    const say = text => tip.append(Object.assign(document.createElement('div'), {textContent: text}));
    say('step ' + step.toLocaleString());
    for (const line of data.lines) {
      const point = line.points.find(p => p[0] === step);
      if (point) say(line.name + '  ' + point[1]);
    }
    svg.append(cursor);
    plot.append(tip);
    const room = box.width - tip.offsetWidth;
    tip.style.left = Math.max(0, Math.min(room, at * scale + (at * scale > box.width / 2 ? -tip.offsetWidth - 10 : 10))) + 'px';
  };
  plot.addEventListener('pointermove', show);
  plot.addEventListener('pointerdown', show);
}
"""


def page(title: str, body: str) -> str:
    """The whole HTML document; ``title`` is text, ``body`` is HTML."""
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,"><style>{_STYLE}</style></head>\n'
        f"<body><main>\n{body}\n</main><script>{_SCRIPT}</script></body></html>\n"
    )


def section(title: str, *parts: str, about: str = "") -> str:
    """A section with a heading; ``""`` where none of the parts (HTML) has anything."""
    inner = "\n".join(part for part in parts if part)
    if not inner:
        return ""
    explained = f'<p class="small">{escape(about)}</p>' if about else ""
    return f"<section><h2>{escape(title)}</h2>{explained}\n{inner}</section>"


def charts(*figures: str) -> str:
    """A grid of figures (HTML), of those that are there."""
    inner = "\n".join(figure for figure in figures if figure)
    return f'<div class="charts">{inner}</div>' if inner else ""


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """Names and values; what is None or empty is left out."""
    inner = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in pairs if value not in (None, "")
    )
    return f'<dl class="facts">{inner}</dl>' if inner else ""


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, label: str, wrap: str = "") -> str:
    """A table that scrolls by itself where it is too wide. A column whose name ends with ``#`` holds numbers; the column
    named ``wrap`` may take several lines."""
    head = "".join(_cell("th", name.removesuffix("#"), name, wrap, ' scope="col"') for name in columns)
    lines = [
        "<tr>" + "".join(_cell("td", value, name, wrap) for name, value in zip(columns, row, strict=True)) + "</tr>"
        for row in rows
    ]
    if not lines:
        return ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label, quote=True)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(kind: str, value: object, column: str, wrap: str, more: str = "") -> str:
    name = "n" if column.endswith("#") else "wrap" if column == wrap else ""
    text = "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
    return f"<{kind}{more}{f' class={name}' if name else ''}>{escape(text)}</{kind}>"


def details(summary: str, inner: str) -> str:
    """HTML folded away under a line of text; ``""`` where there is none."""
    return f"<details><summary>{escape(summary)}</summary>{inner}</details>" if inner else ""
