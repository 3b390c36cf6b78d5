"""Answer parsing: from a model's raw output to its answer, or to the reason why there is none. The highest rank decides:

    cue      what follows directly where the prompt itself ended with the answer marker
    final    最終回答: c            Final answer: c
    marked   答え: a,c              【正解】ｃ             Answer: (b)            \\boxed{b}
    spoken   答えはｃです           The answer is b.       したがって、c。         適切なのはcである
    bare     a first or last line that is nothing but an answer

Nothing is guessed. Failures: statements of the deciding rank that differ, two letters joined by "or", a letter outside the
choices or with the text of another choice, a range, a fraction, a later spoken statement that contradicts the marked one.
From a new question of the model's own on (問題: ..., Question: ...) nothing is read.
"""

from __future__ import annotations

import re
from dataclasses import replace

from medtrain.trainer.exam.questions import SLOTS, Question
from medtrain.trainer.exam.statements import BARE, CLOSE, CUE, FINAL, MARKED, SPOKEN, Parsed, StatementReader, fold, squeeze

# What a marker of an answer is made of: "最終的な", "the final", and a word for answer that is not one for a wrong answer.
_FINAL = r"(最終(?:的な|的に|の)?|最後の|final )?"
_NOT_WRONG = "".join(f"(?<!{word})" for word in ("不", "誤", "非", "間違った", "誤った", "誤りの", "間違いの"))
_NOT_WRONG_EN = "".join(f"(?<!{word} )" for word in ("wrong", "incorrect", "not", "no", "an"))
_NOUN = (
    rf"(?:{_NOT_WRONG}(?:答え|答|こたえ|回答|解答|正解|正答)(?:の?(?:選択肢|記号|番号|数値))?"
    rf"|{_NOT_WRONG_EN}(?<![a-z])(?:(?<!in)(?:correct|best|right) )?(?:answers?|ans"
    r"|(?:(?<=correct )|(?<=right )|(?<=best ))(?:option|choice))"
    r"(?:\(s\))?(?: choice| option)?(?![a-z]))"
)

# The rules, each a pattern before an answer. Their only groups are the words for "final", which raise the rank.
_MARKED = re.compile(  # "答え:", "【正解】", a heading "### Answer", "\boxed{", but not "例: 答え:" (_EXAMPLE)
    rf"{_FINAL}{_NOUN}(?:{CLOSE}|[ ])*(?:[:=→⇒]|(?<=ans)\.|】|(?<=\])|(?<=[*_])(?=\n))"
    rf"|(?:^|\n)[ #*]*(最終(?:的な|的に|の)?)?{_NOUN}[ #*]*(?=\n| )"
    r"|\\boxed(?=\{)|<answer>"
)
_EXAMPLE = re.compile(r"(?:例|例えば|たとえば|e\.g\.|形式)[ :「、(]*$")
_SPOKEN = re.compile(  # "答えは", "the answer is", "so the answer", "I'll choose"
    rf"{_FINAL}{_NOUN}(?:は|が|としては"
    r"|(?: to (?:this|the) question)? (?:is|are|would be|must be|should be)(?: therefore| thus| most likely| clearly)?(?![a-z]))"
    r"|(?<![a-z])(?:so|thus|therefore|hence),? (?:the )?(?:correct |best )?answer(?: is| would be| should be| must be)?"
    r"(?: likely| probably)?(?![a-z:])"
    r"|(?<![a-z])(?:i|i would|i'll|i will|so|thus|therefore|let's),? (?:choose|select|pick|go with|answer(?! ?is))(?![a-z:])"
)
_CONCLUDED = re.compile(  # "したがって、", "therefore"
    r"(?:^|[。.\n])[ ]*(?:したがって|従って|よって|以上より|以上から|ゆえに|故に|therefore|thus|hence|so)[、,]?(?=[ ]*\S)"
)
_RIGHT_CHOICE = re.compile(r"(?<!も)(?:正しい|適切な|妥当な)選択肢は")
# Where the question asks for a wrong statement, the right ones are not its answer.
_ASKS_FOR_THE_WRONG = re.compile(
    r"誤|不適切|でない|しくない|ではない|ないのは|除く|except|(?<![a-z])not(?![a-z])|incorrect|false"
)
_SPOKEN_AFTER = re.compile(  # "cが正解", "a and c are the answers": the letters come first
    r"(?<![a-z0-9])([a-z](?:[ ]*(?:,|、|・|と)[ ]*[a-z]){0,25})\)?[ ]*"
    r"(?:(?:が|を)(?:正解|正答|答え|解答|選択|選ぶ|選び)(?!では|じゃ|で(?:は)?な|しな|とは|か|肢)"
    r"| is the (?:correct |best |right )?answer(?![a-z])| are the (?:correct |right )?answers(?![a-z]))"
)
_CORRECT = re.compile(  # "Option D is correct."
    r"(?:^|(?<=[.。\n,:]))[ ]*(?:(?:hence|so|thus|therefore),? )?(?:(?:option|choice|answer) )?\(?([a-z])\)? is (?:correct|right)"
    r"(?=[ ]*(?:[.。!\n]|$|because|since|as ))"
)

