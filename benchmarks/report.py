"""What a benchmark file says of itself, and its rows as tables and as a list of goals met or missed.

``medtrain bench table FILE.json`` draws the same Markdown from a file that is there.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from medtrain.trainer.errors import bad_input
from medtrain.trainer.run_folder import commit as tree_commit
from medtrain.trainer.run_folder import device_name, versions

PEERS = ("trl", "liger-kernel", "cut-cross-entropy")
CASES = (("frozen", True), ("trained", True), ("frozen", False))
TITLES = {
    ("frozen", True): "frozen head, forward and backward",
    ("trained", True): "trained head, forward and backward",
    ("frozen", False): "no gradient, forward",
}
COLUMNS = ("", "forward ms", "backward ms", "both ms", "spread", "x medtrain", "of floor", "extra MB", "kept MB",
           "margin error", "dX error", "dW error")  # fmt: skip

LEGEND = """\
- ms: median over rounds in which every implementation ran once, in turn, after a warm-up (CUDA events, or a clock on the
  CPU); spread: 10th to 90th percentile of the whole call. Caches are not flushed: at these sizes the weight alone exceeds
  a GPU's L2. x medtrain: the time over that of medtrain at its default.
- of floor: time of the floor over the time. The floor is the GEMMs that the mode cannot do without (2NVH without
  gradient, 4NVH frozen, 6NVH trained), as bare torch.mm calls in the same rounds.
- extra: the most memory allocated at any moment of the call beyond what was there before it, output and gradient of
  hidden included; for a trained head minus the gradient of the weight, which any method must return. kept: what of it
  waits between forward and backward (a gradient of the weight too, if the forward makes it). As torch's allocator counts.
