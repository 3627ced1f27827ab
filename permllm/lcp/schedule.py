"""How the Sinkhorn temperature and the learning rate move over a run."""

import math


def linear_temperature(progress: float, start: float, end: float) -> float:
    """Interpolate the Sinkhorn temperature; `progress` runs from 0 (first step) to 1 (last step)."""
    return start + (end - start) * progress


def cosine_decay(progress: float) -> float:
    """Return the factor on the learning rate: 1 at the first step, towards 0 at the last."""
    return 0.5 * (1 + math.cos(math.pi * progress))
