"""Settings of exams: what ``medtrain eval``, ``medtrain pairs`` and the exam during training have in common, and their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medtrain.trainer.config.reading import build, read_tree
from medtrain.trainer.errors import bad_input


@dataclass(frozen=True, kw_only=True)
class ExamSettings:
    """How questions are put to a model, and how it generates."""

    max_new_tokens: int = 1024  # of an output with explanation
    engine: Literal["hf", "vllm"] = "hf"
    batch_tokens: int = 65_536  # hf: tokens at once, prompts and new ones
    dtype: str = "auto"  # of the loaded weights: float32, bfloat16, ...; auto: the checkpoint's
    prompt: str | None = None  # default, english, official or demo (configs/prompts), or a YAML file
    chat: bool = False  # use the checkpoint's chat template
    demonstrations: str | None = None  # worked examples for a few-shot prompt, JSON Lines
    mapping: str | None = None  # YAML: which fields hold what, for questions of an own form


@dataclass(frozen=True, kw_only=True)
class EvalSettings(ExamSettings):
    """``medtrain eval``; the exam during training has the defaults where there is no ``eval.exam_*`` setting."""

    mode: Literal["answer", "explain", "both"] = "both"
    method: Literal["generate", "choice_logp"] = "generate"  # choice_logp: the most likely answer, nothing generated
    max_answer_tokens: int = 32  # of an output without explanation
    images: bool = False  # also questions that need an image
    limit: int | None = None  # the first questions only


@dataclass(frozen=True, kw_only=True)
class PairsConfig(ExamSettings):
    """``medtrain pairs``: questions with answers -> sampled and graded reasoning -> preference pairs."""

    model: str  # a Hugging Face folder
    questions: str  # exam questions, JSON Lines or CSV; `explanation` where the strategy needs it
    out: str  # the pairs, JSON Lines
    strategy: Literal["explanation", "sampled", "both"] = "both"  # ground truth | right path over the wrong path
    num_paths: int = 8  # sampled per question
    max_per_question: int = 8
    balance_length: bool = True  # of what the cap leaves to choose from, pairs whose chosen sides are not the longer ones
    min_explanation: int = 1  # letters and digits besides the answer that a chosen path has at least
    temperature: float = 1.0
    unlisted_is_wrong: bool = False  # with answers that are texts of choices: one that names no choice is wrong, not unread
    seed: int = 0


def load_pairs_config(path: str | Path, overrides: Sequence[str] = ()) -> PairsConfig:
    """As :func:`medtrain.trainer.config.settings.load_config`, for ``medtrain pairs``."""
    config = build(PairsConfig, read_tree(path, overrides), "", path, set())
    least = {"num_paths": 1, "max_per_question": 1, "max_new_tokens": 1, "batch_tokens": 1, "min_explanation": 0}
    for name, number in least.items():
        if getattr(config, name) < number:
            raise bad_input("out of range", file=path, field=name, found=getattr(config, name), expected=f"{number} or more")
    if config.temperature <= 0:
        raise bad_input("out of range", file=path, field="temperature", found=config.temperature, expected="more than 0")
    return config
