"""What lower precision does to a curve: a tiny model's losses in float32 beside FP8, 8-bit moments and bfloat16 weights.

    python -m medtrain.benchmarks.precision [--steps 30] [--out FILE.json]

Runs ``medtrain cpt`` on made-up text with random weights, each arm from the same start over the same samples; FP8 is torchao's
emulation where there is no device for it. It shows that the arithmetic is wired as it should be; speed and memory it does not
show, nor what FP8 does to a large model.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from medtrain.trainer.config.settings import config_from_dict
from medtrain.trainer.run.folder import commit, device_name, versions
from medtrain.trainer.train.loop import train

SIZES = {
    "model_type": "qwen2",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "initializer_range": 0.05,
}
NUM_WORDS, NUM_DOCS = 64, 64
SEED = 0

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
    words = [f"w{i}" for i in range(NUM_WORDS)]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["</s>", "<unk>", *words])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder / "tokenizer")
    draw = random.Random(SEED)
    followers = {word: draw.sample(words, 4) for word in words}
    with open(folder / "text.jsonl", "w", encoding="utf-8") as file:
        for _ in range(NUM_DOCS):
            document = [draw.choice(words)]
            while len(document) < draw.randint(20, 120):
                document.append(draw.choice(followers[document[-1]]))
            file.write(json.dumps({"text": " ".join(document)}) + "\n")


def run_arm(folder: Path, name: str, steps: int) -> dict:
    """One row of the result: the arm's settings, losses, and their differences to those of the arm ``float32``."""
    precision, state = ARMS[name]
    tree = {
        "model": {"init": SIZES, "tokenizer": str(folder / "tokenizer")},
        "data": {"sources": [{"path": str(folder / "text.jsonl")}], "seq_len": 128, "cache": str(folder / "cache")},
        "optim": {"lr": 2e-3, "steps": steps, "batch_tokens": 1024, "micro_batch_tokens": 512, "warmup_steps": 5, "state": state},
        "precision": {"compute": "float32"} | precision,
        "run": {"out": str(folder / name.replace(" ", "-").replace(",", "")), "seed": SEED},
    }
    result = train(config_from_dict("cpt", tree), quiet=True)
    rows = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows]
    row = {"arm": name, "precision": tree["precision"], "optim_state": state, "loss_first": losses[0], "loss_last": losses[-1]}
    if "fp8" in precision:
        shadow = [abs(found["fp8/shadow_loss_difference"]) for found in rows]
        row |= {"shadow_loss_difference": {"mean_abs": statistics.mean(shadow), "max_abs": max(shadow)}}
        row |= {key: max(found[f"fp8/{key}"] for found in rows) for key in ("saturated_share", "underflow_share")}
    return row | {"losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        write_inputs(Path(name))
        rows = []
        for arm in ARMS:
            row = run_arm(Path(name), arm, args.steps)
            off = [a - b for a, b in zip(row["losses"], (rows or [row])[0]["losses"], strict=True)]
            row |= {"difference": {"mean_abs": statistics.mean(map(abs, off)), "max_abs": max(map(abs, off)), "last": off[-1]}}
            rows.append(row)
            numbers = {key: f"{value:+.5f}" for key, value in row["difference"].items()}
            print(f"{arm:45} last {row['loss_last']:.5f}  to float32: {numbers}", flush=True)
    about = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "versions": versions(),
        "device": device_name(torch.device("cpu")),
        "model": SIZES,
        "steps": args.steps,
        "unit": "nats a token",
    }
    if args.out is not None:
        args.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
