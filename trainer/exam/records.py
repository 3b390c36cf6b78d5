"""The record of a run: digests of what it was asked, its folder claimed, and rows that outlive a kill."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Collection, Iterable
from pathlib import Path

from medtrain.trainer.errors import bad_input, user_path
from medtrain.trainer.exam.prompts import MODES
from medtrain.trainer.exam.scoring import write_atomically
from medtrain.trainer.files import file_sha256, read_rows


def claim(out: Path, identity: dict, paths: dict, free: Collection[str] = ()) -> None:
    """Make ``out`` this run's folder, or find that it is; refuse it where it holds another run's results.

    ``free`` settings have made none of what is there and may differ; the record then has the new ones.
    """
    run = out / "run.json"
    with user_path(out):
        has_results = (out / "exam.json").exists() or any(out.glob("outputs-*.jsonl"))
    if has_results and not run.is_file():
        raise bad_input("holds results without run.json, so whose they are is unknown", file=out)
    if not has_results:
        write_atomically(run, json.dumps({"identity": identity} | paths, ensure_ascii=False, indent=1) + "\n")
        return
    try:
        before = json.loads(run.read_text(encoding="utf-8"))["identity"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise bad_input("cannot be read as the record of a run", file=run, found=str(error)) from error
    differing = [name for name in identity if before.get(name) != identity[name] and name not in free]
    if differing:
        raise bad_input(
            f"holds the results of another run: {', '.join(differing)} differ", file=out, expected="a new --out folder"
        )
    if before != identity:
        write_atomically(run, json.dumps({"identity": identity} | paths, ensure_ascii=False, indent=1) + "\n")


def rows_of(path: Path, fields: Collection[str] = ("problem_id", "prompt", "output", "truncated")) -> Iterable[dict]:
    """The whole rows of an outputs file; a last line that was cut off when a run was killed is left out."""
    if not path.is_file():
        return
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and set(fields) <= set(row):
            yield row


def read_outputs(file: Path) -> dict[str, list[dict]]:
    """The rows of one exam during training, by mode, as :func:`medtrain.trainer.exam.during.sit_exam` wrote them."""
    rows = read_rows(file)
    return {mode: [row for row in rows if row["mode"] == mode] for mode in MODES}


def end_last_line(path: Path) -> None:
    """End a last line that was cut off when a run was killed, so that rows appended begin on one of their own."""
    if path.is_file() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        with open(path, "ab") as file:
            file.write(b"\n")


def file_digest(path: str | Path | None) -> str | None:
    """sha256 of a file; None of None. Raises :class:`InputError` where it cannot be read."""
    if path is None:
        return None
    with user_path(path):
        return file_sha256(path)


def model_digest(model_dir: str | Path) -> str:
    """Digest of a checkpoint folder: every small file whole; of each tensor its first, middle and last 64 KiB.

    Training moves every tensor, so samples tell checkpoints apart, and 145 GB need not be read to go on with a run.
    """
    with user_path(model_dir):
        return _model_digest(Path(model_dir))


def _model_digest(folder: Path) -> str:
    if not (folder / "config.json").is_file():
        raise bad_input("no checkpoint", file=folder, expected="a folder with config.json, weights and a tokenizer")
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.suffix not in (".json", ".jinja", ".safetensors", ".txt", ".model", ".bin"):
            continue
        digest.update(f"{path.name}:{path.stat().st_size}\n".encode())
        with open(path, "rb") as file:
            if path.suffix != ".safetensors":
                digest.update(file.read(64 << 20))
                continue
            length = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
            header = file.read(min(length, path.stat().st_size))
            digest.update(header)
            try:
                tensors = json.loads(header)
                spans = [tensor["data_offsets"] for name, tensor in tensors.items() if name != "__metadata__"]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise bad_input("not a safetensors file", file=path) from error
            for begin, end in sorted(spans):
                for at in sorted({begin, (begin + end) // 2, max(begin, end - 65_536)}):
                    file.seek(8 + length + at)
                    digest.update(file.read(min(65_536, end - at)))
    return digest.hexdigest()
