"""Preference pairs: makes tokens of ``prompt``, ``chosen``, ``rejected`` rows, and cuts or refuses only as told.

Fields are strings: prompt tokens are ``tokenizer(prompt, add_special_tokens=False)``, completion tokens the same and
eos. Or they are chat lists ``[{"role": ..., "content": ...}, ...]``: prompt tokens are the chat template's with the
generation prompt, completion tokens what the template adds to them for prompt + completion, up to and with the eos.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medtrain.trainer.data.sources import Row, Source, check_text, kind_of, read_rows
from medtrain.trainer.data.tokens import eos_id, tokenize_texts
from medtrain.trainer.errors import bad_input

OVERLONG = ("error", "drop", "cut_completion", "cut_prompt")
_FIELDS = ("prompt", "chosen", "rejected")
_ROWS_PER_CALL = 256


@dataclass(frozen=True)
class PairSet:
    """The pairs of one source, in order.

    ``tokens`` int32, flat; ``offsets`` int64 [3P + 1]: prompt_0, chosen_0, rejected_0, prompt_1, ... ``rows`` int64
    [P]: each pair's row in its file. ``digest``: sha256 of all token ids and where they are divided, so of what a
    reference model would score. ``cut`` and ``refused``: (rows, tokens lost) by reason.
    """

    name: str
    weight: float | None
    path: str
    tokens: np.ndarray
    offsets: np.ndarray
    rows: np.ndarray
    digest: str
    cut: dict[str, tuple[int, int]]
    refused: dict[str, tuple[int, int]]

    @property
    def num_pairs(self) -> int:
        return len(self.rows)

    def prompt(self, i: int) -> np.ndarray:
        return self._segment(3 * i)

    def chosen(self, i: int) -> np.ndarray:
        """Return the chosen completion's tokens, the last one eos."""
        return self._segment(3 * i + 1)

    def rejected(self, i: int) -> np.ndarray:
        """Return the rejected completion's tokens, the last one eos."""
        return self._segment(3 * i + 2)

    @property
    def lengths(self) -> np.ndarray:
        """Input tokens of each pair alone, int64 [P]: the prompt, and each completion without its last token."""
        return np.diff(self.offsets).reshape(-1, 3).sum(axis=1) - 2

    @property
    def separate_lengths(self) -> np.ndarray:
        """The same where each side has a prompt of its own."""
        return self.lengths + np.diff(self.offsets)[::3]

    @property
    def completion_lengths(self) -> np.ndarray:
        """Completion tokens with eos, int64 [2P]: chosen_0, rejected_0, chosen_1, ..."""
        return np.diff(self.offsets).reshape(-1, 3)[:, 1:].reshape(-1)

    def _segment(self, k: int) -> np.ndarray:
        return self.tokens[self.offsets[k] : self.offsets[k + 1]]


def token_key(tokens: np.ndarray) -> bytes:
    """What stands for these tokens where equal prompts and completions are looked for."""
    return hashlib.sha256(np.ascontiguousarray(tokens)).digest()


