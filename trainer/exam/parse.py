"""Answer parsing: from a model's raw output to the letters (or the number) it answered, or to the reason why not.

What is read, in falling rank; the highest rank that occurs decides:

    cue      what follows directly where the prompt itself ended with the answer marker
    final    最終回答: c            Final answer: c
    marked   答え: a,c              【正解】ｃ             Answer: (b)            \\boxed{b}
    spoken   答えはｃです           The answer is b.       したがって、c。         適切なのはcである (as asked)
    bare     a first or last line that is nothing but an answer

The rule is to read, never to guess. Failures: statements of the deciding rank that differ, two letters joined by "or",
a letter outside the choices, a letter beside the text of another choice, a range, a fraction, and a later spoken
statement that contradicts the marked one. From a new, self-made question on (問題: ..., Question: ...) nothing is read.
"""

from __future__ import annotations

import re
import string
import unicodedata
from dataclasses import dataclass

from medtrain.trainer.exam.questions import _SLOTS, Question, answer_boxes


@dataclass(frozen=True)
class Parsed:
    """What an output answered.

    ``letters`` (sorted, distinct) for a question with choices or ``number`` for a numeric one; neither after a failure,
    when ``failure`` says why. ``read_from`` is the piece of the output that the answer, or the failure, was read from.
    """

    letters: tuple[str, ...] = ()
    number: str | None = None
    read_from: str = ""
    failure: str | None = None

    @property
    def value(self) -> list[str] | str | None:
        """The answer as it is written to JSON: a list of letters, the number as a text, or None after a failure."""
        return self.number if self.number is not None else (list(self.letters) or None)


# Everything below runs on a copy of the output in which each character stands for one character of the original
# (full width -> ASCII, upper case -> lower case), so that positions found in the copy cut the original.
_FOLD = {code: chr(code - 0xFEE0).lower() for code in range(0xFF01, 0xFF5F)}
_FOLD |= {ord(upper): upper.lower() for upper in string.ascii_uppercase}
_FOLD |= {0x24B6 + i: letter for i, letter in enumerate(string.ascii_lowercase)}  # Ⓐ
_FOLD |= {0x24D0 + i: letter for i, letter in enumerate(string.ascii_lowercase)}  # ⓐ
_FOLD |= {0x249C + i: letter for i, letter in enumerate(string.ascii_lowercase)}  # ⒜
_FOLD |= str.maketrans("\u3000\u00a0\r\t｡､｢｣･〜−‐‑", "    。、「」・~---")

