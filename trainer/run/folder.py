"""The run folder: manifest, metrics and ledger, and the rule that a folder belongs to one run.

A run started again in its own folder goes on from the last complete checkpoint; a folder of another run is refused.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medtrain.trainer.config.settings import Config, LoraConfig, ModelConfig, learned_settings
from medtrain.trainer.data.chat import now
from medtrain.trainer.errors import bad_input, user_path
from medtrain.trainer.files import PARTIAL, check_can_make, complete_checkpoints, read_rows, sync, write_bytes, write_json

if TYPE_CHECKING:  # `medtrain report` reads run folders without it
    import torch

PACKAGES = "medtrain torch triton transformers peft torchao safetensors numpy flash-attn liger-kernel".split()


class RunFolder:
    """Paths of one run, and the writing of its small files (rank 0 only, but for reading)."""

    def __init__(self, out: str | Path):
        self.root = Path(out)
        self.manifest = self.root / "manifest.json"
        self.metrics = self.root / "metrics.jsonl"
        self.ledger = self.root / "ledger.json"
        self.checkpoints = self.root / "checkpoints"
        self.reference = self.root / "reference"
        self.base = self.root / "base"
        self.model = self.root / "model"
        self.adapter = self.root / "adapter"
        self.tensorboard = self.root / "tensorboard"
        self.report = self.root / "report.html"

    def exam(self, step: int) -> Path:
        """The outputs of the exam after ``step`` steps."""
        return self.root / "exam" / f"step-{step:08d}.jsonl"

    def check(self, settings: dict[str, Any], digests: dict[str, str]) -> None:
        """Refuse a folder that holds something else, before anything is written to it.

        Raises:
            InputError: files that are no run of ours; a run with other settings, data or weights.
        """
        check_can_make(self.root, field="run.out")
        error = partial(bad_input, field="run.out")
        if self.root.exists() and not self.root.is_dir():
            raise error("the run folder is a file", found=str(self.root))
        before = self.read_manifest()
        if before is None:
            with user_path(self.root, field="run.out"):
                entries = [] if not self.root.exists() else [e for e in self.root.iterdir() if not e.name.endswith(PARTIAL)]
            if entries:
                expected = "a new folder, or one of this run"
                raise error("the folder is not empty and holds no run of ours", found=str(self.root), expected=expected)
            return
        # A setting that an older version did not know had what is now its default.
        old = learned_settings(Config(settings["stage"]).settings()) | learned_settings(before["settings"])
        new = learned_settings(settings)
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                found = f"{name}={_short(old.get(name))}, now {_short(new.get(name))}"
                expected = "a new folder, or the same settings to go on"
                raise error("the folder holds another run", file=self.root, found=found, expected=expected)
        for name in sorted(before["digests"].keys() | digests.keys()):
            if before["digests"].get(name) != digests.get(name):
                problem, found = "the folder holds a run on other input", f"{name} has changed since"
                raise error(problem, file=self.root, found=found, expected="a new folder")

    def last_checkpoint(self) -> tuple[int, Path] | None:
        found = complete_checkpoints(self.checkpoints)
        return found[-1] if found else None

    def results(self, lora: LoraConfig) -> list[Path]:
        """The folders that the finished run leaves, the one to go on with last."""
        if not lora.on:
            return [self.model]
        return [self.adapter, self.model] if lora.merge else [self.adapter]

    def missing_results(self, lora: LoraConfig) -> list[Path]:
        return [path for path in self.results(lora) if not path.is_dir()]

    def finished(self, config: Config, steps: int) -> bool:
        """Whether nothing is left to do of the ``steps`` steps and of what comes of them."""
        last = self.last_checkpoint()
        return last is not None and last[0] == steps and not self.missing_results(config.lora)

    def kept(self, model: ModelConfig) -> ModelConfig:
        """``model`` with its config and tokenizer as the run keeps them in ``base/``; as it is where the run keeps none, or
        began with another. Errors as :meth:`read_manifest`."""
        manifest = self.read_manifest()
        if manifest is None or not self.base.is_dir():
            return model
        began = manifest["settings"]["model"]
        if (began["path"], began["tokenizer"]) != (model.path, model.tokenizer):
            return model
        return replace(model, path=str(self.base), init=None, tokenizer=None)

    def read_manifest(self) -> dict[str, Any] | None:
        """What the run wrote about itself; None where there is no run. Raises :class:`InputError` for an unreadable one."""
        with user_path(self.root, field="run.out"):
            written = self.manifest.read_text(encoding="utf-8") if self.manifest.is_file() else None
        if written is None:
            return None
        try:
            content = json.loads(written)
            if {"settings", "digests", "starts"} <= content.keys():
                return content
        except (ValueError, AttributeError):
            pass
        raise bad_input("unreadable manifest", file=self.manifest)

    def starts(self) -> list[dict[str, Any]]:
        """What the manifest holds of earlier starts of this run."""
        return (self.read_manifest() or {"starts": []})["starts"]

    def first_start(self) -> datetime:
        """When this run was started first, to the second and in the time zone it was in; now, where it was not yet."""
        starts = self.starts()
        return datetime.fromisoformat(starts[0]["time"]) if starts else now()

    def write_manifest(self, content: dict[str, Any]) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        write_json(self.manifest, content)

    def add_to_start(self, about: dict[str, Any]) -> None:
        """Add to what the manifest holds of this start."""
        content = self.read_manifest()
        assert content is not None, "written at the start"
        content["starts"][-1] |= about
        write_json(self.manifest, content)

    def cut_metrics(self, step: int) -> None:
        """Drop metrics and exams of steps after ``step``: they will be computed again, perhaps by other kernels or ranks. A last
        line cut short by a kill goes too."""
        for outputs in (self.root / "exam").glob("step-*.jsonl"):
            if outputs > self.exam(step):
                outputs.unlink()
        if not self.metrics.is_file():
            return
        kept = []
        for line in self.metrics.read_bytes().splitlines(keepends=True):
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or row["step"] > step:
                break
            kept.append(line)
        write_bytes(self.metrics, b"".join(kept))

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl so far: one a step, and one after it where something was evaluated."""
        return read_rows(self.metrics)

    def sync_metrics(self) -> None:
        """Let the rows so far reach the disk: a checkpoint is about to say that they are there."""
        if self.metrics.is_file():
            sync(self.metrics)

    def append_metrics(self, row: dict[str, Any]) -> None:
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def last_step(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """All that rows of metrics.jsonl hold of the last step among them."""
    last: dict[str, Any] = {}
    for row in rows:
        last = last | row if last.get("step") == row.get("step") else row
    return last


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on; those not installed are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The git commit of this source tree (``-dirty`` if changed), or None outside a checkout."""
    here = Path(__file__).resolve()
    head = None
    # Installed into somebody else's checkout, HEAD would be theirs.
    for words in (("ls-files", "--error-unmatch", here.name), ("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")):
        try:
            done = subprocess.run(["git", *words], cwd=here.parent, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        head = done.stdout.strip()
    return head


def device_name(device: torch.device) -> str:
    """A readable name, for manifests and benchmark files."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model)
    except OSError:
        pass
    return f"cpu ({model or platform.machine()}, {torch.get_num_threads()} threads)"
