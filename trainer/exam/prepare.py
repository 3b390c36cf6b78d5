"""What is read and checked before a model loads: its folder, and the exam with every prompt made and measured."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from medtrain.trainer.config.exam import ExamSettings
from medtrain.trainer.data.chat import fix_time, now
from medtrain.trainer.data.tokenizer import read_tokenizer, tokenize_starts
from medtrain.trainer.errors import bad_input, user_path
from medtrain.trainer.exam.prompts import PromptStyle, load_style
from medtrain.trainer.exam.questions import Question, load_questions
from medtrain.trainer.files import file_sha256
from medtrain.trainer.model.hf_config import SUPPORTED_TYPES, check_vocabulary, parameter_shapes
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
    max_positions: int | None,
    *,
    images: bool = False,
    limit: int | None = None,
    scored: bool = True,
    prefix: str = "",
) -> Exam:
    """Read the exam in ``path`` and make its prompts for the model of ``tokenizer`` and ``max_positions``.

    Args:
        new_tokens: mode -> the most tokens of an output, for the modes to prepare.
        images: also take questions that need an image; limit: take the first questions only.
        scored: whether every question needs ``points``; prefix: of the settings' names in messages.

    Raises:
        InputError: an unreadable file, an unknown style, no question left, a demonstration that is in the exam too, a prompt that
            does not fit the model with its output.
    """
    style = load_style(settings.prompt, chat=settings.chat, field=f"{prefix}prompt")
    everything = load_questions(path, points_required=scored, mapping=settings.mapping)
    questions = [question for question in everything if question.text_only or images][:limit]
    if not questions:
        raise bad_input("no question is left: all need an image", file=path)
    demonstrations = _read_demonstrations(settings.demonstrations, everything, style, list(new_tokens))
    prompts = {mode: [style.prompt(one, mode, tokenizer, demonstrations) for one in questions] for mode in new_tokens}
    widths = {}
    for mode, new in new_tokens.items():
        if max_positions is not None and new >= max_positions:
            expected = f"below {max_positions}, the model's max_position_embeddings"
            raise bad_input("leaves no room for a prompt", field=f"{prefix}{TOKEN_LIMITS[mode]}", found=new, expected=expected)
        lengths = [len(ids) for ids in tokenize_starts(tokenizer, prompts[mode], as_written=True)]
        for question, length in zip(questions, lengths, strict=True):
            if length == 0 or (max_positions is not None and length + new > max_positions):
                found = f"question {question.problem_id}, {mode}: {length} tokens and {new} new ones"
                expected = f"at least 1, and at most {max_positions} together (max_position_embeddings)"
                raise bad_input("the prompt does not fit the model", file=path, found=found, expected=expected)
        widths[mode] = max(lengths) + new
    files = {"exam": path, "demonstrations": settings.demonstrations, "mapping": settings.mapping}
    digests = {name: None if file is None else file_sha256(file) for name, file in files.items()}
    sizes = settings.batch_tokens, len(everything), sum(not question.text_only for question in everything)
    return Exam(style, questions, prompts, dict(new_tokens), widths, *sizes, digests)


def _read_demonstrations(path: str | None, exam: Sequence[Question], style: PromptStyle, modes: list[str]) -> list[Question]:
    """The worked questions of a few-shot prompt, in file order; none without a ``path``."""
    demonstrations = load_questions(path, points_required=False) if path is not None else []
    known = {(question.problem_text, question.choices) for question in exam}
    for row, demonstration in enumerate(demonstrations, start=1):
        if (demonstration.problem_text, demonstration.choices) in known:
            raise bad_input("a demonstration that is in the exam too", file=path, row=row, found=demonstration.problem_id)
        for mode in modes:
            style.completion(demonstration, mode)  # needs an explanation in explain mode
    return demonstrations


def open_exam(
    model: Path, path: str | Path, settings: ExamSettings, new_tokens: Mapping[str, int], recorded: Mapping, **options: Any
) -> tuple[Exam, PreTrainedTokenizerBase]:
    """The exam in ``path`` with its prompts for the checkpoint ``model``, and the tokenizer; ``options`` and errors as
    :func:`read_exam`, :func:`open_model`. A chat template that writes the date gets that of the first start in ``recorded``."""
    tokenizer, config = open_model(model)
    first_start = datetime.fromisoformat(recorded["first_start"]) if "first_start" in recorded else now()
    renderer = fix_time(tokenizer, first_start)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    exam = read_exam(path, settings, renderer, new_tokens, positions, **options)
    if renderer is not tokenizer and exam.style.chat:
        log.info(f"the chat template writes a date: {first_start:%Y-%m-%d}, that of the first start")
        exam = replace(exam, first_start=first_start.isoformat())
    return exam, tokenizer


def open_model(folder: Path) -> tuple[PreTrainedTokenizerBase, PreTrainedConfig]:
    """The tokenizer and config of a model folder, once they and the headers of its weights are known to fit together.

    A type of model that cannot be trained here may still be evaluated; its tensors' shapes are then compared with nothing.
    Raises :class:`InputError` for a run folder, an adapter, and what else training refuses in a checkpoint's files."""
    names = ("config.json", "manifest.json", "adapter_config.json")
    with user_path(folder):
        has_config, is_run, is_adapter = ((folder / name).is_file() for name in names)
    if is_adapter:  # transformers would look for its base and put it on that
        advice = "the model merged with it: RUN/model, or what medtrain export writes"
        raise bad_input("an adapter, not a model", file=folder, expected=advice)
    if is_run and not has_config:
        advice = f"{folder / 'model'}, which is there when the run has finished"
        raise bad_input("a run folder, not a model", file=folder, expected=advice)
    if not has_config:
        raise bad_input("no checkpoint", file=folder, expected="a folder with config.json, weights and a tokenizer")
    tokenizer = read_tokenizer(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds here
        raise bad_input("unreadable config", file=folder / "config.json", found=" ".join(str(error).split())) from None
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
                for piece in _samples(path):
                    digest.update(piece)
        return digest.hexdigest()


def _samples(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        if path.suffix != ".safetensors":
            yield file.read(64 << 20)
            return
        try:
            spans = sorted((tensor.start, tensor.end) for tensor in read_header(path).values())
        except ValueError as error:
            raise bad_input("not a safetensors file", file=path) from error
        file.seek(8)
        yield file.read(spans[0][0] - 8 if spans else -1)  # the header
        for begin, end in spans:
            for at in sorted({begin, (begin + end) // 2, max(begin, end - _SAMPLE)}):
                file.seek(at)
                yield file.read(min(_SAMPLE, end - at))
