"""One answer statement: what stands after a marker, read as letters, as texts of choices, or as a number.

It runs on a copy of the output in which each character stands for one character of the original (full width -> ASCII,
upper case -> lower case), so that positions found in the copy cut the original.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, replace

from medtrain.trainer.exam.questions import SLOTS, Question

# Ranks of a statement (see medtrain.trainer.exam.parse).
BARE, SPOKEN, MARKED, FINAL, CUE = range(5)

# Characters from the marker on: no answer is longer, and reading stays linear in the length of the output.
_LONGEST_STATEMENT = 600

_FOLD = {code: chr(code - 0xFEE0).lower() for code in range(0xFF01, 0xFF5F)}
_FOLD |= {first + i: letter for first in (0x24B6, 0x24D0, 0x249C) for i, letter in enumerate(string.ascii_lowercase)}  # Ⓐ ⓐ ⒜
_FOLD |= str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
_FOLD |= str.maketrans("\u3000\u00a0\r\t｡､｢｣･〜−‐‑", "    。、「」・~---")

# Before an answer: what may stand between a marker and its answer without being part of either.
_OPEN = r"""[\s"'`*_$「『(\[【{<〈《“”‘’#>•・]"""
_OPENERS = re.compile(rf"{_OPEN}*")
_LEAD = re.compile(
    rf"(?:{_OPEN}|-(?!\d)|\\(?:text|mathrm|boxed|textbf)\{{|\\[(\[]|選択肢の?|記号の?|(?:以下|次)の(?:通り|とおり)(?:です|である)?[。:、]?"
    r"|(?:both|option|choice|options|choices)(?![a-z])|[、:](?=\s*\S))*"
)
_NUMBER_LEAD = re.compile(rf"(?:{_OPEN}|-(?!\.?\d)|[、:](?=\s*\S)|約|およそ|about|approximately)*")

# The answer itself, and what joins several.
_LINE = re.compile(r"[^\n]*")
_LETTER = re.compile(r"[a-z](?![a-z0-9_]|-[a-z0-9])")
_WORD = re.compile(r"[a-z]{2,}")
_ONLY_LETTERS = re.compile(r"[a-z](?:[ ,、]+[a-z])*[ ]*[。.]?[ ]*")
_AND = re.compile(r"[ ]*(?:,|、|・|;|&|\+|と|および|及び|かつ|(?<=[ )])and(?![a-z]))+[ ]*(?:and[ ]+)?")
_OR = re.compile(
    r"[ ]*(?:,|、)?[ ]*(?:または|又は|もしくは|あるいは|(?<![a-z])or(?![a-z])|か(?=[ ]*[^らつの])|/|\||~|-|–|→|vs)[ ]*"
)
_BULLET = re.compile(r"[ ]*\n[ ]*[-*•・][ ]*\(?(?=[a-z](?![a-z0-9]))")
_DIGITS = r"[+\-]?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|[+\-]?\.[0-9]+"
_NUMBER = re.compile(_DIGITS)
_VALUE = re.compile(rf"[ ]*(?:約|およそ|\()?[ ]*({_DIGITS})")

# Beside a letter: closing marks, the text of its choice, a remark in brackets.
CLOSE = r"""["'`*_$」』)\]】}>〉》”’]"""
_CLOSERS = re.compile(rf"(?:[ ]*{CLOSE}|\\[)\]])*")
_GAP = re.compile(r"[ ]*(?:[.:、,)。–-](?=[ ]*[^ ]))?[ ]*の?[ ]*")
_REMARK = re.compile(r"[ ]*\([ ]*([^()\n]*?)[ ]*\)")
_LABEL = re.compile(r"[ ]*\(([a-z])\)")
_HOW_MANY = re.compile(r"[ ]*(?:の|\()[ ]*([2-5])つ\)?")

# After an answer: what ends it. だが, ですが and ですか take it back or leave it open, so they do not.
_COPULA = (
    r"(?:です(?!か|が)|である(?!か|が)|となります|となる(?!か)|だ(?!が|け|ろうか|とは)|になります|になる(?!か)|であり|で、"
    r"|と(?:考え(?!が|られが)|判断|思(?!われが)|わか|分か|いえ|言え|なっ)|でしょう(?!か)|を選)"
)
_REASON = r"(?:理由|解説|説明|根拠|なぜ|because|since|as |due|based|the |which|this )"
_END = re.compile(
    rf"[ ]*(?:$|\n|[。!;](?!のよう)|\.(?![0-9])(?![ ]*[a-z][ ]*(?:$|[.,、。\n)]))|{_COPULA}|[、,:]?[ ]*{_REASON}|<"
    r"|,?[ ]*(?:not|rather than) (?:option )?[a-z](?![a-z]))"
)
_BARE_NUMBER_END = re.compile(r"[ ]*(?:[^\d\s。]{0,12}(?:1,?000対)?)[。.]?(?:です|である)?[。.]?")
# What shows that it is none: an example, a denial, a doubt ("cだと思いますが、...").
_ECHO = re.compile(rf"(?:{CLOSE}|[ ])*(?:のよう|の形式|という形|の形で|など)")
_ALL_BUT = re.compile(r"[ ]*以外")
_DENIED = re.compile(r"[ ]*(?:で(?:は|も)?な|じゃな|とは(?:限|言|い)|は(?:誤|不|間違|適切でな)|以外)")
_HEDGED = re.compile(r"[ ]*(?:だ|である|です)?と(?:思|考え)[^。、\n]{0,8}(?:が|けど|けれど)")
# After a number: a range, an alternative, a product, a fraction, one more number.
_UNFINISHED = re.compile(
    r"[ ]*(?:~|-|–|から|または|又は|もしくは|あるいは|or(?![a-z])|か[^らつ]|×|x[ ]*\d|\*[ ]*\d|\^|/[ ]*\d|±|[, ]\d)"
)

_SEVERAL = "several answers offered"
_ANOTHER_TEXT = "a letter beside the text of another choice"


def fold(text: str) -> str:
    """Full width to ASCII and upper case to lower case, character by character."""
    return text.translate(_FOLD)


def squeeze(text: str) -> str:
    """Text for comparing choices: NFKC, without white space."""
    return "".join(unicodedata.normalize("NFKC", text).split())


@dataclass(frozen=True)
class Parsed:
    """What an output, or one statement in it, answers: letters, or the number of a numeric question; neither after a failure."""

    letters: tuple[str, ...] = ()  # sorted, distinct
    number: str | None = None
    read_from: str = ""  # the piece of the output that the answer, or the failure, was read from
    failure: str | None = None
    start: int = 0  # where the statement begins and ends in the output
    end: int = 0
    rank: int = BARE

    @property
    def value(self) -> list[str] | str | None:
        """The answer as it is written to JSON: a list of letters, the number as a text, or None after a failure."""
        return self.number if self.number is not None else (list(self.letters) or None)


class StatementReader:
    """Reads answers to ``question`` at places of ``output``; ``text`` is the folded copy of it."""

    def __init__(self, output: str, question: Question):
        self.output, self.text, self.question = output, fold(output), question
        # A text that two choices share, or a blank one, names no choice. Case and a final stop count only where they tell
        # choices apart.
        exact = [squeeze(choice) for choice in question.choices]
        loose = [text.casefold().rstrip(".。") if len(text) > 2 else text for text in exact]
        texts = [one if loose.count(one) == 1 and one else text for one, text in zip(loose, exact, strict=True)]
        self.letter_of = {a: b for a, b in zip(texts, question.letters, strict=True) if a and texts.count(a) == 1}
        self.longest = max(map(len, self.letter_of), default=0)

    def read(self, start: int, at: int, end: int, rank: int) -> Parsed | None:
        """The answer that stands at ``at``, behind a marker from ``start``: None where none does, a problem where it is two."""
        end = min(end, at + _LONGEST_STATEMENT)
        if self.question.is_numeric:
            reading = self._read_number(self._after(_NUMBER_LEAD, at, end), end, bare=rank == BARE)
        else:
            reading = self._read_choices(start, self._after(_LEAD, at, end), end)
        return replace(reading, start=start, rank=rank) if reading else None

    def reading_of(self, letters: Iterable[str], end: int) -> Parsed:
        """``letters`` as an answer that ends at ``end``."""
        if not set(letters) <= set(self.question.letters):
            return Parsed(failure="a letter outside the choices", end=end)
        return Parsed(tuple(sorted(set(letters))), end=end)

    def _after(self, pattern: re.Pattern, at: int, end: int) -> int:
        """Where ``pattern`` ends if it stands at ``at``; ``at`` if it does not."""
        match = pattern.match(self.text, at, end)
        return match.end() if match else at

    def _ends(self, at: int, end: int, complete: bool = False) -> bool:
        """Whether a statement ends at ``at``; a ``complete`` one does unless it is taken back."""
        if any(pattern.match(self.text, at, end) for pattern in (_ECHO, _DENIED, _HEDGED)):
            return False
        return complete or bool(_END.match(self.text, at, end))

    def _read_choices(self, start: int, at: int, end: int) -> Parsed | None:
        named, lettered = self._read_texts(at, end), self._read_letters(at, end, bullets="\n" in self.text[start:at])
        if not named or not lettered:
            return named or lettered
        # "AB" as a choice of its own is not the letters a and b
        if lettered.failure or 1 < len(lettered.letters) == lettered.end - at:
            return named
        if named.failure or named.letters == lettered.letters:
            return lettered
        return Parsed(failure="a letter that is also the text of another choice", end=lettered.end)

    def _read_letters(self, at: int, end: int, bullets: bool) -> Parsed | None:
        """Letters, each alone or with the text of its choice, joined in one line or, after a line break, in ``bullets``."""
        if word := _WORD.match(self.text, at, end):
            return self._read_word(word, end)
        letters, position, following = [], at, at
        while following is not None:
            if not _LETTER.match(self.text, following, end):
                return None
            letters.append(self.text[following])
            position, complete, problem = self._after_letter(following, self._after(_LINE, following, end))
            if problem:
                return Parsed(failure=problem, end=position)
            either = self._after(_OR, position, end)
            if either > position and _LETTER.match(self.text, self._after(_LEAD, either, end), end):
                return Parsed(failure=_SEVERAL, end=either + 1)
            following = self._next_letter(position, end)
            if following is None and bullets and (bullet := _BULLET.match(self.text, position, end)):
                following = bullet.end()
        if count := _HOW_MANY.match(self.text, position, end):
            position, complete = count.end(), True
            if int(count[1]) != len(set(letters)):
                return Parsed(failure="another number of letters than it says", end=position)
        if but := _ALL_BUT.match(self.text, position, end):
            return Parsed(failure="all but one choice", end=but.end())
        return self.reading_of(letters, position) if self._ends(position, end, complete) else None

    def _read_word(self, word: re.Match, end: int) -> Parsed | None:
        """ "ac": letters written together, where they can be nothing else."""
        letters, after = list(word[0]), self._after(_CLOSERS, word.end(), end)
        distinct = letters == sorted(set(letters) & set(self.question.letters)) and len(letters) <= 3
        return Parsed(tuple(letters), end=word.end()) if distinct and _END.match(self.text, after, end) else None

    def _after_letter(self, at: int, end: int) -> tuple[int, bool, str | None]:
        """Step over the letter at ``at`` and what belongs to it: closing marks, the text of its choice, a remark in brackets.
        Returns where it ends, whether it has the text of its choice, and a problem: it has that of another one."""
        letter, position = self.text[at], self._after(_CLOSERS, at + 1, end)
        gap = self._after(_GAP, position, end)
        if named := self._longest_text(self._after(_OPENERS, gap, end), end):
            after, apart = self._after(_CLOSERS, named[1], end), self.text[position:gap].strip() in ("、", ",", "。")
            if named[0] == letter and not _DENIED.match(self.text, after, end):
                return after, True, None
            if named[0] != letter and not apart and _END.match(self.text, after, end):
                return after, False, _ANOTHER_TEXT
        if remark := _REMARK.match(self.text, position, end):
            other = re.fullmatch("[a-z]", remark[1]) and remark[1] != letter
            return remark.end(), False, _SEVERAL if other else None
        return position, False, None

    def _next_letter(self, position: int, end: int) -> int | None:
        """Where the next letter of a list in one line stands: after a joint, or after a gap if letters alone fill the line."""
        line_end = self._after(_LINE, position, end)
        joined = self._after(_AND, position, line_end)
        following = self._after(_LEAD, joined, line_end)
        letters_follow = following > position and ":" not in self.text[position:following]
        goes_on = joined > position or (letters_follow and _ONLY_LETTERS.fullmatch(self.text, following, line_end))
        return following if goes_on and _LETTER.match(self.text, following, end) else None

    def _longest_text(self, position: int, end: int) -> tuple[str, int] | None:
        """The longest choice text that stands at ``position``: its letter and where it ends."""
        best, text = None, ""
        for at in range(position, end):
            text += (character := squeeze(self.output[at]))
            if len(text) > self.longest:
                break
            name = text if text in self.letter_of else text.casefold()
            if character and name in self.letter_of and (len(name) > 2 or name == text):
                best = (self.letter_of[name], at + 1)
        return best

    def _read_texts(self, position: int, end: int) -> Parsed | None:
        """An answer given as the exact text of one or more choices."""
        letters: list[str] = []
        while named := self._longest_text(position, end):
            letter, position = named[0], self._after(_CLOSERS, named[1], end)
            letters.append(letter)
            if label := _LABEL.match(self.text, position, end):
                position = label.end()
                if label[1] != letter:
                    return Parsed(failure=_ANOTHER_TEXT, end=position)
            either = self._after(_OR, position, end)
            if either > position and self._longest_text(self._after(_LEAD, either, end), end):
                return Parsed(failure=_SEVERAL, end=either)
            joined = self._after(_AND, position, end)
            following = self._after(_LEAD, joined, end)
            if joined == position or not self._longest_text(following, end):
                break
            position = following
        return self.reading_of(letters, position) if letters and self._ends(position, end) else None

    def _read_number(self, at: int, end: int, bare: bool) -> Parsed | None:
        line_end = self._after(_LINE, at, end)
        line = self.text[at:line_end]
        boxed = re.findall(rf"([{SLOTS}])([^{SLOTS}]*)", line)
        if len(boxed) > 1:
            return self._read_boxes(line_end, boxed)
        result = re.split(rf"[=≒≈→⇒{SLOTS}]", line)[-1]
        value = _VALUE.match(result)
        if not value and not bare:
            # "解答: 総再生産率は1.2です": the only number of the statement. The digits of m2 or PaCO2 are no numbers.
            sentence = re.split(r"。|(?<!\d)\.|\.(?!\d)", line)[0]
            numbers = [m for m in _NUMBER.finditer(sentence) if not re.search(r"[a-z^_0-9]$", sentence[: m.start()])]
            if len(numbers) > 1:
                return Parsed(failure="several numbers", end=at + len(sentence))
            result, value = line, numbers[0] if numbers else None
        if not value:
            return None
        number, rest = value[value.re.groups], result[value.end() :]
        position = line_end - len(rest)
        if _UNFINISHED.match(rest):
            return Parsed(failure="more than one number, or an unfinished calculation", end=position)
        if _ECHO.match(rest) or _DENIED.match(rest) or (bare and not _BARE_NUMBER_END.fullmatch(rest)):
            return None
        number = number.replace(",", "").removeprefix("+")
        number = "0" + number if number.startswith(".") else number.replace("-.", "-0.")
        return Parsed(number=number, end=position)

    def _read_boxes(self, end: int, boxed: list[tuple[str, str]]) -> Parsed | None:
        """An answer written box by box, as on the answer sheet: ``①2 ②6`` or ``①0．②4``."""
        digits = [re.findall(r"\d(?:[ ]*\.)?", after) for _, after in boxed]  # each with the point behind it
        if not any(digits):
            return None  # the boxes of the question, restated and not filled in
        if "".join(box for box, _ in boxed) != SLOTS[: len(boxed)] or any(len(found) != 1 for found in digits):
            return Parsed(failure="boxes not filled with one digit each", end=end)
        filled = self.question.fill_boxes([found[0][0] for found in digits])
        return Parsed(number=filled or "".join(found[0] for found in digits).replace(" ", "").rstrip("."), end=end)
