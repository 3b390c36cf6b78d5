"""Exam prompts: one style object renders questions, demonstrations and ground-truth completions for both exam modes.

Modes: ``answer`` asks for the answer alone, ``explain`` for an explanation that ends with the answer line. A plain
prompt (base models) ends with a marker, ``答え:`` or ``説明:``, and generation starts right after it. A chat prompt
goes through the tokenizer's chat template and generation starts the assistant's turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from medtrain.trainer.config.reading import build, read_tree
from medtrain.trainer.data.chat import left_out, squeeze
from medtrain.trainer.data.tokenizer import opening
from medtrain.trainer.errors import bad_input, user_path
from medtrain.trainer.exam.questions import Question

MODES = ("answer", "explain")
_NAMED = Path(__file__).resolve().parents[2] / "configs" / "prompts"


@dataclass(frozen=True)
class Stop:
    """Where an output ends: before the first of ``strings``, or before the ``end`` that follows an answer after the first
    ``marker`` ("": the output begins with the answer; None: only the strings count)."""

    strings: tuple[str, ...] = ()
    marker: str | None = None
    end: str = "\n"

    def cut(self, text: str) -> tuple[str, bool]:
        """Return the text up to its end, and whether the end was there."""
        found = [at for stop in self.strings if (at := text.find(stop)) >= 0]
        if self.marker is not None and (marked := text.find(self.marker)) >= 0:
            begin = marked + len(self.marker)
            begin += len(text[begin:]) - len(text[begin:].lstrip())
            if begin < len(text) and (at := text.find(self.end, begin)) >= 0:
                found.append(at)
        return (text[: min(found)], True) if found else (text, False)


@dataclass(frozen=True)
class PromptStyle:
    """How exam prompts look. The defaults are those for Japanese medical examinations."""

    question: str = "問題: {text}\n{choices}"
    choice: str = "{letter}. {text}"
    choice_joint: str = "\n"
    count_line: str = ""  # follows the choices and tells, as {count}, how many are right
    answer_marker: str = "答え:"
    explain_marker: str = "説明:"
    lead: str = " "  # between a marker and what follows
    joint: str = "\n"  # between question and marker, and before the answer line
    shot_joint: str = "\n\n"  # between worked examples
    answer_as: Literal["letters", "text"] = "letters"  # text: of the choice
    answer_joint: str = ","
    answer_end: str = "\n"  # plain prompts: ends the answer (see Stop)
    stops: tuple[str, ...] = ("\n問題:", "\n【問題】", "\nQuestion:")  # plain prompts: end an output anywhere
    instruction_answer: str = (
        "次の医師国家試験の問題に答えてください。"
        "「答え: a」または「答え: a,c」のように、正解の記号だけを書いてください。"
        "選択肢のない計算問題では、記号の代わりに数値を書いてください。"
    )
    instruction_explain: str = (
        "次の医師国家試験の問題について、根拠を説明し、"
        "最後の行に「答え: a」または「答え: a,c」のように正解の記号を書いてください。"
        "選択肢のない計算問題では、記号の代わりに数値を書いてください。"
    )
    chat: bool = False  # use the tokenizer's chat template
    system: str = ""  # chat: the system message, if any
    marker_in_turn: bool = False  # chat: end the user's turn with the marker

    def __post_init__(self):
        if empty := [name for name in ("answer_marker", "answer_end") if not getattr(self, name)]:
            raise bad_input("empty", field=empty[0], expected="a text")
        for name, keys in (("question", ["choices", "text"]), ("choice", ["letter", "text"]), ("count_line", ["count"])):
            template = getattr(self, name)
            try:
                template.format(**dict.fromkeys(keys, ""))
            except (KeyError, IndexError, ValueError) as error:
                raise bad_input("wrong template", field=name, found=template, expected=f"only {keys}") from error
            if "{text}" not in template and name != "count_line":
                raise bad_input("the template leaves out {text}", field=name, found=template)

    def render_question(self, question: Question) -> str:
        choices = [self.choice.format(letter=a, text=text) for a, text in zip(question.letters, question.choices, strict=True)]
        block = self.question.format(text=question.problem_text, choices=self.choice_joint.join(choices))
        if question.is_numeric:
            return block.rstrip()
        return block + (f"\n{self.count_line.format(count=len(question.answer))}" if self.count_line else "")

    def answer(self, letters: Sequence[str], question: Question) -> str:
        """The answer as the answer line shows it: letters or the texts of these choices, joined."""
        as_text = self.answer_as == "text"
        return self.answer_joint.join(question.choices[question.letters.index(a)] if as_text else a for a in letters)

    @property
    def answer_lead(self) -> str:
        """What stands between a prompt for the answer alone and the answer."""
        if self.chat:
            return "" if self.marker_in_turn else self.answer_marker + self.lead
        return self.lead

    def completion(self, question: Question, mode: str) -> str:
        """The ground-truth completion: what follows the prompt of :meth:`prompt`, up to the end of the answer; where several
        answers count, the first. Raises :class:`InputError` in ``explain`` mode for a question without an ``explanation``."""
        key = question.answer[0] if question.is_numeric else self.answer(question.accepted[0], question)
        if mode == "answer":
            return self.answer_lead + key
        explanation = (question.explanation or "").strip()
        if not explanation:
            raise bad_input("needs an explanation here", field="explanation", found=f"none for question {question.problem_id}")
        return f"{'' if self.chat else self.lead}{explanation}{self.joint}{self.answer_marker}{self.lead}{key}"

    def prompt(self, question: Question, mode: str, tokenizer, demonstrations: Sequence[Question] = ()) -> str:
        """The whole prompt as one string, to be tokenised by ``tokenize_starts(..., as_written=True)``: a BOS that the tokenizer
        puts before every text stands in it, unless the chat template writes its own. Raises :class:`InputError` for ``chat``
        without a chat template, or with one that fails or loses part of a message."""
        instruction, marker = self.instruction_explain, self.explain_marker
        if mode == "answer":
            instruction, marker = self.instruction_answer, self.answer_marker
        shown = [(self.render_question(one), self.completion(one, mode)) for one in demonstrations]
        shown.append((self.render_question(question), ""))
        if not self.chat:
            blocks = [instruction] if instruction else []
            blocks += [f"{text}{self.joint}{marker}{completion}" for text, completion in shown]
            return ("" if tokenizer is None else opening(tokenizer)[0]) + self.shot_joint.join(blocks)
        before = f"{instruction}{self.shot_joint}" if instruction else ""
        after = f"{self.joint}{marker}" if self.marker_in_turn else ""
        messages = [("system", self.system)] if self.system else []
        for text, completion in shown:
            messages += [("user", f"{before}{text}{after}"), ("assistant", completion)]
        return _render_chat(messages[:-1], tokenizer)

    def stop(self, mode: str) -> Stop:
        """Where outputs of this mode end. A chat model ends its turn itself and may restate the question before."""
        if self.chat:
            return Stop()
        return Stop(self.stops, "" if mode == "answer" else self.answer_marker, self.answer_end)

    def parse_settings(self, mode: str) -> dict:
        """The keyword arguments with which :func:`parse_output` reads outputs of this style and mode."""
        cue = mode == "answer" and (self.marker_in_turn or not self.chat)
        return {"cue": cue, "markers": (self.answer_marker,)}


def _render_chat(messages: Sequence[tuple[str, str]], tokenizer) -> str:
    """The chat template's text of (role, content), which must hold every word of them."""
    if not getattr(tokenizer, "chat_template", None):
        raise bad_input("the tokenizer has no chat template", field="chat", expected="a plain prompt (chat: false)")
    chat = [{"role": role, "content": content} for role, content in messages]
    try:
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template raises what it likes
        raise bad_input(f"the chat template fails: {error}", field="chat") from error
    rendered = squeeze(prompt)
    for role, content in messages:
        if (missing := left_out(content, rendered)) is not None:
            problem = f"the chat template leaves out or changes part of the {role} message, from {missing[:60]!r} on"
            raise bad_input(problem, field="chat")
    return prompt


def load_style(prompt: str | Path | None, *, chat: bool = False, field: str = "prompt") -> PromptStyle:
    """The prompt style of a name (a file in configs/prompts) or of a YAML file; None is the default one. ``chat`` turns the
    chat template on, whatever the file says. ``field`` is the user's name for ``prompt``."""
    if prompt is None:
        return PromptStyle(chat=chat)
    with user_path(prompt, field=field):
        path = next((file for file in (_NAMED / f"{prompt}.yaml", Path(prompt)) if file.is_file()), None)
    if path is None:
        names = ", ".join(sorted(file.stem for file in _NAMED.glob("*.yaml")))
        raise bad_input("no such prompt style", field=field, found=str(prompt), expected=f"{names}, or a YAML file")
    tree = read_tree(path, ())
    stops = tree.pop("stops", list(PromptStyle.stops))
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise bad_input("wrong type", file=path, field="stops", found=stops, expected="a list of texts")
    style = build(PromptStyle, tree, "", path, set(), skip=frozenset({"stops"}), fixed={"stops": tuple(stops)})
    return replace(style, chat=style.chat or chat)
