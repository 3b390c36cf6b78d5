"""Exam prompts: one style object renders questions, demonstrations and ground-truth completions for both exam modes.

Modes: ``answer`` asks for the answer alone, ``explain`` for an explanation that ends with the answer line. A plain
prompt (base models) ends with a marker, ``答え:`` or ``説明:``, and generation starts right after it. A chat prompt
goes through the tokenizer's chat template and generation starts the assistant's turn. A prompt does not say how many
answers are right; only the exam's own text does ("2つ選べ"). The one exception is a style with a ``count_line``, as in
the official prompt of IgakuQA. Named styles are the files of ``configs/prompts``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medtrain.trainer.config.reading import build, read_tree
from medtrain.trainer.data.chat import left_out, squeeze
from medtrain.trainer.data.encode import opening, tokenize_starts
from medtrain.trainer.data.tokenizer import check_ids, first_texts
from medtrain.trainer.errors import bad_input, user_path
from medtrain.trainer.exam.questions import Question, load_questions

MODES = ("answer", "explain")
_NAMED = Path(__file__).resolve().parents[2] / "configs" / "prompts"


@dataclass(frozen=True)
class Stop:
    """Where an output ends: before the first of ``strings``, or before the ``end`` of its answer.

    The answer ends at the first ``end`` after the first ``marker`` with something between them; an empty marker means
    that the output begins with the answer. ``marker=None``: only the strings count.
    """

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
    """How exam prompts look. The defaults are those for Japanese medical examinations.

    ``question`` may use ``{text}`` and ``{choices}``; ``choice`` ``{letter}`` and ``{text}``. ``joint`` stands between
    question and marker and before the answer line, ``lead`` between a marker and what follows, ``shot_joint`` between
    worked examples. ``answer_as`` is ``letters`` or ``text`` (the text of the choice). ``answer_end`` ends the answer
    (see :class:`Stop`), ``stops`` end an output anywhere; both are for plain prompts. ``instruction_*`` open the prompt;
    ``chat`` uses the tokenizer's chat template, with the ``system`` message if there is one, and ``marker_in_turn`` ends
    the user's turn with the marker. ``count_line`` follows the choices and tells, as ``{count}``, how many are right.
    """

    question: str = "問題: {text}\n{choices}"
    choice: str = "{letter}. {text}"
    choice_joint: str = "\n"
    count_line: str = ""
    answer_marker: str = "答え:"
    explain_marker: str = "説明:"
    lead: str = " "
    joint: str = "\n"
    shot_joint: str = "\n\n"
    answer_as: str = "letters"
    answer_joint: str = ","
    answer_end: str = "\n"
    stops: tuple[str, ...] = ("\n問題:", "\n【問題】", "\nQuestion:")
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
    chat: bool = False
    system: str = ""
    marker_in_turn: bool = False

    def __post_init__(self):
        if self.answer_as not in ("letters", "text"):
            raise bad_input("unknown", field="answer_as", found=self.answer_as, expected="letters or text")
        for name in ("answer_marker", "answer_end"):
            if not getattr(self, name):
                raise bad_input("empty", field=name, expected="a text")
        templates = {"question": ("text", "choices"), "choice": ("letter", "text"), "count_line": ("count",)}
        for name, example in ((name, dict.fromkeys(keys, "")) for name, keys in templates.items()):
            template = getattr(self, name)
            try:
                template.format(**example)
            except (KeyError, IndexError, ValueError) as error:
                raise bad_input("wrong template", field=name, found=template, expected=f"only {sorted(example)}") from error
            if "{text}" not in template and name != "count_line":
                raise bad_input("the template leaves out {text}", field=name, found=template)

    def render_question(self, question: Question) -> str:
        rendered = (
            self.choice.format(letter=letter, text=text) for letter, text in zip(question.letters, question.choices, strict=True)
        )
        block = self.question.format(text=question.problem_text, choices=self.choice_joint.join(rendered))
        if question.is_numeric:
            return block.rstrip()
        if self.count_line:
            block += f"\n{self.count_line.format(count=len(question.answer))}"
        return block

    def answer(self, letters: Sequence[str], question: Question) -> str:
        """The answer as the answer line shows it: letters or the texts of these choices, joined."""
        if self.answer_as == "letters":
            return self.answer_joint.join(letters)
        return self.answer_joint.join(question.choices[question.letters.index(letter)] for letter in letters)

    def key(self, question: Question) -> str:
        """The official answer as the answer line shows it; the first one where several count."""
        if question.is_numeric:
            return question.answer[0]
        return self.answer(question.accepted[0], question)

    def completion(self, question: Question, mode: str) -> str:
        """The ground-truth completion: what follows the prompt of :meth:`prompt`, up to the end of the answer.

        In ``explain`` mode the question needs an ``explanation`` (:class:`InputError` without).
        """
        line = f"{self.answer_marker}{self.lead}{self.key(question)}"
        if mode == "answer":
            if self.chat and self.marker_in_turn:
                return self.key(question)
            return line if self.chat else line.removeprefix(self.answer_marker)
        if not (question.explanation or "").strip():
            raise bad_input("needs an explanation here", field="explanation", found=f"none for question {question.problem_id}")
        return f"{'' if self.chat else self.lead}{question.explanation.strip()}{self.joint}{line}"

    def prompt(self, question: Question, mode: str, tokenizer, demonstrations: Sequence[Question] = ()) -> str:
        """The whole prompt as one string, to be tokenised by ``tokenize_starts(..., as_written=True)``.

        A tokenizer that begins every text with its bos token gets that token as text; a chat template writes its own.
        Raises :class:`InputError` where ``chat`` is set and the tokenizer has no chat template, or one that fails or
        leaves out part of a message.
        """
        if mode not in MODES:
            raise bad_input("unknown mode", found=mode, expected=" or ".join(MODES))
        instruction = self.instruction_answer if mode == "answer" else self.instruction_explain
        if self.chat:
            return self._chat_prompt(question, mode, tokenizer, demonstrations, instruction)
        marker = self.answer_marker if mode == "answer" else self.explain_marker
        blocks = [instruction] if instruction else []
        for shot in demonstrations:
            blocks.append(f"{self.render_question(shot)}{self.joint}{marker}{self.completion(shot, mode)}")
        blocks.append(f"{self.render_question(question)}{self.joint}{marker}")
        return ("" if tokenizer is None else opening(tokenizer)[0]) + self.shot_joint.join(blocks)

    def _chat_prompt(self, question, mode, tokenizer, demonstrations, instruction) -> str:
        if not getattr(tokenizer, "chat_template", None):
            raise bad_input("the tokenizer has no chat template", field="chat", expected="a plain prompt (chat: false)")
        opening = f"{instruction}{self.shot_joint}" if instruction else ""
        marker = self.answer_marker if mode == "answer" else self.explain_marker
        closing = f"{self.joint}{marker}" if self.marker_in_turn else ""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for shot in demonstrations:
            messages.append({"role": "user", "content": opening + self.render_question(shot) + closing})
            messages.append({"role": "assistant", "content": self.completion(shot, mode)})
        messages.append({"role": "user", "content": opening + self.render_question(question) + closing})
        try:
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template raises what it likes
            raise bad_input(f"the chat template fails: {error}", field="chat") from error
        rendered = squeeze(prompt)
        for message in messages:
            if (missing := left_out(message["content"], rendered)) is not None:
                problem = f"the chat template leaves out or changes part of the {message['role']} message"
                raise bad_input(f"{problem}, from {missing[:60]!r} on", field="chat")
        return prompt

    def stop(self, mode: str) -> Stop:
        """Where outputs of this mode end. A chat model ends its turn itself and may restate the question before."""
        if self.chat:
            return Stop()
        return Stop(self.stops, "" if mode == "answer" else self.answer_marker, self.answer_end)

    def parse_settings(self, mode: str) -> dict:
        """The keyword arguments with which :func:`parse_output` reads outputs of this style and mode."""
        cue = mode == "answer" and (self.marker_in_turn or not self.chat)
        return {"cue": cue, "markers": (self.answer_marker,)}


def load_style(prompt: str | Path | None, *, chat: bool = False, setting: str = "prompt") -> PromptStyle:
    """The prompt style of a name (a file in configs/prompts) or of a YAML file; None is the default one.

    ``setting`` is what the user calls ``prompt``. ``chat`` turns the chat template on, whatever the file says. Raises
    :class:`InputError` for an unknown name or setting.
    """
    if prompt is None:
        return PromptStyle(chat=chat)
    named, path = _NAMED / f"{prompt}.yaml", Path(prompt)
    with user_path(path, field=setting):
        there = named.is_file() or path.is_file()
    if not there:
        names = ", ".join(sorted(file.stem for file in _NAMED.glob("*.yaml")))
        raise bad_input("no such prompt style", field=setting, found=str(prompt), expected=f"{names}, or a YAML file")
    path = named if named.is_file() else path
    tree = read_tree(path, ())
    stops = tree.pop("stops", list(PromptStyle.stops))
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise bad_input("wrong type", file=path, field="stops", found=stops, expected="a list of texts")
    style = build(PromptStyle, tree, "", path, set(), skip={"stops"}, fixed={"stops": tuple(stops)})
    return replace(style, chat=True) if chat else style


def read_demonstrations(
    path: str | Path | None, asked: Sequence[Question], style: PromptStyle, modes: Sequence[str] = MODES
) -> list[Question]:
    """The worked questions of a few-shot prompt, in file order; none without a ``path``.

    Raises:
        InputError: an unreadable file, a question that is among those ``asked``, no explanation where ``modes`` need one.
    """
    if path is None:
        return []
    shots = load_questions(path, points_required=False)
    known = {(question.problem_text, question.choices) for question in asked}
    for row, shot in enumerate(shots, start=1):
        if (shot.problem_text, shot.choices) in known:
            raise bad_input("a demonstration that the exam asks", file=path, row=row, found=shot.problem_id)
        for mode in modes:
            style.completion(shot, mode)
    return shots


def model_positions(model_dir: str | Path) -> int | None:
    """The model's max_position_embeddings, where its config has any."""
    try:
        config = json.loads((Path(model_dir) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise bad_input("cannot be read", file=Path(model_dir) / "config.json", found=str(error)) from error
    return config.get("max_position_embeddings") if isinstance(config, dict) else None


def prompt_widths(
    style: PromptStyle,
    questions: Sequence[Question],
    demonstrations: Sequence[Question],
    tokenizer,
    new_tokens: Mapping[str, int],
    limit: int | None,
    file: str | Path,
) -> dict[str, int]:
    """Tokens of the longest prompt and its ``new_tokens``, by mode; ``limit``: the model's positions, where it has a limit.

    Raises:
        InputError: a prompt without a token, or one that does not fit with its output; ids that are not tokenizer.json's.
    """
    widths: dict[str, int] = {}
    for mode, new in new_tokens.items():
        prompts = [style.prompt(question, mode, tokenizer, demonstrations) for question in questions]
        check_ids(tokenizer, first_texts(prompts))
        for question, ids in zip(questions, tokenize_starts(tokenizer, prompts, as_written=True), strict=True):
            width = len(ids) + new
            if not ids or (limit is not None and width > limit):
                raise bad_input(
                    "the prompt does not fit the model",
                    file=file,
                    found=f"question {question.problem_id}, {mode}: {len(ids)} tokens and {new} new ones",
                    expected=f"1 to {limit} together (max_position_embeddings)",
                )
            widths[mode] = max(widths.get(mode, 0), width)
    return widths
