"""A tokenizer as the data code uses it: its end token, what decides its ids, and the ids of many texts in one call."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from medtrain.trainer.errors import bad_input


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
