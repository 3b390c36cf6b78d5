"""How sure a score is: bootstrap intervals over the questions of one evaluation, and an exact paired test."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_NUM_RESAMPLES = 10_000


def bootstrap_interval(points: Sequence[int], max_points: Sequence[int]) -> tuple[float, float]:
    """95 % percentile interval of ``sum(points) / sum(max_points)``, questions resampled with replacement (Efron and Tibshirani
    1993, An Introduction to the Bootstrap, section 13.3). ``points`` [Q] may be differences of two modes or models: the interval
    is then the paired one. Questions of 0 points take no part; without others it is (0, 0). The seed is fixed. Drawn is how
    often each kind of question (points, max_points) comes up: the same distribution as drawing questions one by one.
    """
    counted = [pair for pair in zip(points, max_points, strict=True) if pair[1]]
    if not counted:
        return 0.0, 0.0
    kinds, counts = np.unique(np.array(counted, dtype=np.int64), axis=0, return_counts=True)
    draws = np.random.default_rng(0).multinomial(len(counted), counts / len(counted), size=_NUM_RESAMPLES)
    low, high = np.quantile((draws @ kinds[:, 0]) / (draws @ kinds[:, 1]), [0.025, 0.975])
    return float(low), float(high)


def paired_p_value(differences: Sequence[int]) -> float:
    """Two-sided exact p-value of "both are equally good", from the points that one has more than the other per question.

    The paired permutation (sign-flip) test (Fisher 1935, The Design of Experiments, section 21), all sign patterns counted by
    convolution (Pagano and Tritchler 1983); on right and wrong (-1, 0, 1) it is the exact McNemar test.
    """
    sizes = [abs(difference) for difference in differences if difference]
    chances = np.ones(1)  # of each sum of signed differences, from -total to total
    for size in sizes:
        wider = np.zeros(len(chances) + 2 * size)
        wider[: len(chances)] += chances / 2
        wider[2 * size :] += chances / 2
        chances = wider
    sums = np.arange(len(chances)) - sum(sizes)
    return min(1.0, float(chances[abs(sums) >= abs(sum(differences))].sum()))


def p_text(p_value: float) -> str:
    """A p-value to four places; a smaller one as below 0.0001, for it is not 0."""
    return f"{p_value:.4f}" if p_value >= 0.0001 else "<0.0001"