_OPEN = r"""[\s"'`*_$「『(\[【{<〈《“”‘’#>•・]"""
_CLOSE = r"""["'`*_$」』)\]】}>〉》”’]"""
# What may stand between a marker and its answer without being part of either.
_LEAD = re.compile(
    rf"(?:{_OPEN}|-(?!\d)|\\(?:text|mathrm|boxed|textbf)\{{|\\[(\[]|選択肢の?|記号の?|以下の(?:通り|とおり)(?:です|である)?[。:、]?"
    r"|(?:both|option|choice|options|choices)(?![a-z])|[、:](?=\s*\S))*"
)
_CLOSERS = re.compile(rf"(?:[ ]*{_CLOSE}|\\[)\]])*")
_NOT_WRONG = "".join(f"(?<!{word})" for word in ("不", "誤", "非", "間違った", "誤った", "誤りの", "間違いの"))
_NOT_WRONG_EN = "".join(f"(?<!{word} )" for word in ("wrong", "incorrect", "not", "no", "an"))
_NOUN = (
    rf"(?:{_NOT_WRONG}(?:答え|答|こたえ|回答|解答|正解|正答)(?:の?(?:選択肢|記号|番号|数値))?"
    rf"|{_NOT_WRONG_EN}(?<![a-z])(?:(?<!in)(?:correct|best|right) )?(?:answers?|ans|(?<=correct )(?:option|choice))"
    r"(?:\(s\))?(?: choice| option)?(?![a-z]))"
)
_FINAL = r"(?P<final>最終(?:的な|的に|の)?|最後の|final )?"
_MARKED = re.compile(
    rf"{_FINAL}{_NOUN}(?:{_CLOSE}|[ ])*(?:[:=→⇒]|】|(?<=\])|(?<=[*_])(?=\n))"
    rf"|(?:^|\n)[ #*]*(?P<heading>最終(?:的な|的に|の)?)?{_NOUN}[ #*]*(?=\n| )"
    r"|\\boxed(?=\{)"
)
_CONCLUSION = r"(?:したがって|従って|よって|以上より|以上から|ゆえに|故に|therefore|thus|hence|so)"
_SPOKEN = re.compile(
    rf"{_FINAL}{_NOUN}(?:は|が|としては"
    r"| (?:is|are|would be|must be|should be)(?: therefore| thus| most likely| clearly)?(?![a-z]))"
    r"|(?<![a-z])(?:so|thus|therefore|hence),? (?:the )?(?:correct |best )?answer(?: is)?(?: likely| probably)?(?![a-z:])"
    r"|(?<![a-z])(?:i|i would|i'll|i will|so|thus|therefore|let's),? (?:choose|select|pick|go with)(?![a-z])"
)
_CONCLUDED = re.compile(rf"(?:^|[。.\n])[ ]*{_CONCLUSION}[、,]?(?=[ ]*\S)")
_SPOKEN_AFTER = re.compile(
    r"(?<![a-z0-9])(?P<answer>[a-z](?:[ ]*(?:,|、|・|と)[ ]*[a-z]){0,25})\)?[ ]*"
    r"(?:(?:が|を)(?:正解|正答|答え|解答|選択|選ぶ|選び)(?!では|じゃ|で(?:は)?な|しな|とは|か|肢)"
    r"| is the (?:correct |best |right )?answer(?![a-z])| are the (?:correct |right )?answers(?![a-z]))"
)

# What may follow an answer. だが, ですが and ですか take it back or leave it open, so they do not end one.
_COPULA = (
    r"(?:です(?!か|が)|である(?!か|が)|となります|となる(?!か)|だ(?!が|け|ろうか|とは)|になります|になる(?!か)|であり|で、"
    r"|と(?:考え(?!が|られが)|判断|思(?!われが)|わか|分か|いえ|言え|なっ)|でしょう(?!か)|を選)"
)
_REASON = r"(?:理由|解説|説明|根拠|なぜ|because|since|as |due|based|the |which|this )"
_END = re.compile(
    rf"[ ]*(?:$|\n|[。!;](?!のよう)|\.(?![0-9])(?![ ]*[a-z][ ]*(?:$|[.,、。\n)]))|{_COPULA}|[、,:]?[ ]*{_REASON}|<)"
)
_ECHO = re.compile(rf"(?:{_CLOSE}|[ ])*(?:のよう|の形式|という形|の形で|など)")
_TAKEN_BACK = re.compile(r"[ ]*(?:で(?:は|も)?な|じゃな|とは(?:限|言|い)|は(?:誤|不|間違|適切でな)|以外)")
_AND = re.compile(r"[ ]*(?:,|、|・|;|&|\+|と|および|及び|かつ|(?<=[ )])and(?![a-z]))+[ ]*(?:and[ ]+)?")
_OR = re.compile(
    r"[ ]*(?:,|、)?[ ]*(?:または|又は|もしくは|あるいは|(?<![a-z])or(?![a-z])|か(?=[ ]*[^らつの])|/|\||~|-|–|→|vs)[ ]*"
)
_HEADER = re.compile(
    r"(?:^|\n)[ #*>\-]*(?:[【\[「<](?:次の)?(?:問題|設問|例題|問)[ ]*\d*[】\]」>]"
    r"|(?:次の|新しい)?(?:問題|設問|例題|問)[ ]*\d*[ *]*(?:[:.](?!\d)|(?=[ ]*(?:\n|$)))"
    r"|(?:user|human|ユーザー|instruction|指示)[ ]*:"
    r"|(?P<english>[【\[<]?(?:new |next )?(?:question|problem|q)[ ]*\d*[】\]>]?[ *]*(?:[:.](?!\d)|(?=[ ]*(?:\n|$)))))"
    r"|(?P<inline>(?<=[\s。.])(?:次の)?(?:問題|question)[ ]*\d*[ ]*:)"
)
_OWN_CHOICES = re.compile(r"\n[ \-*]*\(?a[.):][^\n]*\n[ \-*]*\(?b[.):]")
_CONTROL = re.compile(r"<\|(?:endoftext|im_end|im_start|eot_id|end_of_text|end|eom_id)\|>|</s>|<(?:eos|end_of_turn)>")
_NUMBER = re.compile(r"[+\-]?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|[+\-]?\.[0-9]+")

