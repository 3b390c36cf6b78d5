"""Benchmark files: what they say of the machine, and their rows drawn as Markdown."""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from medtrain.benchmarks.tables import SHEETS, Row, Sheet, grouped, name_of
from medtrain.trainer.errors import bad_input, user_path
from medtrain.trainer.files import check_can_make, write_json
from medtrain.trainer.run.folder import commit as tree_commit
from medtrain.trainer.run.folder import device_name, versions

LEGENDS = Path(__file__).parent / "legends"
PEERS = ("trl", "liger-kernel", "cut-cross-entropy", "accelerate")


def header(stage: str, device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """``stage``, ``device``, ``date``, ``commit``, ``versions`` of a benchmark file."""
    found = versions()
    for name in PEERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if device.type == "cuda":
        found["cuda"] = str(torch.version.cuda)
    return {
        "stage": stage,
        "device": device_name(device),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": tree_commit() or commit,
        "versions": found,
    }


def free_path(out: str | Path, stage: str, device: torch.device) -> Path:
    """``OUT/STAGE-DEVICE-DATE.json``, with a number if there is such a file already; makes the folder, InputError if it is
    a file."""
    folder = Path(out)
    check_can_make(folder, field="--out")
    if folder.is_file():
        raise bad_input("not a folder", field="--out", found=str(out))
    with user_path(folder, "cannot be written", field="--out"):
        folder.mkdir(parents=True, exist_ok=True)
    name = device_name(device) if device.type == "cuda" else device.type
    stem = f"{stage}-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}-{datetime.now(UTC).date().isoformat()}"
    paths = (folder / f"{stem}{number}.json" for number in itertools.chain([""], itertools.count(-2, -1)))
    return next(path for path in paths if not path.exists())


def save(path: Path, result: dict[str, Any]) -> None:
    """Write a benchmark file and the same as Markdown next to it."""
    write_json(path, result)
    path.with_suffix(".md").write_text(markdown(result), encoding="utf-8")


def load(path: str | Path) -> dict[str, Any]:
    """Read a benchmark file; InputError for what is no JSON, or has no ``rows`` of a known ``stage``."""
    with user_path(path):
        content = Path(path).read_bytes()
    try:
        result = json.loads(content)
        _ = result["rows"], result["device"], SHEETS[result["stage"]]
    except (ValueError, KeyError, TypeError):
        raise bad_input("not a file of medtrain bench", file=path) from None
    return result


def failures(result: dict[str, Any]) -> list[str]:
    """Rows of our own that have no result, but for want of memory, time or a device: what must not pass unseen."""
    place, excused = SHEETS[result["stage"]].place, ("out of memory", "left out", "cannot run here")
    failed = [row for row in result["rows"] if row["impl"] == "medtrain" and row["reason"]]
    return [f"{name_of(row)} ({place(row)}): {row['reason']}" for row in failed if not row["reason"].startswith(excused)]


def markdown(result: dict[str, Any]) -> str:
    """The whole file as Markdown: what ran where, tables, what did not run and why, goals, notes, legend."""
    rows, sheet = result["rows"], SHEETS[result["stage"]]
    parts = [
        f"{result['device']}, {result['date']}, commit {result['commit'] or 'unknown'}, {result.get('form', '')} form; "
        f"{sheet.about(rows)}\n" + ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    ]
    for here in grouped(rows, sheet.place).values():
        if lines := sheet.lines([row for row in here if not row["reason"]]):
            cells = [["" if line[key] is None else format(line[key], form) for _, key, form in sheet.columns] for line in lines]
            titles = [title for title, _, _ in sheet.columns]
            head = [_line(titles), "|---" + "|---:" * (len(titles) - 1) + "|"]
            parts.append("\n".join([f"### {sheet.title(here[0])}", "", *head, *map(_line, cells)]))
    notes = {name_of(row): row["note"] for row in rows if row["note"]}
    legend = [(LEGENDS / f"{result['stage']}.md").read_text(encoding="utf-8").rstrip()]
    legend += [sheet.cpu_note] if result["device"].startswith("cpu") else []
    for title, items in (
        ("Did not run", [f"- {text}" for text in _missing(rows, sheet)]),
        ("Goals", [f"- {text}" for text in sheet.goals(rows)]),
        ("Notes", [*(f"- {name}: {note}." for name, note in notes.items()), *legend]),
    ):
        if items:
            parts.append(f"### {title}\n\n" + "\n".join(items))
    return "\n\n".join(parts) + "\n"


def _missing(rows: list[Row], sheet: Sheet) -> Iterator[str]:
    """One text for each implementation and reason why it did not run; places are left out where all share the reason."""
    for name, own in grouped(rows, name_of).items():
        reasons = grouped(own, lambda row: row["reason"])
        for reason, those in reasons.items():
            places = dict.fromkeys(map(sheet.place, those))
            if reason:
                where = f" ({'; '.join(places)})" if len(reasons) > 1 or len(places) == 1 else ""
                yield f"{name} did not run: {reason}{where}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
