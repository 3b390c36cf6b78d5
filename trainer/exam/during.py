"""The exam during training: the policy, sharded as it trains, sits a small exam in both modes, and the gap is logged.

Outputs are made by the same code as those of ``medtrain eval`` (transformers' greedy ``generate``, with its KV cache and
padded attention), through a face of a causal LM around the policy: each forward is one forward of the policy's root, so
that FSDP gathers as in training, and the head gives logits for the last position alone. Questions are dealt out over the
ranks; every rank makes as many batches and, within a batch, as many forwards as the others.

The training is not touched: no gradient, no random number, and every parameter is its shard again afterwards.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from medtrain.trainer.config.settings import Config
from medtrain.trainer.distributed import World
from medtrain.trainer.errors import bad_input
from medtrain.trainer.exam.evaluate import answer_exam, summarize_rows
from medtrain.trainer.exam.generate import HFEngine
from medtrain.trainer.exam.prompts import MODES, PromptStyle, load_style, prompt_widths, read_demonstrations
from medtrain.trainer.exam.questions import Question, load_questions
from medtrain.trainer.exam.records import read_outputs
from medtrain.trainer.exam.scoring import INVALID, to_jsonl
from medtrain.trainer.files import file_sha256, write_bytes
from medtrain.trainer.model import attention
from medtrain.trainer.model.policy import PolicyModel
from medtrain.trainer.weights.small_files import generation_config

_MOST_ROWS = 64  # of a batch, so that its logits stay small: 64 x 152,064 float32 are 39 MB


@dataclass(frozen=True)
class Exam:
    """The exam of one run, read and checked. ``num_tokens``: a rank's budget for the KV cache, rows x (prompt + new)."""

    questions: tuple[Question, ...]
    demonstrations: tuple[Question, ...]
    style: PromptStyle
    max_new_tokens: dict[str, int]  # by mode
    widths: dict[str, int]  # by mode: tokens of the longest prompt and of its output
    num_tokens: int
    digest: str

    def describe(self) -> str:
        return f"exam: {len(self.questions):,} questions, each for the answer alone and with explanation"


def read_exam(config: Config, tokenizer, hf_config) -> Exam | None:
    """The exam that ``data.exam`` names, with every prompt made and measured; None without one.

    Raises:
        InputError: an unreadable exam or demonstrations, an unknown style or setting of one, no question left, a prompt that
            does not fit the model's positions.
    """
    settings = config.eval
    if config.data.exam is None:
        return None
    style = load_style(settings.exam_prompt, chat=settings.exam_chat, setting="eval.exam_prompt")
    everything = load_questions(config.data.exam, mapping=settings.exam_mapping)
    questions = [question for question in everything if question.text_only][: settings.exam_questions]
    if not questions:
        raise bad_input("no question without an image", file=config.data.exam, field="data.exam")
    shots = read_demonstrations(settings.exam_demonstrations, everything, style)
    limits = {"answer": settings.exam_max_answer_tokens, "explain": settings.exam_max_new_tokens}
    widths = prompt_widths(style, questions, shots, tokenizer, limits, hf_config.max_position_embeddings, config.data.exam)
    about = [file_sha256(config.data.exam), asdict(style), limits, [q.problem_id for q in questions]]
    for file in (settings.exam_demonstrations, settings.exam_mapping):
        about += [file_sha256(file)] if file is not None else []
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    budget = config.optim.micro_batch_tokens
    return Exam(tuple(questions), tuple(shots), style, limits, widths, budget, digest)


def sit_exam(policy: PolicyModel, tokenizer, exam: Exam, world: World, file: Path, source: str | Path | None) -> dict[str, Any]:
    """Let the policy sit the exam and write its outputs to ``file``; returns metrics. All ranks must call this.

    Before, the first question proves the way outputs are made (:meth:`HFEngine.cache_agrees`); where it fails, the rows and
    the metrics say ``invalid``.

    ``file`` has one row a question and mode; where it is there already, from before this run was stopped, it is read
    instead. ``source`` is the checkpoint the run began with, whose generation settings name the ends of outputs.
    """
    began = time.perf_counter()
    rows = world.from_main(lambda: read_outputs(file) if file.is_file() else None)
    if rows is None:
        try:
            with _as_causal_lm(policy, generation_config(tokenizer, source), world) as model:
                prompt = exam.style.prompt(exam.questions[0], "explain", tokenizer, exam.demonstrations)
                agrees = HFEngine(model, tokenizer).cache_agrees(prompt, exam.max_new_tokens["explain"])
                rows = {mode: _sit(model, tokenizer, exam, mode, world) for mode in MODES}
        finally:
            policy.reshard_all()
        if not agrees:
            rows = {mode: [row | {"invalid": INVALID} for row in rows[mode]] for mode in MODES}
        if world.is_main:
            file.parent.mkdir(exist_ok=True)
            write_bytes(file, to_jsonl(row for mode in MODES for row in rows[mode]).encode())
    metrics: dict[str, Any] = {"exam/questions": len(exam.questions)}
    if any("invalid" in row for row in rows["explain"]):
        metrics["exam/invalid"] = 1
    for mode in MODES:
        found = summarize_rows(exam.questions, rows[mode], mode, exam.style)
        metrics |= {f"exam/{mode}/{name}": found[name] for name in ("points_ratio", "parse_failures", "truncated")}
    metrics["exam/explanation_gap"] = metrics["exam/answer/points_ratio"] - metrics["exam/explain/points_ratio"]
    return metrics | {"exam/seconds": time.perf_counter() - began}


