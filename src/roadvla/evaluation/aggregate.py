"""From one difference to a claim over settings: p-values, Holm's correction, IQM, improvement.

Scores are tables with one row per setting and one column per seed. What is drawn in a bootstrap
over them are the seeds of each setting, as Agarwal et al. (2021) do; the settings are not a sample
of anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Real

from roadvla.evaluation.stats import Estimate, paired_difference

RESAMPLES = 2000
_SMALLEST = 1e-4
_STEPS = 40


def p_value(outcomes: Real[np.ndarray, "S N"], baseline: Real[np.ndarray, "S N"]) -> float:
    """Two-sided p-value of a paired difference: the least level at which it is established.

    So p ≤ 0.05 exactly where ``paired_difference``'s 95 % interval excludes 0. That interval is the
    widest of three, so p is the largest of theirs; it is never below 0.0001.

    Args:
        outcomes: 1 for success, 0 for failure; row s of both tables is the same seed.
        baseline: The same episodes under another method.
    """

    def established(alpha: float) -> bool:
        return paired_difference(outcomes, baseline, level=1 - alpha).sign != 0

    if established(_SMALLEST):
        return _SMALLEST
    low, high = math.log(_SMALLEST), 0.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if established(math.exp(middle)) else (middle, high)
    return math.exp(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values so that the chance of any false claim among them stays below the level.

    Args:
        p_values: Of as many comparisons, in any order.

    Returns:
        Adjusted p-values in the same order: p ≤ 0.05 after adjustment is a claim at 5 % over all.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def iqm(scores: Real[np.ndarray, "M S"]) -> float:
    """Interquartile mean: of all runs the middle half, so that no single run decides.

    Where a quarter of the runs is no whole number, the fraction is rounded down.
    """
    flat = np.sort(scores, axis=None)
    cut = int(0.25 * flat.size)
    return float(flat[cut : flat.size - cut].mean())


def iqm_interval(scores: Real[np.ndarray, "M S"], level: float = 0.95) -> Estimate:
    """Interquartile mean with a bootstrap interval, stratified by setting.

    Args:
        scores: Success rates, settings by seeds.
        level: Confidence level in (0, 1).
    """
    return _stratified(lambda table: iqm(table), [scores], level)


def iqm_difference(
    ours: Real[np.ndarray, "M S"], theirs: Real[np.ndarray, "M S"], level: float = 0.95
) -> Estimate:
    """Difference of interquartile means; seeds are drawn in pairs.

    Args:
        ours: Success rates, settings by seeds.
        theirs: Of another method, on the same settings and seeds.
        level: Confidence level in (0, 1).
    """
    return _stratified(lambda a, b: iqm(a) - iqm(b), [ours, theirs], level)


def probability_of_improvement(
    ours: Real[np.ndarray, "M S"], theirs: Real[np.ndarray, "M S2"], level: float = 0.95
) -> Estimate:
    """Chance that a run of one method beats one of the other on a setting, averaged over settings.

    Ties count half: Mann and Whitney's U over the number of pairs.

    Args:
        ours: Success rates, settings by seeds.
        theirs: Of another method on the same settings; seeds are drawn independently.
        level: Confidence level in (0, 1).
    """
    return _stratified(_improvement, [ours, theirs], level, paired=False)


def _improvement(ours: np.ndarray, theirs: np.ndarray) -> float:
    difference = ours[:, :, None] - theirs[:, None, :]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def _stratified(
    statistic: Callable[..., float],
    tables: Sequence[Float[np.ndarray, "M S"]],
    level: float,
    *,
    paired: bool = True,
) -> Estimate:
    """Percentile interval over draws of the seeds of each setting, with replacement."""
    rows = len(tables[0])
    if any(len(table) != rows for table in tables):
        raise ValueError(f"the methods have {[len(table) for table in tables]} settings")
    seeds = tables[0].shape[1]
    if paired and any(table.shape != tables[0].shape for table in tables):
        raise ValueError("the methods have different numbers of seeds")
    generator = np.random.default_rng([rows, seeds])
    draws = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        drawn = []
        pick = generator.integers(seeds, size=(rows, seeds))
        for place, table in enumerate(tables):
            if place and not paired:
                pick = generator.integers(table.shape[1], size=(rows, table.shape[1]))
            drawn.append(np.take_along_axis(table, pick, axis=1))
        draws[number] = statistic(*drawn)
    tail = (1 - level) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Estimate(statistic(*tables), float(low), float(high), seeds, rows)
