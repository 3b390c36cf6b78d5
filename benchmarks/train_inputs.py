"""What all trainers of the training benchmark are given: a random checkpoint, pairs or texts of random tokens, their order.

Nothing is downloaded. Everything is a function of the seed and is written once, as files any run would read: a Hugging Face
folder with a word-level tokenizer (``w17`` is token 17), JSON Lines, and where adapters are trained a PEFT folder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from medtrain.trainer.config.settings import Config, config_from_dict
from medtrain.trainer.data.tokenizer import read_tokenizer
from medtrain.trainer.distributed import World
from medtrain.trainer.train.setup import STAGES

SEED = 0
SPECIAL = ("<eos>", "<pad>", "<unk>")
# As configs/rpo.yaml, but for the norm of the NLL, which TRL pools over tokens.
RPO = {"beta": 0.1, "alpha": 1.0, "loss": "sigmoid", "nll_norm": "token"}


@dataclass(frozen=True)
class Model:
    """One size: ``sizes`` as in a HF config.json, how it is trained, and the tokens (least, median, most) of prompts and
    completions (RPO) or documents (CPT). ``lr`` is large enough for the loss to move within a few steps. ``lora_rank`` 0
    trains all weights. ``few_tokens`` and ``few_pairs`` bound a micro-batch of our and of TRL's rows without activation
    checkpointing; CPT has one of about ``tokens_a_step`` a step."""

    name: str
    sizes: dict[str, Any]
    lr: float
    precision: str = "bfloat16"
    lora_rank: int = 0
    pairs_a_step: int = 16
    prompt: tuple[int, int, int] = (100, 250, 600)
    completion: tuple[int, int, int] = (150, 420, 900)
    few_tokens: int = 8192
    few_pairs: int = 2
    stage: str = "rpo"
    document: tuple[int, int, int] = (100, 900, 4095)
    tokens_a_step: int = 8192

    @property
    def how(self) -> str:
        """What is trained, in words."""
        return f"LoRA rank {self.lora_rank}" if self.lora_rank else "all weights"


def qwen(*sizes: int) -> dict[str, Any]:
    """The config.json of a Qwen2.5 of this hidden size, layers, heads, key-value heads, intermediate size and vocabulary."""
    heads = ("num_attention_heads", "num_key_value_heads")
    names = ("hidden_size", "num_hidden_layers", *heads, "intermediate_size", "vocab_size")
    tied = sizes[0] < 3584  # as in Qwen2.5
    return {"model_type": "qwen2", **dict(zip(names, sizes, strict=True)), "tie_word_embeddings": tied}


# The shapes of Qwen2.5.
_TINY = qwen(64, 2, 4, 2, 176, 512)
_05B = qwen(896, 24, 14, 2, 4864, 151_936)
_15B = qwen(1536, 28, 12, 2, 8960, 151_936)
_7B = qwen(3584, 28, 28, 4, 18_944, 152_064)
_TINY_TRAINING = {"lr": 2e-3, "precision": "float32"}

# 7B with float32 masters and AdamW takes 122 GB, so it is trained by LoRA, on both sides.
MODELS = {
    "tiny": Model("tiny", _TINY, **_TINY_TRAINING, pairs_a_step=8, prompt=(10, 25, 60), completion=(15, 42, 90)),
    "1.5b": Model("1.5b", _15B, lr=1e-5),
    "7b": Model("7b", _7B, lr=1e-4, lora_rank=16, few_tokens=4096, few_pairs=1),
}
# All weights. Of 7B 8 layers, whose float32 masters, gradients and moments take 47 GB.
CPT_MODELS = {
    "tiny": Model("tiny", _TINY, **_TINY_TRAINING, stage="cpt", document=(10, 40, 120), tokens_a_step=512),
    "0.5b": Model("0.5b", _05B, lr=1e-5, stage="cpt", tokens_a_step=16_384),
    "1.5b": Model("1.5b", _15B, lr=1e-5, stage="cpt"),
    "7b": Model("7b, 8 of 28 layers", _7B | {"num_hidden_layers": 8}, lr=1e-5, stage="cpt"),
}


@dataclass(frozen=True)
class Arm:
    """One row to be: ``variant`` tells rows of one impl apart ("" is its default). ``few``: small micro-batches (of
    ``Model.few_tokens`` or ``few_pairs``) instead of one per step; ``share_prompts``, ``fp8`` (a recipe), ``compiled``: ours;
    ``liger``: TRL or Trainer with Liger's layers; ``apart`` false: Trainer's documents attend to those before them in the row."""

    impl: str
    variant: str = ""
    note: str = ""
    checkpointing: bool = True
    few: bool = False
    share_prompts: bool = True
    liger: bool = False
    fp8: str | None = None
    compiled: bool = False
    apart: bool = True


@dataclass
class Measured:
    """By step: ``ms`` wall clock, ``losses`` and ``margins`` before the update, ``computed`` tokens the model was given,
    padding included, ``micro_batches``. ``peak_bytes``: CUDA's allocator, over all steps; ``extra_bytes``: on the CPU, most
    beyond what was there before, over one more step. ``clocks``: of a GPU, right after the last step."""

    ms: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)
    micro_batches: list[int] = field(default_factory=list)
    peak_bytes: int | None = None
    extra_bytes: int | None = None
    paths: dict[str, str] = field(default_factory=dict)
    clocks: dict[str, str] | None = None


@dataclass(frozen=True)
class Work:
    """What a step has to do, whoever does it. ``tokens``: the fewest positions anyone could compute: each distinct prompt
    once, and of every completion or document all but its last token, from which nothing is predicted. ``head_tokens``: those
    that are predicted. ``attended``: of a micro-batch of all of them, as the training loop counts attention's work."""

    tokens: int
    head_tokens: int
    attended: int


