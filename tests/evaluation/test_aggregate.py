"""Aggregates against independent implementations, on random data."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from roadvla.evaluation.aggregate import (
    holm,
    iqm,
    iqm_difference,
    iqm_interval,
    p_value,
    probability_of_improvement,
)
from roadvla.evaluation.stats import paired_difference, t_interval, wilson

seeds = st.integers(0, 10_000)


def outcomes(seed: int, *, gain: float, runs=3, episodes=60):
    generator = np.random.default_rng(seed)
    base = generator.random((runs, episodes)) < 0.5
    better = base | (generator.random((runs, episodes)) < gain)
    return better.astype(int), base.astype(int)


@settings(max_examples=8, deadline=None)
@given(seeds, st.sampled_from([0.0, 0.05, 0.15, 0.4]), st.sampled_from([0.01, 0.05, 0.2]))
def test_p_is_the_level_at_which_the_interval_lets_go_of_zero(seed, gain, alpha):
    ours, theirs = outcomes(seed, gain=gain)
    p = p_value(ours, theirs)
    established = paired_difference(ours, theirs, level=1 - alpha).sign != 0
    if abs(p - alpha) > 1e-6:
        assert established == (p < alpha)
    assert p_value(theirs, ours) == pytest.approx(p, rel=0.05)


def test_p_is_between_its_bounds():
    same = np.ones((3, 20), dtype=int)
    assert p_value(same, same) == pytest.approx(1.0)
    assert p_value(same, 1 - same) >= 1e-4
    none = np.zeros((1, 400), dtype=int)
    assert p_value(1 - none, none) == 1e-4


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=9))
def test_holm_is_statsmodels(p_values):
    expected = multipletests(p_values, method="holm")[1]
    np.testing.assert_allclose(holm(p_values), expected, rtol=1e-12)


@settings(max_examples=50, deadline=None)
@given(seeds, st.integers(1, 7), st.integers(1, 6))
def test_iqm_is_scipys_trimmed_mean(seed, rows, columns):
    scores = np.random.default_rng(seed).random((rows, columns))
    assert iqm(scores) == pytest.approx(scipy_stats.trim_mean(scores, 0.25, axis=None))


@settings(max_examples=3, deadline=None)
@given(seeds)
def test_iqm_intervals_are_those_of_a_loop(seed):
    generator = np.random.default_rng(seed)
    scores = generator.random((7, 5))
    draws = []
    for _ in range(3000):
        drawn = [[row[generator.integers(5)] for _ in range(5)] for row in scores]
        draws.append(scipy_stats.trim_mean(np.array(drawn), 0.25, axis=None))
    found = iqm_interval(scores)
    low, high = np.quantile(draws, [0.025, 0.975])
    assert found.mean == pytest.approx(scipy_stats.trim_mean(scores, 0.25, axis=None))
    assert (found.low, found.high) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))
    assert (found.seeds, found.episodes) == (5, 7)


def test_a_difference_of_iqms_draws_seeds_in_pairs():
    scores = np.random.default_rng(0).random((7, 5))
    found = iqm_difference(scores + 0.1, scores)
    assert found.mean == pytest.approx(0.1)
    assert (found.low, found.high) == (pytest.approx(0.1), pytest.approx(0.1))


@settings(max_examples=12, deadline=None)
@given(seeds, st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_improvement_is_mann_whitneys_u(seed, m, n, ties):
    generator = np.random.default_rng(seed)
    ours, theirs = generator.random((4, m)), generator.random((4, n))
    if ties:
        ours, theirs = ours.round(1), theirs.round(1)
    pairs = zip(ours, theirs, strict=True)
    expected = np.mean([scipy_stats.mannwhitneyu(a, b).statistic / (m * n) for a, b in pairs])
    found = probability_of_improvement(ours, theirs)
    assert found.mean == pytest.approx(expected)
    assert 0 <= found.low <= found.high <= 1


def test_improvement_is_certain_or_even():
    scores = np.random.default_rng(0).random((7, 3))
    sure = probability_of_improvement(scores + 2, scores)
    assert (sure.mean, sure.low, sure.high) == (1.0, 1.0, 1.0)
    assert probability_of_improvement(scores, scores).mean == pytest.approx(0.5)


def test_improvement_intervals_are_those_of_a_loop():
    generator = np.random.default_rng(3)
    ours, theirs = generator.random((6, 4)) + 0.1, generator.random((6, 4))
    draws = []
    for _ in range(2000):
        values = []
        for a, b in zip(ours, theirs, strict=True):
            x, y = generator.choice(a, 4), generator.choice(b, 4)
            values.append(np.mean([(p > q) + 0.5 * (p == q) for p in x for q in y]))
        draws.append(np.mean(values))
    low, high = np.quantile(draws, [0.025, 0.975])
    found = probability_of_improvement(ours, theirs)
    assert (found.low, found.high) == (pytest.approx(low, abs=0.03), pytest.approx(high, abs=0.03))


def test_tables_that_do_not_match_are_refused():
    scores = np.zeros((3, 2))
    with pytest.raises(ValueError, match="settings"):
        probability_of_improvement(scores, np.zeros((2, 2)))
    with pytest.raises(ValueError, match="numbers of seeds"):
        iqm_difference(scores, np.zeros((3, 3)))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 400), st.floats(0, 1))
def test_wilson_is_statsmodels(n, share):
    successes = round(share * n)
    expected = proportion_confint(successes, n, method="wilson")
    np.testing.assert_allclose(wilson(successes, n), expected, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(2, 12))
def test_students_interval_is_scipys(seed, count):
    values = np.random.default_rng(seed).random(count)
    expected = scipy_stats.t.interval(
        0.95, count - 1, loc=values.mean(), scale=scipy_stats.sem(values)
    )
    np.testing.assert_allclose(t_interval(values), expected, atol=1e-9)


# The bootstrap alone, seeds and episodes drawn with replacement, is one of the three spans.
@settings(max_examples=3, deadline=None)
@given(seeds)
def test_the_interval_spans_a_nested_bootstrap_made_by_loops(seed):
    ours, theirs = outcomes(seed, gain=0.1, runs=4, episodes=50)
    difference = ours.astype(float) - theirs
    generator = np.random.default_rng(seed + 1)
    draws = []
    for _ in range(1500):
        rows = generator.integers(4, size=4)
        columns = generator.integers(50, size=50)
        draws.append(difference[rows][:, columns].mean())
    low, high = np.quantile(draws, [0.025, 0.975])
    found = paired_difference(ours, theirs)
    assert found.low <= low + 0.015
    assert found.high >= high - 0.015
