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
from dataclasses import dataclass

from medtrain.trainer.exam.questions import SLOTS, Question
from medtrain.trainer.exam.statements import BARE, CLOSE, CUE, FINAL, MARKED, SPOKEN, Reading, StatementReader, fold, squeeze


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


_NOT_WRONG = "".join(f"(?<!{word})" for word in ("不", "誤", "非", "間違った", "誤った", "誤りの", "間違いの"))
_NOT_WRONG_EN = "".join(f"(?<!{word} )" for word in ("wrong", "incorrect", "not", "no", "an"))
_NOUN = (
    rf"(?:{_NOT_WRONG}(?:答え|答|こたえ|回答|解答|正解|正答)(?:の?(?:選択肢|記号|番号|数値))?"
    rf"|{_NOT_WRONG_EN}(?<![a-z])(?:(?<!in)(?:correct|best|right) )?(?:answers?|ans|(?<=correct )(?:option|choice))"
    r"(?:\(s\))?(?: choice| option)?(?![a-z]))"
)
_FINAL = r"(?P<final>最終(?:的な|的に|の)?|最後の|final )?"
_MARKED = re.compile(
    rf"{_FINAL}{_NOUN}(?:{CLOSE}|[ ])*(?:[:=→⇒]|】|(?<=\])|(?<=[*_])(?=\n))"
    rf"|(?:^|\n)[ #*]*(?P<heading>最終(?:的な|的に|の)?)?{_NOUN}[ #*]*(?=\n| )"
    r"|\\boxed(?=\{)|<answer>"
)
_CONCLUSION = r"(?:したがって|従って|よって|以上より|以上から|ゆえに|故に|therefore|thus|hence|so)"
_SPOKEN = re.compile(
    rf"{_FINAL}{_NOUN}(?:は|が|としては"
    r"| (?:is|are|would be|must be|should be)(?: therefore| thus| most likely| clearly)?(?![a-z]))"
    r"|(?<![a-z])(?:so|thus|therefore|hence),? (?:the )?(?:correct |best )?answer(?: is)?(?: likely| probably)?(?![a-z:])"
    r"|(?<![a-z])(?:i|i would|i'll|i will|so|thus|therefore|let's),? (?:choose|select|pick|go with|answer(?! ?is))(?![a-z:])"
)
_CONCLUDED = re.compile(rf"(?:^|[。.\n])[ ]*{_CONCLUSION}[、,]?(?=[ ]*\S)")
_SPOKEN_AFTER = re.compile(
    r"(?<![a-z0-9])(?P<answer>[a-z](?:[ ]*(?:,|、|・|と)[ ]*[a-z]){0,25})\)?[ ]*"
    r"(?:(?:が|を)(?:正解|正答|答え|解答|選択|選ぶ|選び)(?!では|じゃ|で(?:は)?な|しな|とは|か|肢)"
    r"| is the (?:correct |best |right )?answer(?![a-z])| are the (?:correct |right )?answers(?![a-z]))"
)
# Where the question asks for a wrong statement, the right ones are not its answer.
_ASKS_FOR_THE_WRONG = re.compile(
    r"誤|不適切|でない|しくない|ではない|ないのは|除く|except|(?<![a-z])not(?![a-z])|incorrect|false"
)
_RIGHT_CHOICE = re.compile(r"(?<!も)(?:正しい|適切な|妥当な)選択肢は")

