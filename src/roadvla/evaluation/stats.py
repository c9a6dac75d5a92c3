"""Intervals for success rates and their differences.

Outcomes are tables with one row per seed (a separate training run) and one column per episode;
all seeds meet the same episodes. Two things make a measured rate differ from the one meant: which
episodes were drawn, and which training run was met. With one seed only the first can be seen, and
the interval speaks of that one training run. With several, an interval is the **widest span** of

* a bootstrap that draws seeds and episodes, both with replacement: it sees both sources, but is
  too narrow with few seeds;
* Student's t over the seeds' own values: right for few seeds, blind to the shared episodes;
* a closed form that pools all episodes: never empty, even where every episode succeeded.

So it errs on the side of not claiming a difference.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Float, Real

RESAMPLES = 4000


@dataclass(frozen=True)
class Estimate:
    """A rate or a difference of rates, with its interval.

    Attributes:
        mean: As a fraction.
        low: Lower end of the interval.
        high: Upper end of the interval.
        seeds: Training runs behind it.
        episodes: Episodes per training run.
    """

    mean: float
    low: float
    high: float
    seeds: int
    episodes: int

    @property
    def sign(self) -> int:
        """+1 or −1 if the interval excludes 0, else 0: the sign is not established."""
        return int(self.low > 0) - int(self.high < 0)


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion.

    Args:
        successes: Out of ``n``.
        n: At least 1.
        level: Confidence level in (0, 1).

    Raises:
        ValueError: If there are not 0 to ``n`` successes, or ``n`` is below 1.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: expected 0 to n, n at least 1")
    z = _normal_quantile(level)
    rate = successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    return low, 1.0 if successes == n else min(1.0, centre + half)


def mean_and_std(values: Real[np.ndarray, " S"]) -> tuple[float, float]:
    """Mean and sample standard deviation (divisor S − 1) over seeds; NaN for a single seed."""
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else math.nan


def t_interval(values: Real[np.ndarray, " S"], level: float = 0.95) -> tuple[float, float]:
    """Student's t interval of the mean over independent seeds.

    Raises:
        ValueError: If there are fewer than two seeds.
    """
    if len(values) < 2:
        raise ValueError("a t interval needs at least two seeds")
    mean, std = mean_and_std(values)
    half = t_quantile(0.5 + level / 2, len(values) - 1) * std / math.sqrt(len(values))
    return mean - half, mean + half


def seed_interval(outcomes: Real[np.ndarray, "S N"], level: float = 0.95) -> Estimate:
    """Success rate over seeds, with an interval that knows of the variance between seeds.

    Wilson's for a single seed; otherwise the widest span that the module describes.

    Args:
        outcomes: 1 for success, 0 for failure.
        level: Confidence level in (0, 1).
    """
    seeds, episodes = outcomes.shape
    closed = wilson(round(float(outcomes.sum())), outcomes.size, level)
    if seeds == 1:
        return Estimate(float(outcomes.mean()), *closed, seeds, episodes)
    draws = bootstrap(outcomes, "episodes", RESAMPLES)
    low, high = _widest(outcomes.mean(1), draws, closed, level)
    return Estimate(float(outcomes.mean()), max(0.0, low), min(1.0, high), seeds, episodes)


def paired_difference(
    outcomes: Real[np.ndarray, "S N"], baseline: Real[np.ndarray, "S N"], level: float = 0.95
) -> Estimate:
    """Difference of success rates on the same episodes: ``outcomes`` minus ``baseline``.

    Row s of both comes from the same seed, column n from the same episode id. The closed form is
    Bonett and Price's for paired proportions, on the pooled episodes.

    Raises:
        ValueError: If the shapes differ.
    """
    if outcomes.shape != baseline.shape:
        raise ValueError(f"shapes differ: {outcomes.shape} and {baseline.shape}")
    return paired_mean_difference([outcomes.astype(np.float64) - baseline], [1.0], level)


def paired_mean_difference(
    differences: Sequence[Real[np.ndarray, "S N"]], weights: Sequence[float], level: float = 0.95
) -> Estimate:
    """Weighted mean of paired differences on several sets of episodes, by the same seeds.

    The closed form adds up the sets' variances, for their episodes are different ones.

    Args:
        differences: Outcomes minus the baseline's, one table per set; row s is always seed s.
        weights: Of the sets; they add up to 1.
        level: Of the interval.

    Raises:
        ValueError: If there is not one weight per table, or the numbers of seeds differ.
    """
    if len(differences) != len(weights) or len({len(table) for table in differences}) != 1:
        raise ValueError("expected one weight per table, and tables of the same seeds")
    pairs = list(zip(weights, differences, strict=True))
    draws = np.sum(
        [
            weight * bootstrap(table, f"episodes {number}" if number else "episodes", RESAMPLES)
            for number, (weight, table) in enumerate(pairs)
        ],
        axis=0,
    )
    closed = [(weight, *bonett_price(table)) for weight, table in pairs]
    centre = sum(weight * value for weight, value, _ in closed)
    half = _normal_quantile(level) * math.hypot(*(weight * error for weight, _, error in closed))
    values = np.sum([weight * table.mean(axis=1) for weight, table in pairs], axis=0)
    low, high = _widest(values, draws, (max(-1.0, centre - half), min(1.0, centre + half)), level)
    episodes = sum(table.shape[1] for table in differences)
    mean = sum(weight * float(table.mean()) for weight, table in pairs)
    return Estimate(mean, low, high, len(values), episodes)


def unpaired_difference(
    outcomes: Real[np.ndarray, "S N"], baseline: Real[np.ndarray, "S M"], level: float = 0.95
) -> Estimate:
    """Difference of success rates on different episodes of the same training runs, e.g. ID − OOD.

    Row s of both comes from the same training run. The closed form is Newcombe's, on the pooled
    episodes.

    Raises:
        ValueError: If the numbers of seeds differ.
    """
    if len(outcomes) != len(baseline):
        raise ValueError(f"numbers of seeds differ: {len(outcomes)} and {len(baseline)}")
    draws = bootstrap(outcomes, "episodes", RESAMPLES)
    draws = draws - bootstrap(baseline, "other episodes", RESAMPLES)
    closed = _newcombe(outcomes, baseline, level)
    values = outcomes.mean(1) - baseline.mean(1)
    low, high = _widest(values, draws, closed, level)
    episodes = min(outcomes.shape[1], baseline.shape[1])
    return Estimate(float(values.mean()), low, high, len(outcomes), episodes)


def _widest(
    values: Real[np.ndarray, " S"],
    draws: Float[np.ndarray, " R"],
    closed: tuple[float, float],
    level: float,
) -> tuple[float, float]:
    """Span the bootstrap's percentiles, the closed form and, with several seeds, Student's t."""
    tail = (1 - level) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    spans = [(float(low), float(high)), closed]
    if len(values) > 1:
        spans.append(t_interval(values, level))
    return min(span[0] for span in spans), max(span[1] for span in spans)


def bootstrap(
    table: Real[np.ndarray, "S N"], stream: str, resamples: int
) -> Float[np.ndarray, " R"]:
    """Means of the table with rows and columns drawn with replacement, independently.

    Sums of whole numbers are exact, so a mean of 0 is 0 and not a rounding error of either sign.

    Args:
        table: Outcomes, or differences of outcomes.
        stream: The same stream draws the same columns, and every table of S rows the same rows, so
            that what is paired stays paired.
        resamples: How many draws.
    """
    rows = _counts(table.shape[0], resamples, "seeds")
    columns = _counts(table.shape[1], resamples, stream)
    return ((columns @ table.T.astype(np.float64)) * rows).sum(1) / table.size


@functools.lru_cache(maxsize=16)
def _counts(count: int, resamples: int, stream: str) -> Float[np.ndarray, "R C"]:
    """How often each of ``count`` things is drawn: [resamples, count], rows sum to ``count``."""
    generator = np.random.default_rng([count, *stream.encode()])
    drawn = generator.multinomial(count, np.full(count, 1 / count), size=resamples)
    drawn = drawn.astype(np.float64)
    drawn.setflags(write=False)
    return drawn


def bonett_price(difference: Real[np.ndarray, "S N"]) -> tuple[float, float]:
    """Adjusted difference of paired proportions and its standard error (Bonett and Price, 2012).

    Args:
        difference: +1 where an episode was gained, −1 where one was lost, else 0.
    """
    n = difference.size + 2
    up, down = (int((sign * difference > 0).sum() + 1) / n for sign in (1, -1))
    return up - down, math.sqrt((up + down - (up - down) ** 2) / n)


def _newcombe(
    outcomes: Real[np.ndarray, "S N"], baseline: Real[np.ndarray, "S M"], level: float
) -> tuple[float, float]:
    """Hybrid score interval of a difference of independent proportions (Newcombe, 1998)."""
    rate, other = float(outcomes.mean()), float(baseline.mean())
    low, high = wilson(round(float(outcomes.sum())), outcomes.size, level)
    other_low, other_high = wilson(round(float(baseline.sum())), baseline.size, level)
    difference = rate - other
    return (
        difference - math.hypot(rate - low, other_high - other),
        difference + math.hypot(high - rate, other - other_low),
    )


def _normal_quantile(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}: expected between 0 and 1")
    return NormalDist().inv_cdf(0.5 + level / 2)


def t_quantile(probability: float, freedom: int) -> float:
    """Quantile, above the median, of Student's t with a whole number of degrees of freedom."""
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < probability:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def t_cdf(t: float, freedom: int) -> float:
    """Student's t distribution function as the finite sum for whole degrees of freedom."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine = math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    share = math.sin(angle) * total
    return 0.5 + ((angle + share) / math.pi if odd else share / 2)
