"""Learning-rate schedules: the factor on the peak rate as a pure function of the step."""

from __future__ import annotations

import math

from medtrain.trainer.config.settings import OptimConfig


def lr_factor(optim: OptimConfig, step: int, steps: int) -> float:
    """The factor for optimizer step ``step`` (0-based) of ``steps``.

    Linear warm-up over ``warmup_steps``, reaching 1 at its last; then ``cosine`` to ``min_lr_ratio`` at the last step,
    ``constant``, or ``wsd`` (warm-up, stable, decay): 1 until the last ``decay_steps``, then linear to ``min_lr_ratio``.
    """
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    floor = optim.min_lr_ratio
    if optim.schedule == "constant":
        return 1.0
    if optim.schedule == "cosine":
        length = max(1, steps - 1 - optim.warmup_steps)
        done = min(1.0, (step - optim.warmup_steps) / length)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
    decay = decay_steps(optim, steps)
    left = steps - step  # 1 at the last step
    return 1.0 if left > decay else floor + (1 - floor) * (left - 1) / decay


def decay_steps(optim: OptimConfig, steps: int) -> int:
    """Steps of the final decay of ``wsd``."""
    return optim.decay_steps if optim.decay_steps is not None else max(1, steps // 10)
