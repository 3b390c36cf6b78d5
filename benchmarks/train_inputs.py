"""What all trainers of the training benchmark are given: a random checkpoint, pairs or texts of random tokens, their order.

Nothing is downloaded. Everything is a function of the seed and is written once, as the files any run would read: a Hugging
Face folder with a word-level tokenizer (``w17`` is token 17), preference pairs or texts in JSON Lines, and where adapters are
trained a PEFT folder, so that both sides begin with the same ones.
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
from medtrain.trainer.data.batch import cpt_batch, pair_batch
from medtrain.trainer.data.pairs import PairSet
from medtrain.trainer.data.tokenizer import read_tokenizer
from medtrain.trainer.data.windows import Windows
from medtrain.trainer.distributed import World
from medtrain.trainer.train.setup import STAGES

SEED = 0
SPECIAL = ("<eos>", "<pad>", "<unk>")
# As configs/rpo.yaml, but for the learning rate (each model's own, so that the loss moves within a few steps) and the norm
# of the NLL, which TRL pools over tokens.
OPTIM = {"schedule": "constant", "weight_decay": 0.0}
RPO = {"beta": 0.1, "alpha": 1.0, "loss": "sigmoid", "nll_norm": "token"}


@dataclass(frozen=True)
class Model:
    """One size: ``sizes`` as in a HF config.json, how it is trained, and the tokens (least, median, most) of prompts and
    completions (RPO) or documents (CPT). ``lora_rank`` 0 trains all weights. ``few_tokens`` and ``few_pairs`` bound a
    micro-batch of our and of TRL's rows without activation checkpointing; CPT has one of about ``tokens_a_step`` a step."""

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
        """What is trained, for a person."""
        return f"LoRA rank {self.lora_rank}" if self.lora_rank else "all weights"