- errors: against float64 on peaked logits (targets from nearly certain down to about -20 nats): largest error of a
  pair's summed margin, in nats, over sequences of about 512 tokens; gradients of the mean DPO loss, relative Frobenius
  error (of the weight: the targets' rows and an even sample of the others)."""
CPU_NOTE = (
    "- On a CPU the milliseconds mean little, and the shape is small: memory and errors are what this table is for."
)


def header(stage: str, device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """``stage``, ``device``, ``date``, ``commit``, ``versions`` of a benchmark file."""
    found = versions()
    for name in PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda
    return {
        "stage": stage,
        "device": device_name(device),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": tree_commit() or commit,
        "versions": found,
    }


def free_path(out: str | Path, stage: str, device: torch.device) -> Path:
    """``OUT/STAGE-DEVICE-DATE.json``, with a number if there is such a file already; makes the folder.

    Raises:
        InputError: ``out`` is a file.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise bad_input("not a folder", field="--out", found=str(out))
    folder.mkdir(parents=True, exist_ok=True)
    name = device_name(device) if device.type == "cuda" else device.type
    stem = f"{stage}-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}-{datetime.now(UTC).date().isoformat()}"
    number, path = 1, folder / f"{stem}.json"
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.json"
    return path


def load(path: str | Path) -> dict[str, Any]:
    """Read a benchmark file.

    Raises:
        InputError: no JSON, or nothing with ``rows``.
    """
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        result["rows"], result["device"]
    except (ValueError, KeyError, TypeError):
        raise bad_input("not a file of medtrain bench", file=path) from None
    return result


def shape_name(num_rows: int, hidden_size: int, vocab_size: int, dtype: str) -> str:
    return f"N {num_rows}, H {hidden_size}, V {vocab_size}, {dtype}"


def tables(rows: list[dict]) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """Per shape, dtype and case: (title, lines of ``COLUMNS``) of the implementations that ran."""
    for shape in dict.fromkeys((row["N"], row["H"], row["V"], row["dtype"]) for row in rows):
        here = [row for row in rows if (row["N"], row["H"], row["V"], row["dtype"]) == shape]
        for case in CASES:
            named: dict[tuple[str, str], dict[str, dict]] = {}
            for row in here:
                if (row["head"], row["gradient"]) == case:
                    named.setdefault((row["impl"], row["variant"]), {})[row["stage"]] = row
            whole = "both" if case[1] else "forward"
            unit = (named.get(("medtrain", ""), {}).get(whole) or {}).get("ms_median")
            lines = [
                _line(f"{impl} {variant}".strip(), stages, stages[whole], unit)
                for (impl, variant), stages in named.items()
                if not stages[whole]["reason"]
            ]
            if lines:
                yield f"{shape_name(*shape)}: {TITLES[case]}", lines


def missing(rows: list[dict]) -> list[str]:
    """One text for each implementation and reason why it did not run, with the places if it ran in others."""
    places: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        title = f"{shape_name(row['N'], row['H'], row['V'], row['dtype'])}: {TITLES[row['head'], row['gradient']]}"
        by_reason = places.setdefault(f"{row['impl']} {row['variant']}".strip(), {})
        by_reason.setdefault(row["reason"], []).append(title)
    return [
        f"{name} did not run: {reason}" + ("" if len(by_reason) == 1 else f" ({'; '.join(titles)})")
        for name, by_reason in places.items()
        for reason, titles in by_reason.items()
        if reason
    ]


def _line(name: str, stages: dict[str, dict], row: dict, unit: float | None) -> tuple[str, ...]:
    def ms(stage: str) -> str:
        return _text(stages.get(stage, {}).get("ms_median"), ".2f")

    def megabytes(value: int | None) -> str:
        return _text(None if value is None else value / 1e6, ".1f")

    return (
        f"{name} ({row['tflops']:.3g} TFLOP/s)" if row["tflops"] else name,
        ms("forward"),
        ms("backward"),
        ms("both"),
        _text(row["ms_spread"], ".2f"),
        _text(unit and row["ms_median"] / unit, ".2f"),
        _text(row["floor_share"], ".0%"),
        megabytes(row["extra_bytes"]),
        megabytes(stages.get("forward", {}).get("kept_bytes")),
        _text(row["margin_error_nats"], ".1e"),
        _text(row["dx_error"], ".1e"),
        _text(row["dw_error"], ".1e"),
    )


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def verdicts(rows: list[dict]) -> list[dict[str, Any]]:
    """The goals for N = 8192, H = 3584 in bfloat16, for rows that hold that shape: ``goal``, ``measured``, ``met``.

    ``met`` is None, and ``measured`` says why, where one side was not measured.
    """
    at = [row for row in rows if (row["N"], row["H"], row["dtype"]) == (8192, 3584, "bfloat16") and row["gradient"]]
    whole = {(row["impl"], row["variant"], row["head"]): row for row in at if row["stage"] == "both"}
    if not any(impl == "medtrain" for impl, _, _ in whole):
        return []
    found = []

    def value(key: tuple[str, str, str], column: str) -> float:
        row = whole.get(key)
        if row is None or row[column] is None:
            raise LookupError(f"{key[0]} was not measured: {row and row['reason'] or 'not in this file'}")
        return row[column]

    def judge(goal: str, compute, limit: float, at_least: bool, form: str) -> None:
        try:
            measured = compute()
            met = measured >= limit if at_least else measured <= limit
            found.append({"goal": goal, "measured": format(measured, form), "met": met})
        except LookupError as error:
            found.append({"goal": goal, "measured": str(error.args[0]), "met": None})

    for head, trl_factor in (("frozen", 1.35), ("trained", 1.3)):
        for peer, factor in (("trl", trl_factor), ("liger", 1.9)):
            judge(f"{head} head: at least {factor} x as fast as {peer}",
                  lambda head=head, peer=peer: value((peer, "", head), "ms_median")
                  / value(("medtrain", "", head), "ms_median"), factor, True, ".2f")  # fmt: skip
        judge(f"{head} head: at least 80 % of the GEMM floor",
              lambda head=head: value(("medtrain", "", head), "floor_share"), 0.8, True, ".0%")  # fmt: skip
        judge(f"{head} head: margin error at most 1e-3 nat",
              lambda head=head: value(("medtrain", "", head), "margin_error_nats"), 1e-3, False, ".1e")  # fmt: skip
    judge("frozen head: at most 0.4 GB extra",
          lambda: value(("medtrain", "", "frozen"), "extra_bytes") / 1e9, 0.4, False, ".2f")  # fmt: skip
    judge("trained head, keep_bytes=0: at most 0.7 GB extra beside dW",
          lambda: value(("medtrain", "keep_bytes=0", "trained"), "extra_bytes") / 1e9, 0.7, False, ".2f")  # fmt: skip
    return found


def _verdict_text(verdict: dict[str, Any]) -> str:
    word = {True: "met", False: "missed", None: "not judged"}[verdict["met"]]
    return f"{word}: {verdict['goal']} (measured: {verdict['measured']})"


def markdown(result: dict[str, Any]) -> str:
    """The whole file as Markdown: what ran where, tables, what did not run and why, goals, notes, legend."""
    rows = result["rows"]
    parts = ["\n".join(_about(result))]
    for title, lines in tables(rows):
        block = ["| " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
        block += ["| " + " | ".join(line) + " |" for line in lines]
        parts.append(f"### {title}\n\n" + "\n".join(block))
    if gone := missing(rows):
        parts.append("\n".join(["### Did not run", "", *(f"- {text}" for text in gone)]))
    if judged := verdicts(rows):
        parts.append("\n".join(["### Goals", "", *(f"- {_verdict_text(verdict)}" for verdict in judged)]))
    parts.append("\n".join(["### Notes", "", *_notes(rows), LEGEND, *([CPU_NOTE] if _on_cpu(result) else [])]))
    return "\n\n".join(parts) + "\n"


def show(result: dict[str, Any], console: Console) -> None:
    """The same on a terminal."""
    for line in _about(result):
        console.print(line, markup=False)
    for title, lines in tables(result["rows"]):
        table = Table(title=title, title_justify="left")
        for column in COLUMNS:
            table.add_column(column, justify="right" if column else "left", no_wrap=True)
        for line in lines:
            table.add_row(*line)
        console.print(table)
    for text in missing(result["rows"]):
        console.print(text, markup=False, soft_wrap=True)
    for line in (*_notes(result["rows"]), LEGEND, *([CPU_NOTE] if _on_cpu(result) else [])):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for verdict in verdicts(result["rows"]):
        console.print(_verdict_text(verdict), markup=False, soft_wrap=True)


def _about(result: dict[str, Any]) -> list[str]:
    paths = sorted({row["path"] for row in result["rows"] if row.get("path")})
    return [
        f"{result['device']}, {result['date']}, commit {result['commit'] or 'unknown'}, {result.get('form', '')} form; "
        f"medtrain took the path: {', '.join(paths) or 'none'}",
        ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
    ]


def _notes(rows: list[dict]) -> list[str]:
    notes = {f"{row['impl']} {row['variant']}".strip(): row["note"] for row in rows if row["note"]}
    return [f"- {name}: {note}." for name, note in notes.items()]


def _on_cpu(result: dict[str, Any]) -> bool:
    return result["device"].startswith("cpu")
