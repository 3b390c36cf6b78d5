"""What lower precision does to a curve: a tiny model's losses in float32 beside FP8, 8-bit moments and bfloat16 weights.

    OMP_NUM_THREADS=1 python -m medtrain.benchmarks.precision

Runs ``medtrain cpt`` on made-up text with random weights, each arm from the same start over the same samples; FP8 is
torchao's emulation. It shows that the arithmetic is wired as it should be, not what FP8 does to a large model.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from medtrain.benchmarks.report import free_path, header
from medtrain.trainer.config.settings import config_from_dict
from medtrain.trainer.files import read_rows, write_json
from medtrain.trainer.train.loop import train

SIZES = {"model_type": "qwen2", "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"intermediate_size": 256, "initializer_range": 0.05}
STEPS, SEED = 30, 0

_TENSORWISE = {"fp8": "tensorwise", "fp8_emulate": True, "fp8_check_every": 1}
_ROWWISE = _TENSORWISE | {"fp8": "rowwise"}
_BF16 = {"compute": "bfloat16"}
_ROUNDED = _BF16 | {"weights": "bf16"}
ARMS: dict[str, tuple[dict, str]] = {  # precision, optim.state
    "float32": ({}, "fp32"),
    "fp8 tensorwise": (_TENSORWISE, "fp32"),
    "fp8 tensorwise, fp8 all-gather": (_TENSORWISE | {"fp8_all_gather": True}, "fp32"),
    "fp8 rowwise": (_ROWWISE, "fp32"),
    "8-bit moments": ({}, "8bit"),
    "bfloat16 compute": (_BF16, "fp32"),
    "bfloat16 weights": (_ROUNDED, "fp32"),
    "bfloat16 weights, 8-bit moments": (_ROUNDED, "8bit"),
    "fp8 rowwise, bfloat16 weights, 8-bit moments": (_ROWWISE | _ROUNDED, "8bit"),
}


def write_inputs(folder: Path) -> None:
    """A tokenizer of made-up words, and documents in which each word has few followers, so that there is something to learn."""
    words = [f"w{i}" for i in range(64)]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["</s>", "<unk>", *words])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder / "tokenizer")
    draw = random.Random(SEED)
    followers = {word: draw.sample(words, 4) for word in words}
    with open(folder / "text.jsonl", "w", encoding="utf-8") as file:
        for _ in range(64):
            document = [draw.choice(words)]
            while len(document) < draw.randint(20, 120):
                document.append(draw.choice(followers[document[-1]]))
            file.write(json.dumps({"text": " ".join(document)}) + "\n")


def run_arm(folder: Path, name: str) -> dict:
    """One row of the result: the arm's settings and losses, and how far FP8's guard found them off."""
    precision, state = ARMS[name]
    optim = {"lr": 2e-3, "steps": STEPS, "batch_tokens": 1024, "micro_batch_tokens": 512, "warmup_steps": 5, "state": state}
    tree = {
        "model": {"init": SIZES, "tokenizer": str(folder / "tokenizer")},
        "data": {"sources": [{"path": str(folder / "text.jsonl")}], "seq_len": 128, "cache": str(folder / "cache")},
        "optim": optim,
        "precision": {"compute": "float32"} | precision,
        "run": {"out": str(folder / name), "seed": SEED},
    }
    train(config_from_dict("cpt", tree), quiet=True)
    rows = read_rows(folder / name / "metrics.jsonl")
    row = {"arm": name, "precision": tree["precision"], "optim_state": state, "losses": [found["loss"] for found in rows]}
    if "fp8" in precision:
        row["shadow_loss_difference"] = statistics.mean(abs(found["fp8/shadow_loss_difference"]) for found in rows)
    return row


def main() -> None:
    cpu = torch.device("cpu")
    result = header("precision", cpu) | {"model": SIZES, "steps": STEPS, "unit": "nats per token", "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder))
        for arm in ARMS:
            result["rows"].append(row := run_arm(Path(folder), arm))
            off = [a - b for a, b in zip(row["losses"], result["rows"][0]["losses"], strict=True)]
            row["difference"] = {"mean_abs": statistics.mean(map(abs, off)), "max_abs": max(map(abs, off)), "last": off[-1]}
            print(f"{arm:45} last {row['losses'][-1]:.5f}  to float32: {row['difference']}", flush=True)
    write_json(free_path("benchmarks/results", "precision", cpu), result)


if __name__ == "__main__":
    main()
