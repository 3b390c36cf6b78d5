"""A tokenizer as the data code uses it: its end token, what decides its ids, and the ids of many texts in one call.

A text is either the start of a sequence (a document, a prompt) or goes on from another (a completion, an answer that is
scored). A start has the BOS where the tokenizer puts one before every text; what goes on has no blank that the tokenizer
would put before a text of its own, as SentencePiece's do.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer, models

from medtrain.trainer.errors import bad_input

_BYTES_BACK = r'"decoder":\{"type":"ByteLevel",[^}]*\}'
_BYTES_BACK_OF_QWEN2 = '"decoder":{"type":"ByteLevel","add_prefix_space":true,"trim_offsets":true,"use_regex":true}'


def eos_id(tokenizer) -> int:
    """Return the id that ends a document. Raises InputError if the tokenizer has no eos token."""
    if tokenizer.eos_token_id is None:
        raise bad_input("the tokenizer has no eos token", file=tokenizer.name_or_path or None, field="eos_token")
    return int(tokenizer.eos_token_id)


def tokenizer_digest(tokenizer) -> str:
    """Return the sha256 (hex) of what decides a fast tokenizer's ids, its eos, and what it puts before every text.

    Left out are padding and truncation, which calls set and reset, and what decides offsets and decoded text. Raises
    InputError for a tokenizer without the fast backend: there is nothing to take the digest of.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        found, expected = type(tokenizer).__name__, "a fast one (tokenizer.json)"
        raise bad_input("wrong kind of tokenizer", file=getattr(tokenizer, "name_or_path", None), found=found, expected=expected)
    # Before "added_tokens" stand the format's version, truncation and padding. Parsing megabytes to drop them is slow.
    state = backend.to_str()
    before, after = state[state.index('"added_tokens"') :].split('"post_processor":', 1)
    # Offsets and decoding stand here as transformers' Qwen2Tokenizer sets them, by which such tokenizers used to be read:
    # what was tokenised then is still good.
    before = before.replace('"trim_offsets":false', '"trim_offsets":true')
    after = re.sub(_BYTES_BACK, _BYTES_BACK_OF_QWEN2, after, count=1)
    rest = f"{eos_id(tokenizer)} {bool(getattr(tokenizer, 'split_special_tokens', False))} "
    if bos := opening(tokenizer)[1]:
        rest += f"{bos} "
    return hashlib.sha256(f'{rest}{before}"post_processor":{after}'.encode()).hexdigest()


def tokenize_texts(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each text, without special tokens, in one (threaded) call."""
    if not texts:
        return []
    return tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning above model_max_length: windows come later
    )["input_ids"]


def opening(tokenizer) -> tuple[str, list[int]]:
    """Return what the tokenizer puts before every text, as text and as ids: its BOS; ``""`` and none where it puts nothing."""
    if not tokenizer.num_special_tokens_to_add():
        return "", []
    whole, bare = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    ids = next(whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return "".join(tokenizer.convert_ids_to_tokens(ids)), ids  # not bos_token, which need not be named


def tokenize_starts(tokenizer, texts: Sequence[str], *, as_written: bool = False) -> list[list[int]]:
    """Return the ids of texts that begin a sequence, each with the :func:`opening` before it, once.

    A text that begins with the opening as text does not get a second one. ``as_written``: the others get none, for a chat
    template writes its own. A text without tokens has no opening either.
    """
    text, ids = opening(tokenizer)
    if not ids:
        return tokenize_texts(tokenizer, texts)
    rows = tokenize_texts(tokenizer, [one.removeprefix(text) for one in texts])
    opened = [one.startswith(text) or not as_written for one in texts]
    return [[*ids, *row] if row and is_opened else row for row, is_opened in zip(rows, opened, strict=True)]


def continuations(tokenizer) -> Callable[[Sequence[str]], list[list[int]]]:
    """Return a function that makes ids of texts that go on from others: as :func:`tokenize_texts`, without a blank before.

    So the ids of prompt and completion, one after the other, decode to prompt + completion as they stand.
    """
    parts = _parts(tokenizer.backend_tokenizer)
    bare = _without_blank(parts)
    if bare == parts:
        return functools.partial(tokenize_texts, tokenizer)
    backend = Tokenizer.from_str(json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()) | bare))
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return lambda texts: [encoding.ids for encoding in backend.encode_batch(list(texts), add_special_tokens=False)]


def puts_blank(tokenizer) -> bool:
    """Whether the tokenizer puts a blank before every text."""
    parts = _parts(tokenizer.backend_tokenizer)
    return _without_blank(parts) != parts


def _parts(backend: Tokenizer) -> dict[str, Any]:
    """What a tokenizer does with a text before its model sees it, as tokenizer.json has it."""
    small = Tokenizer(models.BPE())  # a vocabulary is megabytes
    if backend.normalizer is not None:
        small.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        small.pre_tokenizer = backend.pre_tokenizer
    state = json.loads(small.to_str())
    return {name: state[name] for name in ("normalizer", "pre_tokenizer")}


def _without_blank(part: Any) -> Any:
    if isinstance(part, list):
        return [kept for one in part if (kept := _without_blank(one)) is not None]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return None
    off = {"prepend_scheme": "never", "add_prefix_space": False}
    return {key: off.get(key, _without_blank(value)) for key, value in part.items()}
