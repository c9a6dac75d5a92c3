from __future__ import annotations

import math

import jaxtyping
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

from roadvla.evaluation import stats
from roadvla.evaluation.stats import (
    mean_and_std,
    paired_difference,
    paired_mean_difference,
    seed_interval,
    t_interval,
    unpaired_difference,
    wilson,
)


@pytest.fixture
def without_shape_checks():
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def outcomes(seed, rates, episodes):
    rng = np.random.default_rng(seed)
    return (rng.random((len(rates), episodes)) < np.array(rates)[:, None]).astype(np.int64)


@given(st.integers(1, 3000), st.floats(0, 1), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_wilson_is_statsmodels_wilson(n, share, level):
    successes = round(share * n)
    expected = proportion_confint(successes, n, alpha=1 - level, method="wilson")
    assert wilson(successes, n, level) == pytest.approx(expected, abs=1e-12)


def test_wilson_ends_exactly_at_0_and_1():
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == 1.0
    # z² / (n + z²) by hand at 0 of 10: 3.841459 / 13.841459
    assert wilson(0, 10)[1] == pytest.approx(0.277533, abs=1e-6)


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(successes, n):
    with pytest.raises(ValueError, match="expected 0 to n"):
        wilson(successes, n)


def test_levels_outside_0_to_1_are_refused():
    with pytest.raises(ValueError, match="level is 95"):
        wilson(1, 2, 95.0)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12), st.sampled_from([0.8, 0.95]))
def test_t_interval_is_scipys(values, level):
    values = np.array(values)
    if values.std() == 0:
        return
    expected = scipy_stats.t.interval(
        level, len(values) - 1, loc=values.mean(), scale=values.std(ddof=1) / math.sqrt(len(values))
    )
    assert t_interval(values, level) == pytest.approx(expected, abs=1e-8)


def test_t_interval_by_hand_and_refusal():
    # 0.6 0.7 0.8: mean 0.7, s = 0.1, t(2) = 4.302653, half = 0.430265 / √3
    assert t_interval(np.array([0.6, 0.7, 0.8])) == pytest.approx((0.451586, 0.948414), abs=1e-6)
    with pytest.raises(ValueError, match="two seeds"):
        t_interval(np.array([0.5]))


def test_mean_and_std_divides_by_one_less():
    assert mean_and_std(np.array([0.6, 0.7, 0.8])) == pytest.approx((0.7, 0.1))
    assert math.isnan(mean_and_std(np.array([0.6]))[1])


def test_one_seed_gives_wilson():
    table = outcomes(0, [0.7], 200)
    estimate = seed_interval(table)
    assert (estimate.low, estimate.high) == wilson(int(table.sum()), 200)
    assert (estimate.mean, estimate.seeds, estimate.episodes) == (table.mean(), 1, 200)


def test_several_seeds_know_of_the_variance_between_seeds():
    table = outcomes(0, [0.5, 0.7, 0.9], 400)
    estimate = seed_interval(table)
    spans = [t_interval(table.mean(1)), wilson(int(table.sum()), table.size)]
    assert estimate.low <= min(low for low, _ in spans)
    assert estimate.high >= max(high for _, high in spans) or estimate.high == 1.0
    assert estimate.high - estimate.low > 3 * (spans[1][1] - spans[1][0])
    assert estimate.seeds == 3


def test_perfect_seeds_still_have_an_interval():
    estimate = seed_interval(np.ones((3, 50)))
    assert estimate.low < 0.99
    assert estimate.high == 1.0


def test_shared_episodes_are_not_counted_once_per_seed():
    # Three equal seeds: t is empty, and what is known is what 150 episodes tell, not 450.
    table = outcomes(0, [0.6], 150).repeat(3, axis=0)
    rate = table.mean()
    half = 1.959964 * math.sqrt(rate * (1 - rate) / 150)
    estimate = seed_interval(table)
    assert (estimate.high - estimate.low) / 2 == pytest.approx(half, rel=0.06)
    against_itself = unpaired_difference(table, table)  # as if of two sets of 150 episodes
    width = against_itself.high - against_itself.low
    assert width / 2 == pytest.approx(math.sqrt(2) * half, rel=0.06)


def test_seeds_and_episodes_are_drawn_independently():
    assert stats.bootstrap(np.eye(6), "episodes", 4000).mean() == pytest.approx(1 / 6, abs=0.01)


def test_a_mean_of_zero_is_no_rounding_error():
    # A bound at 0 must not pass for one above it: gains and losses that cancel leave exactly 0.
    difference = outcomes(0, [0.1, 0.1, 0.1], 60) - outcomes(1, [0.1, 0.1, 0.1], 60)
    draws = stats.bootstrap(difference, "episodes", 4000)
    near = draws[np.abs(draws) < 1e-9]
    assert len(near) > 50
    assert (near == 0).all()


def test_bootstrap_matches_a_loop_that_draws_seeds_and_episodes():
    table = outcomes(3, [0.5, 0.6, 0.8], 40).astype(float)
    rng = np.random.default_rng(1)
    loop = [
        np.mean([[table[s, n] for n in episodes] for s in seeds])
        for seeds, episodes in (
            (rng.integers(0, 3, 3), rng.integers(0, 40, 40)) for _ in range(2000)
        )
    ]
    draws = stats.bootstrap(table, "episodes", 4000)
    assert draws.mean() == pytest.approx(np.mean(loop), abs=0.01)
    assert draws.std() == pytest.approx(np.std(loop), rel=0.08)
    assert np.quantile(draws, [0.1, 0.9]) == pytest.approx(np.quantile(loop, [0.1, 0.9]), abs=0.02)


