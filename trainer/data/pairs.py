"""Preference pairs: makes tokens of ``prompt``, ``chosen``, ``rejected`` rows, and cuts or refuses as configured.

Fields are strings: a prompt's tokens are those of a text that begins a sequence, a completion's those of one that goes on
(``tokenizer.py``), and eos. Or they are chat lists ``[{"role": ..., "content": ...}, ...]``: prompt tokens are the chat
template's with the generation prompt, completion tokens what it adds to them for prompt + completion, up to and with eos.

A row of the wrong form (a missing field, a wrong role) is always an error; one of the right form that cannot teach
(``UNUSABLE``) is an error or, with ``unusable: drop``, is left out; what is kept but looks wrong is noted. All are counted by
reason.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from medtrain.trainer.config.source import Source
from medtrain.trainer.data.chat import render_chat
from medtrain.trainer.data.sources import Row, check_text, kind_of, read_rows, source_name
from medtrain.trainer.data.tokenizer import continuations, opening, tokenize_starts, tokenize_texts
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

    ``tokens`` int32, flat; ``offsets`` int64 [3P + 1]: prompt_0, chosen_0, rejected_0, prompt_1, ...; completions end in eos.
    ``rows`` int64 [P]: each pair's row in its file. ``digest``: sha256 of ``tokens`` and ``offsets``, so of what a reference
    model would score. ``cut`` and ``refused``: (rows, tokens lost) by reason; ``noted``: rows by reason.
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
        return self.tokens[self.offsets[3 * i] : self.offsets[3 * i + 1]]

    def chosen(self, i: int) -> np.ndarray:
        return self.tokens[self.offsets[3 * i + 1] : self.offsets[3 * i + 2]]

    def rejected(self, i: int) -> np.ndarray:
        return self.tokens[self.offsets[3 * i + 2] : self.offsets[3 * i + 3]]

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


def token_key(tokens: np.ndarray) -> bytes:
    """A key that equal prompts and equal completions share."""
    return hashlib.sha256(tokens.tobytes()).digest()


def load_pairs(
    source: Source, tokenizer, *, max_length: int, overlong: Overlong = "error", unusable: Literal["error", "drop"] = "error"
) -> PairSet:
    """Read and tokenise the pairs of ``source``.

    ``overlong``: what becomes of pairs whose prompt and longer completion have more than ``max_length`` tokens:
    ``cut_completion`` keeps of both sides what fits after the prompt, eos last; ``cut_prompt`` cuts the prompt from the left,
    but for its BOS. A pair that cutting leaves no room, or makes both sides of equal, is refused. ``unusable``: what becomes of
    pairs of a reason in ``UNUSABLE``. Raises InputError naming file, row, field and counts by reason, and if no pair is left.
    """
    tokenize = _PairTokenizer(tokenizer)
    segments: list[np.ndarray] = []
    rows: list[int] = []
    cut: dict[str, tuple[int, int]] = {}
    refused: dict[str, tuple[int, int]] = {}
    noted: dict[str, int] = {}
    first_problem: InputError | None = None
    first_overlong: InputError | None = None
    remaining = read_rows(source.path, _FIELDS, _UNREAD)
    while batch := list(itertools.islice(remaining, _ROWS_PER_CALL)):
        for pair in tokenize(batch):
            tokens, reason = pair.tokens, None
            num_tokens, length = sum(map(len, tokens)), len(tokens[0]) + max(map(len, tokens[1:]))
            if pair.problems:
                reason, problem = pair.problems[0]
                tokens, first_problem = None, first_problem or problem
            elif length > max_length:
                tokens, reason = _shorten(tokens, max_length, overlong, tokenize)
                found, expected = f"{length} tokens", f"at most {max_length}, data.max_length"
                first_overlong = first_overlong or pair.row.error("overlong pair", found=found, expected=expected)
            if reason is not None:
                counts, lost = (cut, num_tokens - sum(map(len, tokens))) if tokens else (refused, num_tokens)
                num_rows, before = counts.get(reason, (0, 0))
                counts[reason] = (num_rows + 1, before + lost)
            if tokens:
                for note in dict.fromkeys(pair.notes):
                    noted[note] = noted.get(note, 0) + 1
                segments += (np.array(segment, dtype=np.int32) for segment in tokens)
                rows.append(pair.row.number)
    if first_problem is not None and unusable == "error":
        counted = ", ".join(f"{refused[reason][0]} {reason}" for reason in UNUSABLE if reason in refused)
        raise InputError(f"{first_problem} (unusable rows: {counted}; data.unusable: drop leaves them out)")
    if first_overlong is not None and overlong == "error":
        ways = "data.max_length or data.overlong: drop | cut_completion | cut_prompt help"
        raise InputError(f"{first_overlong} ({refused['overlong'][0]} rows are, this is the first; {ways})")
    if not rows:
        raise bad_input("no pair is left", file=source.path, found=f"{sum(r for r, _ in refused.values())} refused")
    flat, offsets = np.concatenate(segments), np.cumsum([0, *map(len, segments)])
    digest = hashlib.sha256(flat.astype("<i4").tobytes() + offsets.astype("<i8").tobytes()).hexdigest()
    name, path = source_name(source), str(source.path)
    return PairSet(name, source.weight, path, flat, offsets, np.array(rows), digest, cut, refused, noted)


def _shorten(tokens: _Tokens, max_length: int, overlong: Overlong, tokenize: _PairTokenizer) -> tuple[_Tokens | None, str]:
    """The pair cut to ``max_length``, or None; and why."""
    prompt, *sides = tokens
    if overlong in ("error", "drop"):
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


_Tokens = tuple[list[int], ...]  # prompt, chosen, rejected; completions with eos


class _Pair:
    """A row on its way to a pair: its tokens, the reasons why it cannot teach (the first counts), and what is noted."""

    def __init__(self, row: Row):
        """Raises InputError for a row of the wrong form."""
        self.row = row
        self.tokens: _Tokens = ()
        self.problems: list[tuple[str, InputError]] = []
        self.notes = [COLUMN_UNREAD.format(name) for name in _UNREAD if row.fields.get(name)]
        prompt = row.fields["prompt"]
        for name in _FIELDS:
            value = row.fields[name]
            if not isinstance(prompt, (str, list)) or type(value) is not type(prompt):
                expected = "a string or a list of messages" if name == "prompt" else f"{kind_of(prompt)}, as 'prompt' is"
                raise row.error("wrong type", field=name, found=kind_of(value), expected=expected)
            if value == []:
                raise row.error("empty list of messages", field=name)
            messages = value if isinstance(value, list) else []
            texts = {} if messages else {name: value}
            for k, message in enumerate(messages):
                if not isinstance(message, dict):
                    raise row.error("wrong type", field=f"{name}[{k}]", found=kind_of(message), expected="a message")
                texts |= {f"{name}[{k}].{key}": message.get(key) for key in ("role", "content")}
            for place, text in texts.items():
                if isinstance(text, str) and not text.strip():
                    self.refuse("empty", "empty text", place, text)
                else:
                    check_text(text, row, place)
            # Completion tokens are all learned, so they must all be the model's own; and it must be its turn to speak.
            for k, message in enumerate(messages):
                place, role = f"{name}[{k}].role", message["role"]
                if name != "prompt" and role != "assistant":
                    raise row.error("wrong role", field=place, found=role, expected="assistant")
                if name == "prompt" and k == len(messages) - 1 and role == "assistant":
                    raise row.error("the prompt ends with the assistant's turn", field=place, expected="user")

    def refuse(self, reason: str, problem: str, field: str, found: object = None) -> None:
        self.problems.append((reason, self.row.error(problem, field=field, found=found)))


class _PairTokenizer:
    def __init__(self, tokenizer):
        self.tokenizer, self.eos, self.start = tokenizer, tokenizer.eos_token_id, opening(tokenizer)[1]
        self.go_on = continuations(tokenizer)

    def __call__(self, rows: Sequence[Row]) -> list[_Pair]:
        """Make pairs of rows, with few calls of the tokenizer."""
        pairs = [_Pair(row) for row in rows]
        strings = [pair for pair in pairs if isinstance(pair.row.fields["prompt"], str)]
        chats = [pair for pair in pairs if isinstance(pair.row.fields["prompt"], list)]
        prompts = tokenize_starts(self.tokenizer, [pair.row.fields["prompt"] for pair in strings])
        sides = self.go_on([pair.row.fields[name] for pair in strings for name in _FIELDS[1:]])
        for k, pair in enumerate(strings):
            pair.tokens = prompts[k], [*sides[2 * k], self.eos], [*sides[2 * k + 1], self.eos]
            if all(pair.row.fields[name].startswith(pair.row.fields["prompt"]) for name in _FIELDS[1:]):
                pair.notes.append(PROMPT_REPEATED)
        rendered = [render_chat(pair.row, self.tokenizer) for pair in chats]
        ids = tokenize_texts(self.tokenizer, [text for texts, *_ in rendered for text in texts])
        for k, (pair, (texts, left_out, notes)) in enumerate(zip(chats, rendered, strict=True)):
            pair.notes = [*notes, *pair.notes]
            self._divide(pair, texts, ids[3 * k : 3 * k + 3])
            pair.problems += [(LEFT_OUT, error) for error in left_out]
        for pair in pairs:
            self._check(pair)
        return pairs

    def _divide(self, pair: _Pair, texts: list[str], ids: list[list[int]]) -> None:
        """Give a pair the tokens of what a chat template made: of the prompt, and of prompt and each completion."""
        prompt, *sides = ids
        if prompt[: len(self.start)] != self.start:
            pair.notes.append(BOS_MISSING)
        for k, (whole, text) in enumerate(zip(sides, texts[1:], strict=True)):
            if whole[: len(prompt)] == prompt:
                completion = whole[len(prompt) :]
            elif text.startswith(texts[0]):
                # A completion that begins with a line break may melt into the prompt's last token. The model goes on
                # from the prompt's own tokens, so that is where its text is divided.
                (completion,) = self.go_on([text[len(texts[0]) :]])
            else:
                completion, same = whole, len(os.path.commonprefix([texts[0], text]))
                problem = "the prompt is not a prefix of prompt and completion in the chat template: the prompt ends with"
                rest, other = (one[same : same + 40] for one in (texts[0], text))
                pair.refuse(NO_PREFIX, f"{problem} {rest!r}, where prompt and completion have {other!r}", _FIELDS[1 + k])
            # Completions end in eos: without the blanks a template adds after it, with eos where it adds none.
            end = len(completion) - completion[::-1].index(self.eos) if self.eos in completion else 0
            if not end:
                pair.notes.append(EOS_MISSING)
            blank_after = end and not self.tokenizer.decode(completion[end:]).strip()
            sides[k] = completion[:end] if blank_after else [*completion, self.eos]
        pair.tokens = prompt, *sides

    def _check(self, pair: _Pair) -> None:
        prompt, *sides = pair.tokens
        for name, segment, least in zip(_FIELDS, pair.tokens, (1, 2, 2), strict=True):
            if len(segment) < least:
                pair.refuse("empty", "the tokenizer makes no tokens of it", name, pair.row.fields[name])
        if sides[0] == sides[1]:
            pair.refuse("identical", "the same tokens as 'chosen'", "rejected", pair.row.fields["rejected"])
        bos, is_chat = self.tokenizer.bos_token_id, not isinstance(pair.row.fields["prompt"], str)
        # Of a chat only at its beginning: ChatML opens every turn with <|im_start|>, which some name as their BOS.
        doubled = prompt[:2] == [bos, bos] if is_chat else any([*prompt, *side].count(bos) > 1 for side in sides)
        if bos not in (None, self.eos) and doubled:
            pair.notes.append(BOS_DOUBLED)
        if any(side[-2:] == [self.eos, self.eos] for side in sides):
            pair.notes.append(EOS_DOUBLED)
