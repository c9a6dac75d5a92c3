"""What an adaptation curve says: when it settles, how high it gets, how restless it stays.

Section 5.3 compares methods by these, without defining them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Real

TOLERANCE = 0.02
LATE = 0.3
_ROUNDING = 1e-12


def convergence_step(
    steps: Sequence[int], success: Real[np.ndarray, "S P"], tolerance: float = TOLERANCE
) -> int:
    """First measured step from which the mean over seeds stays within a tolerance of its end.

    A curve that only passes by its final level has not converged. One that never settles is said to
    do so at its last point.

    Args:
        steps: Environment steps of the P points, ascending.
        success: Success rate of each seed at each point, as fractions.
        tolerance: As a fraction; a point exactly this far off is within.

    Raises:
        ValueError: If there is not one step per point.
    """
    _check(steps, success)
    mean = success.mean(axis=0)
    away = np.flatnonzero(np.abs(mean - mean[-1]) > tolerance + _ROUNDING)
    return steps[int(away[-1]) + 1 if len(away) else 0]


def peak(steps: Sequence[int], success: Real[np.ndarray, "S P"]) -> tuple[float, int]:
    """Highest mean over seeds, and the first step at which it is reached.

    Args:
        steps: Environment steps of the P points.
        success: Success rate of each seed at each point, as fractions.

    Raises:
        ValueError: If there is not one step per point.
    """
    _check(steps, success)
    mean = success.mean(axis=0)
    best = int(mean.argmax())
    return float(mean[best]), steps[best]


def late_variance(
    steps: Sequence[int], success: Real[np.ndarray, "S P"], share: float = LATE
) -> float:
    """Variance of each seed's curve over the last share of training, averaged over seeds.

    In squared percentage points, with one less than the late points as divisor; NaN with fewer than
    two. The paper reports "lower variance … (4 % vs. 6 %)" over the final 30 % of training, in
    percent: if those are deviations, it is the root of this that compares with them.

    Args:
        steps: Environment steps of the P points, ascending.
        success: Success rate of each seed at each point, as fractions.
        share: Of the last step, in (0, 1]; a point exactly at its beginning counts as late.

    Raises:
        ValueError: If there is not one step per point.
    """
    _check(steps, success)
    late = np.asarray(steps) >= (1 - share - _ROUNDING) * steps[-1]
    if late.sum() < 2:
        return math.nan
    return float((100 * success[:, late]).var(axis=1, ddof=1).mean())


def _check(steps: Sequence[int], success: Real[np.ndarray, "S P"]) -> None:
    if not 0 < len(steps) == success.shape[1]:
        raise ValueError(f"{len(steps)} steps for {success.shape[1]} points of a curve")
