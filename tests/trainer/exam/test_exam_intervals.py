"""Bootstrap intervals and the exact paired test, against closed forms and enumeration; comparing two sittings."""

import itertools
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from helpers import write_jsonl

from medtrain.trainer.errors import InputError
from medtrain.trainer.exam.compare import as_text, compare
from medtrain.trainer.exam.scoring import run_score
from medtrain.trainer.intervals import bootstrap_interval, paired_p_value

IGAKUQA = Path(__file__).parents[4] / "shared/data/igakuqa"


def test_the_interval_of_a_share_is_that_of_the_binomial():
    right = [1] * 70 + [0] * 30
    low, high = bootstrap_interval(right, [1] * 100)
    # 95 % quantiles of Binomial(100, 0.7) / 100
    cumulated = np.cumsum([math.comb(100, k) * 0.7**k * 0.3 ** (100 - k) for k in range(101)])
    exact = [int(np.searchsorted(cumulated, q)) / 100 for q in (0.025, 0.975)]
    assert (low, high) == pytest.approx(exact, abs=0.011)


def test_the_interval_is_of_resampled_questions_weighted_by_points():
    draw = random.Random(3)
    full = [draw.choice([1, 1, 3]) for _ in range(150)]
    had = [f if draw.random() < (0.9 if f == 3 else 0.4) else 0 for f in full]
    drawn = np.random.default_rng(1).integers(150, size=(20_000, 150))
    ratios = np.array(had)[drawn].sum(1) / np.array(full)[drawn].sum(1)
    assert bootstrap_interval(had, full) == pytest.approx(tuple(np.quantile(ratios, [0.025, 0.975])), abs=4e-3)
    unweighted = bootstrap_interval([bool(h) for h in had], [1] * 150)
    assert abs(unweighted[0] - bootstrap_interval(had, full)[0]) > 0.05


def test_the_interval_does_not_depend_on_the_order_and_ignores_withdrawn_questions():
    had, full = [1, 0, 3, 0, 1], [1, 1, 3, 3, 1]
    assert bootstrap_interval(had, full) == bootstrap_interval(had[::-1], full[::-1])
    assert bootstrap_interval([*had, 0, 0], [*full, 0, 0]) == bootstrap_interval(had, full)
    assert bootstrap_interval([], []) == bootstrap_interval([0], [0]) == (0.0, 0.0)
    assert bootstrap_interval([1, 1], [1, 1]) == (1.0, 1.0)


def test_a_paired_interval_is_narrower_than_the_two_apart():
    ours, theirs = [1] * 60 + [0] * 40, [1] * 65 + [0] * 35  # B has all that A has, and five more
    low, high = bootstrap_interval([b - a for a, b in zip(ours, theirs, strict=True)], [1] * 100)
    assert 0 < low < 0.05 < high < 0.11
    assert bootstrap_interval(ours, [1] * 100)[1] > bootstrap_interval(theirs, [1] * 100)[0]


def test_the_p_value_counts_every_pattern_of_signs():
    draw = random.Random(0)
    for _ in range(40):
        differences = [draw.choice([-3, -1, 0, 1, 2]) for _ in range(draw.randint(1, 9))]
        observed = abs(sum(differences))
        sums = [
            sum(s * d for s, d in zip(signs, differences, strict=True))
            for signs in itertools.product((1, -1), repeat=len(differences))
        ]
        assert paired_p_value(differences) == pytest.approx(sum(abs(s) >= observed for s in sums) / len(sums))
    assert paired_p_value([]) == paired_p_value([0, 0]) == 1.0


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 6), (3, 9), (5, 5), (20, 41), (300, 400)])
def test_on_right_and_wrong_the_p_value_is_mcnemars(only_a, only_b):
    n, k = only_a + only_b, min(only_a, only_b)
    exact = min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)
    assert paired_p_value([-1] * only_a + [1] * only_b + [0] * 50) == pytest.approx(exact)


