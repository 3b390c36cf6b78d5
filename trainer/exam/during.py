"""The exam during training: the policy, sharded as it trains, answers a small exam in both modes, and the gap is logged.

Outputs are made by the code of ``medtrain eval``: each forward is one forward of the policy's root, so that FSDP gathers as in
training. Questions are dealt out over the ranks; every rank makes as many batches and, within a batch, as many forwards as the
others. The training is not touched: no gradient, no random number, and every parameter is its shard again afterwards.
"""

from __future__ import annotations

import inspect
import time
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn as nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from medtrain.trainer.config.exam import ExamSettings
from medtrain.trainer.config.settings import Config
from medtrain.trainer.distributed import World
from medtrain.trainer.exam.evaluate import exam_row
from medtrain.trainer.exam.generate import HFEngine, Output
from medtrain.trainer.exam.prepare import Exam, read_exam
from medtrain.trainer.exam.prompts import MODES
from medtrain.trainer.exam.scoring import INVALID, Row, read_outputs
from medtrain.trainer.files import write_jsonl
from medtrain.trainer.model import attention
from medtrain.trainer.model.policy import PolicyModel
from medtrain.trainer.weights.small_files import generation_config

_MOST_ROWS = 64  # of a batch, so that its logits stay small: 64 x 152,064 float32 are 39 MB
_SCORES = ("prompt", "output", "parsed", "correct", "read_from", "failure", "truncated")


def read_training_exam(config: Config, tokenizer, hf_config) -> Exam | None:
    """The exam that ``data.exam`` names, None without one; errors as :func:`read_exam`."""
    if config.data.exam is None:
        return None
    named = config.eval
    shared = {name: getattr(named, f"exam_{name}") for name in ("prompt", "chat", "demonstrations", "mapping")}
    settings = ExamSettings(**shared, batch_tokens=config.optim.micro_batch_tokens)
    limits = {"answer": named.exam_max_answer_tokens, "explain": named.exam_max_new_tokens}
    positions, limit = hf_config.max_position_embeddings, named.exam_questions
    return read_exam(config.data.exam, settings, tokenizer, limits, positions, limit=limit, prefix="eval.exam_")


def evaluate_policy(policy: PolicyModel, tokenizer, exam: Exam, world: World, file: Path, source: Path) -> dict[str, Any]:
    """Let the policy answer the exam and write its outputs to ``file``, one row per question and mode; returns metrics. All
    ranks must call this. A ``file`` of before the run was stopped is read instead. Rows and metrics have ``invalid`` where
    :meth:`HFEngine.cache_agrees` fails. ``source``: the starting checkpoint, whose generation settings name the ends."""
    began = time.perf_counter()
    rows: dict[str, list[Row]] | None = world.from_main(lambda: read_outputs(file) if file.is_file() else None)
    if rows is None:
        with CausalLM(policy, generation_config(tokenizer, source), world) as model:
            agrees = HFEngine(model, tokenizer).cache_agrees(exam.prompts["explain"][0], exam.new_tokens["explain"])
            marks = {} if agrees else {"invalid": INVALID}
            rows = {mode: _evaluate_mode(model, tokenizer, exam, mode, world, marks) for mode in MODES}
        if world.is_main:
            file.parent.mkdir(exist_ok=True)
            write_jsonl(file, [row for mode in MODES for row in rows[mode]])
    metrics: dict[str, Any] = {"exam/questions": len(exam.questions)}
    if any("invalid" in row for row in rows["explain"]):
        metrics["exam/invalid"] = 1
    for mode in MODES:
        points = sum(row["points"] for row in rows[mode] if row["correct"])
        max_points = sum(row["points"] for row in rows[mode])
        metrics[f"exam/{mode}/points_ratio"] = points / max_points if max_points else 0.0
        metrics[f"exam/{mode}/parse_failures"] = sum(row["failure"] is not None for row in rows[mode])
        metrics[f"exam/{mode}/truncated"] = sum(row["truncated"] for row in rows[mode])
    metrics["exam/explanation_gap"] = metrics["exam/answer/points_ratio"] - metrics["exam/explain/points_ratio"]
    return metrics | {"exam/seconds": time.perf_counter() - began}