def _sit(model: _CausalLM, tokenizer, exam: Exam, mode: str, world: World) -> list[dict]:
    """One mode's rows in the exam's order, on every rank."""
    # Long prompts first, so that a batch holds little padding.
    lengths = [len(exam.style.render_question(question)) for question in exam.questions]
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    num_rows = max(1, min(_MOST_ROWS, exam.num_tokens // exam.widths[mode], -(-len(order) // world.size)))
    made: list[tuple[int, dict]] = []
    for start in range(0, len(order), num_rows * world.size):
        world.raise_if_stopping()
        mine = order[start : start + num_rows * world.size][world.rank :: world.size]
        # A rank without a question answers the shortest one, for the others wait for its forwards.
        asked = [exam.questions[i] for i in mine or order[-1:]]
        rows = answer_exam(
            model,
            tokenizer,
            asked,
            mode,
            exam.style,
            demonstrations=exam.demonstrations,
            max_new_tokens=exam.max_new_tokens[mode],
            batch_tokens=num_rows * exam.widths[mode],
        )
        made += zip(mine, rows, strict=False)
    by_question = dict(one for of_rank in world.gather(made) for one in of_rank)
    kept = ("prompt", "output", "parsed", "correct", "read_from", "failure", "truncated")
    return [
        {
            "problem_id": question.problem_id,
            "mode": mode,
            "question": exam.style.render_question(question),
            "key": list(question.answer),
            "points": question.points,
        }
        | {name: by_question[i][name] for name in kept}
        for i, question in enumerate(exam.questions)
    ]


class _CausalLM(PreTrainedModel, GenerationMixin):
    """The face of a Hugging Face causal LM around a policy, for ``generate`` alone."""

    _supports_sdpa = True

    def __init__(self, policy: PolicyModel, ends: GenerationConfig, world: World):
        super().__init__(policy.config)
        self.generation_config = ends
        self.synced_gpus = world.size > 1
        self.hidden = (policy,)  # in a tuple, or it would be a submodule, which is put into evaluation mode and counted
        self.decoder_takes = inspect.signature(policy.model.forward).parameters.keys() - {"kwargs"}
        self.place = nn.Parameter(torch.empty(0, device=policy.device), requires_grad=False)  # says what device this is on

    def get_input_embeddings(self) -> nn.Module:
        return self.hidden[0].model.embed_tokens

    def generate(self, *args, **kwargs):
        # A rank whose outputs have ended goes on with forwards until all ranks' have.
        return super().generate(*args, synced_gpus=self.synced_gpus, **kwargs)

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        logits_to_keep: int = 1,
        return_dict: bool = True,
        **inputs: object,
    ) -> CausalLMOutputWithPast:
        """The logits of the last position, for the inputs ``generate`` prepares: all of them go on to the decoder, under
        whatever names this version of transformers has for them (the KV cache has had two), and what the decoder returns
        beside its hidden states comes back.

        Raises:
            TypeError: an input that the decoder does not name, and would ignore.
        """
        unknown = inputs.keys() - self.decoder_takes
        if unknown or logits_to_keep != 1 or not return_dict:
            passed = {"logits_to_keep": logits_to_keep, "return_dict": return_dict} | dict.fromkeys(unknown, "...")
            raise TypeError(f"generate passes {passed}: not what {type(self.hidden[0].model).__name__} takes")
        # The engine generates in inference mode; a weight that FSDP gathered in it could not be trained on afterwards.
        with torch.inference_mode(False), torch.no_grad():
            padded = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, **inputs}
            logits, rest = self.hidden[0](padded=padded)
            return CausalLMOutputWithPast(logits=logits, **rest)


@contextmanager
def _as_causal_lm(policy: PolicyModel, ends: dict, world: World) -> Iterator[_CausalLM]:
    """The policy as :class:`_CausalLM`, with transformers' own attention instead of the packed one while this lasts."""
    policy.model.set_attn_implementation("sdpa")
    try:
        yield _CausalLM(policy, GenerationConfig.from_dict(ends), world)
    finally:
        policy.model.set_attn_implementation(attention.NAME)