def load_pairs(source: Source, tokenizer, *, max_length: int, overlong: str = "error") -> PairSet:
    """Read and tokenise the pairs of ``source``.

    A pair is overlong if prompt and longer completion (with eos) have more than ``max_length`` tokens. ``overlong``:
    ``error`` raises; ``drop`` refuses the pair; ``cut_completion`` keeps of both sides what fits after the prompt, eos
    last; ``cut_prompt`` cuts the prompt, which both share, from the left. Where cutting leaves no room for the other
    part, or makes both sides equal, the pair is refused. Raises InputError naming file, row and field for whatever
    cannot be a pair, and if no pair is left.
    """
    if overlong not in OVERLONG:
        raise bad_input("wrong setting", field="data.overlong", found=overlong, expected=" | ".join(OVERLONG))
    eos = eos_id(tokenizer)
    kept: list[tuple[np.ndarray, ...]] = []
    rows: list[int] = []
    cut: dict[str, tuple[int, int]] = {}
    refused: dict[str, tuple[int, int]] = {}
    too_long: list[tuple[Row, int]] = []
    for batch in _batches(read_rows(source.path, _FIELDS)):
        for row, pair in zip(batch, _tokenize(batch, tokenizer, eos), strict=True):
            before = sum(map(len, pair))
            length = len(pair[0]) + max(len(pair[1]), len(pair[2]))
            if length > max_length:
                if overlong == "error":
                    too_long.append((row, length))
                    continue
                if overlong == "drop":
                    _count(refused, "overlong", before)
                    continue
                pair = _cut_prompt(pair, max_length) if overlong == "cut_prompt" else _cut(pair, max_length, eos)
                if pair is None:
                    _count(refused, f"{overlong} leaves no room", before)
                    continue
                if pair[1] == pair[2]:
                    _count(refused, "identical after cutting", before)
                    continue
                _count(cut, overlong, before - sum(map(len, pair)))
            kept.append(tuple(np.array(segment, dtype=np.int32) for segment in pair))
            rows.append(row.number)
    if too_long:
        (row, length), several = too_long[0], f"{len(too_long)} rows are, this is the first"
        raise bad_input(
            f"overlong pair ({several}; data.max_length or data.overlong: drop | cut_completion | cut_prompt help)",
            file=row.file,
            row=row.number,
            found=f"{length} tokens",
            expected=_limit(max_length),
        )
    if not kept:
        raise bad_input("no pair is left", file=source.path, found=f"{sum(r for r, _ in refused.values())} refused")
    segments = [segment for pair in kept for segment in pair]
    tokens = np.concatenate(segments)
    offsets = np.concatenate([[0], np.cumsum([len(segment) for segment in segments])])
    digest = hashlib.sha256(tokens.astype("<i4").tobytes() + offsets.astype("<i8").tobytes()).hexdigest()
    name = source.name or Path(source.path).resolve().stem
    return PairSet(name, source.weight, str(source.path), tokens, offsets, np.array(rows), digest, cut, refused)


def _limit(max_length: int) -> str:
    return f"at most {max_length}, data.max_length"


def _count(counts: dict[str, tuple[int, int]], reason: str, tokens: int) -> None:
    rows, before = counts.get(reason, (0, 0))
    counts[reason] = (rows + 1, before + tokens)


def _cut(pair: Sequence[list[int]], max_length: int, eos: int) -> tuple[list[int], ...] | None:
    room = max_length - len(pair[0])
    if room < 2:  # a token and eos
        return None
    return pair[0], *(side if len(side) <= room else [*side[: room - 1], eos] for side in pair[1:])


def _cut_prompt(pair: Sequence[list[int]], max_length: int) -> tuple[list[int], ...] | None:
    room = max_length - max(len(pair[1]), len(pair[2]))
    return None if room < 1 else (pair[0][-room:], *pair[1:])


def _batches(rows):
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _ROWS_PER_CALL:
            yield batch
            batch = []
    if batch:
        yield batch


def _tokenize(batch: Sequence[Row], tokenizer, eos: int) -> list[tuple[list[int], ...]]:
    """Return (prompt, chosen, rejected) ids of each row, completions with eos."""
    chats = [_check(row) for row in batch]
    texts: list[str] = []
    for row, chat in zip(batch, chats, strict=True):
        texts += _render(row, tokenizer) if chat else [row.fields[field] for field in _FIELDS]
    ids = tokenize_texts(tokenizer, texts)
    pairs = []
    for k, (row, chat) in enumerate(zip(batch, chats, strict=True)):
        prompt, *sides = ids[3 * k : 3 * k + 3]
        where = {"file": row.file, "row": row.number}
        if chat:
            for side in (1, 2):
                whole, prompt_text, text = ids[3 * k + side], texts[3 * k], texts[3 * k + side]
                if whole[: len(prompt)] == prompt:
                    completion = whole[len(prompt) :]
                elif text.startswith(prompt_text):
                    # A completion that begins with a line break may melt into the prompt's last token. The model goes
                    # on from the prompt's own tokens, so that is where its text is divided.
                    completion = tokenize_texts(tokenizer, [text[len(prompt_text) :]])[0]
                else:
                    problem = "the prompt is not a prefix of prompt and completion in the chat template"
                    raise bad_input(problem, **where, field=_FIELDS[side])
                sides[side - 1] = _until_eos(completion, tokenizer, eos)
        else:
            sides = [[*side, eos] for side in sides]
        for field, segment, least in zip(_FIELDS, (prompt, *sides), (1, 2, 2), strict=True):
            if len(segment) < least:
                raise bad_input("the tokenizer makes no tokens of it", **where, field=field, found=row.fields[field])
        if sides[0] == sides[1]:
            raise bad_input("the same tokens as 'chosen'", **where, field="rejected", found=row.fields["rejected"])
        pairs.append((prompt, *sides))
    return pairs


