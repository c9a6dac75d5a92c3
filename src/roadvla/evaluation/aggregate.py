"""From one difference to a claim over settings: p-values, Holm's correction, IQM, improvement.

Scores are tables with one row per setting and one column per seed. What is drawn in a bootstrap
over them are the seeds of each setting, as Agarwal et al. (2021) do; the settings are not a sample
of anything. Settings that share their training runs are one group, whose seeds are drawn once: a
run that is good by luck is so in all of them. A bootstrap alone is too narrow with few seeds (three
differences of one sign already exclude 0), so an interval is the wider of the draws' quantiles and
of Student's t with the draws' own deviation. With one seed it is NaN: nothing is known then of
other training runs. In an ``Estimate`` over settings, ``episodes`` counts the settings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import NormalDist

import numpy as np
from jaxtyping import Float, Real

from roadvla.evaluation import stats
from roadvla.evaluation.stats import Estimate

RESAMPLES = 2000
SMALLEST_P = 1e-4
EVEN = 0.5  # the probability of improvement where there is no difference


def p_value(outcomes: Real[np.ndarray, "S N"], baseline: Real[np.ndarray, "S N"]) -> float:
    """Two-sided p-value of a paired difference: the least level at which it is established.

    So p ≤ 0.05 exactly where ``paired_difference``'s 95 % interval excludes 0. That interval is the
    widest of three, so p is the largest of theirs, all taken on the same side of 0. It is never
    below 0.0001: so far out, neither draws nor normal approximations tell anything.

    Args:
        outcomes: 1 for success, 0 for failure; row s of both tables is the same seed.
        baseline: The same episodes under another method.

    Raises:
        ValueError: If the shapes differ.
    """
    if outcomes.shape != baseline.shape:
        raise ValueError(f"shapes differ: {outcomes.shape} and {baseline.shape}")
    difference = outcomes.astype(np.float64) - baseline
    return min(1.0, max(SMALLEST_P, 2 * min(_tail(difference), _tail(-difference))))


def holm(p_values: Sequence[float], comparisons: int | None = None) -> list[float]:
    """Adjust p-values so that the chance of any false claim among them stays below the level.

    Step down: the smallest of m p-values is taken times m, the next times m − 1, and none is let
    below the one before.

    Args:
        p_values: Of as many comparisons, in any order.
        comparisons: m, where some are still to come; as many as there are unless given.

    Returns:
        Adjusted p-values in the same order: p ≤ 0.05 after adjustment is a claim at 5 % over all.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    m = max(len(p_values), comparisons or 0)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (m - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def iqm(scores: Real[np.ndarray, "M S"]) -> float:
    """Interquartile mean: of all runs the middle half, so that no single run decides.

    Args:
        scores: Success rates, settings by seeds. Where a quarter of all M·S is no whole number, it
            is rounded down.
    """
    return float(_iqm(scores[None])[0])


def iqm_interval(
    scores: Real[np.ndarray, "M S"], groups: Sequence[int] = (), level: float = 0.95
) -> Estimate:
    """Interquartile mean, with an interval over seeds.

    Args:
        scores: Success rates, settings by seeds.
        groups: Group of each setting; those of one group share their runs. None do unless given.
        level: Confidence level in (0, 1).

    Raises:
        ValueError: If there are more or fewer groups than settings.
    """
    (drawn,) = _draws([scores], groups, paired=True)
    return _estimate(iqm(scores), _iqm(drawn), scores.shape, level)


def iqm_difference(
    ours: Real[np.ndarray, "M S"],
    theirs: Real[np.ndarray, "M S"],
    groups: Sequence[int] = (),
    level: float = 0.95,
) -> Estimate:
    """Difference of interquartile means; seeds are drawn in pairs.

    Args:
        ours: Success rates, settings by seeds.
        theirs: Of another method, on the same settings and seeds.
        groups: Group of each setting; those of one group share their runs. None do unless given.
        level: Confidence level in (0, 1).

    Raises:
        ValueError: If they have other settings or seeds.
    """
    first, second = _draws([ours, theirs], groups, paired=True)
    return _estimate(iqm(ours) - iqm(theirs), _iqm(first) - _iqm(second), ours.shape, level)


def probability_of_improvement(
    ours: Real[np.ndarray, "M S"],
    theirs: Real[np.ndarray, "M S2"],
    groups: Sequence[int] = (),
    level: float = 0.95,
) -> Estimate:
    """Chance that a run of one method beats one of the other on a setting, averaged over settings.

    Ties count half: Mann and Whitney's U over the number of pairs. Even is ``EVEN``, not 0, so
    the estimate's ``sign`` says nothing here.

    Args:
        ours: Success rates, settings by seeds.
        theirs: Of another method on the same settings; seeds are drawn independently.
        groups: Group of each setting; those of one group share their runs. None do unless given.
        level: Confidence level in (0, 1).

    Raises:
        ValueError: If they have other settings.
    """
    first, second = _draws([ours, theirs], groups, paired=False)
    mean = float(_improvement(ours[None], theirs[None])[0])
    shape = len(ours), min(ours.shape[1], theirs.shape[1])
    found = _estimate(mean, _improvement(first, second), shape, level)
    return replace(found, low=min(max(found.low, 0.0), 1.0), high=max(min(found.high, 1.0), 0.0))


def _tail(difference: Float[np.ndarray, "S N"]) -> float:
    """Largest share that one of the three intervals leaves at or below 0."""
    draws = stats.bootstrap(difference, "episodes", stats.RESAMPLES)
    centre, error = stats.bonett_price(difference)
    tails = [_share_below(draws), NormalDist().cdf(-centre / error)]
    if len(difference) > 1:
        tails.append(_student_tail(difference.mean(1)))
    return max(tails)


def _share_below(draws: Float[np.ndarray, " R"]) -> float:
    """Share of the draws at which their quantile, linear between draws as numpy's, passes 0."""
    draws = np.sort(draws)
    below = int((draws <= 0).sum())
    if below in (0, len(draws)):
        return float(below > 0)
    last, first = draws[below - 1 : below + 1]
    return float((below - 1 - last / (first - last)) / (len(draws) - 1))


def _student_tail(values: Float[np.ndarray, " S"]) -> float:
    mean, std = stats.mean_and_std(values)
    if std == 0:
        return float(mean <= 0)
    return stats.t_cdf(-mean / (std / math.sqrt(len(values))), len(values) - 1)


def _iqm(tables: Real[np.ndarray, "R M S"]) -> Float[np.ndarray, " R"]:
    flat = np.sort(tables.reshape(len(tables), -1), axis=1)
    cut = int(0.25 * flat.shape[1])
    return flat[:, cut : flat.shape[1] - cut].mean(axis=1)


def _improvement(
    ours: Real[np.ndarray, "R M S"], theirs: Real[np.ndarray, "R M S2"]
) -> Float[np.ndarray, " R"]:
    difference = ours[..., :, None] - theirs[..., None, :]
    return ((difference > 0) + 0.5 * (difference == 0)).mean(axis=(1, 2, 3))


def _draws(
    tables: Sequence[np.ndarray], groups: Sequence[int], *, paired: bool
) -> list[np.ndarray]:
    """Draw the seeds of each group with replacement, many times: [RESAMPLES, M, S] each."""
    rows, seeds = tables[0].shape
    if any(len(table) != rows for table in tables):
        raise ValueError(f"the methods have {[len(table) for table in tables]} settings")
    if paired and any(table.shape != tables[0].shape for table in tables):
        raise ValueError("the methods have different numbers of seeds")
    if groups and len(groups) != rows:
        raise ValueError(f"{len(groups)} groups for {rows} settings")
    labels, member = np.unique(groups or range(rows), return_inverse=True)
    generator = np.random.default_rng([rows, seeds])
    drawn, pick = [], generator.integers(seeds, size=(RESAMPLES, len(labels), seeds))
    for place, table in enumerate(tables):
        if place and not paired:
            seeds = table.shape[1]
            pick = generator.integers(seeds, size=(RESAMPLES, len(labels), seeds))
        drawn.append(np.take_along_axis(table[None], pick[:, member], axis=2))
    return drawn


def _estimate(
    mean: float, draws: Float[np.ndarray, " R"], shape: tuple[int, ...], level: float
) -> Estimate:
    """The wider of the draws' quantiles and of Student's t on either side."""
    settings, seeds = shape
    if seeds == 1:  # the draws cannot differ, which is not to say that runs would not
        return Estimate(mean, math.nan, math.nan, seeds, settings)
    tail = (1 - level) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    # Drawing S of S makes the variance (S - 1)/S of what it is; few groups may decide, so that the
    # degrees of freedom are those of one.
    error = float(draws.std()) * math.sqrt(seeds / (seeds - 1))
    half = stats.t_quantile(1 - tail, seeds - 1) * error
    return Estimate(
        mean, min(float(low), mean - half), max(float(high), mean + half), seeds, settings
    )
