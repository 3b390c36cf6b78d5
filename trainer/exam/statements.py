"""One answer statement: what stands after a marker, read as letters, as texts of choices, or as a number.

It runs on a copy of the output in which each character stands for one character of the original (full width -> ASCII,
upper case -> lower case), so that positions found in the copy cut the original.
"""

from __future__ import annotations

import re
import string
import unicodedata
from dataclasses import dataclass

from medtrain.trainer.exam.questions import SLOTS, Question, answer_boxes

_FOLD = {code: chr(code - 0xFEE0).lower() for code in range(0xFF01, 0xFF5F)}
_FOLD |= {ord(upper): upper.lower() for upper in string.ascii_uppercase}
_FOLD |= {0x24B6 + i: letter for i, letter in enumerate(string.ascii_lowercase)}  # Ⓐ
_FOLD |= {0x24D0 + i: letter for i, letter in enumerate(string.ascii_lowercase)}  # ⓐ
_FOLD |= {0x249C + i: letter for i, letter in enumerate(string.ascii_lowercase)}  # ⒜
_FOLD |= str.maketrans("\u3000\u00a0\r\t｡､｢｣･〜−‐‑", "    。、「」・~---")

_OPEN = r"""[\s"'`*_$「『(\[【{<〈《“”‘’#>•・]"""
CLOSE = r"""["'`*_$」』)\]】}>〉》”’]"""
# What may stand between a marker and its answer without being part of either.
_LEAD = re.compile(
    rf"(?:{_OPEN}|-(?!\d)|\\(?:text|mathrm|boxed|textbf)\{{|\\[(\[]|選択肢の?|記号の?|(?:以下|次)の(?:通り|とおり)(?:です|である)?[。:、]?"
    r"|(?:both|option|choice|options|choices)(?![a-z])|[、:](?=\s*\S))*"
)
_CLOSERS = re.compile(rf"(?:[ ]*{CLOSE}|\\[)\]])*")

# What may follow an answer. だが, ですが and ですか take it back or leave it open, so they do not end one.
_COPULA = (
    r"(?:です(?!か|が)|である(?!か|が)|となります|となる(?!か)|だ(?!が|け|ろうか|とは)|になります|になる(?!か)|であり|で、"
    r"|と(?:考え(?!が|られが)|判断|思(?!われが)|わか|分か|いえ|言え|なっ)|でしょう(?!か)|を選)"
)
_REASON = r"(?:理由|解説|説明|根拠|なぜ|because|since|as |due|based|the |which|this )"
_END = re.compile(
    rf"[ ]*(?:$|\n|[。!;](?!のよう)|\.(?![0-9])(?![ ]*[a-z][ ]*(?:$|[.,、。\n)]))|{_COPULA}|[、,:]?[ ]*{_REASON}|<"
    r"|,?[ ]*(?:not|rather than) (?:option )?[a-z](?![a-z]))"
)
_ECHO = re.compile(rf"(?:{CLOSE}|[ ])*(?:のよう|の形式|という形|の形で|など)")
_TAKEN_BACK = re.compile(r"[ ]*(?:で(?:は|も)?な|じゃな|とは(?:限|言|い)|は(?:誤|不|間違|適切でな)|以外)")
# "cだと思いますが、..." leaves the answer open.
_HEDGED = re.compile(r"[ ]*(?:だ|である|です)?と(?:思|考え)[^。、\n]{0,8}(?:が|けど|けれど)")
_HOW_MANY = re.compile(r"[ ]*(?:の|\()[ ]*([2-5])つ\)?")
_AND = re.compile(r"[ ]*(?:,|、|・|;|&|\+|と|および|及び|かつ|(?<=[ )])and(?![a-z]))+[ ]*(?:and[ ]+)?")
_OR = re.compile(
    r"[ ]*(?:,|、)?[ ]*(?:または|又は|もしくは|あるいは|(?<![a-z])or(?![a-z])|か(?=[ ]*[^らつの])|/|\||~|-|–|→|vs)[ ]*"
)
_NUMBER = re.compile(r"[+\-]?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|[+\-]?\.[0-9]+")