_HEADER = re.compile(
    r"(?:^|\n)[ #*>\-]*(?:[【\[「<](?:次の)?(?:問題|設問|例題|問)[ ]*\d*[】\]」>]"
    r"|(?:次の|新しい)?(?:問題|設問|例題|問)[ ]*\d*[ *]*(?:[:.](?!\d)|(?=[ ]*(?:\n|$)))"
    r"|(?:user|human|ユーザー|instruction|指示)[ ]*:"
    r"|(?P<english>[【\[<]?(?:new |next )?(?:question|problem|q)[ ]*\d*[】\]>]?[ *]*(?:[:.](?!\d)|(?=[ ]*(?:\n|$)))))"
    r"|(?P<inline>(?<=[\s。.])(?:次の)?(?:問題|question|user|human|ユーザー)[ ]*\d*[ ]*:)"
    r"|(?P<numbered>\n[ #*]*(?:第[ ]*\d+[ ]*問|(?:問題|設問|例題|問)[ ]*\d+(?=[ ])))"
)
_OWN_CHOICES = re.compile(r"\n[ \-*]*\(?a[.):][^\n]*\n[ \-*]*\(?b[.):]")
_CONTROL = re.compile(r"<\|(?:endoftext|im_end|im_start|eot_id|end_of_text|end|eom_id)\|>|</s>|<(?:eos|end_of_turn)>")


def parse_output(output: str, question: Question, *, cue: bool = False, markers: tuple[str, ...] = ()) -> Parsed:
    """Read the answer to ``question`` from a model's raw ``output``.

    ``cue`` says that the prompt ended with the answer marker, so that the output begins with the answer itself.
    ``markers`` are further texts that mark an answer, beside the usual Japanese and English ones. Never raises.
    """
    return _Parser(output, question, markers).parse(cue)


