"""Helpers of the tests: made-up text, tiny sizes and runs, curves compared, runs killed, functions on several gloo ranks."""

import copy
import gc
import itertools
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from medtrain.trainer.config.settings import config_from_dict
from medtrain.trainer.run.folder import RunFolder
from medtrain.trainer.train.loop import TrainResult, train

WORDS = ["熱", "咳", "の", "患者", "に", "薬", "を", "与える", "与えない", "病", "は", "答え", ":", "a", "b", "c", "。", "理由"]


def every_two(*axes: Sequence) -> list[tuple]:
    """Few combinations of one value an axis, such that any two values of different axes stand together in one of them."""
    places = list(itertools.product(*(range(len(axis)) for axis in axes)))
    two = {place: set(itertools.combinations(enumerate(place), 2)) for place in places}
    missing, cases = set().union(*two.values()), []
    while missing:
        place = max(places, key=lambda place: len(two[place] & missing))
        missing -= two[place]
        cases.append(tuple(axis[i] for axis, i in zip(axes, place, strict=True)))
    return cases


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def made_up_text(seed: int, num_words: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (num_words,), generator=generator).tolist())


# A prompt style for exams in WORDS; the tokenizer of the tests splits at blanks.
EXAM_STYLE = {
    "question": "{text} {choices}",
    "choice": "{letter} {text}",
    "choice_joint": " ",
    "joint": " ",
    "answer_marker": "答え :",
    "explain_marker": "理由 :",
    "instruction_answer": "",
    "instruction_explain": "",
}

SIZES = {
    "model_type": "qwen2",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "initializer_range": 0.2,
}


def read_metrics(run: str | Path) -> list[dict]:
    """One row a step: what was trained and what was evaluated then."""
    steps: dict[int, dict] = {}
    for line in (Path(run) / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        steps[row["step"]] = steps.get(row["step"], {}) | row
    return list(steps.values())


# What depends on speed and on how a step is packed.
TIMING = (
    "seconds",
    "checkpoint_seconds",
    "exam/seconds",
    "tokens_per_second",
    "mfu",
    "max_memory_gib",
    "tokens_computed",
    "tokens_prompt",
    "tokens_padding",
    "tokens_saved",
    "tokens_completion",
    "useful_token_share",
)


def without_timing(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in TIMING} for row in rows]


def _rank_main(rank: int, size: int, store: str, function, args) -> None:
    gc.freeze()  # collecting a process group of the parent's, whose threads are not here, would crash this child
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        function(*args)
        dist.barrier()
        dist.destroy_process_group()
        status = 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    os._exit(status)  # a forked child must not run the parent's exit handlers


def run_on_ranks(size: int, tmp_path: Path, function, *args) -> None:
    """Call ``function(*args)`` in ``size`` forked processes that form a gloo group; an exception in one fails the test."""
    store = tmp_path / f"store-{len(list(tmp_path.glob('store-*')))}"
    context = mp.get_context("fork")
    processes = [context.Process(target=_rank_main, args=(r, size, str(store), function, args)) for r in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * size, codes


def run(stage, tree, out, **changes) -> TrainResult:
    """Train as ``tree`` says, into ``out``, with ``section__key=value`` changed."""
    tree = copy.deepcopy(tree)
    tree["run"]["out"] = str(out)
    for name, value in changes.items():
        section, key = name.split("__")
        tree.setdefault(section, {})[key] = value
    return train(config_from_dict(stage, tree), quiet=True)


def assert_same_curve(a, b, tolerance=1e-5) -> None:
    rows_a, rows_b = without_timing(read_metrics(a)), without_timing(read_metrics(b))
    assert len(rows_a) == len(rows_b)
    for x, y in zip(rows_a, rows_b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            if name.endswith("accuracy") and x["step"] <= 1:
                continue  # policy == reference: the sign of a margin that is 0 but for rounding
            if name.endswith("length_correlation"):  # rounding of the margins over how far they spread
                assert (x[name] is None) == (y[name] is None), (x["step"], name)
                assert (x[name] or 0) == pytest.approx(y[name] or 0, abs=1e-2), (x["step"], name)
                continue
            assert x[name] == pytest.approx(y[name], rel=tolerance, abs=tolerance), (x["step"], name)


def _in_fork(function, args) -> None:
    gc.freeze()  # as in _rank_main
    function(*args)


def killed_in_a_child(function, *args) -> None:
    """Call ``function(*args)`` in a forked child, which must die of SIGKILL."""
    child = mp.get_context("fork").Process(target=_in_fork, args=(function, args))
    child.start()
    child.join(timeout=240)
    assert child.exitcode == -signal.SIGKILL


def _signal_after(step, number) -> None:
    """Let this process, a forked child, send itself a signal when the row of ``step`` is written."""
    write = RunFolder.append_metrics

    def signalling(self, row):
        write(self, row)
        if row["step"] == step:
            os.kill(os.getpid(), number)

    RunFolder.append_metrics = signalling


def _killed(stage, tree, out, at_step) -> None:
    """Run until the row of ``at_step`` is written, then die as SIGKILL dies: nothing is flushed, nothing is closed."""
    _signal_after(at_step, signal.SIGKILL)
    run(stage, tree, out)


def stopped_after(step, stage, tree, out) -> None:
    """Run until the row of ``step`` is written, and ask it to stop as a scheduler does."""
    _signal_after(step, signal.SIGTERM)
    assert run(stage, tree, out).interrupted


def kill_in_a_child(stage, tree, out, at_step) -> None:
    """Run in a child that dies of SIGKILL once the row of ``at_step`` is written."""
    killed_in_a_child(_killed, stage, tree, out, at_step)


def documents():
    """Four token sequences below id 20, of ragged lengths."""
    generator = np.random.default_rng(0)
    return [generator.integers(0, 20, size=n).astype(np.uint32) for n in (9, 2, 31, 17)]


def hf_logps(model, documents):
    """Log-probabilities of every token after a document's first, by the model's own logits in float64."""
    pieces = []
    for document in documents:
        ids = torch.from_numpy(document.astype(np.int64))
        logits = model(ids[:-1].unsqueeze(0)).logits[0].double()
        pieces.append(logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0])
    return torch.cat(pieces).float()
