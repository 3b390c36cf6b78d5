"""Preference pairs: makes tokens of ``prompt``, ``chosen``, ``rejected`` rows, and cuts or refuses only as told.

Fields are strings: a prompt's tokens are those of a text that begins a sequence, a completion's those of one that goes on
(``encode.py``), and eos. Or they are chat lists ``[{"role": ..., "content": ...}, ...]``: prompt tokens are the chat
template's with the generation prompt, completion tokens what it adds to them for prompt + completion, up to and with eos.

A row of the wrong form (a missing field, a wrong role) is always an error; one of the right form that cannot teach
(``UNUSABLE``) is refused, by an error or, if told, by leaving it out; what is kept but looks wrong is noted. All are counted
by reason.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from medtrain.trainer.config.source import Source
from medtrain.trainer.data.chat import render_chat, why_no_prefix
from medtrain.trainer.data.encode import continuations, eos_id, opening, tokenize_starts, tokenize_texts
from medtrain.trainer.data.sources import Row, check_text, kind_of, read_rows, source_name
from medtrain.trainer.data.tokenizer import check_ids, first_texts
from medtrain.trainer.errors import InputError, bad_input

Overlong = Literal["error", "drop", "cut_completion", "cut_prompt"]
NO_PREFIX = "prompt not a prefix"
LEFT_OUT = "left out by the chat template"
UNUSABLE = ("empty", "identical", NO_PREFIX, LEFT_OUT)
BOS_DOUBLED = "BOS more than once"
BOS_MISSING = "no BOS from the chat template, the tokenizer puts one before every text"
EOS_DOUBLED = "EOS twice at the end: the text has its own"
EOS_MISSING = "no EOS from the chat template, one was added"
PROMPT_REPEATED = "both completions begin with the prompt's text"
COLUMN_UNREAD = "the row's own '{}' is not read"
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
    return hashlib.sha256(tokens.tobytes()).digest()


def load_pairs(
    source: Source, tokenizer, *, max_length: int, overlong: Overlong = "error", unusable: Literal["error", "drop"] = "error"
) -> PairSet:
    """Read and tokenise the pairs of ``source``.

    ``overlong``: what becomes of pairs whose prompt and longer completion have more than ``max_length`` tokens: ``error``;
    ``drop``; ``cut_completion`` keeps of both sides what fits after the prompt, eos last; ``cut_prompt`` cuts the prompt
    from the left, but for its BOS. A pair that cutting leaves no room, or makes both sides of equal, is refused.
    ``unusable``: ``error`` or ``drop``, of pairs that are empty or identical, whose prompt the chat template does not keep
    as the beginning, or of whose text it leaves something out. Raises InputError naming file, row, field and counts by
    reason, if no pair is left, and where the tokenizer's ids are not its tokenizer.json's.
    """
    check_ids(tokenizer, first_texts(_texts(read_rows(source.path, _FIELDS))))
    tokenize = _PairTokenizer(tokenizer)
    kept: list[np.ndarray] = []
    rows: list[int] = []
    cut: dict[str, tuple[int, int]] = {}
    refused: dict[str, tuple[int, int]] = {}
    noted: dict[str, int] = {}
    too_long: list[tuple[Row, int]] = []
    first_unusable: InputError | None = None
    remaining = read_rows(source.path, _FIELDS, _UNREAD)
    while batch := list(itertools.islice(remaining, _ROWS_PER_CALL)):
        for row, (pair, problem, notes) in zip(batch, tokenize(batch), strict=True):
            num_tokens, length = sum(map(len, pair)), len(pair[0]) + max(map(len, pair[1:]))
            if problem is not None:
                first_unusable = first_unusable or problem.error
                _count(refused, problem.reason, num_tokens)
                continue
            if length > max_length:
                if overlong == "error":
                    too_long.append((row, length))
                    continue
                shortened, reason = _shorten(pair, max_length, overlong, tokenize)
                if shortened is None:
                    _count(refused, reason, num_tokens)
                    continue
                pair = shortened
                _count(cut, reason, num_tokens - sum(map(len, pair)))
            for note in notes:
                noted[note] = noted.get(note, 0) + 1
            kept += (np.array(segment, dtype=np.int32) for segment in pair)
            rows.append(row.number)
    if first_unusable is not None and unusable == "error":
        counts = ", ".join(f"{refused[reason][0]} {reason}" for reason in UNUSABLE if reason in refused)
        raise InputError(f"{first_unusable} (unusable rows: {counts}; data.unusable: drop leaves them out)")
    if too_long:
        (row, length), several = too_long[0], f"{len(too_long)} rows are, this is the first"
        raise bad_input(
            f"overlong pair ({several}; data.max_length or data.overlong: drop | cut_completion | cut_prompt help)",
            file=row.file,
            row=row.number,
            found=f"{length} tokens",
            expected=f"at most {max_length}, data.max_length",
        )
    if not kept:
        raise bad_input("no pair is left", file=source.path, found=f"{sum(r for r, _ in refused.values())} refused")
    tokens = np.concatenate(kept)
    offsets = np.cumsum([0, *map(len, kept)])
    digest = hashlib.sha256(tokens.astype("<i4").tobytes() + offsets.astype("<i8").tobytes()).hexdigest()
    name, path = source_name(source), str(source.path)
    return PairSet(name, source.weight, path, tokens, offsets, np.array(rows), digest, cut, refused, noted)


def _count(counts: dict[str, tuple[int, int]], reason: str, tokens: int) -> None:
    rows, before = counts.get(reason, (0, 0))
    counts[reason] = (rows + 1, before + tokens)


def _shorten(pair: _Pair, max_length: int, overlong: Overlong, tokenize: _PairTokenizer) -> tuple[_Pair | None, str]:
    """The pair cut to ``max_length``, or None; and why."""
    prompt, *sides = pair
    if overlong == "drop":
        return None, "overlong"
    if overlong == "cut_completion":
        room, least = max_length - len(prompt), 2  # a token and eos
        sides = [side if len(side) <= room else [*side[: room - 1], tokenize.eos] for side in sides]
    else:
        start = tokenize.start if prompt[: len(tokenize.start)] == tokenize.start else []
        room, least = max_length - max(map(len, sides)) - len(start), 1
        prompt = start + prompt[len(start) :][-room:]
    if room < least:
        return None, f"{overlong} leaves no room"
    return (None, "identical after cutting") if sides[0] == sides[1] else ((prompt, *sides), overlong)


def _texts(rows: Iterable[Row]) -> Iterator[object]:
    """The rows' strings and their messages' contents, and whatever else stands there in a bad row."""
    for row in rows:
        for value in row.fields.values():
            messages = value if isinstance(value, list) else [{"content": value}]
            yield from (message.get("content") for message in messages if isinstance(message, dict))


_Pair = tuple[list[int], ...]  # prompt, chosen, rejected; completions with eos


class _Unusable(NamedTuple):
    reason: str
    error: InputError


class _PairTokenizer:
    """Makes of rows their pairs, what makes each unusable (or None), and what is to be noted. Raises InputError for a row
    of the wrong form."""

    def __init__(self, tokenizer):
        self.tokenizer, self.eos, self.start = tokenizer, eos_id(tokenizer), opening(tokenizer)[1]
        self.go_on = continuations(tokenizer)

    def __call__(self, rows: Sequence[Row]) -> list[tuple[_Pair, _Unusable | None, list[str]]]:
        checked = [_check(row) for row in rows]
        strings = [row.fields for row in rows if isinstance(row.fields["prompt"], str)]
        prompts = iter(tokenize_starts(self.tokenizer, [fields["prompt"] for fields in strings]))
        sides = iter(self.go_on([fields[name] for fields in strings for name in _FIELDS[1:]]))
        chats = [render_chat(row, self.tokenizer) for row in rows if isinstance(row.fields["prompt"], list)]
        wholes = iter(tokenize_texts(self.tokenizer, [text for texts, *_ in chats for text in texts]))
        rendered = iter(chats)
        made = []
        for row, problem in zip(rows, checked, strict=True):
            notes = [COLUMN_UNREAD.format(name) for name in _UNREAD if row.fields.get(name)]
            if isinstance(row.fields["prompt"], str):
                pair = next(prompts), *([*side, self.eos] for side in itertools.islice(sides, 2))
                if all(row.fields[name].startswith(row.fields["prompt"]) for name in _FIELDS[1:]):
                    notes.append(PROMPT_REPEATED)
            else:
                texts, left_out, chat_notes = next(rendered)
                pair, no_prefix, more = self._chat(row, texts, list(itertools.islice(wholes, 3)))
                problem = problem or no_prefix or (_Unusable(LEFT_OUT, left_out[0]) if left_out else None)
                notes = [*chat_notes, *notes, *more]
            made.append((pair, problem or _same_or_empty(row, pair), list(dict.fromkeys(notes + self._doubled(pair)))))
        return made

    def _chat(self, row: Row, texts: list[str], ids: list[list[int]]) -> tuple[_Pair, _Unusable | None, list[str]]:
        """The pair of texts that a chat template made: of the prompt, and of prompt and each completion."""
        prompt, *sides = ids
        problem, notes = None, [] if prompt[: len(self.start)] == self.start else [BOS_MISSING]
        for k, (whole, text) in enumerate(zip(sides, texts[1:], strict=True)):
            if whole[: len(prompt)] == prompt:
                completion = whole[len(prompt) :]
            elif text.startswith(texts[0]):
                # A completion that begins with a line break may melt into the prompt's last token. The model goes on
                # from the prompt's own tokens, so that is where its text is divided.
                (completion,) = self.go_on([text[len(texts[0]) :]])
            else:
                completion, why = whole, why_no_prefix(texts[0], text)
                error = bad_input(why, file=row.file, row=row.number, field=_FIELDS[1 + k])
                problem = problem or _Unusable(NO_PREFIX, error)
            if self.eos not in completion:
                notes.append(EOS_MISSING)
            sides[k] = self._until_eos(completion)
        return (prompt, *sides), problem, notes

    def _until_eos(self, completion: list[int]) -> list[int]:
        """The completion ending in eos: without the blanks a template adds after it, with eos where it adds none."""
        if self.eos in completion:
            end = len(completion) - completion[::-1].index(self.eos)
            if not self.tokenizer.decode(completion[end:]).strip():
                return completion[:end]
        return [*completion, self.eos]

    def _doubled(self, pair: _Pair) -> list[str]:
        prompt, *sides = pair
        bos, notes = self.tokenizer.bos_token_id, []
        if bos not in (None, self.eos) and any([*prompt, *side].count(bos) > 1 for side in sides):
            notes.append(BOS_DOUBLED)
        if any(side[-2:] == [self.eos, self.eos] for side in sides):
            notes.append(EOS_DOUBLED)
        return notes


def _same_or_empty(row: Row, pair: _Pair) -> _Unusable | None:
    where = {"file": row.file, "row": row.number}
    for name, segment, least in zip(_FIELDS, pair, (1, 2, 2), strict=True):
        if len(segment) < least:
            error = bad_input("the tokenizer makes no tokens of it", **where, field=name, found=row.fields[name])
            return _Unusable("empty", error)
    if pair[1] == pair[2]:
        error = bad_input("the same tokens as 'chosen'", **where, field="rejected", found=row.fields["rejected"])
        return _Unusable("identical", error)
    return None


def _check(row: Row) -> _Unusable | None:
    """Check the form of a row's fields; return what makes the row unusable."""
    where = {"file": row.file, "row": row.number}
    prompt, chosen, rejected = values = [row.fields[name] for name in _FIELDS]
    empty: list[InputError] = []
    for name, value in zip(_FIELDS, values, strict=True):
        if not isinstance(value, (str, list)):
            raise bad_input("wrong type", **where, field=name, found=kind_of(value), expected="a string or a list of messages")
        if type(value) is not type(prompt):
            expected = f"{kind_of(prompt)} as 'prompt' is"
            raise bad_input("types are mixed in one row", **where, field=name, found=kind_of(value), expected=expected)
        if isinstance(value, str):
            _check_text(value, row, name, empty)
        else:
            _check_messages(value, row, name, empty)
    if empty:
        return _Unusable("empty", empty[0])
    if chosen == rejected:
        return _Unusable("identical", bad_input("identical to 'chosen'", **where, field="rejected", found=rejected))
    return None


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
        last = f"prompt[{len(messages) - 1}].role"
        raise bad_input("the prompt ends with the assistant's turn", **where, field=last, expected="user")
