"""``report.html``: one page of a run for a person, made of what the run folder holds; a part that is missing is left out.

Nothing is computed here but intervals, so that the page of a run made elsewhere, or by an older version, is the same.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

from medtrain.kernels.losses import LOSSES
from medtrain.trainer.config.settings import Config
from medtrain.trainer.data.ledger import describe
from medtrain.trainer.errors import InputError, bad_input, user_path
from medtrain.trainer.exam.scoring import read_outputs
from medtrain.trainer.files import write_bytes
from medtrain.trainer.run.alarms import ForgettingAlarm, LikelihoodAlarm
from medtrain.trainer.run.console import count
from medtrain.trainer.run.folder import RunFolder
from medtrain.trainer.run.report_charts import line_chart, series, short
from medtrain.trainer.run.report_exam import MODES, exam_sections
from medtrain.trainer.run.report_page import charts, details, facts, page, section, table

log = logging.getLogger(__name__)

_MUCH = 0.05  # of an exam's outputs cut off or without an answer


@dataclass(frozen=True)
class Run:
    """What a run folder holds. ``exams``: rows of outputs by step, then by mode; ``evals``: (name, exam.json) of whole
    examinations; ``status``: text and whether it is good (None: neither)."""

    name: str
    manifest: dict[str, Any]
    rows: list[dict[str, Any]]
    ledger: dict[str, Any]
    exams: dict[int, dict[str, list[dict]]]
    evals: list[tuple[str, dict[str, Any]]]
    status: tuple[str, bool | None]

    @cached_property
    def trained(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "loss" in row]

    @cached_property
    def keys(self) -> list[str]:
        """Every key of metrics.jsonl, in the order in which they first come."""
        return list(dict.fromkeys(key for row in self.rows for key in row))


def write_report(out: str | Path, *, stopped: str = "", evals: Sequence[str | Path] = ()) -> Path:
    """Write ``report.html`` into the run folder ``out`` and return its path.

    Args:
        stopped: why the run ended before its last step, where that is known.
        evals: folders that ``medtrain eval`` wrote, whose results are put beside the exam of the run.

    Raises:
        InputError: no run folder, nothing trained in it yet, a file in it that cannot be read, no exam.json.
    """
    folder = RunFolder(out)
    with user_path(folder.root):
        run = _read(folder, stopped, evals)
    with user_path(folder.report, "cannot be written"):
        write_bytes(folder.report, page(f"{run.name} – medtrain", _body(run)).encode())
    return folder.report


class LiveReport:
    """Writes the report of a run in progress, on the rank that is ``enabled``. What goes wrong is said and ends nothing."""

    def __init__(self, out: str | Path, *, enabled: bool):
        self.out, self.enabled = out, enabled
        self._due = 0.0

    def refresh(self) -> None:
        """Write it, unless that would take more than a fiftieth of the time: a long run has many rows to read."""
        began = time.monotonic()
        if self.enabled and began >= self._due:
            self.write()
            ended = time.monotonic()
            self._due = ended + 49 * (ended - began)

    def write(self, stopped: str = "") -> None:
        if not self.enabled:
            return
        try:
            write_report(self.out, stopped=stopped)
        except Exception as error:
            log.info(f"note: report.html could not be written: {type(error).__name__}: {error}")


def _read(folder: RunFolder, stopped: str, evals: Sequence[str | Path]) -> Run:
    if not folder.manifest.is_file():
        raise bad_input("no run folder", file=folder.root, expected="manifest.json in it, as a run writes it")
    if not folder.metrics.is_file():
        raise bad_input("nothing is trained yet", file=folder.root, expected="metrics.jsonl in it")
    try:
        manifest = json.loads(folder.manifest.read_text(encoding="utf-8"))
        ledger = json.loads(folder.ledger.read_text(encoding="utf-8")) if folder.ledger.is_file() else {}
        # The last line may be half written, by a run in progress or one that was killed.
        lines = folder.metrics.read_text(encoding="utf-8").split("\n")[:-1]
        rows = [json.loads(line) for line in lines]
        # Exams of a step that will be computed again, since it lies after the last checkpoint, are not yet this run's.
        last = rows[-1]["step"] if rows else -1
        exams = {}
        for file in sorted(folder.root.glob("exam/step-*.jsonl")):
            step = int(re.sub(r"\D", "", file.stem))
            if step <= last:
                exams[step] = read_outputs(file)
        finished = bool(rows) and last == manifest["steps"] and all(place.is_dir() for place in _results(folder, manifest))
        name = folder.root.resolve().name
        if finished:
            status = ("finished", True)
        elif stopped:
            status = (f"stopped: {stopped}", False)
        else:
            status = (f"step {max(last, 0):,} of {manifest['steps']:,}", None)
        found = [(Path(os.path.realpath(place)).name, _exam_json(Path(place))) for place in evals]
        return Run(name, manifest, rows, ledger, exams, found, status)
    except InputError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise bad_input("not a run that can be read", file=folder.root, found=f"{type(error).__name__}: {error}") from None


def _exam_json(folder: Path) -> dict[str, Any]:
    file = folder / "exam.json"
    if not file.is_file():
        raise bad_input("no result of an exam", file=folder, expected="exam.json in it, as medtrain eval writes it")
    return json.loads(file.read_text(encoding="utf-8"))


def _body(run: Run) -> str:
    warnings = _warnings(run)
    return "\n".join(
        part
        for part in (
            _header(run, warnings),
            _cards(run),
            _notes(warnings),
            *exam_sections(run.exams, run.evals),
            section("Training", charts(*_curves(run))),
            section("Preferences", charts(*_preference_curves(run))),
            section("Data", _ledger_table(run), _ledger_notes(run)),
            section("How it was run", _settings(run), _starts(run)),
            _footer(),
        )
        if part
    )


# The head of the page


def _header(run: Run, warnings: list[str]) -> str:
    stage = {"cpt": "continued pretraining", "rpo": "reasoning preference optimization"}[run.manifest["stage"]]
    start = run.manifest["starts"][-1]
    text, good = run.status
    badges = f'<span class="badge{"" if good is None else " good" if good else " bad"}">{escape(text)}</span>'
    badges += f'<span class="badge">{stage}</span>'
    if warnings:
        badges += f'<span class="badge warn">{len(warnings)} warning{"s" if len(warnings) > 1 else ""}</span>'
    settings, parameters = run.manifest["settings"], run.manifest.get("parameters", {})
    model = settings["model"]
    sizes = count(parameters["all"]) if parameters else None
    if parameters and parameters["trained"] != parameters["all"]:
        sizes += f", {count(parameters['trained'])} trained"
    versions = start.get("versions", {})
    about = [
        ("model", model["path"] or f"random {model['init']['model_type']}"),
        ("parameters", sizes),
        ("started", run.manifest["starts"][0]["time"].replace("T", " ").replace("+00:00", " UTC")),
        ("device", f"{start['world_size']} × {start['device']}"),
        ("commit", re.sub(r"^(.{12})[0-9a-f]*", r"\1", start.get("commit") or "")),
        ("versions", ", ".join(f"{n} {versions[n]}" for n in ("medtrain", "torch", "transformers") if n in versions)),
        ("paths taken", ", ".join(f"{name} {path}" for name, path in start.get("paths", {}).items())),
    ]
    return f'<header><h1>{escape(run.name)}</h1><div class="badges">{badges}</div>{facts(about)}</header>'


def _cards(run: Run) -> str:
    """Key figures, before -> after: held-out numbers and the exam where they are there, else means of the run's ends."""
    cards: list[tuple[str, str, str, str]] = []  # name, before, after, small print
    rows, trained = run.rows, run.trained
    for mode, name in MODES.items():
        cards += _card(f"exam, {name}", rows, f"exam/{mode}/points_ratio", "share of points", "{:.3f}")
    cards += _card("explanation gap", rows, "exam/explanation_gap", "answer only − with explanation", "{:+.3f}")
    for key in _keys(run, r"heldout/.*bits_per_byte"):
        cards += _card(f"bits per byte, {key.split('/')[1]}", rows, key, "held-out", "{:.3f}")
    for key, name in (("loss", "loss"), ("rewards/accuracy", "reward accuracy"), ("rewards/margin", "reward margin")):
        held = [row for row in rows if row.get(f"heldout/{key}") is not None]
        if len(held) > 1:
            cards += _card(name, rows, f"heldout/{key}", "held-out", "{:.4g}")
        elif values := [row[key] for row in trained if row.get(key) is not None]:
            few = max(1, min(10, len(values) // 5))
            before, after = sum(values[:few]) / few, sum(values[-few:]) / few
            small = f"training, mean of the first and last {few} steps" if few > 1 else "training, first and last step"
            alone = len(values) == 1
            cards.append((name, "" if alone else f"{before:.4g}", f"{after:.4g}", "training" if alone else small))
    if trained:
        seconds, last = sum(row["seconds"] for row in trained), trained[-1]
        speed = sorted(row["tokens_per_second"] for row in trained)[len(trained) // 2]
        mfu = f", MFU {last['mfu']:.1%}" if last.get("mfu") else ""
        cards.append(("tokens counted", "", short(last["tokens_total"]), f"step {last['step']:,}"))
        cards.append(("tokens per second", "", short(speed), f"median{mfu}"))
        cards.append(("time in steps", "", _duration(seconds), f"{seconds / len(trained):.2f} s a step"))
        cards.append(("peak memory", "", f"{last['max_memory_gib']:.2f} GiB", "a rank"))
    inner = "".join(
        f'<li><div class="name">{escape(name)}</div><div class="value">'
        + (f'<span class="from">{escape(before)} → </span>' if before else "")
        + f'{escape(after)}</div><div class="small">{escape(small)}</div></li>'
        for name, before, after, small in cards
    )
    return f'<ul class="cards">{inner}</ul>' if cards else ""


def _card(name: str, rows: list[dict], key: str, small: str, form: str) -> list[tuple[str, str, str, str]]:
    found = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    if not found:
        return []
    before = form.format(found[0][1]) if len(found) > 1 else ""
    steps = f"steps {found[0][0]:,} and {found[-1][0]:,}" if len(found) > 1 else f"step {found[0][0]:,}"
    return [(name, before, form.format(found[-1][1]), f"{small}, {steps}")]


def _results(folder: RunFolder, manifest: dict[str, Any]) -> list[Path]:
    """What a run of these settings leaves at its end, as ``RunFolder.results`` says it of a config."""
    lora = manifest["settings"]["lora"]
    adapted = lora["rank"] > 0 or lora["path"] is not None
    return [folder.adapter] * adapted + [folder.model] * (not adapted or lora["merge"])


def _warnings(run: Run) -> list[str]:
    """The run's own alarms again, from its rows; outputs of the exam that were cut off; what the ledger notes."""
    found = []
    if run.manifest["stage"] == "rpo" and run.ledger:
        rpo = run.manifest["settings"]["rpo"]
        alarm = LikelihoodAlarm(list(run.ledger["sources"]), rpo["beta"], has_reference=LOSSES[rpo["loss"]].needs_reference)
    elif run.ledger:
        alarm = ForgettingAlarm(list(run.ledger.get("heldout", {})))
    else:
        alarm = None
    if alarm is not None:
        found += [line.removeprefix("warning: ") for row in run.rows for line in (alarm.watch(row) or "").splitlines()]
    for step, exam in run.exams.items():
        if any("invalid" in row for row in exam["explain"]):
            found.append(f"exam at step {step:,}: its figures are invalid: {exam['explain'][0]['invalid']}")
    found += [f"eval {name}: its figures are invalid: {result['invalid']}" for name, result in run.evals if "invalid" in result]
    for step in [*run.exams][-1:]:
        for mode, rows in run.exams[step].items():
            for what, number in (
                ("were cut off at their length limit", sum(row["truncated"] for row in rows)),
                ("have no readable answer", sum(row["failure"] is not None for row in rows)),
            ):
                if number > _MUCH * len(rows):
                    found.append(f"exam at step {step:,}, {MODES[mode]}: {number} of {len(rows)} outputs {what}")
    if run.ledger:
        found += [line for line in describe(run.ledger) if ": noted: " in line]
    return found


def _notes(warnings: list[str]) -> str:
    inner = "".join(f"<li>{escape(line)}</li>" for line in warnings)
    return f'<div class="note" role="note"><ul>{inner}</ul></div>' if warnings else ""


# Curves


def _keys(run: Run, pattern: str) -> list[str]:
    return [key for key in run.keys if re.fullmatch(pattern, key)]


def _with_heldout(run: Run, title: str, key: str, **more: Any) -> str:
    return line_chart(
        title,
        [series("training", run.rows, key, color=1), series("held-out", run.rows, f"heldout/{key}", color=2, marks=True)],
        **more,
    )


def _curves(run: Run) -> list[str]:
    rows = run.rows
    bits = [
        series(key.split("/")[1], rows, key, color=1 + i, marks=True)
        for i, key in enumerate(_keys(run, r"heldout/.*/bits_per_byte")[:6])
    ]
    return [
        _with_heldout(run, "Loss", "loss"),
        line_chart("Held-out bits per byte", bits),
        line_chart("Gradient norm", [series("before clipping", rows, "grad_norm")]),
        line_chart("Learning rate", [series("lr", rows, "lr", color=3)], zero=True),
        line_chart("Tokens per second", [series("tokens/s", rows, "tokens_per_second", color=6)], zero=True),
        line_chart("Useful tokens, share of the computed", [series("share", rows, "useful_token_share", color=6)])
        if any(row.get("useful_token_share", 1) < 1 for row in rows)
        else "",
        line_chart("MFU", [series("MFU", rows, "mfu", color=6)], zero=True),
        line_chart(
            "FP8: difference of the loss to one without",
            [series("nats a token", rows, "fp8/shadow_loss_difference", color=5, marks=True)],
        ),
    ]


def _preference_curves(run: Run) -> list[str]:
    rows = run.rows
    sources = [
        series(key.split("/")[1], rows, key, color=1 + i) for i, key in enumerate(_keys(run, r"sources/.*/rewards/margin")[:6])
    ]
    return [
        _with_heldout(run, "Reward margin, chosen − rejected", "rewards/margin", zero=True),
        _with_heldout(run, "Reward accuracy", "rewards/accuracy"),
        line_chart(
            "Rewards",
            [series("chosen", rows, "rewards/chosen", color=3), series("rejected", rows, "rewards/rejected", color=2)],
            zero=True,
        ),
        line_chart(
            "Log-probabilities, nats a completion",
            [series("chosen", rows, "logps/chosen", color=3), series("rejected", rows, "logps/rejected", color=2)],
        ),
        line_chart(
            "Loss terms",
            [series("preference (DPO)", rows, "dpo_loss", color=1), series("likelihood (NLL)", rows, "nll_loss", color=4)],
        ),
        line_chart(
            "Correlation of margin and length", [series("Pearson's r", rows, "rewards/length_correlation", color=5)], zero=True
        ),
        line_chart("Reward margin by source", sources, zero=True),
    ]


# Data, settings, starts


def _ledger_table(run: Run) -> str:
    lines = []
    for held, sources in (("", run.ledger.get("sources", {})), ("held-out ", run.ledger.get("heldout", {}))):
        for name, source in sources.items():
            lost = {outcome: sum(counts["rows"] for counts in source[outcome].values()) for outcome in ("cut", "refused")}
            split = source.get("split", {}).get("rows", "")
            lines.append(
                [
                    held + name,
                    source["rows"],
                    source["kept"]["rows"],
                    split,
                    lost["cut"],
                    lost["refused"],
                    source["tokens"],
                    source["kept"]["tokens"],
                ]
            )
    columns = ["source", "rows#", "kept#", "split#", "cut#", "refused#", "tokens#", "tokens kept#"]
    if all(line[3] == "" for line in lines):
        columns, lines = columns[:3] + columns[4:], [line[:3] + line[4:] for line in lines]
    return table(columns, lines, label="What became of every row and token")


def _ledger_notes(run: Run) -> str:
    lines = [f"<li>{escape(line)}</li>" for line in describe(run.ledger)] if run.ledger else []
    return details("cut, refused and noted, by reason", f"<ul>{''.join(lines)}</ul>" if lines else "")


def _settings(run: Run) -> str:
    stage = run.manifest["stage"]
    ours, usual = _flat(run.manifest["settings"]), _flat(Config(stage).settings())
    ours.pop("stage", None)
    changed = {name: value for name, value in ours.items() if usual.get(name) != value}
    return details("settings that differ from the defaults", _settings_table(changed)) + details(
        "all settings", _settings_table(ours)
    )


def _settings_table(settings: dict[str, Any]) -> str:
    rows = [[name, json.dumps(value, ensure_ascii=False)] for name, value in settings.items()]
    return table(["setting", "value"], rows, label="Settings", wrap="value")


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict | list) or not tree:
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {name: leaf for key, value in items for name, leaf in _flat(value, f"{prefix}.{key}" if prefix else str(key)).items()}


def _starts(run: Run) -> str:
    rows = [
        [
            start["time"],
            start["from_step"],
            f"{start['world_size']} × {start['device']}",
            start.get("commit") or "",
            " ".join(start.get("command", [])),
            ", ".join(f"{n} {v}" for n, v in start.get("versions", {}).items()),
        ]
        for start in run.manifest["starts"]
    ]
    columns = ["time", "from step#", "device", "commit", "command", "versions"]
    return details("starts", table(columns, rows, label="Starts of this run", wrap="versions"))


def _footer() -> str:
    return f'<p class="small">Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by medtrain, from the files beside this page.</p>'


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