def sitting(folder, explain, answer="1111100000", exam="x"):
    """An out folder of eval with the given marks; every third question counts three points."""
    folder.mkdir()
    for mode, marks in (("answer", answer), ("explain", explain)):
        rows = [
            {
                "problem_id": str(i),
                "correct": m == "1",
                "points": (1 + 2 * (i % 3 == 0)) * int(m),
                "max_points": 1 + 2 * (i % 3 == 0),
            }
            for i, m in enumerate(marks)
        ]
        write_jsonl(folder / f"outputs-{mode}.jsonl", rows)
    (folder / "run.json").write_text(json.dumps({"identity": {"model": str(folder), "exam": exam, "engine": "hf"}}))
    return folder


def test_two_sittings_are_compared_question_by_question(tmp_path):
    a, b = sitting(tmp_path / "a", "1000000000"), sitting(tmp_path / "b", "1011000000", exam="y")
    result = compare(a, b)
    row = result["modes"]["explain"]
    assert (row["a"], row["b"], row["difference"]) == pytest.approx((3 / 18, 7 / 18, 4 / 18))
    assert (row["only_a"], row["only_b"], row["mcnemar_p_value"], row["p_value"]) == (0, 2, 0.5, 0.5)
    assert result["modes"]["answer"]["difference"] == 0.0 and result["modes"]["answer"]["p_value"] == 1.0
    assert result["explanation_gap"]["difference"] == pytest.approx(-4 / 18)
    assert result["explanation_gap"]["high"] <= 0 and result["settings_that_differ"] == ["exam"]
    text = as_text(result)
    assert "explain" in text and "+0.222" in text and "A 0, B 2" in text and "these settings differ: exam" in text
    swapped = compare(b, a)["modes"]["explain"]
    assert swapped["low"] == pytest.approx(-row["high"], abs=0.03) and swapped["p_value"] == row["p_value"]


def test_what_cannot_be_compared_is_refused(tmp_path):
    a, b = sitting(tmp_path / "a", "1000000000"), sitting(tmp_path / "b", "100000000")
    with pytest.raises(InputError, match="not the same questions.*1 questions that only one has, such as 9"):
        compare(a, b)
    with pytest.raises(InputError, match="no finished exam here"):
        compare(a, tmp_path / "nowhere")
    rows = [json.loads(line) for line in (a / "outputs-explain.jsonl").read_text().splitlines()]
    c = sitting(tmp_path / "c", "1000000000")
    write_jsonl(c / "outputs-explain.jsonl", [rows[0] | {"max_points": 2}, *rows[1:]])
    with pytest.raises(InputError, match="other points for question 0"):
        compare(a, c)
    write_jsonl(c / "outputs-explain.jsonl", [{"problem_id": "0", "correct": True}])
    with pytest.raises(InputError, match="row 1: field 'points'"):
        compare(a, c)
    with pytest.raises(InputError, match="no mode in common"):
        compare(a, write_jsonl(tmp_path / "details.jsonl", rows))


@pytest.mark.skipif(not IGAKUQA.is_dir(), reason=f"the examination data is not at {IGAKUQA}")
def test_the_published_baselines_differ_by_their_published_points(tmp_path):
    for model in ("gpt4", "chatgpt"):
        files = sorted((IGAKUQA / "baseline_results/2022").glob(f"*_{model}.jsonl"))
        (tmp_path / model).write_text("".join(file.read_text() for file in files))
        run_score(IGAKUQA / "2022.jsonl", tmp_path / model, tmp_path / f"{model}.details")
    expected = json.loads((IGAKUQA / "baseline_results/expected_scores.json").read_text())
    row = compare(tmp_path / "chatgpt.details", tmp_path / "gpt4.details")["modes"]["predictions"]
    points = [expected[model]["2022"]["score"] for model in ("gpt4", "chatgpt")]
    assert row["difference"] == pytest.approx((points[0] - points[1]) / 494)
    assert row["low"] > 0 and row["p_value"] < 1e-6
