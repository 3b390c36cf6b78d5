"""What a benchmark file says of itself, and its rows as tables and as a list of goals met or missed.

``medtrain bench table FILE.json`` draws the same Markdown from a file that is there. What is particular to a stage stands
in the module that ``_sheet`` names: ``COLUMNS``, ``LEGEND``, ``CPU_NOTE``, ``about``, ``tables``, ``missing``, ``verdicts``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from medtrain.trainer.errors import bad_input, user_path
from medtrain.trainer.files import check_can_make
from medtrain.trainer.run.folder import commit as tree_commit
from medtrain.trainer.run.folder import device_name, versions

PEERS = ("trl", "liger-kernel", "cut-cross-entropy", "accelerate")
SHEETS = {"kernels": "kernel_tables", "train-rpo": "train_tables", "train-cpt": "train_cpt_tables"}


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
    check_can_make(folder, field="--out")
    if folder.exists() and not folder.is_dir():
        raise bad_input("not a folder", field="--out", found=str(out))
    name = device_name(device) if device.type == "cuda" else device.type
    stem = f"{stage}-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}-{datetime.now(UTC).date().isoformat()}"
    number, path = 1, folder / f"{stem}.json"
    with user_path(folder, "cannot be written", field="--out"):
        folder.mkdir(parents=True, exist_ok=True)
        while path.exists():
            number += 1
            path = folder / f"{stem}-{number}.json"
    return path


def load(path: str | Path) -> dict[str, Any]:
    """Read a benchmark file.

    Raises:
        InputError: no JSON, or nothing with ``rows`` of a known ``stage``.
    """
    with user_path(path):
        content = Path(path).read_bytes()
    try:
        result = json.loads(content)
        result["rows"], result["device"], SHEETS[result["stage"]]
    except (ValueError, KeyError, TypeError):
        raise bad_input("not a file of medtrain bench", file=path) from None
    return result


def form_number(value: float | None, form: str) -> str:
    """A number in this format, nothing for None."""
    return "" if value is None else format(value, form)


def judge(goal: str, compute: Callable[[], float], limit: float, at_least: bool, form: str) -> list[dict[str, Any]]:
    """One verdict: ``goal``, ``measured``, ``met``; the last is None where ``compute`` raises LookupError, saying why."""
    try:
        measured = compute()
        met = measured >= limit if at_least else measured <= limit
        return [{"goal": goal, "measured": format(measured, form), "met": met}]
    except LookupError as error:
        return [{"goal": goal, "measured": str(error.args[0]), "met": None}]


def markdown(result: dict[str, Any]) -> str:
    """The whole file as Markdown: what ran where, tables, what did not run and why, goals, notes, legend."""
    rows, sheet = result["rows"], _sheet(result)
    parts = ["\n".join(_about(result))]
    for title, lines in sheet.tables(rows):
        block = ["| " + " | ".join(sheet.COLUMNS) + " |", "|---" + "|---:" * (len(sheet.COLUMNS) - 1) + "|"]
        block += ["| " + " | ".join(line) + " |" for line in lines]
        parts.append(f"### {title}\n\n" + "\n".join(block))
    if gone := sheet.missing(rows):
        parts.append("\n".join(["### Did not run", "", *(f"- {text}" for text in gone)]))
    if judged := sheet.verdicts(rows):
        parts.append("\n".join(["### Goals", "", *(f"- {_verdict_text(verdict)}" for verdict in judged)]))
    parts.append("\n".join(["### Notes", "", *_notes(result)]))
    return "\n\n".join(parts) + "\n"


def show(result: dict[str, Any], console: Console) -> None:
    """The same on a terminal."""
    rows, sheet = result["rows"], _sheet(result)
    for line in _about(result):
        console.print(line, markup=False)
    for title, lines in sheet.tables(rows):
        table = Table(title=title, title_justify="left")
        for column in sheet.COLUMNS:
            table.add_column(column, justify="right" if column else "left", no_wrap=True)
        for line in lines:
            table.add_row(*line)
        console.print(table)
    for text in sheet.missing(rows):
        console.print(text, markup=False, soft_wrap=True)
    for line in _notes(result):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for verdict in sheet.verdicts(rows):
        console.print(_verdict_text(verdict), markup=False, soft_wrap=True)


def _sheet(result: dict[str, Any]) -> ModuleType:
    return importlib.import_module(f"medtrain.benchmarks.{SHEETS[result['stage']]}")


def _verdict_text(verdict: dict[str, Any]) -> str:
    word = {True: "met", False: "missed", None: "not judged"}[verdict["met"]]
    return f"{word}: {verdict['goal']} (measured: {verdict['measured']})"


def _about(result: dict[str, Any]) -> list[str]:
    return [
        f"{result['device']}, {result['date']}, commit {result['commit'] or 'unknown'}, {result.get('form', '')} form; "
        + _sheet(result).about(result["rows"]),
        ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
    ]


def _notes(result: dict[str, Any]) -> list[str]:
    sheet = _sheet(result)
    notes = {f"{row['impl']} {row['variant']}".strip(): row["note"] for row in result["rows"] if row["note"]}
    on_cpu = result["device"].startswith("cpu")
    return [*(f"- {name}: {note}." for name, note in notes.items()), sheet.LEGEND, *([sheet.CPU_NOTE] if on_cpu else [])]
