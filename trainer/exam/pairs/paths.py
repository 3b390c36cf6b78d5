"""Reasoning paths: sampled from a checkpoint in explain mode, kept in a file as they come, and graded.

The file's first line says how they were sampled; a sampling that was killed goes on from the others, to the same end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medtrain.trainer.errors import bad_input, user_path
from medtrain.trainer.exam.generate import HFEngine, OnOutputs, Output, VLLMEngine
from medtrain.trainer.exam.parse import Parsed, parse_output
from medtrain.trainer.exam.prompts import PromptStyle
from medtrain.trainer.exam.questions import Question
from medtrain.trainer.exam.records import end_last_line, rows_of
from medtrain.trainer.exam.scoring import INVALID, grade_output, to_jsonl, write_atomically
from medtrain.trainer.exam.statements import squeeze

KINDS = ("right", "bare", "wrong", "unparsed", "truncated", "duplicate")
_FIELDS = ("problem_id", "path", "output", "truncated")


@dataclass(frozen=True)
class ReasoningPath:
    """One sampled reasoning path: the prompt, what the model wrote after it, and whether the token limit cut it off."""

    prompt: str
    output: str
    truncated: bool = False


@dataclass(frozen=True)
class GradedPath:
    """A path's place among its question's, its text without white space at the end, its kind (:data:`KINDS`)."""

    index: int
    text: str
    kind: str
    parsed: Parsed = field(compare=False)


def sample_paths(
    engine: HFEngine | VLLMEngine,
    questions: Sequence[Question],
    *,
    num_paths: int,
    temperature: float = 1.0,
    seed: int = 0,
    max_new_tokens: int = 1024,
    style: PromptStyle | None = None,
    demonstrations: Sequence[Question] = (),
    known: Collection[tuple[str, int]] = (),
    on_outputs: OnOutputs | None = None,
) -> dict[str, list[ReasoningPath]]:
    """Sample ``num_paths`` reasoning paths a question in explain mode: problem_id -> paths.

    ``known`` paths, (problem_id, index), may be missing in the result. ``on_outputs`` gets numbers of outputs: path i
    of question q is ``q * num_paths + i``.
    """
    if num_paths < 1 or temperature <= 0:
        raise bad_input("sampling needs num_paths of 1 or more and a temperature above 0")
    style = style or PromptStyle()
    prompts = [style.prompt(question, "explain", engine.tokenizer, demonstrations) for question in questions]
    numbers = {(q.problem_id, i): n * num_paths + i for n, q in enumerate(questions) for i in range(num_paths)}
    outputs = engine.generate(
        [prompt for prompt in prompts for _ in range(num_paths)],
        max_new_tokens=max_new_tokens,
        stop=style.stop("explain"),
        temperature=temperature,
        seed=seed,
        on_outputs=on_outputs,
        skip={numbers[one] for one in known},
    )
    paths: dict[str, list[ReasoningPath]] = {}
    for number, output in enumerate(outputs):
        if output is not None:
            path = ReasoningPath(prompts[number // num_paths], output.text, output.truncated)
            paths.setdefault(questions[number // num_paths].problem_id, []).append(path)
    return paths


def grade_paths(
    question: Question,
    paths: Sequence[ReasoningPath],
    style: PromptStyle,
    unlisted_is_wrong: bool = False,
    min_explanation: int = 1,
) -> list[GradedPath]:
    """Grade the paths of one question, in their order; a repeat of an earlier one is a ``duplicate``, and a right one with
    less than ``min_explanation`` letters and digits beside its answer is ``bare``.

    ``unlisted_is_wrong``: see :func:`medtrain.trainer.exam.pairs.build.build_pairs`.
    """
    graded, seen = [], set()
    for index, path in enumerate(paths):
        if path.prompt != paths[0].prompt:
            raise bad_input("the paths of one question have different prompts", found=f"question {question.problem_id}")
        # White space at the end carries nothing; the eos of training follows the last word.
        text = path.output.rstrip()
        parsed = parse_output(text, question, **style.parse_settings("explain"))
        if text in seen:
            kind = "duplicate"
        elif path.truncated:
            kind = "truncated"
        elif parsed.failure:
            unlisted = unlisted_is_wrong and parsed.failure == "no answer found"
            kind = "wrong" if unlisted and _names_no_choice(text, question, style) else "unparsed"
        elif not grade_output(question, parsed):
            kind = "wrong"
        else:
            beside = text.replace(parsed.read_from, "", 1)
            kind = "right" if sum(letter.isalnum() for letter in beside) >= min_explanation else "bare"
        seen.add(text)
        graded.append(GradedPath(index, text, kind, parsed))
    return graded


def _names_no_choice(text: str, question: Question, style: PromptStyle) -> bool:
    """Whether a path ends with its only answer line, and this holds neither a choice's text nor a choice's letter."""
    before, marker, answer = text.partition(style.answer_marker)
    answer = squeeze(answer)
    if question.is_numeric or not marker or not answer or squeeze(style.answer_marker) in answer:
        return False
    if "\n" in text[len(before) + len(marker) :].strip() or answer.lower() in question.letters:
        return False
    return not any(squeeze(choice) in answer for choice in question.choices)


def recorded_header(path: Path) -> dict:
    """How the paths of a file were sampled; nothing where there is no such file, or no paths in it."""
    header = next(iter(rows_of(path, ("sampling",))), None)
    return header["sampling"] if header and isinstance(header["sampling"], dict) else {}


class PathFile:
    """The file that keeps paths; ``identity`` says how they are sampled, and a file of others is refused. ``about`` is
    written beside it and compared with nothing."""

    def __init__(self, path: Path, identity: dict, about: dict | None = None):
        self.path, self.identity = path, json.loads(json.dumps(identity))
        self.header = {"sampling": self.identity | (about or {})}
        self.outputs: dict[tuple[str, int], Output] = {}
        with user_path(path):
            if not path.is_file():
                return
            with open(path, "rb"):
                pass
        recorded = recorded_header(path)
        if not recorded:
            raise bad_input("not a file of sampled paths", file=path, expected="another out, or this file moved away")
        differing = [name for name in self.identity if recorded.get(name) != self.identity[name]]
        if differing:
            raise bad_input(
                f"holds paths that were sampled otherwise: {', '.join(differing)} differ",
                file=path,
                expected="another out, or this file moved away",
            )
        for row in rows_of(path, _FIELDS):
            self.outputs[row["problem_id"], row["path"]] = Output(row["output"], row["truncated"], 0)

    def add(self, paths: Sequence[tuple[str, int]], outputs: Sequence[Output]) -> None:
        """Append outputs, so that they outlive a kill."""
        if not self.path.is_file():
            write_atomically(self.path, to_jsonl([self.header]))
        end_last_line(self.path)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(to_jsonl(self._row(*one, output) for one, output in zip(paths, outputs, strict=True)))
        self.outputs.update(zip(paths, outputs, strict=True))

    def write_graded(self, graded: dict[str, list[GradedPath]]) -> None:
        """Write all paths again, in the order of the questions, each with how it was graded and from which words."""
        rows: list[dict] = [self.header]
        for problem_id, paths in graded.items():
            for path in paths:
                row = self._row(problem_id, path.index, self.outputs[problem_id, path.index])
                parsed = path.parsed
                rows.append(
                    row | {"kind": path.kind, "parsed": parsed.value, "read_from": parsed.read_from, "failure": parsed.failure}
                )
        write_atomically(self.path, to_jsonl(rows))

    @staticmethod
    def _row(problem_id: str, index: int, output: Output) -> dict:
        return {"problem_id": problem_id, "path": index, "output": output.text, "truncated": output.truncated}


def sample_into(
    file: PathFile,
    load_engine: Callable[[], HFEngine | VLLMEngine],
    questions: Sequence[Question],
    *,
    num_paths: int,
    echo: Callable[[str], None] | None = None,
    **settings: object,
) -> None:
    """Sample what ``file`` lacks into it (``settings`` as of :func:`sample_paths`); with nothing to do, load nothing."""
    wanted = [(question.problem_id, i) for question in questions for i in range(num_paths)]

    def report() -> None:
        if echo is not None:
            echo(f"paths: {sum(one in file.outputs for one in wanted)}/{len(wanted)}")

    def keep(numbers: list[int], outputs: list[Output]) -> None:
        # Of a batch that held some of another run's, those stay as they are.
        new = [(wanted[n], output) for n, output in zip(numbers, outputs, strict=True) if wanted[n] not in file.outputs]
        file.add([one for one, _ in new], [output for _, output in new])
        report()

    report()
    known = [one for one in wanted if one in file.outputs]
    if len(known) == len(wanted):
        return
    engine = load_engine()
    if isinstance(engine, HFEngine):
        style, shots = settings["style"], settings["demonstrations"]
        prompt = style.prompt(questions[0], "explain", engine.tokenizer, shots)
        if not engine.cache_agrees(prompt, settings["max_new_tokens"]):
            raise bad_input(f"nothing was sampled: {INVALID}", file=file.path)
    sample_paths(engine, questions, num_paths=num_paths, known=known, on_outputs=keep, **settings)
