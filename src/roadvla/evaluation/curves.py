"""What an adaptation curve says: when it settles, how high it gets, how restless it stays (5.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Real

TOLERANCE = 0.02
LATE = 0.3


def convergence_step(
    steps: Sequence[int], success: Real[np.ndarray, "S P"], tolerance: float = TOLERANCE
) -> int:
    """First measured step from which the mean over seeds stays within a tolerance of its end.

    Args:
        steps: Environment steps of the P points, ascending.
        success: Success rate of each seed at each point, as fractions.
        tolerance: As a fraction.
    """
    mean = success.mean(axis=0)
    near = np.abs(mean - mean[-1]) <= tolerance + 1e-12
    settled = np.flatnonzero(~near)
    first = 0 if not len(settled) else int(settled[-1]) + 1
    return steps[first]


def peak(steps: Sequence[int], success: Real[np.ndarray, "S P"]) -> tuple[float, int]:
    """Highest mean over seeds, and the first step at which it is reached.

    Args:
        steps: Environment steps of the P points.
        success: Success rate of each seed at each point, as fractions.
    """
    mean = success.mean(axis=0)
    best = int(mean.argmax())
    return float(mean[best]), steps[best]


def late_variance(
    steps: Sequence[int], success: Real[np.ndarray, "S P"], share: float = LATE
) -> float:
    """Variance of each seed's curve over the last share of training, averaged over seeds.

    In squared percentage points, as the divisor P − 1 estimates it; NaN with fewer than two points.

    Args:
        steps: Environment steps of the P points, ascending.
        success: Success rate of each seed at each point, as fractions.
        share: Of the last step.
    """
    late = np.asarray(steps) >= (1 - share) * steps[-1]
    if late.sum() < 2:
        return math.nan
    return float((100 * success[:, late]).var(axis=1, ddof=1).mean())