# After a number: a range, an alternative, a product, a fraction, one more number.
_UNFINISHED = re.compile(
    r"[ ]*(?:~|-|–|から|または|又は|もしくは|あるいは|or(?![a-z])|か[^らつ]|×|x[ ]*\d|\*[ ]*\d|\^|/[ ]*\d|±|[, ]\d)"
)

# Characters from the marker on: no answer is longer, and reading stays linear in the length of the output.
_LONGEST_STATEMENT = 600

# Ranks of a statement (see medtrain.trainer.exam.parse).
BARE, SPOKEN, MARKED, FINAL, CUE = range(5)


def fold(text: str) -> str:
    """Full width to ASCII and upper case to lower case, character by character."""
    return text.translate(_FOLD)


@dataclass(frozen=True)
class Reading:
    """One answer statement: what it says or what is wrong with it, its rank, and where it stands."""

    rank: int
    start: int
    end: int
    letters: tuple[str, ...] = ()
    number: str | None = None
    problem: str | None = None

    @property
    def said(self):
        return self.letters, self.number


def squeeze(text: str) -> str:
    """Text for comparing choices: NFKC, without white space."""
    return "".join(unicodedata.normalize("NFKC", text).split())


class StatementReader:
    """Reads answers to ``question`` at places of ``output``; ``text`` is the folded copy of it."""

    def __init__(self, output: str, question: Question):
        self.output, self.question = output, question
        self.text = fold(output)
        # A text that two choices share, or a blank one, names no choice.
        texts = [squeeze(choice) for choice in question.choices]
        self.texts = {
            text: letter for text, letter in zip(texts, question.letters, strict=True) if text and texts.count(text) == 1
        }

    def read(self, start: int, at: int, end: int, rank: int) -> Reading | None:
        """The answer that stands at ``at``: None where none stands, a problem where it says two things."""
        end = min(end, at + _LONGEST_STATEMENT)
        lead = _LEAD.match(self.text, at, end).end()
        if self.question.is_numeric:
            return self._read_number(start, at, end, rank)
        named, exact = self._read_texts(start, lead, end, rank), self._read_letters(start, lead, end, rank)
        together = exact and len(exact.letters) > 1 and exact.end - lead == len(exact.letters)
        if named and together:
            return named  # "AB" as a choice of its own is not the letters a and b
        if named and exact and not named.problem and not exact.problem and named.letters != exact.letters:
            problem = "a letter that is also the text of another choice"
            return Reading(rank, start, exact.end, problem=problem)
        if exact and (not exact.problem or not named):
            return exact
        return named

    def _read_letters(self, start: int, at: int, end: int, rank: int) -> Reading | None:
        text, letters, position = self.text, [], at
        line_end = end if (found := text.find("\n", at, end)) < 0 else found
        run = re.compile(r"[a-z]+").match(text, at, end)
        if not run:
            return None
        if len(run[0]) > 1:
            # "ac": letters written together, where they can be nothing else.
            after = _CLOSERS.match(text, run.end(), end).end()
            together = list(run[0]) == sorted(set(run[0])) and set(run[0]) <= set(self.question.letters)
            if not together or len(run[0]) > 3 or not _END.match(text, after, end) or _ECHO.match(text, after, end):
                return None
            return Reading(rank, start, run.end(), tuple(run[0]))
        while True:
            if not re.compile(r"[a-z](?![a-z0-9_]|-[a-z0-9])").match(text, position, end):
                return None
            letter = text[position]
            position, confirmed, problem = self._after_letter(letter, position + 1, line_end)
            letters.append(letter)
            if problem:
                return Reading(rank, start, position, problem=problem)
            either = _OR.match(text, position, end)
            if either and self._isolated_letter(_LEAD.match(text, either.end(), end).end(), end):
                return Reading(rank, start, either.end() + 1, problem="several answers offered")
            joined = _AND.match(text, position, line_end)
            following = _LEAD.match(text, joined.end() if joined else position, line_end).end()
            if joined and self._isolated_letter(following, end):
                position = following
                continue
            if (
                following > position
                and ":" not in text[position:following]
                and self._isolated_letter(following, end)
                and self._all_letters(following, line_end)
            ):
                position = following
                continue
            bullet = re.compile(r"[ ]*\n[ ]*[-*•・][ ]*\(?(?=[a-z](?![a-z0-9]))").match(text, position, end)
            if bullet and "\n" in text[start:position]:
                position = bullet.end()
                line_end = end if (found := text.find("\n", position, end)) < 0 else found
                continue
            break
        if said := _HOW_MANY.match(text, position, line_end):
            position, confirmed = said.end(), True
            if int(said[1]) != len(set(letters)):
                return Reading(rank, start, position, problem="another number of letters than it says")
        if (
            _ECHO.match(text, position, end)
            or _HEDGED.match(text, position, end)
            or (taken := _TAKEN_BACK.match(text, position, end))
            and "以外" not in taken[0]
        ):
            return None
        if taken:
            return Reading(rank, start, taken.end(), problem="all but one choice")
        if not confirmed and not _END.match(text, position, end) and not _END.match(text, position, line_end):
            return None
        if any(letter not in self.question.letters for letter in letters):
            return Reading(rank, start, position, problem="a letter outside the choices")
        return Reading(rank, start, position, tuple(sorted(set(letters))))

    def _after_letter(self, letter: str, position: int, line_end: int) -> tuple[int, bool, str | None]:
        """Step over what belongs to a letter: closing marks, the text of its choice, a remark in brackets.

        Returns where it ends, whether it was the letter's own text, and a problem: the text of another choice.
        """
        text = self.text
        position = _CLOSERS.match(text, position, line_end).end()
        gap = re.compile(r"[ ]*(?:[.:、,)。](?=[ ]*[^ ]))?[ ]*の?[ ]*").match(text, position, line_end)
        opening = re.compile(rf"{_OPEN}*").match(text, gap.end(), line_end)
        match = self._longest_text(opening.end(), line_end)
        if match is not None:
            owner, after = match
            closing = _CLOSERS.match(text, after, line_end).end()
            plain = gap.group().strip() not in ("、", ",", "。")
            if owner == letter and not _TAKEN_BACK.match(text, closing, line_end):
                return closing, True, None
            if owner != letter and plain and _END.match(text, closing, line_end):
                return closing, False, "a letter beside the text of another choice"
        bracket = re.compile(r"[ ]*\(([^()\n]*)\)").match(text, position, line_end)
        if bracket:
            if re.fullmatch(r"[ ]*[a-z][ ]*", bracket[1]) and bracket[1].strip() != letter:
                return bracket.end(), False, "several answers offered"
            return bracket.end(), False, None
        return position, False, None

    def _longest_text(self, position: int, end: int) -> tuple[str, int] | None:
        """The longest choice text that stands at ``position``: its letter and where it ends."""
        best: tuple[str, int] | None = None
        wanted = max((len(text) for text in self.texts), default=0)
        seen = ""
        for at in range(position, end):
            character = squeeze(self.output[at])
            seen += character
            if not character:
                continue
            if len(seen) > wanted:
                break
            if seen in self.texts:
                best = (self.texts[seen], at + 1)
        return best

    def _isolated_letter(self, position: int, end: int) -> bool:
        return bool(re.compile(r"[a-z](?![a-z0-9_]|-[a-z0-9])").match(self.text, position, end))

    def _all_letters(self, position: int, line_end: int) -> bool:
        return bool(re.fullmatch(r"[a-z](?:[ ,、]+[a-z])*[ ]*[。.]?[ ]*", self.text[position:line_end]))

    def _read_texts(self, start: int, at: int, end: int, rank: int) -> Reading | None:
        """An answer given as the exact text of one or more choices."""
        text, letters, position = self.text, [], at
        while match := self._longest_text(position, end):
            letter, position = match
            letters.append(letter)
            position = _CLOSERS.match(text, position, end).end()
            label = re.compile(r"[ ]*\(([a-z])\)").match(text, position, end)
            if label:
                position = label.end()
                if label[1] != letter:
                    return Reading(rank, start, position, problem="a letter beside the text of another choice")
            either = _OR.match(text, position, end)
            if either and self._longest_text(_LEAD.match(text, either.end(), end).end(), end):
                return Reading(rank, start, either.end(), problem="several answers offered")
            joined = _AND.match(text, position, end)
            following = _LEAD.match(text, joined.end(), end).end() if joined else position
            if not joined or not self._longest_text(following, end):
                break
            position = following
        if not letters or any(p.match(text, position, end) for p in (_ECHO, _TAKEN_BACK, _HEDGED)):
            return None
        if not _END.match(text, position, end):
            return None
        return Reading(rank, start, position, tuple(sorted(set(letters))))

    def _read_number(self, start: int, at: int, end: int, rank: int) -> Reading | None:
        lead = re.compile(rf"(?:{_OPEN}|-(?!\.?\d)|[、:](?=\s*\S)|約|およそ|about|approximately)*").match(self.text, at, end)
        at = lead.end()
        line_end = end if (found := self.text.find("\n", at, end)) < 0 else found
        line = self.text[at:line_end]
        boxed = re.findall(rf"([{SLOTS}])([^{SLOTS}]*)", line)
        if len(boxed) > 1:
            return self._read_boxes(start, at, line, boxed, rank)
        equals = max(line.rfind(sign) for sign in "=≒≈→⇒")
        if boxed:
            equals = max(equals, line.index(boxed[0][0]))
        first = re.compile(r"[ ]*(?:約|およそ|\()?[ ]*").match(line, equals + 1).end()
        number = _NUMBER.match(line, first)
        if number is None:
            if rank == BARE:
                return None
            # "解答: 総再生産率は1.2です": the only number of the statement. The digits of m2 or PaCO2 are no numbers.
            sentence = re.split(r"。|(?<!\d)\.|\.(?!\d)", line)[0]
            numbers = [m for m in _NUMBER.finditer(sentence) if not re.search(r"[a-z^_0-9]$", sentence[: m.start()])]
            if len(numbers) != 1:
                problem = "several numbers" if numbers else None
                return Reading(rank, start, at + len(sentence), problem=problem) if problem else None
            number = numbers[0]
        rest = line[number.end() :]
        if _UNFINISHED.match(rest):
            return Reading(rank, start, at + number.end(), problem="more than one number, or an unfinished calculation")
        if _ECHO.match(rest) or _TAKEN_BACK.match(rest):
            return None
        if rank == BARE and not re.fullmatch(r"[ ]*(?:[^\d\s。]{0,12}(?:1,?000対)?)[。.]?(?:です|である)?[。.]?", rest):
            return None
        return Reading(rank, start, at + number.end(), number=_plain(number[0]))

    def _read_boxes(self, start: int, at: int, line: str, boxed: list[tuple[str, str]], rank: int) -> Reading | None:
        """An answer written box by box, as on the answer sheet: ``①2 ②6`` or ``①0．②4``."""
        end = at + len(line)
        digits = [re.findall(r"\d", after) for _, after in boxed]
        in_order = "".join(box for box, _ in boxed) == SLOTS[: len(boxed)]
        if all(not found for found in digits):
            return None  # the boxes of the question, restated and not filled in
        if not in_order or any(len(found) != 1 for found in digits):
            return Reading(rank, start, end, problem="boxes not filled with one digit each")
        filling = iter(found[0] for found in digits)
        boxes = answer_boxes(self.question.problem_text)
        if boxes is not None and sum(c in SLOTS for c in boxes) == len(boxed):
            number = "".join(next(filling) if c in SLOTS else c for c in boxes)
        else:
            point = [bool(re.search(r"\d[ ]*\.", after)) for _, after in boxed]
            number = "".join(digit + "." * dot for digit, dot in zip(filling, point, strict=True)).rstrip(".")
        return Reading(rank, start, end, number=number)


def _plain(number: str) -> str:
    number = number.replace(",", "").removeprefix("+")
    return "0" + number if number.startswith(".") else number.replace("-.", "-0.")
