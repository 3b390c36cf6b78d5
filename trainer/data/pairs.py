"""Preference pairs: makes tokens of ``prompt``, ``chosen``, ``rejected`` rows, and cuts or refuses only as told.

Fields are strings: prompt tokens are ``tokenizer(prompt, add_special_tokens=False)``, after the BOS where the tokenizer
puts one before every text; completion tokens the same without BOS, without the blank that a tokenizer may put before a
text (see ``encode.py``), and with eos. Or they are chat lists ``[{"role": ..., "content": ...}, ...]``: prompt tokens are
the chat template's with the generation prompt, completion tokens what the template adds to them for prompt + completion,
up to and with the eos.

Three kinds of trouble: a row of the wrong form (a missing field, a wrong role) is always an error; a row of the right
form that cannot teach (``UNUSABLE``) is refused, by an error or, if told, by leaving it out; and what is kept but looks
wrong is noted (``NOTED``). All are counted by reason.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from medtrain.trainer.config.source import Source
from medtrain.trainer.data.chats import HISTORY_SHORTENED, KEY_LEFT_OUT, render_chat, why_no_prefix
from medtrain.trainer.data.encode import continuations, eos_id, opening, tokenize_starts, tokenize_texts
from medtrain.trainer.data.sources import Row, check_text, kind_of, read_rows
from medtrain.trainer.data.tokenizer import check_ids, first_texts
from medtrain.trainer.errors import InputError, bad_input

OVERLONG = ("error", "drop", "cut_completion", "cut_prompt")
UNUSABLE = ("empty", "identical", "prompt not a prefix", "left out by the chat template")
BOS_DOUBLED = "BOS more than once"
BOS_MISSING = "no BOS from the chat template, the tokenizer puts one before every text"
EOS_DOUBLED = "EOS twice at the end: the text has its own"
EOS_MISSING = "no EOS from the chat template, one was added"
PROMPT_REPEATED = "both completions begin with the prompt's text"
COLUMN_UNREAD = "the row's own '{}' is not read"
NOTED = (BOS_DOUBLED, BOS_MISSING, EOS_DOUBLED, EOS_MISSING, PROMPT_REPEATED, HISTORY_SHORTENED, KEY_LEFT_OUT, COLUMN_UNREAD)
# Columns that other trainers put into the prompt.
_UNREAD = ("system", "tools", "images", "chat_template_kwargs")
_FIELDS = ("prompt", "chosen", "rejected")
_ROWS_PER_CALL = 256


@dataclass(frozen=True)
class PairSet:
    """The pairs of one source, in order.

    ``tokens`` int32, flat; ``offsets`` int64 [3P + 1]: prompt_0, chosen_0, rejected_0, prompt_1, ... ``rows`` int64
    [P]: each pair's row in its file. ``digest``: sha256 of all token ids and where they are divided, so of what a
    reference model would score. ``cut`` and ``refused``: (rows, tokens lost) by reason. ``noted``: rows by reason, kept
    all the same.
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
    noted: dict[str, int] = field(default_factory=dict)

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


