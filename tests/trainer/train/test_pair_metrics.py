"""What is watched of pairs: by source, the bias for length, and the alarm for chosen answers that grow less likely."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from helpers import made_up_text, read_metrics, run_on_ranks, write_jsonl

from medtrain.kernels.preference import preference_loss
from medtrain.trainer.config.settings import config_from_dict
from medtrain.trainer.run.alarms import LikelihoodAlarm
from medtrain.trainer.train.loop import train
from medtrain.trainer.train.pair_metrics import num_sums, pair_metrics, pair_sums

BETA = 0.3


def sums_of(seed, num_pairs, num_sources=1, beta=BETA):
    """(sums, margins in reward, length differences, source ids) of made-up pairs."""
    generator = torch.Generator().manual_seed(seed)
    logps = torch.randn(2 * num_pairs, generator=generator, dtype=torch.float64) * 10 - 50
    lengths = torch.randint(1, 40, (2 * num_pairs,), generator=generator)
    source_ids = torch.arange(num_pairs) * 3 // 4 % num_sources
    options = {"beta": beta, "alpha": 1.0, "num_pairs": num_pairs}
    loss, stats = preference_loss(logps, lengths, torch.zeros_like(logps), **options)
    sums = pair_sums(loss, stats, lengths, source_ids, num_sources)
    return sums, stats["rewards/margin"].numpy(), (lengths[0::2] - lengths[1::2]).numpy(), source_ids.numpy()


def test_length_bias_is_pearsons_correlation_of_margin_and_difference_over_all_micro_batches():
    (a, *first), (b, *second) = sums_of(0, 7), sums_of(1, 12)
    row = pair_metrics(a + b, ["all"], nll_denominator=19, beta=BETA)
    margin, longer = (np.concatenate(both) for both in list(zip(first, second, strict=True))[:2])
    assert row["rewards/length_correlation"] == pytest.approx(np.corrcoef(margin, longer)[0, 1], rel=1e-12)
    assert row["rewards/margin"] == pytest.approx(margin.mean()) and row["pairs"] == 19
    assert not any(name.startswith("sources/") for name in row)


def test_a_correlation_that_would_be_of_rounding_or_of_nothing_is_none():
    logps, lengths = torch.tensor([-5.0, -6, -7, -8, -9, -3]).double(), torch.tensor([3, 4, 5, 1, 2, 2])

    def correlation(reference, lengths):
        loss, stats = preference_loss(logps, lengths, reference, beta=BETA, alpha=0.0)
        sums = pair_sums(loss, stats, lengths, torch.zeros(len(lengths) // 2, dtype=torch.int64), 1)
        return pair_metrics(sums, ["a"], nll_denominator=3, beta=BETA)["rewards/length_correlation"]

    assert correlation(torch.zeros_like(logps), lengths) is not None
    assert correlation(logps + torch.tensor([1e-5, 0, 0, 2e-5, 0, 0]), lengths) is None
    assert correlation(torch.zeros_like(logps), torch.tensor([3, 2, 5, 4, 2, 1])) is None


def test_each_source_has_its_own_means_and_one_without_pairs_has_none():
    sums, margin, _, source_ids = sums_of(2, 9, num_sources=2)
    assert len(sums) == num_sums(2)
    row = pair_metrics(sums, ["a", "b"], nll_denominator=9, beta=BETA)
    for s, name in enumerate("ab"):
        assert row[f"sources/{name}/rewards/margin"] == pytest.approx(margin[source_ids == s].mean())
        assert row[f"sources/{name}/rewards/accuracy"] == pytest.approx((margin[source_ids == s] > 0).mean())
    alone, *_ = sums_of(2, 9)
    empty = torch.cat([alone, torch.zeros(num_sums(2) - num_sums(1), dtype=torch.float64)])
    row = pair_metrics(empty, ["a", "b"], nll_denominator=9, beta=BETA)
    assert "sources/a/rewards/margin" in row and "sources/b/rewards/margin" not in row


def rows_of(chosen, margin, prefix=""):
    return [
        {"step": k + 1, f"{prefix}rewards/chosen": c, f"{prefix}rewards/margin": m}
        for k, (c, m) in enumerate(zip(chosen, margin, strict=True))
    ]


def lines(alarm, rows):
    return [line for row in rows if (line := alarm.watch(row))]


NOISE = np.random.default_rng(0).normal(0, 0.01, 40)
RISING, FALLING = np.arange(40) * 0.01, -np.arange(40) * 0.02


@pytest.mark.parametrize(
    ("chosen", "margin", "warned"),
    [
        (FALLING + NOISE, RISING + NOISE[::-1], True),
        (RISING + NOISE, RISING, False),
        (FALLING + NOISE, FALLING, False),
        (NOISE - NOISE.mean(), RISING, False),
    ],
)
def test_the_alarm_tells_once_of_a_falling_chosen_side_under_a_rising_margin(chosen, margin, warned):
    alarm = LikelihoodAlarm(["notes"], 0.1, has_reference=True)
    found = lines(alarm, rows_of(chosen, margin))
    assert len(found) == warned
    if warned:
        step = int(found[0].split("to step ")[1].split()[0])
        window = slice(step - 10, step)
        assert found[0].startswith("warning: notes: ")
        assert f"{-chosen[window].mean() / 0.1:.3g} nats below" in found[0] and f"{margin[window].mean():.3g}" in found[0]
        assert step < 20


def test_the_alarm_names_the_source_and_is_silent_of_it_after_a_restart():
    rows = [a | b for a, b in zip(rows_of(FALLING, RISING, "sources/x/"), rows_of(RISING, RISING, "sources/y/"), strict=True)]
    alarm = LikelihoodAlarm(["x", "y"], 0.1, has_reference=True)
    (line,) = lines(alarm, rows[:25])
    assert line.startswith("warning: x: ")
    again = LikelihoodAlarm(["x", "y"], 0.1, has_reference=True)
    lines(again, json.loads(json.dumps(rows[:25])))
    assert lines(again, rows[25:]) == [] == lines(alarm, rows[25:])


def test_without_a_reference_the_start_is_the_first_steps():
    alarm = LikelihoodAlarm(["x"], 2.0, has_reference=False)
    assert lines(alarm, rows_of(-3.0 + RISING + NOISE, RISING)) == []
    alarm = LikelihoodAlarm(["x"], 2.0, has_reference=False)
    (line,) = lines(alarm, rows_of(-3.0 + FALLING + NOISE, RISING))
    assert "nats per token below the start" in line


def _run(tree, out):
    tree = copy.deepcopy(tree)
    tree["run"]["out"] = str(out)
    train(config_from_dict("rpo", tree))


def test_a_run_without_the_likelihood_term_warns_once_of_the_source_that_falls(rpo_tree, tmp_path, capfd):
    """Chosen and rejected differ in one late word, so that pushing the rejected side down takes the chosen with it."""
    texts = [made_up_text(k, 12) for k in range(8)]
    rows = [{"prompt": f"病 は {t}", "chosen": f"{t} a", "rejected": f"{t} b"} for t in texts]
    other = [{"prompt": f"薬 を {t}", "chosen": f"c 。 {t}", "rejected": f"{t} 咳 咳"} for t in texts]
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", part) for name, part in (("near", rows), ("far", other))]
    rpo_tree["data"]["pairs"] = [{"path": str(path), "name": path.stem} for path in paths]
    rpo_tree["rpo"] |= {"alpha": 0.0}
    rpo_tree["optim"] |= {"steps": 50, "batch_pairs": 8, "lr": 0.02}
    rpo_tree["checkpoint"] = {"every": 25, "keep": 2}
    _run(rpo_tree, tmp_path / "run")
    warned = [line for line in capfd.readouterr().err.splitlines() if "grow less likely" in line]
    names = [line.split("warning: ")[1].split(":")[0] for line in warned]
    assert len(names) == len(set(names)) >= 1
    rows = read_metrics(tmp_path / "run")
    for name in names:
        step = int(warned[names.index(name)].split("to step ")[1].split()[0])
        window = [row for row in rows if row["step"] <= step][-10:]
        assert step < 25 and np.mean([row[f"sources/{name}/rewards/chosen"] for row in window]) < 0
    # Gone on with from step 25, it does not say so again.
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000050")
    _run(rpo_tree, tmp_path / "run")
    err = capfd.readouterr().err
    assert "going on from step-00000025" in err and "grow less likely" not in err
    run_on_ranks(2, tmp_path, _run, rpo_tree, tmp_path / "two")
    again = [line for line in capfd.readouterr().err.splitlines() if "grow less likely" in line]
    assert [line.split(" their log-prob")[0] for line in again] == [line.split(" their log-prob")[0] for line in warned]
