"""Shared prompts: computed once, they give the hidden states, gradients and loss curve of separate sequences."""

import copy

import numpy as np
import pytest
import torch
from helpers import SIZES, made_up_text, read_metrics, run_on_ranks, without_timing, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medtrain.kernels.preference import sum_by_sequence
from medtrain.trainer.config.settings import ModelConfig, config_from_dict
from medtrain.trainer.data.batch import pair_batch
from medtrain.trainer.data.packing import plan_pairs
from medtrain.trainer.data.pairs import PairSet
from medtrain.trainer.distributed import World
from medtrain.trainer.model.attention import packed_layout
from medtrain.trainer.model.hf_config import load_model_config, load_tokenizer
from medtrain.trainer.model.policy import build_model
from medtrain.trainer.train.loop import train
from medtrain.trainer.weights.load import init_weights

ALONE = World(0, 1, torch.device("cpu"), None)


def pair_set(rows) -> PairSet:
    """Pairs of (prompt, chosen, rejected) token lists."""
    segments = [np.array(segment, dtype=np.int32) for row in rows for segment in row]
    offsets = np.concatenate([[0], np.cumsum([len(segment) for segment in segments])])
    return PairSet("p", None, "", np.concatenate(segments), offsets, np.arange(len(rows)), "", {}, {})


def tokens(seed, length):
    return np.random.default_rng(seed).integers(0, 20, size=length).tolist()


def pairs_of_all_kinds() -> PairSet:
    """One prompt with six distinct completions (one chosen twice), prompts and completions of one token."""
    a, b, c = tokens(1, 9), tokens(2, 1), tokens(3, 17)
    return pair_set(
        [
            (a, tokens(10, 12), tokens(11, 5)),
            (b, tokens(12, 7), tokens(13, 8)),
            (a, tokens(14, 1), tokens(15, 30)),
            (c, tokens(16, 6), [3]),
            (a, tokens(10, 12), [4]),
            (a, tokens(17, 3), tokens(18, 2)),
            (b, [5], [6]),
        ]
    )


def norm_in_full(self, x):
    return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.fixture
def policy(tokenizer_dir, monkeypatch):
    """Grouped-query attention, float64 throughout (transformers' own norm would round to float32 on the way)."""
    monkeypatch.setattr("transformers.models.qwen2.modeling_qwen2.Qwen2RMSNorm.forward", norm_in_full)
    sizes = SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2}
    settings = ModelConfig(init=sizes, tokenizer=str(tokenizer_dir))
    config = load_model_config(settings, load_tokenizer(settings))
    policy = build_model(settings, config, ALONE, torch.float32, backend="sdpa")
    init_weights(policy, 0)
    return policy.double()


def hidden(policy, batch):
    layout = packed_layout(batch, "sdpa")
    ids, positions = batch.input_ids.unsqueeze(0), batch.position_ids.unsqueeze(0)
    return policy.model(input_ids=ids, position_ids=positions, use_cache=False, layout=layout).last_hidden_state[0]


def by_side(values, batch):
    """``values`` [N, ...] at the counted positions, as a list over chosen_0, rejected_0, chosen_1, ..."""
    bounds = batch.target_cu_seqlens.tolist()
    return [values[bounds[n] : bounds[n + 1]] for n in batch.sides.tolist()]