@dataclass
class Inputs:
    """Folders and files of one model's benchmark; by step which lines of ``rows`` (pairs, or texts) it takes and its work;
    the tokens of each prompt and completion, or of each document."""

    checkpoint: Path
    rows: Path
    adapter: Path | None
    order: list[list[int]] = field(default_factory=list)
    works: list[Work] = field(default_factory=list)
    lengths: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One row to be measured over so many ``steps``; on the CPU one more is run, for memory."""

    arm: Arm
    model: Model
    inputs: Inputs
    steps: int
    device: torch.device

    @property
    def total_steps(self) -> int:
        return self.steps + (self.device.type == "cpu")


def config(model: Model, inputs: Inputs, steps: int, arm: Arm | None = None) -> Config:
    """Our settings for a row. ``run.out`` is where a run would go: the benchmark keeps its reference there."""
    arm = arm or Arm("medtrain")
    rows, folder = [{"path": str(inputs.rows)}], inputs.checkpoint.parent
    tree: dict[str, Any] = {
        "model": {
            "path": str(inputs.checkpoint),
            "activation_checkpointing": "full" if arm.checkpointing else "none",
            "compile": arm.compiled,
        },
        "optim": {"schedule": "constant", "weight_decay": 0.0, "lr": model.lr, "steps": steps},
        "lora": {"path": str(inputs.adapter)} if inputs.adapter else {},
        "precision": {"compute": model.precision} | ({"fp8": arm.fp8, "fp8_check_every": 0} if arm.fp8 else {}),
        "run": {"out": str(folder / "run"), "seed": SEED},
    }
    # Unless there are to be few tokens in a micro-batch, it fits any step at once.
    if model.stage == "cpt":
        tree["data"] = {"sources": rows, "seq_len": model.document[2], "cache": str(folder / "cache")}
        tree["optim"] |= {"batch_tokens": model.tokens_a_step}
        whole_step = model.tokens_a_step + model.document[2]  # its items are those that begin within tokens_a_step
    else:
        longest = model.prompt[2] + model.completion[2] + 1
        tree["data"] = {"pairs": rows, "max_length": longest, "share_prompts": arm.share_prompts}
        tree["optim"] |= {"batch_pairs": model.pairs_a_step}
        tree["rpo"] = RPO
        whole_step = 2 * model.pairs_a_step * longest
    tree["optim"]["micro_batch_tokens"] = model.few_tokens if arm.few else whole_step
    return config_from_dict(model.stage, tree)


def make_inputs(model: Model, folder: Path, steps: int, device: torch.device) -> Inputs:
    """Write everything under ``folder``; the random weights are drawn on ``device``."""
    inputs = Inputs(folder / "model", folder / "rows.jsonl", folder / "adapter" if model.lora_rank else None)
    write_tokenizer(model.sizes["vocab_size"], inputs.checkpoint)
    _write_model(model, inputs, device)
    rows = _texts(model, steps * model.tokens_a_step) if model.stage == "cpt" else _pairs(model, steps * model.pairs_a_step)
    inputs.rows.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    world, tokenizer = World(0, 1, torch.device("cpu"), None), read_tokenizer(inputs.checkpoint)
    data = STAGES[model.stage].read_data(config(model, inputs, steps), tokenizer, world)
    for step in range(steps):
        inputs.order.append(data.order.step(step).item_ids.tolist())
        (batch,), _ = data.micro_batches(step, world)
        inputs.works.append(Work(batch.input_ids.numel(), batch.targets.numel(), batch.attended))
    for key in rows[0]:  # beyond its words a completion or document has its end token
        name = {"text": "document", "chosen": "completion", "rejected": "completion"}.get(key, key)
        inputs.lengths.setdefault(name, []).extend(len(token_ids(row[key])) + (name != "prompt") for row in rows)
    return inputs


def token_ids(text: str) -> list[int]:
    """The tokens that a text of ``make_inputs`` stands for."""
    return [int(word[1:]) for word in text.split()]


def write_tokenizer(vocab_size: int, folder: Path) -> None:
    vocab = {token: i for i, token in enumerate(SPECIAL)} | {f"w{i}": i for i in range(len(SPECIAL), vocab_size)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    eos, pad, unk = SPECIAL
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token=pad, unk_token=unk).save_pretrained(folder)


def _write_model(model: Model, inputs: Inputs, device: torch.device) -> None:
    torch.manual_seed(SEED)
    hf_config = AutoConfig.for_model(**model.sizes, rope_theta=1e6, eos_token_id=0, bos_token_id=None, pad_token_id=1)
    with device:
        hf_model = AutoModelForCausalLM.from_config(hf_config, dtype=getattr(torch, model.precision))
    hf_model.save_pretrained(inputs.checkpoint)
    if inputs.adapter is not None:
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        rank = model.lora_rank
        settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM")
        get_peft_model(hf_model, settings).save_pretrained(str(inputs.adapter))


def _pairs(model: Model, num_pairs: int) -> list[dict[str, str]]:
    """Half of the pairs have a prompt of their own, the others come in groups of 2 to 4 that share one."""
    rng, vocab_size, rows = np.random.default_rng(SEED), model.sizes["vocab_size"], []
    while len(rows) < num_pairs:
        prompt, together = _text(rng, model.prompt, vocab_size), 1 if rng.random() < 0.75 else int(rng.integers(2, 5))
        for _ in range(min(together, num_pairs - len(rows))):
            chosen, rejected = (_text(rng, model.completion, vocab_size) for _ in range(2))
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def _texts(model: Model, num_tokens: int) -> list[dict[str, str]]:
    """Documents that together have more than ``num_tokens``; some words are far commoner than others, which can be learned
    within a few steps, so that losses tell updates apart."""
    rng, rows, least = np.random.default_rng(SEED), [], num_tokens + model.document[2]
    while least > 0:
        text = _text(rng, model.document, model.sizes["vocab_size"], skew=4)
        rows.append({"text": text})
        least -= text.count(" ")
    return rows


def _text(rng: np.random.Generator, lengths: tuple[int, int, int], vocab_size: int, skew: int = 1) -> str:
    least, median, most = lengths
    length = int(np.clip(rng.lognormal(np.log(median), 0.45), least, most))
    if skew == 1:
        words = rng.integers(len(SPECIAL), vocab_size, length)
    else:
        words = len(SPECIAL) + ((vocab_size - len(SPECIAL)) * rng.random(length) ** skew).astype(np.int64)
    # A blank before each word, the first too: TRL tokenizes prompt and completion as one text.
    return "".join(f" w{i}" for i in words)
