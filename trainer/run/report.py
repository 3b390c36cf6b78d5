"""``report.html``: one page about a run, made of what the run folder holds; a part that is missing is left out.

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
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from medtrain.trainer.config.settings import Config, LoraConfig
from medtrain.trainer.data.ledger import describe
from medtrain.trainer.errors import InputError, bad_input, user_path
from medtrain.trainer.exam.scoring import read_outputs
from medtrain.trainer.files import write_bytes
from medtrain.trainer.run.alarms import alarm_of
from medtrain.trainer.run.console import count, duration
from medtrain.trainer.run.folder import RunFolder
from medtrain.trainer.run.report_charts import Series, chart, series
from medtrain.trainer.run.report_exam import MODES, Evals, Exams, exam_charts, exam_samples, exam_table, exam_warnings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What a run folder holds. ``exams``: outputs by step, then by mode; ``evals``: (name, exam.json) of whole examinations;
    ``status``: text and its colour."""

    name: str
    manifest: dict[str, Any]
    rows: list[dict[str, Any]]
    ledger: dict[str, Any]
    exams: Exams
    evals: Evals
    status: tuple[str, str]

    def keys(self, pattern: str) -> list[str]:
        """Names in metrics.jsonl that match ``pattern``, in the order in which they first come."""
        names = dict.fromkeys(key for row in self.rows for key in row)
        return [key for key in names if re.fullmatch(pattern, key)]


def write_report(out: str | Path, *, stopped: str = "", evals: Sequence[str | Path] = ()) -> Path:
    """Write ``report.html`` into the run folder ``out`` and return its path.

    Args:
        stopped: why the run ended before its last step, where that is known.
        evals: folders that ``medtrain eval`` wrote, whose results are shown with the exam of the run.

    Raises:
        InputError: no run folder, nothing trained in it yet, a file in it that cannot be read, no exam.json.
    """
    folder = RunFolder(out)
    with user_path(folder.root):
        run = _read(folder, stopped, evals)
    with user_path(folder.report, "cannot be written"):
        write_bytes(folder.report, _page(run).encode())
    return folder.report