def _until_eos(completion: list[int], tokenizer, eos: int) -> list[int]:
    """Return the completion ending in eos: without the blanks a template adds after it, with eos where it adds none."""
    if eos in completion:
        end = len(completion) - completion[::-1].index(eos)
        if not tokenizer.decode(completion[end:]).strip():
            return completion[:end]
    return [*completion, eos]


def _check(row: Row) -> bool:
    """Check a row's fields; return whether they are chat lists."""
    values = [row.fields[field] for field in _FIELDS]
    where = {"file": row.file, "row": row.number}
    for field, value in zip(_FIELDS, values, strict=True):
        if not isinstance(value, (str, list)):
            expected = "a string or a list of messages"
            raise bad_input("wrong type", **where, field=field, found=kind_of(value), expected=expected)
        if type(value) is not type(values[0]):
            expected = f"{kind_of(values[0])} as 'prompt' is"
            raise bad_input("types are mixed in one row", **where, field=field, found=kind_of(value), expected=expected)
        if isinstance(value, str):
            check_text(value, row, field)
        else:
            _check_messages(value, row, field)
    if values[1] == values[2]:
        raise bad_input("identical to 'chosen'", **where, field="rejected", found=row.fields["rejected"])
    return isinstance(values[0], list)


def _check_messages(messages: list, row: Row, field: str) -> None:
    where = {"file": row.file, "row": row.number}
    if not messages:
        raise bad_input("empty list of messages", **where, field=field)
    for k, message in enumerate(messages):
        if not isinstance(message, dict):
            raise bad_input("wrong type", **where, field=f"{field}[{k}]", found=kind_of(message), expected="a message")
        for key in ("role", "content"):
            check_text(message.get(key), row, f"{field}[{k}].{key}")
        # Completion tokens are all learned, so they must all be the model's own; and it must be its turn to speak.
        if field != "prompt" and message["role"] != "assistant":
            raise bad_input(
                "wrong role", **where, field=f"{field}[{k}].role", found=message["role"], expected="assistant"
            )
    if field == "prompt" and messages[-1]["role"] == "assistant":
        raise bad_input(
            "the prompt ends with the assistant's turn",
            **where,
            field=f"prompt[{len(messages) - 1}].role",
            expected="user",
        )


def _render(row: Row, tokenizer) -> list[str]:
    """Return the chat template's text of prompt, prompt + chosen and prompt + rejected."""
    where = {"file": row.file, "row": row.number}
    if not tokenizer.chat_template:
        expected = "strings, or a tokenizer with a chat template"
        raise bad_input(
            "the tokenizer has no chat template", **where, field="prompt", found="a list", expected=expected
        )
    # Parquet fills keys that other rows have with null.
    prompt, chosen, rejected = (
        [{key: value for key, value in message.items() if value is not None} for message in row.fields[field]]
        for field in _FIELDS
    )
    try:
        return [
            tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True),
            tokenizer.apply_chat_template(prompt + chosen, tokenize=False),
            tokenizer.apply_chat_template(prompt + rejected, tokenize=False),
        ]
    except Exception as error:  # a template raises what it likes
        raise bad_input(f"the chat template fails: {error}", **where) from error