def _evaluate_mode(model: CausalLM, tokenizer, exam: Exam, mode: str, world: World, marks: dict[str, str]) -> list[Row]:
    """One mode's rows in the exam's order, on every rank."""
    texts = [exam.style.render_question(question) for question in exam.questions]
    # Long prompts first, so that a batch holds little padding.
    order = sorted(range(len(texts)), key=lambda i: (-len(texts[i]), i))
    num_rows = max(1, min(_MOST_ROWS, exam.batch_tokens // exam.widths[mode], -(-len(order) // world.size)))
    engine = HFEngine(model, tokenizer, batch_tokens=num_rows * exam.widths[mode])
    made: dict[int, Output] = {}
    for start in range(0, len(order), num_rows * world.size):
        world.raise_if_stopping()
        mine = order[start : start + num_rows * world.size][world.rank :: world.size]
        # A rank without a question answers the shortest one, for the others wait for its forwards.
        prompts = [exam.prompts[mode][i] for i in mine or order[-1:]]
        for indices, outputs in engine.batches(prompts, exam.new_tokens[mode], exam.style.stop(mode)):
            made |= {mine[i]: output for i, output in zip(indices, outputs, strict=True) if mine}
    by_question = {i: output for of_rank in world.gather(made) for i, output in of_rank.items()}
    rows = []
    for i, question in enumerate(exam.questions):
        row = exam_row(exam.style, mode, question, exam.prompts[mode][i], by_question[i])
        of_question = {"question": texts[i], "key": list(question.answer), "points": question.points}
        scores = {name: row[name] for name in _SCORES}
        rows.append({"problem_id": question.problem_id, "mode": mode} | of_question | scores | marks)
    return rows


class CausalLM(PreTrainedModel, GenerationMixin):
    """The interface of a Hugging Face causal LM around a policy, for ``generate`` alone, which puts transformers' own attention
    in the place of the packed one while it is entered. ``ends``: a generation config as plain data."""

    _supports_sdpa = True

    def __init__(self, policy: PolicyModel, ends: dict[str, Any], world: World):
        super().__init__(policy.config)
        self.generation_config, self.synced_gpus = GenerationConfig.from_dict(ends), world.size > 1
        decoder: Any = policy.model
        self.hidden = (policy, decoder)  # in a tuple, or they would be submodules, put into evaluation mode and counted
        self.decoder_takes = inspect.signature(decoder.forward).parameters.keys() - {"kwargs"}
        self.place = nn.Parameter(torch.empty(0, device=policy.device), requires_grad=False)  # tells the device

    def __enter__(self) -> CausalLM:
        self.hidden[1].set_attn_implementation("sdpa")
        return self

    def __exit__(self, *error) -> None:
        self.hidden[1].set_attn_implementation(attention.NAME)
        self.hidden[0].reshard_all()

    def get_input_embeddings(self) -> nn.Module:
        return self.hidden[1].embed_tokens

    def generate(self, *args, **kwargs):
        # A rank whose outputs have ended goes on with forwards until all ranks' have.
        return cast(Any, super()).generate(*args, synced_gpus=self.synced_gpus, **kwargs)

    def forward(self, input_ids, attention_mask=None, position_ids=None, logits_to_keep=1, return_dict=True, **inputs):
        """The logits of the last position. All that ``generate`` prepares goes on to the decoder under its own names, and what
        the decoder returns besides hidden states comes back. Raises TypeError for an input that the decoder would ignore."""
        unknown = inputs.keys() - self.decoder_takes
        if unknown or logits_to_keep != 1 or not return_dict:
            passed = {"logits_to_keep": logits_to_keep, "return_dict": return_dict} | dict.fromkeys(unknown, "...")
            raise TypeError(f"generate passes {passed}: not what {type(self.hidden[1]).__name__} takes")
        # The engine generates in inference mode; a weight that FSDP gathered in it could not be trained on afterwards.
        with torch.inference_mode(False), torch.no_grad():
            padded = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, **inputs}
            logits, rest = self.hidden[0](padded=padded)
            return CausalLMOutputWithPast(logits=logits, **rest)
