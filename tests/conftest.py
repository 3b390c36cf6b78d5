"""Shared fixtures: a made-up tokenizer, corpus and pairs, and tiny settings of both stages."""

import os
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports Triton: without a GPU its kernels run in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

# isort: split
from helpers import SIZES, WORDS, made_up_text, write_jsonl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# One server forks all clean children of a session (medtrain.trainer.processes); started, it has imported all they need.
forkserver.set_forkserver_preload(
    ["medtrain.benchmarks.plan_check", "medtrain.benchmarks.evidence.seeds", "medtrain.trainer.data.tokens", "torch._dynamo"]
)
forkserver.set_forkserver_preload = lambda modules: None

# One thread: two test ranks share two cores, and a forked child must not inherit a running thread pool.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    # The tests on several ranks fork, and a process that has imported TRL or Liger runs threads: those tests go last.
    items.sort(key=lambda item: "benchmarks" in item.path.parts or item.path.stem in ("test_peers", "test_liger", "test_docs"))


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    """A word-level tokenizer with eos ``</s>`` (id 1); id 0 is an ordinary word."""
    vocab = {word: i for i, word in enumerate([WORDS[0], "</s>", "<unk>", *WORDS[1:]])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """40 documents of 1 to 60 words."""
    rows = [{"text": made_up_text(i, 1 + (i * 17) % 60)} for i in range(40)]
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", rows)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """24 pairs of ragged lengths."""
    rows = [
        {
            "prompt": made_up_text(100 + i, 3 + i % 5),
            "chosen": made_up_text(200 + i, 2 + i % 7) + " 答え : a",
            "rejected": made_up_text(300 + i, 2 + i % 4) + " 答え : b",
        }
        for i in range(24)
    ]
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


@pytest.fixture
def cpt_tree(tokenizer_dir, corpus, tmp_path) -> dict:
    return {
        "model": {"init": dict(SIZES), "tokenizer": str(tokenizer_dir)},
        "data": {"sources": [{"path": str(corpus)}], "seq_len": 32, "cache": str(tmp_path / "cache")},
        "optim": {"lr": 1e-2, "steps": 6, "batch_tokens": 200, "micro_batch_tokens": 128, "warmup_steps": 2},
        "run": {"out": str(tmp_path / "cpt")},
    }


@pytest.fixture
def rpo_tree(tokenizer_dir, pairs, tmp_path) -> dict:
    return {
        "model": {"init": dict(SIZES), "tokenizer": str(tokenizer_dir)},
        "data": {"pairs": [{"path": str(pairs)}], "max_length": 64},
        "optim": {"lr": 1e-2, "steps": 6, "batch_pairs": 8, "micro_batch_tokens": 128, "weight_decay": 0.0},
        "rpo": {"beta": 0.5, "alpha": 1.0},
        "run": {"out": str(tmp_path / "rpo")},
    }