def test_bootstrap_of_one_seed_is_scipys():
    table = outcomes(5, [0.3], 120).astype(float)
    expected = scipy_stats.bootstrap(
        (table[0],), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    low, high = np.quantile(stats.bootstrap(table, "episodes", 4000), [0.025, 0.975])
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.015)


def test_pairing_narrows_the_interval():
    baseline = outcomes(1, [0.5], 500)
    better = baseline.copy()
    better[0, np.flatnonzero(baseline[0] == 0)[:25]] = 1
    paired = paired_difference(better, baseline)
    unpaired = unpaired_difference(better, baseline)
    assert (paired.mean, unpaired.mean) == pytest.approx((0.05, 0.05))
    assert paired.sign == 1
    assert unpaired.sign == 0
    assert paired_difference(baseline, better).sign == -1


def test_few_discordant_episodes_establish_nothing():
    # 4 gained, 0 lost of 64: the bootstrap alone would exclude 0; McNemar's exact p is 0.125.
    baseline = np.zeros((1, 64))
    better = baseline.copy()
    better[0, :4] = 1
    estimate = paired_difference(better, baseline)
    # Bonett-Price: 5/66 − 1/66 ± 1.959964 sqrt((6/66 − (4/66)²) / 66) = 0.060606 ± 0.071257
    assert estimate.low == pytest.approx(-0.010650, abs=1e-6)
    assert estimate.sign == 0
    assert paired_difference(baseline, baseline).high > 0.01


@given(st.integers(0, 50), st.integers(0, 80))
def test_newcombe_is_statsmodels_newcombe(first, second):
    a, b = np.zeros((1, 50)), np.zeros((1, 80))
    a[0, :first] = 1
    b[0, :second] = 1
    expected = confint_proportions_2indep(first, 50, second, 80, method="newcomb")
    assert stats._newcombe(a, b, 0.95) == pytest.approx(expected, abs=1e-9)


def test_seeds_that_disagree_establish_nothing():
    baseline = outcomes(0, [0.7, 0.7, 0.7], 400)
    disagreeing = outcomes(1, [0.9, 0.65, 0.75], 400)
    agreeing = outcomes(2, [0.85, 0.86, 0.84], 400)
    assert paired_difference(disagreeing, baseline).sign == 0
    assert paired_difference(agreeing, baseline).sign == 1


def test_intervals_hold_what_they_promise():
    rng = np.random.default_rng(0)
    for seeds, spread in ((1, 0.0), (3, 0.0), (3, 0.3), (5, 0.3)):
        held = 0
        for _ in range(100):
            hardness = rng.normal(0, 1, 128)
            logits = 0.8 + hardness + rng.normal(0, spread, (2, seeds, 1))
            first, second = (rng.random((2, seeds, 128)) < 1 / (1 + np.exp(-logits))).astype(int)
            estimate = paired_difference(first, second)
            held += estimate.low <= 0 <= estimate.high
        assert held >= 88, (seeds, spread, held)  # 95 expected; 88 is 3 standard deviations below


def test_differences_refuse_what_cannot_be_paired(without_shape_checks):
    with pytest.raises(ValueError, match="shapes differ"):
        paired_difference(np.ones((2, 3)), np.ones((2, 4)))
    with pytest.raises(ValueError, match="numbers of seeds"):
        unpaired_difference(np.ones((2, 3)), np.ones((1, 4)))


def test_results_repeat():
    table = outcomes(0, [0.5, 0.6, 0.7], 100)
    first = seed_interval(table)
    stats._counts.cache_clear()
    assert seed_interval(table) == first


def test_a_mean_over_sets_weighs_them():
    generator = np.random.default_rng(11)
    first, second = (
        generator.choice([-1.0, 0.0, 1.0], p=p, size=(4, 300))
        for p in ([0.1, 0.6, 0.3], [0.2, 0.6, 0.2])
    )
    mean = paired_mean_difference([first, second], [0.75, 0.25])
    assert mean.mean == pytest.approx(0.75 * first.mean() + 0.25 * second.mean())
    per_seed = 0.75 * first.mean(axis=1) + 0.25 * second.mean(axis=1)
    student = scipy_stats.t.interval(0.95, 3, per_seed.mean(), scipy_stats.sem(per_seed))
    assert (mean.low, mean.high) == pytest.approx(
        (min(mean.low, student[0]), max(mean.high, student[1]))
    )
    with pytest.raises(ValueError, match="one weight per table"):
        paired_mean_difference([first, second], [1.0])
    with pytest.raises(ValueError, match="the same seeds"):
        paired_mean_difference([first, second[:2]], [0.5, 0.5])


def test_one_set_alone_is_the_paired_difference():
    generator = np.random.default_rng(5)
    ours, theirs = (generator.random((3, 400)) < rate for rate in (0.6, 0.5))
    alone = paired_mean_difference([ours.astype(float) - theirs], [1.0])
    pair = paired_difference(ours.astype(float), theirs.astype(float))
    assert (alone.mean, alone.low, alone.high) == pytest.approx(
        (pair.mean, pair.low, pair.high), abs=0.005
    )


def test_a_set_that_is_counted_four_times_does_not_narrow_the_interval():
    generator = np.random.default_rng(8)
    table = generator.choice([-1.0, 0.0, 1.0], p=[0.2, 0.55, 0.25], size=(40, 200))
    once = paired_mean_difference([table], [1.0])
    fourfold = paired_difference(np.tile(table, (1, 4)), np.zeros((40, 800)))
    assert once.high - once.low > 1.2 * (fourfold.high - fourfold.low)
