"""Learning-rate schedules: pure functions of the optimizer step."""

import math
from typing import Literal

ScheduleName = Literal["constant", "linear", "cosine"]


def learning_rate(step: int, *, steps: int, peak: float, schedule: ScheduleName, warmup_ratio: float) -> float:
    """Returns the learning rate of optimizer step ``step``.

    It rises linearly over the first ``ceil(warmup_ratio * steps)`` steps, reaches ``peak`` at the last of them, and
    then stays (``constant``), falls linearly, or falls along a half cosine, so that a step after the last would have 0.

    Args:
        step: from 1 to ``steps``.
        steps: optimizer steps of the run.
        peak: the largest value.
        schedule: the shape after the warm-up.
        warmup_ratio: share of the steps that warm up, in [0, 1].
    """
    warmup = math.ceil(warmup_ratio * steps)
    if step <= warmup:
        return peak * step / warmup
    if schedule == "constant":
        return peak
    done = (step - 1 - warmup) / max(1, steps - warmup)
    return peak * (1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))