# After a number: a range, an alternative, a product, a fraction, one more number.
_UNFINISHED = re.compile(
    r"[ ]*(?:~|-|–|から|または|又は|もしくは|あるいは|or(?![a-z])|か[^らつ]|×|x[ ]*\d|\*[ ]*\d|\^|/[ ]*\d|±|[, ]\d)"
)

# Characters from the marker on: no answer is longer, and reading stays linear in the length of the output.
_LONGEST_STATEMENT = 600

_BARE, _SPOKEN_RANK, _MARKED_RANK, _FINAL_RANK, _CUE_RANK = range(5)


@dataclass(frozen=True)
class _Reading:
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


def parse_output(output: str, question: Question, *, cue: bool = False, markers: tuple[str, ...] = ()) -> Parsed:
    """Read the answer to ``question`` from a model's raw ``output``.

    ``cue`` says that the prompt ended with the answer marker, so that the output begins with the answer itself.
    ``markers`` are further texts that mark an answer, beside the usual Japanese and English ones. Never raises.
    """
    return _Parser(output, question, markers).parse(cue)


def squeeze(text: str) -> str:
    """Text for comparing choices: NFKC, without white space."""
    return "".join(unicodedata.normalize("NFKC", text).split())


class _Parser:
    def __init__(self, output: str, question: Question, markers: tuple[str, ...]):
        self.output, self.question = output, question
        self.text = output.translate(_FOLD)
        # A text that two choices share, or a blank one, names no choice.
        texts = [squeeze(choice) for choice in question.choices]
        self.texts = {
            text: letter
            for text, letter in zip(texts, question.letters, strict=True)
            if text and texts.count(text) == 1
        }
        self.own_markers = [
            re.compile(r"\s*".join(re.escape(part) for part in marker.translate(_FOLD).split()))
            for marker in markers
            if marker.strip()
        ]

    def parse(self, cue: bool) -> Parsed:
        thought = self.text.rfind("</think>")
        start = thought + len("</think>") if thought >= 0 else 0
        if thought < 0 and "<think>" in self.text:
            return Parsed(failure="the thinking part does not end")
        control = _CONTROL.search(self.text, start)
        end = self._before_new_question(start, control.start() if control else len(self.text), cue)
        readings = self._statements(start, end, cue) or self._bare_lines(start, end)
        if not readings:
            empty = not self.text[start:end].strip()
            return Parsed(failure="no text" if empty else "no answer found", read_from=self._cut(start, end)[-80:])
        return self._decide(readings)

    def _decide(self, readings: list[_Reading]) -> Parsed:
        rank = max(reading.rank for reading in readings)
        deciding = [reading for reading in readings if reading.rank == rank]
        first, last = deciding[0], deciding[-1]
        for reading in deciding:
            if reading.problem:
                return Parsed(failure=reading.problem, read_from=self._cut(reading.start, reading.end))
        if any(reading.said != first.said for reading in deciding):
            return Parsed(failure="different answers", read_from=self._cut(first.start, last.end))
        if rank in (_MARKED_RANK, _FINAL_RANK):
            # An earlier spoken answer is a step on the way to the marked one; a later, different one takes it back.
            for reading in readings:
                if reading.start > last.start and not reading.problem and reading.said != last.said:
                    return Parsed(failure="different answers", read_from=self._cut(last.start, reading.end))
        return Parsed(last.letters, last.number, self._cut(last.start, last.end))

    def _cut(self, start: int, end: int) -> str:
        return self.output[start:end].strip()

    def _before_new_question(self, start: int, end: int, cue: bool) -> int:
        """Where the first question that is not this one begins.

        A header begins one if this question has been answered before it. Without an answer it is judged: a model may
        restate this question before it answers, and speak of "the question: ..." while it reasons.
        """
        own = squeeze(self.question.problem_text.translate(_FOLD))[:16]
        since, answers = start, []
        for header in _HEADER.finditer(self.text, start, end):
            before, since = since, header.start()
            answers += self._statements(before, since, cue and before == start)
            marked = [answer for answer in answers if answer.rank >= _MARKED_RANK]
            if header["inline"]:
                between = self.text[answers[-1].end : since] if answers else None
                if between is None or between.strip(" 。.*"):
                    continue
                return since
            if marked or (not answers and self._bare_lines(before, since)):
                return since
            following = self.text[header.end() : min(end, header.end() + 2000)]
            restated = squeeze(following[:200]).lstrip("】」]:*").startswith(own)
            if not restated and (not header["english"] or _OWN_CHOICES.search(following)):
                return since
        return end

    # Finding statements

    def _statements(self, start: int, end: int, cue: bool) -> list[_Reading]:
        found: list[_Reading] = []
        if cue and (reading := self._read(start, start, end, _CUE_RANK)):
            return [reading]
        for match in _MARKED.finditer(self.text, start, end):
            if re.search(
                r"(?:例|例えば|たとえば|e\.g\.|形式)[ :「、(]*$",
                self.text[max(start, match.start() - 8) : match.start()],
            ):
                continue
            rank = _FINAL_RANK if match["final"] or match["heading"] else _MARKED_RANK
            found.append(self._read(match.start(), match.end(), end, rank))
        for marker in self.own_markers:
            for match in marker.finditer(self.text, start, end):
                found.append(self._read(match.start(), match.end(), end, _MARKED_RANK))
        for pattern in (_SPOKEN, _CONCLUDED, self._asked()):
            for match in pattern.finditer(self.text, start, end) if pattern else ():
                rank = _FINAL_RANK if "final" in pattern.groupindex and match["final"] else _SPOKEN_RANK
                found.append(self._read(match.start(), match.end(), end, rank))
        if not self.question.is_numeric:
            for match in _SPOKEN_AFTER.finditer(self.text, start, end):
                letters = tuple(sorted(set(re.findall("[a-z]", match["answer"]))))
                outside = any(letter not in self.question.letters for letter in letters)
                problem = "a letter outside the choices" if outside else None
                found.append(_Reading(_SPOKEN_RANK, match.start(), match.end(), letters, None, problem))
        # One place can be found twice (a style's own marker that is also a usual one); the higher rank holds.
        by_end: dict[int, _Reading] = {}
        for reading in filter(None, found):
            if reading.end not in by_end or reading.rank > by_end[reading.end].rank:
                by_end[reading.end] = reading
        return sorted(by_end.values(), key=lambda reading: reading.start)

    def _asked(self) -> re.Pattern | None:
        """The question's own words: for "...適切なのはどれか" an output's "適切なのは" introduces the answer."""
        match = re.search(r"([^。、\n,]{3,})は(?:どれか|何か|どれですか)", self.question.problem_text.translate(_FOLD))
        if not match:
            return None
        # The output may leave out what stands before a particle: "この疾患で最も適切なの" comes back as "最も適切なの".
        words = match[1].strip()
        starts = [
            m.end() for m in re.finditer("[でにがを]", words) if len(words) - m.end() >= 4 and words.endswith("の")
        ]
        return re.compile(re.escape(words[max(starts, default=0) :]) + "は")

    def _bare_lines(self, start: int, end: int) -> list[_Reading]:
        """Readings of an output without statements: a first or last line, or a whole list, of nothing but letters."""
        spans = [m.span() for m in re.finditer(r"[^\n]+", self.text[start:end]) if m[0].strip()]
        spans = [(start + a, start + b) for a, b in spans]
        if self.question.is_numeric and len(spans) > 1 and len(set(_SLOTS) & set(self.text[start:end])) > 1:
            return []  # boxes filled line by line, or calculations numbered like boxes
        lines = [self._read(a, a, b, _BARE) for a, b in spans]
        bullets = all(re.match(r"[ ]*[-*•・]", self.text[a:b]) for a, b in spans)
        if len(spans) > 1 and bullets:
            if not all(
                line and not line.problem and line.letters and self._fills(line, b)
                for line, (_, b) in zip(lines, spans, strict=True)
            ):
                return []
            letters = tuple(sorted({letter for line in lines for letter in line.letters}))
            # All the choices, listed, are the question restated.
            return [_Reading(_BARE, start, end, letters)] if len(letters) < len(self.question.choices) else []
        whole = [line for line, (_, b) in zip(lines, spans, strict=True) if line and self._fills(line, b)]
        if len({line.letters for line in whole}) > 2 or len(whole) == len(self.question.choices) > 1:
            return []
        ends = [line for line in whole if line in (lines[0], lines[-1])]
        # "c。腎低形成により..." : the answer opens the first line and a full stop closes it.
        if lines and lines[0] and lines[0] not in whole and self.text[lines[0].end : lines[0].end + 1] == "。":
            ends.append(lines[0])
        return ends

    def _fills(self, reading: _Reading, line_end: int) -> bool:
        rest = self.text[reading.end : line_end].strip(" 。.!")
        return not rest or bool(re.fullmatch(rf"(?:{_CLOSE})*[。.]?|です|である", rest)) or self.question.is_numeric

    # Reading one statement

    def _read(self, start: int, at: int, end: int, rank: int) -> _Reading | None:
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
            return _Reading(rank, start, exact.end, problem=problem)
        if exact and (not exact.problem or not named):
            return exact
        return named

    def _read_letters(self, start: int, at: int, end: int, rank: int) -> _Reading | None:
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
            return _Reading(rank, start, run.end(), tuple(run[0]))
        while True:
            if not re.compile(r"[a-z](?![a-z0-9_]|-[a-z0-9])").match(text, position, end):
                return None
            letter = text[position]
            position, confirmed, problem = self._after_letter(letter, position + 1, line_end)
            letters.append(letter)
            if problem:
                return _Reading(rank, start, position, problem=problem)
            either = _OR.match(text, position, end)
            if either and self._isolated_letter(_LEAD.match(text, either.end(), end).end(), end):
                return _Reading(rank, start, either.end() + 1, problem="several answers offered")
            joined = _AND.match(text, position, line_end)
            following = _LEAD.match(text, joined.end() if joined else position, line_end).end()
            if joined and self._isolated_letter(following, end):
                position = following
                continue
            if (
                following > position
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
        if (
            _ECHO.match(text, position, end)
            or (taken := _TAKEN_BACK.match(text, position, end))
            and "以外" not in taken[0]
        ):
            return None
        if taken:
            return _Reading(rank, start, taken.end(), problem="all but one choice")
        if not confirmed and not _END.match(text, position, end) and not _END.match(text, position, line_end):
            return None
        if any(letter not in self.question.letters for letter in letters):
            return _Reading(rank, start, position, problem="a letter outside the choices")
        return _Reading(rank, start, position, tuple(sorted(set(letters))))

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

    def _read_texts(self, start: int, at: int, end: int, rank: int) -> _Reading | None:
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
                    return _Reading(rank, start, position, problem="a letter beside the text of another choice")
            either = _OR.match(text, position, end)
            if either and self._longest_text(_LEAD.match(text, either.end(), end).end(), end):
                return _Reading(rank, start, either.end(), problem="several answers offered")
            joined = _AND.match(text, position, end)
            following = _LEAD.match(text, joined.end(), end).end() if joined else position
            if not joined or not self._longest_text(following, end):
                break
            position = following
        if not letters or _ECHO.match(text, position, end) or _TAKEN_BACK.match(text, position, end):
            return None
        if not _END.match(text, position, end):
            return None
        return _Reading(rank, start, position, tuple(sorted(set(letters))))

    def _read_number(self, start: int, at: int, end: int, rank: int) -> _Reading | None:
        lead = re.compile(rf"(?:{_OPEN}|-(?!\.?\d)|[、:](?=\s*\S)|約|およそ|about|approximately)*").match(
            self.text, at, end
        )
        at = lead.end()
        line_end = end if (found := self.text.find("\n", at, end)) < 0 else found
        line = self.text[at:line_end]
        boxed = re.findall(rf"([{_SLOTS}])([^{_SLOTS}]*)", line)
        if len(boxed) > 1:
            return self._read_boxes(start, at, line, boxed, rank)
        equals = max(line.rfind(sign) for sign in "=≒≈→⇒")
        if boxed:
            equals = max(equals, line.index(boxed[0][0]))
        first = re.compile(r"[ ]*(?:約|およそ|\()?[ ]*").match(line, equals + 1).end()
        number = _NUMBER.match(line, first)
        if number is None:
            if rank == _BARE:
                return None
            # "解答: 総再生産率は1.2です": the only number of the statement. The digits of m2 or PaCO2 are no numbers.
            sentence = re.split(r"。|(?<!\d)\.|\.(?!\d)", line)[0]
            numbers = [m for m in _NUMBER.finditer(sentence) if not re.search(r"[a-z^_0-9]$", sentence[: m.start()])]
            if len(numbers) != 1:
                problem = "several numbers" if numbers else None
                return _Reading(rank, start, at + len(sentence), problem=problem) if problem else None
            number = numbers[0]
        rest = line[number.end() :]
        if _UNFINISHED.match(rest):
            return _Reading(
                rank, start, at + number.end(), problem="more than one number, or an unfinished calculation"
            )
        if _ECHO.match(rest) or _TAKEN_BACK.match(rest):
            return None
        if rank == _BARE and not re.fullmatch(
            r"[ ]*(?:[^\d\s。]{0,12}(?:1,?000対)?)[。.]?(?:です|である)?[。.]?", rest
        ):
            return None
        return _Reading(rank, start, at + number.end(), number=_plain(number[0]))

    def _read_boxes(self, start: int, at: int, line: str, boxed: list[tuple[str, str]], rank: int) -> _Reading | None:
        """An answer written box by box, as on the answer sheet: ``①2 ②6`` or ``①0．②4``."""
        end = at + len(line)
        digits = [re.findall(r"\d", after) for _, after in boxed]
        in_order = "".join(box for box, _ in boxed) == _SLOTS[: len(boxed)]
        if all(not found for found in digits):
            return None  # the boxes of the question, restated and not filled in
        if not in_order or any(len(found) != 1 for found in digits):
            return _Reading(rank, start, end, problem="boxes not filled with one digit each")
        filling = iter(found[0] for found in digits)
        boxes = answer_boxes(self.question.problem_text)
        if boxes is not None and sum(c in _SLOTS for c in boxes) == len(boxed):
            number = "".join(next(filling) if c in _SLOTS else c for c in boxes)
        else:
            point = [bool(re.search(r"\d[ ]*\.", after)) for _, after in boxed]
            number = "".join(digit + "." * dot for digit, dot in zip(filling, point, strict=True)).rstrip(".")
        return _Reading(rank, start, end, number=number)


def _plain(number: str) -> str:
    number = number.replace(",", "").removeprefix("+")
    return "0" + number if number.startswith(".") else number.replace("-.", "-0.")
