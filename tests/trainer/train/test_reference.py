"""Reference log-probabilities: what a kill leaves is used, what is missing is computed, and every bit is the same."""

import copy
import json
import math
import os
import shutil
import signal

import numpy as np
import pytest
from helpers import killed_in_a_child, made_up_text, read_metrics, run_on_ranks, write_jsonl

from medtrain.trainer import files
from medtrain.trainer.config.settings import config_from_dict
from medtrain.trainer.errors import InputError
from medtrain.trainer.train import reference
from medtrain.trainer.train.loop import train

NUM_PAIRS, A_PART = 30, 4


@pytest.fixture
def tree(rpo_tree, tmp_path, monkeypatch):
    """30 pairs of 11 prompts in 8 parts, most of several micro-batches."""
    monkeypatch.setattr(reference, "PAIRS_A_PART", A_PART)
    rows = [
        {
            "prompt": made_up_text(i * 11 // 30, 6),
            "chosen": made_up_text(100 + i // 2, 2 + i % 7),
            "rejected": made_up_text(200 + i, 1 + i % 5),
        }
        for i in range(NUM_PAIRS)
    ]
    rpo_tree["data"]["pairs"] = [{"path": str(write_jsonl(tmp_path / "pairs.jsonl", rows))}]
    rpo_tree["optim"] |= {"steps": 1, "micro_batch_tokens": 28}
    return rpo_tree


def run(tree, out, **data):
    tree = copy.deepcopy(tree)
    tree["run"]["out"] = str(out)
    tree["data"] |= data
    train(config_from_dict("rpo", tree), quiet=True)


def parts(out):
    return {path.name: path.read_bytes() for path in sorted((out / "reference").glob("*/part-*.npy"))}


def values(out):
    return np.concatenate([np.load(path) for path in sorted((out / "reference").glob("*/part-*.npy"))])


def _die_writing(number, before_it_appears, tree, out):
    write, replace, written = reference.write_bytes, os.replace, []

    def counting(path, content):
        written.append(path)
        if before_it_appears and len(written) == number:
            os.replace = dying
        write(path, content)
        if len(written) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    assert files.os.replace is replace
    reference.write_bytes = counting
    run(tree, out)


def record_calls(monkeypatch, tmp_path):
    """Note the pairs of every micro-batch that any process computes; returns what reads them back."""
    compute, log = reference._micro_batch_logps, tmp_path / "calls.jsonl"

    def recording(policy, pairs, indices, share):
        with open(log, "a") as file:
            file.write(f"{indices}\n")
        return compute(policy, pairs, indices, share)

    monkeypatch.setattr(reference, "_micro_batch_logps", recording)
    return lambda: [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize(("number", "before_it_appears"), [(3, False), (3, True), (1, True), (8, False)])
def test_a_killed_pass_goes_on_with_what_is_missing_and_every_bit_is_that_of_an_undisturbed_one(
    tree, tmp_path, monkeypatch, number, before_it_appears
):
    calls = record_calls(monkeypatch, tmp_path)
    run(tree, tmp_path / "whole")
    whole, undisturbed = parts(tmp_path / "whole"), calls()
    assert len(whole) == 8 and len(undisturbed) > 16
    killed_in_a_child(_die_writing, number, before_it_appears, tree, tmp_path / "killed")
    left = parts(tmp_path / "killed")
    assert len(left) == number - before_it_appears and left.items() <= whole.items()
    before = len(calls())
    run(tree, tmp_path / "killed")
    assert parts(tmp_path / "killed") == whole
    missing, again = list(range(len(left) * A_PART, NUM_PAIRS)), calls()[before:]
    checked = again[-2:]  # the first micro-batch and the last
    assert sorted(i for indices in again[:-2] for i in indices) == missing
    assert checked == undisturbed[-2:] == [undisturbed[0], undisturbed[-3]]
    assert all(indices in undisturbed for indices in again), "packed as in the undisturbed pass"


def test_parts_are_the_same_bits_from_the_same_micro_batches_at_any_world_size(tree, tmp_path, monkeypatch):
    calls = record_calls(monkeypatch, tmp_path)
    run(tree, tmp_path / "one")
    alone = calls()
    for size in (2, 3):
        before = len(calls())
        run_on_ranks(size, tmp_path, run, tree, tmp_path / str(size))
        assert parts(tmp_path / str(size)) == parts(tmp_path / "one")
        dealt = calls()[before:]
        assert sorted(set(map(tuple, dealt)) - {()}) == sorted(set(map(tuple, alone)))
        assert len(dealt) % size == 0, "every rank calls the model equally often"


def test_budget_and_sharing_change_the_log_probs_by_rounding_alone(tree, tmp_path):
    run(tree, tmp_path / "a")
    run(tree, tmp_path / "b", share_prompts=False)
    tree["optim"]["micro_batch_tokens"] = 4096
    run(tree, tmp_path / "c")
    for other in ("b", "c"):
        off = np.abs(values(tmp_path / "a") - values(tmp_path / other))
        assert off.max() < 2e-4, other


def test_a_run_shares_its_reference_only_with_the_same_weights_tokens_packing_and_precision(tree, tmp_path):
    def folders():
        return {path.name for path in tmp_path.glob("*/reference/*")}

    run(tree, tmp_path / "a")
    run(tree, tmp_path / "same")
    assert len(folders()) == 1
    run(tree, tmp_path / "packing", share_prompts=False)
    assert len(folders()) == 2
    run(tree, tmp_path / "tokens", max_length=9, overlong="cut_completion")
    assert len(folders()) == 3
    tree["run"]["seed"] = 1
    run(tree, tmp_path / "weights")
    assert len(folders()) == 4
    tree["precision"] = {"compute": "bfloat16"}
    run(tree, tmp_path / "precision")
    assert len(folders()) == 5


def test_in_bfloat16_the_reference_and_step_0_are_the_same_bits_on_any_number_of_ranks(tree, tmp_path):
    held = [{"path": tree["data"]["pairs"][0]["path"], "name": "held"}]
    tree["precision"] = {"compute": "bfloat16"}
    run(tree, tmp_path / "one", heldout=held)
    run_on_ranks(2, tmp_path, run, tree | {"data": tree["data"] | {"heldout": held}}, tmp_path / "two")
    for out in ("one", "two"):
        first = read_metrics(tmp_path / out)[0]
        assert first["step"] == 0 and first["heldout/dpo_loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert first["heldout/rewards/margin"] == 0 and first["heldout/rewards/accuracy"] == 0.5


def test_numbers_of_another_device_may_differ_by_what_packing_makes_and_no_more(tree, tmp_path):
    tree["precision"] = {"compute": "bfloat16"}
    run(tree, tmp_path / "run")
    (part, *_) = sorted((tmp_path / "run" / "reference").glob("*/part-000000.npy"))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    whole = np.load(part)
    np.save(part, whole + 1e-5)
    run(tree, tmp_path / "run")
    np.save(part, whole + 5.0)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(InputError, match=r"not those of the starting weights \(found pair \d+ of 'pairs' 5 nats off"):
        run(tree, tmp_path / "run")
