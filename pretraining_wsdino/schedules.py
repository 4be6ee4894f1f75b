"""Learning rate, weight decay, teacher momentum and teacher temperature as pure functions of the global step.

Nothing here keeps state, so a resumed run needs nothing but its step, and the number of processes cannot change a
schedule (Accelerate's scheduler wrapper steps once per process, which would).
"""

import math


def cosine_schedule(step: int, *, start: float, end: float, total_steps: int, warmup_steps: int = 0) -> float:
    """Value at `step` of a linear warm-up from 0 to `start`, then half a cosine from `start` towards `end`.

    This is DINO's schedule (Caron et al. 2021, `cosine_scheduler`), step for step: the warm-up includes both of its
    ends, so its last step already has `start`, and the cosine's first step has it once more; `end` itself would be
    reached one step after the run.

    Parameters
    ----------
    step : int
        Global optimiser step, from 0 to `total_steps - 1`; a later step holds the last value.
    start, end : float
        Value after the warm-up, and at the end of the run.
    total_steps, warmup_steps : int
        Lengths in optimiser steps.
    """
    step = min(step, total_steps - 1)
    if step < warmup_steps:
        return start * step / (warmup_steps - 1) if warmup_steps > 1 else 0.0
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * progress))


def linear_schedule(epoch: int, *, start: float, end: float, warmup_epochs: int) -> float:
    """Value in `epoch` of a linear walk from `start` to `end`, then `end`: DINO's teacher temperature.

    The paper keeps 0.04 throughout (`start == end`).
    """
    if epoch >= warmup_epochs:
        return end
    return start + (end - start) * epoch / max(warmup_epochs - 1, 1)