def load_pairs(source: Source, tokenizer, *, max_length: int, overlong: str = "error", unusable: str = "error") -> PairSet:
    """Read and tokenise the pairs of ``source``.

    A pair is overlong if prompt and longer completion (with eos) have more than ``max_length`` tokens. ``overlong``:
    ``error`` raises; ``drop`` refuses the pair; ``cut_completion`` keeps of both sides what fits after the prompt, eos
    last; ``cut_prompt`` cuts the prompt, which both share, from the left, but for its BOS. Where cutting leaves no room for
    the other part, or makes both sides equal, the pair is refused. ``unusable``: ``error`` raises, ``drop`` refuses a pair
    that is empty, identical, whose prompt the chat template does not keep as the beginning, or of whose completions,
    system or user messages it leaves something out. Raises InputError naming file, row, field and counts by reason, if no
    pair is left, and where the tokenizer's ids are not its tokenizer.json's.
    """
    if overlong not in OVERLONG:
        raise bad_input("wrong setting", field="data.overlong", found=overlong, expected=" | ".join(OVERLONG))
    eos, start = eos_id(tokenizer), opening(tokenizer)[1]
    check_ids(tokenizer, first_texts(_texts(read_rows(source.path, _FIELDS))))
    behind = continuations(tokenizer)
    kept: list[tuple[np.ndarray, ...]] = []
    rows: list[int] = []
    cut: dict[str, tuple[int, int]] = {}
    refused: dict[str, tuple[int, int]] = {}
    noted: dict[str, int] = {}
    too_long: list[tuple[Row, int]] = []
    first_unusable: _Unusable | None = None
    for batch in _batches(read_rows(source.path, _FIELDS, _UNREAD)):
        for row, tokenized in zip(batch, _tokenize(batch, tokenizer, behind, start, eos), strict=True):
            pair = tokenized.pair
            before = sum(map(len, pair))
            if tokenized.unusable is not None:
                first_unusable = first_unusable or tokenized.unusable
                _count(refused, tokenized.unusable.reason, before)
                continue
            length = len(pair[0]) + max(len(pair[1]), len(pair[2]))
            if length > max_length:
                if overlong == "error":
                    too_long.append((row, length))
                    continue
                if overlong == "drop":
                    _count(refused, "overlong", before)
                    continue
                pair = _cut_prompt(pair, max_length, start) if overlong == "cut_prompt" else _cut(pair, max_length, eos)
                if pair is None:
                    _count(refused, f"{overlong} leaves no room", before)
                    continue
                if pair[1] == pair[2]:
                    _count(refused, "identical after cutting", before)
                    continue
                _count(cut, overlong, before - sum(map(len, pair)))
            for reason in tokenized.noted:
                noted[reason] = noted.get(reason, 0) + 1
            kept.append(tuple(np.array(segment, dtype=np.int32) for segment in pair))
            rows.append(row.number)
    if first_unusable is not None and unusable == "error":
        counts = ", ".join(f"{refused[reason][0]} {reason}" for reason in UNUSABLE if reason in refused)
        raise InputError(f"{first_unusable.error} (unusable rows: {counts}; data.unusable: drop leaves them out)")
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
    return PairSet(name, source.weight, str(source.path), tokens, offsets, np.array(rows), digest, cut, refused, noted)


@dataclass(frozen=True)
class _Unusable:
    reason: str
    error: InputError


@dataclass(frozen=True)
class _Tokenized:
    pair: tuple[list[int], ...]  # prompt, chosen, rejected; completions with eos
    unusable: _Unusable | None
    noted: list[str]


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


def _cut_prompt(pair: Sequence[list[int]], max_length: int, start: list[int]) -> tuple[list[int], ...] | None:
    start = start if pair[0][: len(start)] == start else []
    room = max_length - max(len(pair[1]), len(pair[2])) - len(start)
    return None if room < 1 else (start + pair[0][len(start) :][-room:], *pair[1:])


def _batches(rows):
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _ROWS_PER_CALL:
            yield batch
            batch = []
    if batch:
        yield batch


def _texts(rows: Iterable[Row]) -> Iterator[object]:
    """The rows' strings and their messages' contents, and whatever else stands there in a bad row."""
    for row in rows:
        for value in row.fields.values():
            messages = value if isinstance(value, list) else [{"content": value}]
            yield from (message.get("content") for message in messages if isinstance(message, dict))


