"""What is read and checked before a model loads: its folder, and the exam with every prompt made and measured."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from medtrain.trainer.config.exam import ExamSettings
from medtrain.trainer.data.chat import fix_time, now
from medtrain.trainer.data.tokenizer import read_tokenizer, tokenize_starts
from medtrain.trainer.errors import bad_input, user_path
from medtrain.trainer.exam.prompts import PromptStyle, load_style
from medtrain.trainer.exam.questions import Question, load_questions
from medtrain.trainer.files import file_sha256
from medtrain.trainer.model.hf_config import SUPPORTED_TYPES, check_vocabulary, parameter_shapes, read_config
from medtrain.trainer.weights.load import CHECKSUMS, Checkpoint
from medtrain.trainer.weights.safetensors import read_header

log = logging.getLogger(__name__)

TOKEN_LIMITS = {"answer": "max_answer_tokens", "explain": "max_new_tokens"}  # mode -> setting
_SAMPLE = 65_536  # bytes of a tensor read at each place


@dataclass(frozen=True)
class Exam:
    """Questions and their prompts, in the same order."""

    style: PromptStyle
    questions: list[Question]
    prompts: dict[str, list[str]]  # by mode
    new_tokens: dict[str, int]  # by mode: the most tokens of an output
    widths: dict[str, int]  # by mode: tokens of the longest prompt and its output
    batch_tokens: int  # at once, prompts and new ones
    num_in_file: int
    num_with_image: int  # in the file
    digests: dict[str, str | None]  # of the files: exam, demonstrations, mapping
    first_start: str | None = None  # the time in the prompts, where the chat template writes the date

    @property
    def digest(self) -> str:
        """Digest of what decides the outputs and their scores, apart from the model."""
        content = [self.digests["exam"], asdict(self.style), self.new_tokens, [one.problem_id for one in self.questions]]
        content += [self.digests[name] for name in ("demonstrations", "mapping") if self.digests[name] is not None]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def describe(self) -> str:
        return f"exam: {len(self.questions):,} questions, each for the answer alone and with explanation"


def read_exam(
    path: str | Path,
    settings: ExamSettings,
    tokenizer: PreTrainedTokenizerBase,
    new_tokens: Mapping[str, int],
    max_positions: float,
    *,
    images: bool = False,
    limit: int | None = None,
    scored: bool = True,
    prefix: str = "",
) -> Exam:
    """Read the exam in ``path`` and make its prompts for a model of ``max_positions``. ``new_tokens``: mode -> the most tokens of
    an output, for the modes to prepare; ``images``: also take questions that need an image; ``limit``: the first questions
    only; ``scored``: every question needs ``points``; ``prefix``: of the settings' names in messages. Raises
    :class:`InputError`, also for a demonstration that is in the exam, and a prompt that does not fit with its output."""
    style = load_style(settings.prompt, chat=settings.chat, field=f"{prefix}prompt")
    everything = load_questions(path, points_required=scored, mapping=settings.mapping)
    questions = [question for question in everything if question.text_only or images][:limit]
    if not questions:
        raise bad_input("no question is left: all need an image", file=path)
    files = {"exam": path, "demonstrations": settings.demonstrations, "mapping": settings.mapping}
    shown = load_questions(files["demonstrations"], points_required=False) if files["demonstrations"] is not None else []
    known = {(question.problem_text, question.choices) for question in everything}
    for row, one in enumerate(shown, start=1):
        if (one.problem_text, one.choices) in known:
            where = {"file": files["demonstrations"], "row": row}
            raise bad_input("a demonstration that is in the exam too", **where, found=one.problem_id)
    prompts, widths = {}, {}
    for mode, new in new_tokens.items():
        prompts[mode] = [style.prompt(question, mode, tokenizer, shown) for question in questions]
        if new >= max_positions:
            expected = f"below {max_positions}, the model's max_position_embeddings"
            raise bad_input("leaves no room for a prompt", field=f"{prefix}{TOKEN_LIMITS[mode]}", found=new, expected=expected)
        lengths = [len(ids) for ids in tokenize_starts(tokenizer, prompts[mode], as_written=True)]
        for question, length in zip(questions, lengths, strict=True):
            if length == 0 or length + new > max_positions:
                found = f"question {question.problem_id}, {mode}: {length} tokens and {new} new ones"
                expected = f"at least 1, and at most {max_positions} together (max_position_embeddings)"
                raise bad_input("the prompt does not fit the model", file=path, found=found, expected=expected)
        widths[mode] = max(lengths) + new
    digests = {name: None if file is None else file_sha256(file) for name, file in files.items()}
    sizes = settings.batch_tokens, len(everything), sum(not question.text_only for question in everything)
    return Exam(style, questions, prompts, dict(new_tokens), widths, *sizes, digests)


def open_exam(
    model: Path, path: str | Path, settings: ExamSettings, new_tokens: Mapping[str, int], recorded: Mapping, **options: Any
) -> tuple[Exam, PreTrainedTokenizerBase]:
    """The exam in ``path`` with its prompts for the checkpoint ``model``, and the tokenizer; ``options`` and errors as
    :func:`read_exam`, :func:`open_model`. A chat template that writes the date gets that of the first start in ``recorded``."""
    tokenizer, config = open_model(model)
    first_start = datetime.fromisoformat(recorded["first_start"]) if "first_start" in recorded else now()
    renderer = fix_time(tokenizer, first_start)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    exam = read_exam(path, settings, renderer, new_tokens, positions, **options)
    if renderer is not tokenizer and exam.style.chat:
        log.info(f"the chat template writes a date: {first_start:%Y-%m-%d}, that of the first start")
        exam = replace(exam, first_start=first_start.isoformat())
    return exam, tokenizer


def open_model(folder: Path) -> tuple[PreTrainedTokenizerBase, PreTrainedConfig]:
    """The tokenizer and config of a model folder, once they and the headers of its weights are known to fit together (a type
    of model that cannot be trained here may still be evaluated, its shapes then compared with nothing). Raises
    :class:`InputError` for a run folder, an adapter, and what else training refuses in a checkpoint's files."""
    names = ("config.json", "manifest.json", "adapter_config.json")
    with user_path(folder):
        has_config, is_run, is_adapter = ((folder / name).is_file() for name in names)
    problem, expected = "no checkpoint", "a folder with config.json, weights and a tokenizer"
    if is_adapter:  # transformers would look for its base and put it on that
        problem, expected = "an adapter, not a model", "the model merged with it: RUN/model, or what medtrain export writes"
    elif is_run:
        problem, expected = "a run folder, not a model", f"{folder / 'model'}, which is there when the run has finished"
    if is_adapter or not has_config:
        raise bad_input(problem, file=folder, expected=expected)
    tokenizer, config = read_tokenizer(folder), read_config(folder)
    check_vocabulary(tokenizer, config.get_text_config().vocab_size, {"file": folder / "config.json"})
    checkpoint = Checkpoint(folder)
    if config.model_type in SUPPORTED_TYPES and getattr(config, "quantization_config", None) is None:
        checkpoint.check(parameter_shapes(config), tied=config.tie_word_embeddings)
    return tokenizer, config