# What may begin a new question, and what ends an output.
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
    ``markers`` are further texts that mark an answer, besides the usual Japanese and English ones. Never raises.
    """
    parser = _Parser(output, question, markers)
    text = parser.text
    before, thinking_end, _ = text.rpartition("</think>")
    if not thinking_end and "<think>" in text:
        return Parsed(failure="the thinking part does not end")
    start = len(before + thinking_end)
    control = _CONTROL.search(text, start)
    end = parser.before_new_question(start, control.start() if control else len(text), cue)
    if readings := parser.statements(start, end, cue) or parser.bare_lines(start, end):
        return _decide(readings, output)
    unread = output[start:end].strip()
    return Parsed(failure="no answer found" if unread else "no text", read_from=unread[-80:])


def _decide(readings: list[Parsed], output: str) -> Parsed:
    """What the statements of the highest rank agree on."""
    rank = max(reading.rank for reading in readings)
    deciding = [reading for reading in readings if reading.rank == rank]
    first, last = deciding[0], deciding[-1]
    # An earlier spoken answer is a step on the way to the marked one; a later, different one takes it back.
    later = [reading for reading in readings if reading.start > last.start and not reading.failure]
    contradiction = next((reading for reading in later if rank in (MARKED, FINAL) and reading.value != last.value), None)
    failure, start, end = None, last.start, last.end
    if wrong := next((reading for reading in deciding if reading.failure), None):
        failure, start, end = wrong.failure, wrong.start, wrong.end
    elif any(reading.value != first.value for reading in deciding):
        failure, start = "different answers", first.start
    elif contradiction:
        failure, end = "different answers", contradiction.end
    read_from = output[start:end].strip()
    return Parsed(read_from=read_from, failure=failure) if failure else replace(last, read_from=read_from)


def _rules(question: Question, markers: tuple[str, ...]) -> list[tuple[re.Pattern, int]]:
    """What introduces an answer to ``question``, in order, and the rank that it gives."""
    text = fold(question.problem_text)
    own = [re.compile(r"\s*".join(map(re.escape, fold(marker).split()))) for marker in markers if marker.strip()]
    spoken = [_SPOKEN, _CONCLUDED]
    # For "...適切なのはどれか" an output's "適切なのは" introduces the answer.
    if match := re.search(r"([^。、\n,]{3,})は(?:どれか|何か|どれですか)", text):
        # The output may leave out what stands before a particle: "この疾患で最も適切なの" comes back as "最も適切なの".
        words = match[1].strip()
        starts = [m.end() for m in re.finditer("[でにがを]", words) if len(words) - m.end() >= 4 and words.endswith("の")]
        spoken.append(re.compile(re.escape(words[max(starts, default=0) :]) + "は"))
    if match := re.search(r"(?:what|which)(?: of the following)? is (the [a-z][a-z \-]{4,60})\?", text):
        spoken.append(re.compile(rf"(?<![a-z]){re.escape(match[1])} is(?: therefore| most likely)?(?![a-z])"))
    if not _ASKS_FOR_THE_WRONG.search(text):
        spoken.append(_RIGHT_CHOICE)
    return [(pattern, MARKED) for pattern in (_MARKED, *own)] + [(pattern, SPOKEN) for pattern in spoken]


class _Parser(StatementReader):
    """Finds the answers in parts of one output."""

    def __init__(self, output: str, question: Question, markers: tuple[str, ...]):
        super().__init__(output, question)
        self.rules = _rules(question, markers)

    def statements(self, start: int, end: int, cue: bool) -> list[Parsed]:
        """The introduced answers between ``start`` and ``end``, by where they begin."""
        if cue and (reading := self.read(start, start, end, CUE)):
            return [reading]
        readings: list[Parsed | None] = []
        for pattern, rank in self.rules:
            for match in pattern.finditer(self.text, start, end):
                if pattern is not _MARKED or not _EXAMPLE.search(self.text[max(start, match.start() - 8) : match.start()]):
                    readings.append(self.read(match.start(), match.end(), end, FINAL if any(match.groups()) else rank))
        asks_for_the_wrong = _ASKS_FOR_THE_WRONG.search(fold(self.question.problem_text))
        for pattern in (_SPOKEN_AFTER, *([] if asks_for_the_wrong else [_CORRECT])) if self.question.choices else ():
            for match in pattern.finditer(self.text, start, end):
                reading = self.reading_of(re.findall("[a-z]", match[1]), match.end())
                readings.append(replace(reading, start=match.start(), rank=SPOKEN))
        # One place can be read twice (a style's own marker that is also a usual one); the higher rank holds.
        by_end = {reading.end: reading for reading in sorted(filter(None, reversed(readings)), key=lambda one: one.rank)}
        return sorted(by_end.values(), key=lambda reading: reading.start)

    def before_new_question(self, start: int, end: int, cue: bool) -> int:
        """Where the first question that is not this one begins."""
        since, answers = start, []
        for header in _HEADER.finditer(self.text, start, end):
            answers += self.statements(since, header.start(), cue and since == start)
            if self._is_new_question(header, answers, since, end):
                return header.start()
            since = header.start()
        return end

    def _is_new_question(self, header: re.Match, answers: list[Parsed], since: int, end: int) -> bool:
        """Whether a header begins another question: it does if this one has been answered before it. Without an answer it is
        judged: a model may restate this question before it answers, and speak of "the question: ..." while it reasons."""
        if header["inline"]:
            return bool(answers) and not self.text[answers[-1].end : header.start()].strip(" 。.*")
        if any(answer.rank >= MARKED for answer in answers) or (not answers and self.bare_lines(since, header.start())):
            return True
        following = self.text[header.end() : min(end, header.end() + 2000)]
        restated = squeeze(following[:200]).lstrip("】」]:*").startswith(squeeze(fold(self.question.problem_text))[:16])
        new = not header["english"] or _OWN_CHOICES.search(following)
        return bool(new) and not restated and not header["numbered"]

    def bare_lines(self, start: int, end: int) -> list[Parsed]:
        """Readings of an output without statements: a first or last line, or a whole list, of nothing but letters."""
        choices = self.question.choices
        lines = [line.span() for line in re.compile(r"[^\n]+").finditer(self.text, start, end) if line[0].strip()]
        readings = [self.read(at, at, line_end, BARE) for at, line_end in lines]
        whole = [reading for reading, line in zip(readings, lines, strict=True) if reading and self._fills(reading, line[1])]
        bullets = [bool(re.compile(r"[ ]*[-*•・]").match(self.text, *line)) for line in lines]
        if len(lines) > 1 and not choices and len(set(SLOTS) & set(self.text[start:end])) > 1:
            return []  # boxes filled line by line, or calculations numbered like boxes
        if len(lines) > 1 and all(bullets):
            letters = {letter for reading in whole for letter in reading.letters}
            # All the choices, listed, are the question restated.
            is_answer = len(whole) == len(lines) and all(reading.letters for reading in whole) and len(letters) < len(choices)
            return [Parsed(tuple(sorted(letters)), start=start, end=end)] if is_answer else []
        # Of a list after other text, the last line alone is not the answer.
        if not lines or bullets[-2:] == [True, True] or len(whole) == len(choices) > 1 or len({r.letters for r in whole}) > 2:
            return []
        first, last = readings[0], readings[-1]
        ends = [reading for reading in whole if reading in (first, last)]
        # "c。腎低形成により...", "D. Stamina. It ...": the answer opens the first line and a full stop closes it. Choices that
        # are sentences may also be restated: without their letter they are no answer here.
        if first and first not in whole:
            by_letter = re.match(r"[^a-z]{0,4}[a-z](?![a-z0-9])", self.text[first.start : first.end])
            length, stop = first.end - first.start, self.text[first.end : first.end + 1]
            sentences = any(choice.rstrip().endswith(("。", ".")) for choice in choices)
            restated = sentences and length > 3 and not by_letter
            alone = by_letter and length > 2 and sum(map(bool, readings)) == 1
            if (stop == "。" and not restated) or (stop == "." and alone):
                ends.append(first)
        return ends

    def _fills(self, reading: Parsed, line_end: int) -> bool:
        rest = self.text[reading.end : line_end].strip(" 。.!")
        return self.question.is_numeric or bool(re.fullmatch(rf"(?:{CLOSE})*|です|である", rest))