def _tokenize(batch: Sequence[Row], tokenizer, behind, start: list[int], eos: int) -> list[_Tokenized]:
    checked = [_check(row) for row in batch]
    texts: list[list[str]] = []
    lost: list[tuple[list[InputError], list[str]]] = []
    for row, (chat, _) in zip(batch, checked, strict=True):
        of_row, *more = render_chat(row, tokenizer) if chat else ([row.fields[field] for field in _FIELDS], [], [])
        texts.append(of_row)
        lost.append(more)
    strings = [of_row for of_row, (chat, _) in zip(texts, checked, strict=True) if not chat]
    rendered = [text for of_row, (chat, _) in zip(texts, checked, strict=True) if chat for text in of_row]
    whole_ids = iter(tokenize_texts(tokenizer, rendered))
    prompt_ids = iter(tokenize_starts(tokenizer, [prompt for prompt, *_ in strings]))
    side_ids = iter(behind([side for _, *sides in strings for side in sides]))
    found = []
    for row, (prompt_text, *side_texts), (chat, unusable), (left_out, noted) in zip(batch, texts, checked, lost, strict=True):
        where = {"file": row.file, "row": row.number}
        noted += [COLUMN_UNREAD.format(name) for name in _UNREAD if row.fields.get(name)]
        if chat:
            prompt, *sides = itertools.islice(whole_ids, 3)
            if prompt[: len(start)] != start:
                noted.append(BOS_MISSING)
            for side, (whole, text) in enumerate(zip(sides, side_texts, strict=True)):
                if whole[: len(prompt)] == prompt:
                    completion = whole[len(prompt) :]
                elif text.startswith(prompt_text):
                    # A completion that begins with a line break may melt into the prompt's last token. The model goes
                    # on from the prompt's own tokens, so that is where its text is divided.
                    (completion,) = behind([text[len(prompt_text) :]])
                else:
                    error = bad_input(why_no_prefix(prompt_text, text), **where, field=_FIELDS[1 + side])
                    unusable = unusable or _Unusable("prompt not a prefix", error)
                    completion = whole
                sides[side] = _until_eos(completion, tokenizer, eos)
                if eos not in completion:
                    noted.append(EOS_MISSING)
            if left_out:
                unusable = unusable or _Unusable("left out by the chat template", left_out[0])
        else:
            prompt, *sides = next(prompt_ids), *itertools.islice(side_ids, 2)
            if all(text.startswith(prompt_text) for text in side_texts):
                noted.append(PROMPT_REPEATED)
            sides = [[*side, eos] for side in sides]
        for field_, segment, least in zip(_FIELDS, (prompt, *sides), (1, 2, 2), strict=True):
            if len(segment) < least:
                problem = "the tokenizer makes no tokens of it"
                error = bad_input(problem, **where, field=field_, found=row.fields[field_])
                unusable = unusable or _Unusable("empty", error)
        if sides[0] == sides[1]:
            error = bad_input("the same tokens as 'chosen'", **where, field="rejected", found=row.fields["rejected"])
            unusable = unusable or _Unusable("identical", error)
        bos = tokenizer.bos_token_id
        if bos not in (None, eos) and any([*prompt, *side].count(bos) > 1 for side in sides):
            noted.append(BOS_DOUBLED)
        if any(side[-2:] == [eos, eos] for side in sides):
            noted.append(EOS_DOUBLED)
        found.append(_Tokenized((prompt, *sides), unusable, list(dict.fromkeys(noted))))
    return found


def _until_eos(completion: list[int], tokenizer, eos: int) -> list[int]:
    """Return the completion ending in eos: without the blanks a template adds after it, with eos where it adds none."""
    if eos in completion:
        end = len(completion) - completion[::-1].index(eos)
        if not tokenizer.decode(completion[end:]).strip():
            return completion[:end]
    return [*completion, eos]


def _check(row: Row) -> tuple[bool, _Unusable | None]:
    """Check a row's fields; return whether they are chat lists, and what makes the row unusable."""
    values = [row.fields[field] for field in _FIELDS]
    where = {"file": row.file, "row": row.number}
    empty: list[InputError] = []
    for name, value in zip(_FIELDS, values, strict=True):
        if not isinstance(value, (str, list)):
            expected = "a string or a list of messages"
            raise bad_input("wrong type", **where, field=name, found=kind_of(value), expected=expected)
        if type(value) is not type(values[0]):
            expected = f"{kind_of(values[0])} as 'prompt' is"
            raise bad_input("types are mixed in one row", **where, field=name, found=kind_of(value), expected=expected)
        if isinstance(value, str):
            _check_text(value, row, name, empty)
        else:
            _check_messages(value, row, name, empty)
    chat = isinstance(values[0], list)
    if empty:
        return chat, _Unusable("empty", empty[0])
    if values[1] == values[2]:
        error = bad_input("identical to 'chosen'", **where, field="rejected", found=row.fields["rejected"])
        return chat, _Unusable("identical", error)
    return chat, None


def _check_text(value: object, row: Row, name: str, empty: list[InputError]) -> None:
    if isinstance(value, str) and not value.strip():
        empty.append(bad_input("empty text", file=row.file, row=row.number, field=name, found=value))
    else:
        check_text(value, row, name)


def _check_messages(messages: list, row: Row, field: str, empty: list[InputError]) -> None:
    where = {"file": row.file, "row": row.number}
    if not messages:
        raise bad_input("empty list of messages", **where, field=field)
    for k, message in enumerate(messages):
        if not isinstance(message, dict):
            raise bad_input("wrong type", **where, field=f"{field}[{k}]", found=kind_of(message), expected="a message")
        for key in ("role", "content"):
            _check_text(message.get(key), row, f"{field}[{k}].{key}", empty)
        # Completion tokens are all learned, so they must all be the model's own; and it must be its turn to speak.
        if field != "prompt" and message["role"] != "assistant":
            raise bad_input("wrong role", **where, field=f"{field}[{k}].role", found=message["role"], expected="assistant")
    if field == "prompt" and messages[-1]["role"] == "assistant":
        raise bad_input(
            "the prompt ends with the assistant's turn", **where, field=f"prompt[{len(messages) - 1}].role", expected="user"
        )