def test_hidden_states_and_every_gradient_equal_those_of_separate_sequences(policy):
    pairs = pairs_of_all_kinds()
    items = [(0, i) for i in range(pairs.num_pairs)]
    shared, separate = pair_batch([pairs], items), pair_batch([pairs], items, share=False)
    assert len(shared.input_ids) < 0.6 * len(separate.input_ids)
    states = [by_side(hidden(policy, batch)[batch.counted], batch) for batch in (shared, separate)]
    for ours, theirs in zip(*states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    found = []
    for batch in (shared, separate):
        sums = sum_by_sequence(policy(batch), batch.target_cu_seqlens)[batch.sides]
        weights = torch.linspace(-1, 2, len(sums), dtype=torch.float64)
        found.append(torch.autograd.grad((weights * sums).sum(), list(policy.parameters())))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("share", [True, False])
def test_a_changed_completion_leaves_every_other_hidden_state_bitwise_unchanged(policy, share):
    policy = policy.float()
    rows = [
        tuple(p.tolist() for p in (s.prompt(i), s.chosen(i), s.rejected(i))) for s in [pairs_of_all_kinds()] for i in range(7)
    ]
    items = [(0, i) for i in range(7)]
    before = pair_batch([pair_set(rows)], items, share=share)
    states = by_side(hidden(policy, before)[before.counted], before)
    for pair, side in ((0, 2), (2, 2), (1, 1), (3, 1), (5, 2)):
        changed = copy.deepcopy(rows)
        completion = changed[pair][side]
        completion[:] = [(token + 1) % 20 for token in completion]
        after = pair_batch([pair_set(changed)], items, share=share)
        for k, (a, b) in enumerate(zip(states, by_side(hidden(policy, after)[after.counted], after), strict=True)):
            if k == 2 * pair + side - 1:
                assert torch.equal(a[0], b[0]) and not torch.equal(a[1:], b[1:])  # the prompt's last token, then its own
            else:
                assert torch.equal(a, b), k


def test_a_changed_prompt_leaves_the_other_prompts_bitwise_unchanged(policy):
    policy = policy.float()
    rows = [([1, 2, 3], [4, 5], [6, 7, 8]), ([9, 2, 3], [4, 5], [6, 7, 8])]
    batches = [pair_batch([pair_set(r)], [(0, 0), (0, 1)]) for r in (rows, [([1, 3, 3], *rows[0][1:]), rows[1]])]
    before, after = (by_side(hidden(policy, batch)[batch.counted], batch) for batch in batches)
    assert not torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])
    assert torch.equal(before[2], after[2]) and torch.equal(before[3], after[3])


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12),
    st.integers(30, 60),
    st.integers(1, 4),
    st.booleans(),
)
def test_a_plan_holds_every_pair_once_within_the_budget_and_counts_what_batches_compute(shapes, capacity, size, share):
    pairs = pair_set([([p] * (3 + p), tokens(c, c), [21, *tokens(r, r)]) for p, c, r in shapes])
    items = [(0, i) for i in range(len(shapes))]
    plan, counts = plan_pairs([pairs], items, share=share, capacity=capacity, world_size=size)
    assert sorted(k for by_rank in plan for mine in by_rank for k in mine) == list(range(len(items)))
    assert all(len(by_rank) == size for by_rank in plan)
    batches = [pair_batch([pairs], [items[k] for k in mine], share=share) for by_rank in plan for mine in by_rank]
    assert max(len(batch.input_ids) for batch in batches) <= capacity
    assert sum(len(batch.input_ids) for batch in batches) == counts.computed
    assert counts.padding == sum(len(batch.pair_ids) == 0 for batch in batches)
    assert counts.needed <= counts.prompt + counts.completion <= counts.separate
    assert share or counts.prompt + counts.completion == counts.separate
    assert 0 < counts.metrics()["useful_token_share"] <= 1


def test_one_prompt_over_the_budget_or_over_a_ranks_part_is_split_and_costs_its_prompt_again():
    pairs = pair_set([([1] * 10, [2, k], [3, k]) for k in range(4, 12)])
    items = [(0, i) for i in range(8)]
    plan, counts = plan_pairs([pairs], items, share=True, capacity=1000, world_size=1)
    assert len(plan) == 1 and counts.prompt == 10 and counts.completion == 16
    plan, counts = plan_pairs([pairs], items, share=True, capacity=20, world_size=1)
    assert len(plan) == 2 and counts.prompt == 20
    plan, counts = plan_pairs([pairs], items, share=True, capacity=1000, world_size=2)
    assert [len(mine) for mine in plan[0]] != [8, 0] and counts.needed == 26


@pytest.fixture
def sampled_tree(rpo_tree, tmp_path):
    """24 pairs of 7 prompts, some with one chosen side in common: as sampled from a few questions."""
    rows = [
        {
            "prompt": made_up_text(100 + i % 7, 3 + i % 7),
            "chosen": made_up_text(200 + i % 14, 2 + i % 7) + " 答え : a",
            "rejected": made_up_text(300 + i, 2 + i % 4) + " 答え : b",
        }
        for i in range(24)
    ]
    path = write_jsonl(tmp_path / "sampled.jsonl", rows)
    rpo_tree["data"] |= {"pairs": [{"path": str(path)}], "heldout": [{"path": str(path), "name": "held"}]}
    rpo_tree["optim"] |= {"steps": 20, "batch_pairs": 12}
    return rpo_tree


def run(tree, out, budget=128, share=True):
    tree = copy.deepcopy(tree)
    tree["run"]["out"] = str(out)
    tree["optim"]["micro_batch_tokens"] = budget
    tree["data"]["share_prompts"] = share
    train(config_from_dict("rpo", tree), quiet=True)


def test_the_loss_curve_is_the_same_with_and_without_sharing_at_any_world_size_and_budget(sampled_tree, tmp_path):
    run(sampled_tree, tmp_path / "separate", share=False)
    for budget in (48, 128, 4096):
        run(sampled_tree, tmp_path / f"budget-{budget}", budget)
    for size in (2, 4):
        run_on_ranks(size, tmp_path, run, sampled_tree, tmp_path / f"ranks-{size}")
    rows = read_metrics(tmp_path / "separate")
    assert len(rows) == 21 and all(row["tokens_saved"] == 0 for row in rows[1:])
    for other in ("budget-48", "budget-128", "budget-4096", "ranks-2", "ranks-4"):
        others = read_metrics(tmp_path / other)
        assert all(row["tokens_saved"] > 0 for row in others[1:])
        for x, y in zip(without_timing(rows)[1:], without_timing(others)[1:], strict=True):
            assert x["loss"] == pytest.approx(y["loss"], rel=1e-5), (other, x["step"])
            assert x["tokens"] == y["tokens"] and x["pairs"] == y["pairs"]
    # One micro-batch a step: nothing is computed twice.
    assert all(row["useful_token_share"] == 1.0 for row in read_metrics(tmp_path / "budget-4096")[1:])
