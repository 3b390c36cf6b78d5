"""Tokens of CPT documents: each source is tokenised once into a memory-mapped cache that is checked before every use.

A document's tokens are ``tokenizer(text, add_special_tokens=False) + [eos]``. The cache of a source is a folder named
by the sha256 of everything that decides the tokens: the bytes of its files, the tokenizer, the field, the format. It is
written beside its place and renamed into it, so it is whole or not there; its own digests are checked on opening, so
one that was damaged later is made anew. Processes of one machine wait for the one that writes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medtrain.trainer.data.sources import Source, check_text, files_digest, read_rows, source_files
from medtrain.trainer.errors import bad_input
from medtrain.trainer.files import file_sha256

_FORMAT = 1
_FILES = ("tokens.bin", "offsets.npy", "bytes.npy")
_CHARS_PER_CALL = 1_000_000  # bounds the memory of one tokenizer call; long enough to keep its threads busy


@dataclass(frozen=True)
class TokenizedSource:
    """The documents of one source, memory-mapped.

    ``tokens`` uint32 [num_tokens], eos after every document; document ``i`` is ``tokens[offsets[i]:offsets[i + 1]]``,
    ``offsets`` int64 [num_docs + 1]; ``num_bytes`` int64 [num_docs]: UTF-8 bytes of its text. ``digest``: sha256 of
    what decided the tokens.
    """

    name: str
    weight: float | None
    path: str
    tokens: np.ndarray
    offsets: np.ndarray
    num_bytes: np.ndarray
    digest: str

    @property
    def num_docs(self) -> int:
        return len(self.num_bytes)

    def document(self, i: int) -> np.ndarray:
        """Return the tokens of document ``i``, uint32 [n], the last one eos."""
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]


def eos_id(tokenizer) -> int:
    """Return the id that ends a document. Raises InputError if the tokenizer has no eos token."""
    if tokenizer.eos_token_id is None:
        raise bad_input("the tokenizer has no eos token", file=tokenizer.name_or_path or None, field="eos_token")
    return int(tokenizer.eos_token_id)


def tokenizer_digest(tokenizer) -> str:
    """Return the sha256 (hex) of what decides a fast tokenizer's ids and its eos.

    Left out are padding and truncation, which the tokenizer's calls set and reset. Raises InputError for one without
    the fast backend: there is nothing to take the digest of.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        found, expected = type(tokenizer).__name__, "a fast one (tokenizer.json)"
        raise bad_input(
            "wrong kind of tokenizer", file=getattr(tokenizer, "name_or_path", None), found=found, expected=expected
        )
    state = backend.to_str()
    # Before "added_tokens" stand the format's version, truncation and padding. Parsing megabytes to drop them is slow.
    state = state[state.index('"added_tokens"') :]
    rest = f"{eos_id(tokenizer)} {bool(getattr(tokenizer, 'split_special_tokens', False))} "
    return hashlib.sha256((rest + state).encode()).hexdigest()


def tokenize_texts(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each text, without special tokens, in one (threaded) call."""
    return tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning above model_max_length: windows come later
    )["input_ids"]


def tokenize_source(
    source: Source,
    tokenizer,
    cache_dir: str | Path,
    *,
    field: str = "text",
    key: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> TokenizedSource:
    """Return the tokenised documents of ``source``, from the cache in ``cache_dir`` where it holds them.

    Any number of processes may call this at once. ``key`` is the ``digest`` that another process has just got for the
    same source: where its cache is here too, nothing is hashed again. ``progress`` is called with the number of rows
    tokenised so far. Raises InputError for bad rows (see ``sources.py``);
    then no cache is left.
    """
    if key is not None:
        cache = _open_cache(Path(cache_dir) / key, verify=False)
        if cache is not None:
            return _tokenized(source, cache, key)
    digests = {"source": files_digest(source_files(source.path)), "tokenizer": tokenizer_digest(tokenizer)}
    settings = {"format": _FORMAT, "field": field, **digests}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    cache_dir = Path(cache_dir)
    folder = cache_dir / key
    cache = _open_cache(folder)
    if cache is None:
        cache_dir.mkdir(parents=True, exist_ok=True)
        # The lock only spares work: where it does not reach (another machine), each writes its own and one is kept.
        with open(cache_dir / f"{key}.lock", "w") as lock:
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            cache = _open_cache(folder)
            if cache is None:
                _write_cache(folder, source, tokenizer, field, settings, progress)
                cache = _open_cache(folder)
    if cache is None:
        raise OSError(f"{folder}: what was just written there cannot be read back")
    return _tokenized(source, cache, key)


def _tokenized(source: Source, cache: tuple[np.ndarray, np.ndarray, np.ndarray], key: str) -> TokenizedSource:
    name = source.name or Path(source.path).resolve().stem
    return TokenizedSource(name, source.weight, str(source.path), *cache, key)


def _open_cache(folder: Path, *, verify: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return (tokens, offsets, num_bytes), memory-mapped, or None if a file has not its digest in meta.json."""
    try:
        expected = json.loads((folder / "meta.json").read_text("utf-8"))["sha256"]
        if verify and any(file_sha256(folder / name) != expected[name] for name in _FILES):
            return None
        tokens = np.memmap(folder / "tokens.bin", dtype="<u4", mode="r")
        return tokens, *(np.load(folder / name, mmap_mode="r") for name in _FILES[1:])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_cache(folder: Path, source: Source, tokenizer, field: str, settings: dict, progress) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name[:16]}-", dir=folder.parent))
    try:
        eos = eos_id(tokenizer)
        lengths, num_bytes, num_docs = [np.zeros(1, np.int64)], [], 0
        with open(temporary / "tokens.bin", "wb") as out:
            for texts in _text_batches(source.path, field):
                ids = tokenize_texts(tokenizer, texts)
                for document in ids:
                    document.append(eos)
                lengths.append(np.array([len(document) for document in ids], dtype=np.int64))
                num_bytes.append(np.array([len(text.encode("utf-8")) for text in texts], dtype=np.int64))
                out.write(np.fromiter(itertools.chain.from_iterable(ids), "<u4", lengths[-1].sum()).tobytes())
                num_docs += len(ids)
                if progress is not None:
                    progress(num_docs)
        offsets = np.cumsum(np.concatenate(lengths))
        np.save(temporary / "offsets.npy", offsets)
        np.save(temporary / "bytes.npy", np.concatenate(num_bytes))
        meta = {**settings, "num_docs": num_docs, "num_tokens": int(offsets[-1]), "eos_id": eos}
        meta["sha256"] = {name: file_sha256(temporary / name) for name in _FILES}
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", "utf-8")
        temporary.chmod(0o755)
        if _open_cache(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another machine's came first, and it is as good as this one
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _text_batches(path: str, field: str) -> Iterator[list[str]]:
    texts: list[str] = []
    chars = 0
    for row in read_rows(path, [field]):
        texts.append(check_text(row.fields[field], row, field))
        chars += len(texts[-1])
        if chars >= _CHARS_PER_CALL:
            yield texts
            texts, chars = [], 0
    if texts:
        yield texts
