"""What computing a prompt once saves: tokens of an epoch and time of a step, with data.share_prompts on and off.

    python -m medtrain.benchmarks.shared_prompts --pairs FILE --tokenizer DIR [--out FILE]

A small Qwen2 with random weights. ``step`` is plan, forward, loss and backward of one optimizer step. On a CPU the head over
a large vocabulary is most of that and sees completions only, so ``backbone`` times the layers alone, forward and backward;
at 7B they are nearly all of a step. Runs with and without sharing take turns on the same pairs. Seconds are of processor
time: run it with OMP_NUM_THREADS=1, and other work on the machine is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from medtrain.trainer.config.settings import ModelConfig, config_from_dict
from medtrain.trainer.data.batch import MicroBatch
from medtrain.trainer.distributed import World
from medtrain.trainer.model.attention import packed_layout, select_backend
from medtrain.trainer.model.policy import PolicyModel, build_model, load_model_config, load_tokenizer
from medtrain.trainer.run.folder import commit, device_name, versions
from medtrain.trainer.train.rpo import PreferenceLoss, read_data
from medtrain.trainer.weights.load import init_weights

SIZES = {
    "model_type": "qwen2",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 384,
    "tie_word_embeddings": True,
}
MICRO_BATCH_TOKENS = 16_384
DEVICE = torch.device("cpu")


def loss_of(args: argparse.Namespace, share: bool, batch_pairs: int) -> PreferenceLoss:
    tree = {
        "model": {"init": SIZES, "tokenizer": args.tokenizer},
        "data": {"pairs": [{"path": args.pairs}], "max_length": 4096, "share_prompts": share},
        "optim": {"steps": 1, "batch_pairs": batch_pairs, "micro_batch_tokens": MICRO_BATCH_TOKENS},
        "run": {"out": "unused"},
    }
    config = config_from_dict("rpo", tree)
    world = World(0, 1, DEVICE, None)
    data = read_data(config, load_tokenizer(config.model), world)
    # The time does not depend on what the reference is.
    return PreferenceLoss(config.rpo, data, [torch.zeros(pairs.num_pairs, 2, dtype=torch.float64) for pairs in data.sources])


def epoch_tokens(args: argparse.Namespace, share: bool, batch_pairs: int, world_size: int) -> dict:
    """Tokens of one epoch, over all ranks."""
    data = loss_of(args, share, batch_pairs).data
    world = World(0, world_size, DEVICE, None)
    steps = data.epoch_size // batch_pairs
    counts = [data.micro_batches(step, world)[1].inputs for step in range(steps)]
    total = {name: sum(c.metrics()[name] for c in counts) for name in counts[0].metrics() if name.startswith("tokens")}
    needed = sum(c.needed for c in counts)
    row = {"share_prompts": share, "batch_pairs": batch_pairs, "world_size": world_size, "steps": steps}
    return row | total | {"useful_token_share": round(needed / total["tokens_computed"], 4)}


def step_seconds(policy: PolicyModel, loss: PreferenceLoss, step: int) -> float:
    started = time.process_time()
    batches, n = loss.data.micro_batches(step, World(0, 1, DEVICE, None))
    for batch in batches:
        loss(policy, batch, n)[0].backward()
    policy.zero_grad(set_to_none=True)
    return time.process_time() - started


def backbone_seconds(policy: PolicyModel, loss: PreferenceLoss, step: int) -> float:
    started = time.process_time()
    for batch in loss.data.micro_batches(step, World(0, 1, DEVICE, None))[0]:
        hidden(policy, batch).sum().backward()
    policy.zero_grad(set_to_none=True)
    return time.process_time() - started


def hidden(policy: PolicyModel, batch: MicroBatch) -> torch.Tensor:
    output = policy.model(
        input_ids=batch.input_ids.unsqueeze(0),
        position_ids=batch.position_ids.unsqueeze(0),
        use_cache=False,
        layout=packed_layout(batch, policy.backend),
    )
    return output.last_hidden_state.squeeze(0).index_select(0, batch.counted)


def compare(args: argparse.Namespace, policy: PolicyModel, seconds_of, batch_pairs: int, repeats: int) -> dict:
    losses = {share: loss_of(args, share, batch_pairs) for share in (True, False)}
    seconds_of(policy, losses[True], 0)  # warm
    seconds = {True: [], False: []}
    for repeat in range(repeats):
        for share in (True, False) if repeat % 2 else (False, True):
            seconds[share].append(seconds_of(policy, losses[share], repeat))
    ratios = [separate / shared for separate, shared in zip(seconds[False], seconds[True], strict=True)]
    inputs = {
        share: [loss.data.micro_batches(r, World(0, 1, DEVICE, None))[1].inputs.computed for r in range(repeats)]
        for share, loss in losses.items()
    }
    return {
        "batch_pairs": batch_pairs,
        "cpu_seconds_shared": [round(s, 3) for s in seconds[True]],
        "cpu_seconds_separate": [round(s, 3) for s in seconds[False]],
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "tokens_ratio": round(sum(inputs[False]) / sum(inputs[True]), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--repeats", type=int, default=5, help="of the backbone")
    parser.add_argument("--step-repeats", type=int, default=5)
    parser.add_argument("--out", default="shared-prompts.json")
    args = parser.parse_args()
    settings = ModelConfig(init=SIZES, tokenizer=args.tokenizer)
    hf_config = load_model_config(settings, load_tokenizer(settings))
    alone = World(0, 1, DEVICE, None)
    policy = build_model(settings, hf_config, alone, torch.float32, backend=select_backend(DEVICE, torch.float32))
    init_weights(policy, 0)
    rows = [epoch_tokens(args, share, b, w) for b, w in ((64, 1), (16, 1)) for share in (True, False)]
    (ledger,) = loss_of(args, True, 64).data.ledger["sources"].values()
    result = {
        "what": " ".join(__doc__.split("\n\n")[2].split()),
        "device": device_name(DEVICE),
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "versions": versions(),
        "command": "python -m medtrain.benchmarks.shared_prompts " + " ".join(sys.argv[1:]),
        "model": SIZES | {"vocab_size": hf_config.vocab_size},
        "micro_batch_tokens": MICRO_BATCH_TOKENS,
        "ledger": ledger | {"path": Path(args.pairs).name},
        "tokens": rows,
        "backbone": compare(args, policy, backbone_seconds, 64, args.repeats),
        "step": compare(args, policy, step_seconds, 16, args.step_repeats),
    }
    Path(args.out).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps({k: result[k] for k in ("tokens", "backbone", "step")}, indent=1))


if __name__ == "__main__":
    main()