_QWEN = {"model_type": "qwen2", "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "rope_theta": 1e6}

# The shapes of Qwen2.5. 7B with float32 masters and AdamW takes 122 GB, so it is trained by LoRA, on both sides.
MODELS = {
    "tiny": Model(
        "tiny",
        _QWEN
        | {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 176,
            "vocab_size": 512,
            "tie_word_embeddings": True,
        },
        lr=2e-3,
        precision="float32",
        pairs_a_step=8,
        prompt=(10, 25, 60),
        completion=(15, 42, 90),
    ),
    "1.5b": Model(
        "1.5b",
        _QWEN
        | {
            "hidden_size": 1536,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "intermediate_size": 8960,
            "vocab_size": 151_936,
            "tie_word_embeddings": True,
        },
        lr=1e-5,
    ),
    "7b": Model(
        "7b",
        _QWEN
        | {
            "hidden_size": 3584,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "intermediate_size": 18_944,
            "vocab_size": 152_064,
            "tie_word_embeddings": False,
        },
        lr=1e-4,
        lora_rank=16,
        few_tokens=4096,
        few_pairs=1,
    ),
}

# All weights. Of 7B 8 layers, whose float32 masters, gradients and moments take 47 GB.
CPT_MODELS = {
    "tiny": Model(
        "tiny", MODELS["tiny"].sizes, lr=2e-3, precision="float32", stage="cpt", document=(10, 40, 120), tokens_a_step=512
    ),
    "0.5b": Model(
        "0.5b",
        _QWEN
        | {
            "hidden_size": 896,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "intermediate_size": 4864,
            "vocab_size": 151_936,
            "tie_word_embeddings": True,
        },
        lr=1e-5,
        stage="cpt",
        tokens_a_step=16_384,
    ),
    "1.5b": Model("1.5b", MODELS["1.5b"].sizes, lr=1e-5, stage="cpt"),
    "7b": Model("7b, 8 of 28 layers", MODELS["7b"].sizes | {"num_hidden_layers": 8}, lr=1e-5, stage="cpt"),
}


@dataclass(frozen=True)
class Inputs:
    """Folders and files of one model's benchmark, and which lines of ``rows`` (pairs, or texts) each step takes."""

    checkpoint: Path
    rows: Path
    adapter: Path | None
    order: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class Work:
    """What a step has to do, whoever does it. ``tokens``: the fewest positions anyone could compute: each distinct prompt
    once, and of every completion or document all but its last token, from which nothing is predicted. ``head_tokens``: those
    that are predicted. ``attended``: of a micro-batch of all of them, as the training loop counts attention's work."""

    pairs: int
    tokens: int
    head_tokens: int
    attended: int


def config(
    model: Model,
    inputs: Inputs,
    steps: int,
    *,
    micro_batch_tokens: int,
    checkpointing: bool,
    share_prompts: bool = True,
    fp8: str | None = None,
    compiled: bool = False,
) -> Config:
    """Our settings. ``run.out`` is where a run would go: the benchmark keeps its reference there. ``fp8``: a recipe."""
    rows, optim = [{"path": str(inputs.rows)}], OPTIM | {"lr": model.lr, "steps": steps}
    precision: dict[str, Any] = {"compute": model.precision}
    if fp8 is not None:
        precision |= {"fp8": fp8, "fp8_check_every": 0}
    tree = {
        "model": {
            "path": str(inputs.checkpoint),
            "activation_checkpointing": "full" if checkpointing else "none",
            "compile": compiled,
        },
        "optim": optim | {"micro_batch_tokens": micro_batch_tokens},
        "lora": {"path": str(inputs.adapter)} if inputs.adapter else {},
        "precision": precision,
        "run": {"out": str(inputs.checkpoint.parent / "run"), "seed": SEED},
    }
    if model.stage == "cpt":
        tree["data"] = {"sources": rows, "seq_len": model.document[2], "cache": str(inputs.checkpoint.parent / "cache")}
        tree["optim"] |= {"batch_tokens": model.tokens_a_step}
    else:
        longest = model.prompt[2] + model.completion[2] + 1
        tree["data"] = {"pairs": rows, "max_length": longest, "share_prompts": share_prompts}
        tree["optim"] |= {"batch_pairs": model.pairs_a_step}
        tree["rpo"] = RPO
    return config_from_dict(model.stage, tree)


def most_tokens(model: Model) -> int:
    """A micro-batch budget that any step fits at once."""
    if model.stage == "cpt":  # its items are those that begin within tokens_a_step
        return model.tokens_a_step + model.document[2]
    return 2 * model.pairs_a_step * (model.prompt[2] + model.completion[2] + 1)


def make_inputs(model: Model, folder: Path, steps: int, device: torch.device) -> tuple[Inputs, list[Work]]:
    """Write everything under ``folder``; the random weights are drawn on ``device``. Work is of each of the ``steps``."""
    inputs = Inputs(folder / "model", folder / "rows.jsonl", folder / "adapter" if model.lora_rank else None)
    _write_tokenizer(model.sizes["vocab_size"], inputs.checkpoint)
    _write_model(model, inputs, device)
    if model.stage == "cpt":
        _write_texts(model, inputs.rows, steps * model.tokens_a_step)
    else:
        _write_pairs(model, inputs.rows, steps * model.pairs_a_step)
    settings = config(model, inputs, steps, micro_batch_tokens=most_tokens(model), checkpointing=True)
    world = World(0, 1, torch.device("cpu"), None)
    data = STAGES[model.stage].read_data(settings, read_tokenizer(inputs.checkpoint), world)
    order = [data.order.step(step).item_ids.tolist() for step in range(steps)]
    inputs = Inputs(inputs.checkpoint, inputs.rows, inputs.adapter, order)
    return inputs, [work(data.sources[0], items) for items in order]


def work(rows: PairSet | Windows, items: list[int]) -> Work:
    """The work of a step that takes the pairs, or the windows, ``items``."""
    if isinstance(rows, Windows):
        batch = cpt_batch([rows], [(0, i) for i in items])
        return Work(0, batch.num_counted, batch.num_counted, batch.attended)
    pairs = rows
    batch = pair_batch([pairs], [(0, i) for i in items], share=True)
    head_tokens = sum(len(pairs.chosen(i)) + len(pairs.rejected(i)) for i in items)
    return Work(len(items), batch.input_ids.numel(), head_tokens, batch.attended)


def token_ids(text: str) -> list[int]:
    """The tokens that a text of ``make_inputs`` stands for."""
    return [int(word[1:]) for word in text.split()]


def _write_tokenizer(vocab_size: int, folder: Path) -> None:
    vocab = {token: i for i, token in enumerate(SPECIAL)} | {f"w{i}": i for i in range(len(SPECIAL), vocab_size)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("eos_token", "pad_token", "unk_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)


def _write_model(model: Model, inputs: Inputs, device: torch.device) -> None:
    torch.manual_seed(SEED)
    hf_config = AutoConfig.for_model(**model.sizes, eos_token_id=0, bos_token_id=None, pad_token_id=1)
    with device:
        hf_model = AutoModelForCausalLM.from_config(hf_config, dtype=getattr(torch, model.precision))
    hf_model.save_pretrained(inputs.checkpoint)
    if inputs.adapter is not None:
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        settings = LoraConfig(
            r=model.lora_rank,
            lora_alpha=2 * model.lora_rank,
            target_modules=targets,
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )
        get_peft_model(hf_model, settings).save_pretrained(inputs.adapter)


def _write_pairs(model: Model, path: Path, num_pairs: int) -> None:
    """Half of the pairs have a prompt of their own, the others come in groups of 2 to 4 that share one."""
    rng = np.random.default_rng(SEED)

    def text(lengths: tuple[int, int, int]) -> str:
        return _text(rng, lengths, model.sizes["vocab_size"])

    rows: list[str] = []
    while len(rows) < num_pairs:
        prompt, together = text(model.prompt), 1 if rng.random() < 0.75 else int(rng.integers(2, 5))
        for _ in range(min(together, num_pairs - len(rows))):
            row = {"prompt": prompt, "chosen": text(model.completion), "rejected": text(model.completion)}
            rows.append(json.dumps(row))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def _write_texts(model: Model, path: Path, num_tokens: int) -> None:
    """Documents that together have more than ``num_tokens``; some words are far commoner than others, which can be learned
    within a few steps, so that losses tell updates apart."""
    rng, rows, least = np.random.default_rng(SEED), [], num_tokens + model.document[2]
    while least > 0:
        rows.append(text := _text(rng, model.document, model.sizes["vocab_size"], skew=4))
        least -= text.count(" ")
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")


def _text(rng: np.random.Generator, lengths: tuple[int, int, int], vocab_size: int, skew: int = 1) -> str:
    least, median, most = lengths
    length = int(np.clip(rng.lognormal(np.log(median), 0.45), least, most))
    if skew == 1:
        words = rng.integers(len(SPECIAL), vocab_size, length)
    else:
        words = len(SPECIAL) + ((vocab_size - len(SPECIAL)) * rng.random(length) ** skew).astype(np.int64)
    # A blank before each word, the first too: TRL tokenizes prompt and completion as one text.
    return "".join(f" w{i}" for i in words)
