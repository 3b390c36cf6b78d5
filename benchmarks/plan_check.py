"""The memory plan against measured peaks: real steps of small models on a CPU, every allocation counted by torch's profiler.

KINETO_LOG_LEVEL=99 python -m medtrain.benchmarks.plan_check    # exit status 1 where a plan is below what was measured
"""

import itertools
import json
import math
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import torch.distributed as dist
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PreTrainedTokenizerFast

from medtrain.trainer.config.settings import load_config
from medtrain.trainer.distributed import join_world
from medtrain.trainer.plan.memory import plan_memory, read_sizes
from medtrain.trainer.processes import clean_context
from medtrain.trainer.train.setup import build, prepare
from medtrain.trainer.train.step import optimizer_step

SLAB_BYTES = 24 * 2**20  # of the head op on a CPU
BASE = """model.init.model_type=qwen2 model.init.hidden_size=256 model.init.intermediate_size=768 model.init.num_hidden_layers=6
    model.init.num_attention_heads=4 model.init.num_key_value_heads=2 model.init.vocab_size=8192 model.proof=none
    model.init.tie_word_embeddings=false model.tokenizer={0} data.sources=[{{"path":"{0}/rows.jsonl"}}] data.seq_len=256
    data.pairs=[{{"path":"{0}/rows.jsonl"}}] data.max_length=256 data.cache={0} rpo.loss=simpo optim.steps=2 run.out={0}/run
    optim.micro_batch_tokens=1020 optim.batch_tokens={1} optim.batch_pairs={2} precision.compute=bfloat16"""
FULL, FEW = "model.activation_checkpointing=full", "model.init.vocab_size=512"
WIDE = f"{FULL} {FEW} model.init.hidden_size=512 model.init.intermediate_size=1408"
FP8 = f"{FULL} precision.fp8=tensorwise precision.fp8_emulate=true precision.fp8_check_every=0"
# (stage, ranks, settings); a step has two micro-batches of 1,020 tokens unless the settings say otherwise.
CASES = [
    ("cpt", 1, ""),
    ("cpt", 2, "precision.compute=float32 model.init.model_type=qwen3 model.init.head_dim=64"),
    ("cpt", 2, "model.init.tie_word_embeddings=true model.keep_bytes=0 model.activation_checkpointing=selective"),
    ("cpt", 4, f"{WIDE} parallel.reshard_after_forward=false"),
    ("cpt", 8, f"{FULL} optim.batch_tokens=8160"),
    ("cpt", 8, f"{WIDE} parallel.replicate=2 parallel.prefetch=2 precision.weights=bf16"),
    ("cpt", 8, f"{WIDE} precision.weights=bf16 optim.state=8bit"),
    ("cpt", 8, f"{FEW} {FP8}"),
    ("cpt", 8, f"{WIDE} {FP8} precision.fp8_all_gather=true"),
    ("cpt", 8, f"{FULL} lora.rank=8"),
    ("rpo", 8, FULL),
    ("rpo", 8, "lora.rank=8 lora.base=nf4"),
]


def compare(stage: str, ranks: int, settings: str) -> tuple[float, float]:
    """(measured, planned) bytes at the peak of two steps, in a process without a group: its collectives move nothing."""
    with tempfile.TemporaryDirectory() as folder:
        words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2, "<unk>": 3}, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
        # A document takes 255 tokens, and so does a pair.
        prompts = [" ".join("ab"[i >> k & 1] for k in range(15)) for i in range(64)]
        rows = [{"text": "a " * 255, "prompt": prompt, "chosen": "a " * 120, "rejected": "b " * 120} for prompt in prompts]
        Path(folder, "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = load_config(stage, None, [*BASE.format(folder, 2040 * ranks, 8 * ranks).split(), *settings.split()])
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
        # What is gathered is whatever lay in memory, and so are losses.
        with join_world(device_type="cpu", replicate=config.parallel.replicate) as world, mock.patch.object(math, "isfinite"):
            prepared = prepare(config, world)
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
                built = build(config, prepared, world, Path(folder), verify=False)
                step = (built.policy, prepared.data, built.loss, built.optimizer)
                for i in range(2):
                    optimizer_step(*step, i, world, lr=1e-5, grad_clip=1.0, guard=built.guard)
    events = [event for event in vars(run)["profiler"].kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    plan = plan_memory(config, read_sizes(config.model), ranks, SLAB_BYTES)
    return max(itertools.accumulate(changes)), plan.peak - plan.parts["allowance"]


def main() -> None:
    below = False
    with ProcessPoolExecutor(1, clean_context("medtrain.trainer.train.setup"), max_tasks_per_child=1) as pool:
        for case in CASES:
            measured, planned = pool.submit(compare, *case).result()
            below |= planned < measured
            print(f"{planned / measured - 1:+.1%}: {measured / 2**20:.1f} MiB measured, {planned / 2**20:.1f} planned, {case}")
    sys.exit(int(below))


if __name__ == "__main__":
    main()