class _Parser:
    def __init__(self, output: str, question: Question, markers: tuple[str, ...]):
        self.output, self.question = output, question
        self.reader = StatementReader(output, question)
        self.text = self.reader.text
        self.own_markers = [
            re.compile(r"\s*".join(re.escape(part) for part in fold(marker).split())) for marker in markers if marker.strip()
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

    def _decide(self, readings: list[Reading]) -> Parsed:
        rank = max(reading.rank for reading in readings)
        deciding = [reading for reading in readings if reading.rank == rank]
        first, last = deciding[0], deciding[-1]
        for reading in deciding:
            if reading.problem:
                return Parsed(failure=reading.problem, read_from=self._cut(reading.start, reading.end))
        if any(reading.said != first.said for reading in deciding):
            return Parsed(failure="different answers", read_from=self._cut(first.start, last.end))
        if rank in (MARKED, FINAL):
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
        own = squeeze(fold(self.question.problem_text))[:16]
        since, answers = start, []
        for header in _HEADER.finditer(self.text, start, end):
            before, since = since, header.start()
            answers += self._statements(before, since, cue and before == start)
            marked = [answer for answer in answers if answer.rank >= MARKED]
            if header["inline"]:
                between = self.text[answers[-1].end : since] if answers else None
                if between is None or between.strip(" 。.*"):
                    continue
                return since
            if marked or (not answers and self._bare_lines(before, since)):
                return since
            if header["numbered"]:
                continue
            following = self.text[header.end() : min(end, header.end() + 2000)]
            restated = squeeze(following[:200]).lstrip("】」]:*").startswith(own)
            if not restated and (not header["english"] or _OWN_CHOICES.search(following)):
                return since
        return end

    def _statements(self, start: int, end: int, cue: bool) -> list[Reading]:
        found: list[Reading] = []
        if cue and (reading := self.reader.read(start, start, end, CUE)):
            return [reading]
        for match in _MARKED.finditer(self.text, start, end):
            if re.search(
                r"(?:例|例えば|たとえば|e\.g\.|形式)[ :「、(]*$", self.text[max(start, match.start() - 8) : match.start()]
            ):
                continue
            rank = FINAL if match["final"] or match["heading"] else MARKED
            found.append(self.reader.read(match.start(), match.end(), end, rank))
        for marker in self.own_markers:
            for match in marker.finditer(self.text, start, end):
                found.append(self.reader.read(match.start(), match.end(), end, MARKED))
        for pattern in (_SPOKEN, _CONCLUDED, *self._asked()):
            for match in pattern.finditer(self.text, start, end):
                rank = FINAL if "final" in pattern.groupindex and match["final"] else SPOKEN
                found.append(self.reader.read(match.start(), match.end(), end, rank))
        if not self.question.is_numeric:
            for match in _SPOKEN_AFTER.finditer(self.text, start, end):
                letters = tuple(sorted(set(re.findall("[a-z]", match["answer"]))))
                outside = any(letter not in self.question.letters for letter in letters)
                problem = "a letter outside the choices" if outside else None
                found.append(Reading(SPOKEN, match.start(), match.end(), letters, None, problem))
        # One place can be found twice (a style's own marker that is also a usual one); the higher rank holds.
        by_end: dict[int, Reading] = {}
        for reading in filter(None, found):
            if reading.end not in by_end or reading.rank > by_end[reading.end].rank:
                by_end[reading.end] = reading
        return sorted(by_end.values(), key=lambda reading: reading.start)

    def _asked(self) -> list[re.Pattern]:
        """The question's own words: for "...適切なのはどれか" an output's "適切なのは" introduces the answer."""
        asked, patterns = fold(self.question.problem_text), []
        if match := re.search(r"([^。、\n,]{3,})は(?:どれか|何か|どれですか)", asked):
            # The output may leave out what stands before a particle: "この疾患で最も適切なの" comes back as "最も適切なの".
            words = match[1].strip()
            starts = [m.end() for m in re.finditer("[でにがを]", words) if len(words) - m.end() >= 4 and words.endswith("の")]
            patterns.append(re.compile(re.escape(words[max(starts, default=0) :]) + "は"))
        if match := re.search(r"(?:what|which)(?: of the following)? is (the [a-z][a-z \-]{4,60})\?", asked):
            patterns.append(re.compile(rf"(?<![a-z]){re.escape(match[1])} is(?: therefore| most likely)?(?![a-z])"))
        if not _ASKS_FOR_THE_WRONG.search(asked):
            patterns.append(_RIGHT_CHOICE)
        return patterns

    def _bare_lines(self, start: int, end: int) -> list[Reading]:
        """Readings of an output without statements: a first or last line, or a whole list, of nothing but letters."""
        spans = [m.span() for m in re.finditer(r"[^\n]+", self.text[start:end]) if m[0].strip()]
        spans = [(start + a, start + b) for a, b in spans]
        if self.question.is_numeric and len(spans) > 1 and len(set(SLOTS) & set(self.text[start:end])) > 1:
            return []  # boxes filled line by line, or calculations numbered like boxes
        lines = [self.reader.read(a, a, b, BARE) for a, b in spans]
        bullets = [bool(re.match(r"[ ]*[-*•・]", self.text[a:b])) for a, b in spans]
        if bullets[-2:] == [True, True] and not all(bullets):
            return []  # a list after other text: its last line alone is not the answer
        if len(spans) > 1 and all(bullets):
            if not all(
                line and not line.problem and line.letters and self._fills(line, b)
                for line, (_, b) in zip(lines, spans, strict=True)
            ):
                return []
            letters = tuple(sorted({letter for line in lines for letter in line.letters}))
            # All the choices, listed, are the question restated.
            return [Reading(BARE, start, end, letters)] if len(letters) < len(self.question.choices) else []
        whole = [line for line, (_, b) in zip(lines, spans, strict=True) if line and self._fills(line, b)]
        if len({line.letters for line in whole}) > 2 or len(whole) == len(self.question.choices) > 1:
            return []
        ends = [line for line in whole if line in (lines[0], lines[-1])]
        # "c。腎低形成により..." : the answer opens the first line and a full stop closes it.
        if lines and lines[0] and lines[0] not in whole and self.text[lines[0].end : lines[0].end + 1] == "。":
            ends.append(lines[0])
        return ends

    def _fills(self, reading: Reading, line_end: int) -> bool:
        rest = self.text[reading.end : line_end].strip(" 。.!")
        return not rest or bool(re.fullmatch(rf"(?:{CLOSE})*[。.]?|です|である", rest)) or self.question.is_numeric