def model_digest(folder: Path) -> str:
    """Digest of a checkpoint folder: every small file whole; of each tensor its first, middle and last 64 KiB. Training moves
    every tensor, so samples tell checkpoints apart without reading all of a large one. Raises :class:`InputError` for
    unreadable files, and for weights other than a ``SHA256SUMS`` next to them tells, which are read whole."""
    with user_path(folder):
        if (folder / CHECKSUMS).is_file():
            Checkpoint(folder).digest()
        digest = hashlib.sha256()
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.suffix in (".json", ".jinja", ".safetensors", ".txt", ".model", ".bin"):
                digest.update(f"{path.name}:{path.stat().st_size}\n".encode())
                with open(path, "rb") as file:
                    for start, end in _spans(path):
                        file.seek(start)
                        digest.update(file.read(end - start))
        return digest.hexdigest()


def _spans(path: Path) -> list[tuple[int, int]]:
    """The places, first and last byte, of a file that its digest is made of."""
    if path.suffix != ".safetensors":
        return [(0, 64 << 20)]
    tensors = sorted((tensor.start, tensor.end) for tensor in read_header(path).values())
    places = [{start, (start + end) // 2, max(start, end - _SAMPLE)} for start, end in tensors]
    samples = [(at, min(at + _SAMPLE, end)) for (_, end), of in zip(tensors, places, strict=True) for at in sorted(of)]
    return [(8, tensors[0][0] if tensors else path.stat().st_size), *samples]  # the header first