class LiveReport:
    """Writes the report of a run in progress, on the rank that is ``enabled``. A failure is logged and ends nothing."""

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
        rows = [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").split("\n")[:-1]]
        # Exams of a step that will be computed again, since it lies after the last checkpoint, are not yet this run's.
        last = rows[-1]["step"] if rows else -1
        files = {int(re.sub(r"\D", "", file.stem)): file for file in sorted(folder.root.glob("exam/step-*.jsonl"))}
        exams = {step: read_outputs(file) for step, file in files.items() if step <= last}
        missing = folder.missing_results(LoraConfig(**manifest["settings"]["lora"]))
        if last == manifest["steps"] and not missing:
            status = ("finished", "good")
        else:
            status = (f"stopped: {stopped}", "bad") if stopped else (f"step {max(last, 0):,} of {manifest['steps']:,}", "")
        found = [(Path(os.path.realpath(place)).name, _exam_json(Path(place))) for place in evals]
        return Run(folder.root.resolve().name, manifest, rows, ledger, exams, found, status)
    except InputError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise bad_input("not a run that can be read", file=folder.root, found=f"{type(error).__name__}: {error}") from None


def _exam_json(folder: Path) -> dict[str, Any]:
    file = folder / "exam.json"
    if not file.is_file():
        raise bad_input("no result of an exam", file=folder, expected="exam.json in it, as medtrain eval writes it")
    return json.loads(file.read_text(encoding="utf-8"))


def _page(run: Run) -> str:
    environment = Environment(
        loader=PackageLoader(__name__.rpartition(".")[0], "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    ours, usual = _flat(run.manifest["settings"]), _flat(Config(run.manifest["stage"]).settings())
    ours.pop("stage", None)
    return environment.get_template("report.html").render(
        run=run,
        stage={"cpt": "continued pretraining", "rpo": "reasoning preference optimization"}[run.manifest["stage"]],
        warnings=_warnings(run),
        facts=[(name, value) for name, value in _facts(run) if value],
        cards=_cards(run),
        exam_charts=exam_charts(run.exams),
        exam_table=exam_table(run.exams, run.evals),
        samples=exam_samples(run.exams),
        training=list(filter(None, _curves(run))),
        preferences=list(filter(None, _preference_curves(run))),
        ledger=_ledger(run),
        ledger_notes=describe(run.ledger) if run.ledger else [],
        settings={
            "settings that differ from the defaults": {k: v for k, v in ours.items() if usual.get(k) != v},
            "all settings": ours,
        },
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    )


def _facts(run: Run) -> list[tuple[str, str | None]]:
    start, model, sizes = run.manifest["starts"][-1], run.manifest["settings"]["model"], None
    if parameters := run.manifest.get("parameters"):
        sizes = count(parameters["all"])
        if parameters["trained"] != parameters["all"]:
            sizes += f", {count(parameters['trained'])} trained"
    versions = start.get("versions", {})
    return [
        ("model", model["path"] or f"random {model['init']['model_type']}"),
        ("parameters", sizes),
        ("started", run.manifest["starts"][0]["time"].replace("T", " ").replace("+00:00", " UTC")),
        ("device", f"{start['world_size']} × {start['device']}"),
        ("commit", re.sub(r"^(.{12})[0-9a-f]*", r"\1", start.get("commit") or "")),
        ("versions", ", ".join(f"{n} {versions[n]}" for n in ("medtrain", "torch", "transformers") if n in versions)),
        ("paths taken", ", ".join(f"{name} {path}" for name, path in start.get("paths", {}).items())),
    ]


def _cards(run: Run) -> list[tuple[str, str, str, str]]:
    """Key figures, (name, before, after, small print): held-out numbers and the exam where there are any, else means of the
    run's first and last steps."""
    cards: list[tuple[str, str, str, str]] = []

    def add(name: str, key: str, form: str, small: str = "held-out") -> bool:
        found = [(row["step"], row[key]) for row in run.rows if row.get(key) is not None]
        for (first, before), (last, after) in zip(found[:1], found[-1:], strict=True):
            steps = f"steps {first:,} and {last:,}" if len(found) > 1 else f"step {first:,}"
            cards.append((name, form.format(before) if len(found) > 1 else "", form.format(after), f"{small}, {steps}"))
        return len(found) > 1

    for mode, name in MODES.items():
        add(f"exam, {name}", f"exam/{mode}/points_ratio", "{:.3f}", "share of points")
    add("explanation gap", "exam/explanation_gap", "{:+.3f}", "answer only − with explanation")
    for key in run.keys(r"heldout/.*bits_per_byte"):
        add(f"bits per byte, {key.split('/')[1]}", key, "{:.3f}")
    trained = [row for row in run.rows if "loss" in row]
    for key, name in (("loss", "loss"), ("rewards/accuracy", "reward accuracy"), ("rewards/margin", "reward margin")):
        values = [row[key] for row in trained if row.get(key) is not None]
        if not add(name, f"heldout/{key}", "{:.4g}") and values:
            few = max(1, min(10, len(values) // 5))
            before, after = sum(values[:few]) / few, sum(values[-few:]) / few
            cards.append((name, f"{before:.4g}", f"{after:.4g}", f"training, first and last {few} of the steps"))
    if trained:
        seconds, last = sum(row["seconds"] for row in trained), trained[-1]
        speed = sorted(row["tokens_per_second"] for row in trained)[len(trained) // 2]
        mfu = f", MFU {last['mfu']:.1%}" if last.get("mfu") else ""
        cards.append(("tokens counted", "", count(last["tokens_total"]), f"step {last['step']:,}"))
        cards.append(("tokens per second", "", count(speed), f"median{mfu}"))
        cards.append(("time in steps", "", duration(seconds), f"{seconds / len(trained):.2f} s per step"))
        cards.append(("peak memory", "", f"{last['max_memory_gib']:.2f} GiB", "per rank"))
    return cards


def _warnings(run: Run) -> list[str]:
    """The run's own alarms again, from its rows; the exam's; what the ledger notes."""
    found = []
    if run.ledger:
        alarm = alarm_of(run.manifest["stage"], run.manifest["settings"]["rpo"], run.ledger)
        found += [line.removeprefix("warning: ") for row in run.rows for line in (alarm.watch(row) or "").splitlines()]
    found += exam_warnings(run.exams, run.evals)
    return found + [line for line in (describe(run.ledger) if run.ledger else []) if ": noted: " in line]


def _curves(run: Run) -> list[dict | None]:
    def one(title: str, name: str, key: str, **more: Any) -> dict | None:
        return chart(title, [series(name, run.rows, key)], **more)

    padded = any(row.get("useful_token_share", 1) < 1 for row in run.rows)
    return [
        chart("Loss", _with_heldout(run, "loss")),
        chart("Held-out bits per byte", _by_source(run, r"heldout/.*/bits_per_byte")),
        one("Gradient norm", "before clipping", "grad_norm"),
        one("Learning rate", "lr", "lr", zero=True),
        one("Tokens per second", "tokens/s", "tokens_per_second", zero=True),
        one("Useful tokens, share of the computed", "share", "useful_token_share") if padded else None,
        one("MFU", "MFU", "mfu", zero=True),
        one("FP8: difference of the loss to one without", "nats per token", "fp8/shadow_loss_difference"),
    ]


def _preference_curves(run: Run) -> list[dict | None]:
    def two(title: str, keys: dict[str, str], **more: Any) -> dict | None:
        return chart(title, [series(name, run.rows, key) for name, key in keys.items()], **more)

    return [
        chart("Reward margin, chosen − rejected", _with_heldout(run, "rewards/margin"), zero=True),
        chart("Reward accuracy", _with_heldout(run, "rewards/accuracy")),
        two("Rewards", {"chosen": "rewards/chosen", "rejected": "rewards/rejected"}, zero=True),
        two("Log-probabilities, nats per completion", {"chosen": "logps/chosen", "rejected": "logps/rejected"}),
        two("Loss terms", {"preference (DPO)": "dpo_loss", "likelihood (NLL)": "nll_loss"}),
        two("Correlation of margin and length", {"Pearson's r": "rewards/length_correlation"}, zero=True),
        chart("Reward margin by source", _by_source(run, r"sources/.*/rewards/margin"), zero=True),
    ]


def _with_heldout(run: Run, key: str) -> list[Series]:
    return [series("training", run.rows, key), series("held-out", run.rows, f"heldout/{key}")]


def _by_source(run: Run, pattern: str) -> list[Series]:
    return [series(key.split("/")[1], run.rows, key) for key in run.keys(pattern)[:6]]


def _ledger(run: Run) -> list[tuple]:
    """(source, rows, kept, split, cut, refused, tokens, tokens kept) of each source."""
    lines = []
    for held, sources in (("", run.ledger.get("sources", {})), ("held-out ", run.ledger.get("heldout", {}))):
        for name, source in sources.items():
            cut, refused = (sum(counts["rows"] for counts in source[outcome].values()) for outcome in ("cut", "refused"))
            split, kept = source.get("split", {}).get("rows", ""), source["kept"]
            lines.append((held + name, source["rows"], kept["rows"], split, cut, refused, source["tokens"], kept["tokens"]))
    return lines


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict | list) or not tree:
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {name: leaf for key, value in items for name, leaf in _flat(value, f"{prefix}.{key}" if prefix else str(key)).items()}
