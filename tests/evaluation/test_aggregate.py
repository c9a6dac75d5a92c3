"""Aggregates against independent implementations, on random data.

rliable itself is no dependency of the tests: its newest release needs arch < 8, which pandas 3
breaks. Its answers on one table, made apart, are written down here.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from statsmodels.stats.multitest import multipletests

from roadvla.evaluation.aggregate import (
    EVEN,
    SMALLEST_P,
    holm,
    iqm,
    iqm_difference,
    iqm_interval,
    p_value,
    probability_of_improvement,
)
from roadvla.evaluation.stats import bootstrap, paired_difference

seeds = st.integers(0, 10_000)

# Percent, settings by seeds, and what rliable 1.2.0 says of them (arch 7.2.0, 50 000 draws).
OURS = np.array([
    [77, 77, 64, 87, 73], [69, 66, 55, 70, 71], [69, 41, 53, 52, 77], [64, 42, 55, 87, 76],
    [55, 86, 50, 85, 47], [44, 42, 53, 66, 88], [68, 53, 46, 80, 83],
])  # fmt: skip
THEIRS = np.array([
    [69, 75, 62, 43], [63, 70, 41, 79], [31, 50, 36, 78], [36, 46, 52, 45], [53, 38, 63, 40],
    [70, 42, 51, 62], [35, 77, 42, 60],
])  # fmt: skip
RLIABLE_IQM = (0.64947368, 0.59105263, 0.71052632)
RLIABLE_IMPROVEMENT = (0.70714286, 0.56428571, 0.83571429)


def outcomes(seed: int, *, gain: float, runs=3, episodes=60, loss=0.05):
    generator = np.random.default_rng(seed)
    base = generator.random((runs, episodes)) < 0.5
    better = base | (generator.random((runs, episodes)) < gain)
    better &= generator.random((runs, episodes)) >= loss
    return better.astype(int), base.astype(int)


@settings(max_examples=30, deadline=None)
@given(
    seeds,
    st.sampled_from([(1, 25), (1, 400), (2, 30), (3, 60), (5, 20)]),
    st.sampled_from([0.0, 0.03, 0.1, 0.4]),
    st.booleans(),
)
def test_p_is_the_level_at_which_the_interval_lets_go_of_zero(seed, shape, gain, swap):
    ours, theirs = outcomes(seed, gain=gain, runs=shape[0], episodes=shape[1])
    if swap:
        ours, theirs = theirs, ours
    p = p_value(ours, theirs)
    for alpha in (1e-3, 0.01, 0.05, 0.2, 0.5, p * (1 - 1e-6), p * (1 + 1e-6)):
        if SMALLEST_P <= alpha < 1:
            established = paired_difference(ours, theirs, level=1 - alpha).sign != 0
            assert established == (p <= alpha), (p, alpha)
    assert p_value(theirs, ours) == p


def component_tails(difference, generator):
    """Two-sided p of each interval, from scipy and a bootstrap by loops."""
    runs, episodes = difference.shape
    draws = [
        difference[generator.integers(runs, size=runs)][
            :, generator.integers(episodes, size=episodes)
        ].mean()
        for _ in range(4000)
    ]
    up, down = ((sign * difference > 0).sum() + 1 for sign in (1, -1))
    n = difference.size + 2
    error = np.sqrt((up + down) / n - ((up - down) / n) ** 2) / np.sqrt(n)
    return (
        2 * min(np.mean(np.array(draws) <= 0), np.mean(np.array(draws) >= 0)),
        scipy_stats.ttest_1samp(difference.mean(1), 0).pvalue if runs > 1 else 0.0,
        2 * scipy_stats.norm.sf(abs(up - down) / n / error),
    )


# The tables are chosen so that each of the three is the largest somewhere, by far.
@pytest.mark.parametrize(
    ("decides", "case", "gain", "shape"),
    [(0, 2, 0.2, (3, 60)), (0, 8, 0.1, (3, 60)), (1, 7, 0.2, (3, 60)), (2, 2, 0.1, (1, 30))],
)
def test_p_is_the_largest_of_three(decides, case, gain, shape):
    ours, theirs = outcomes(case, gain=gain, runs=shape[0], episodes=shape[1])
    tails = component_tails(ours.astype(float) - theirs, np.random.default_rng(case))
    assert np.argmax(tails) == decides, tails
    tolerance = {"abs": 0.025} if decides == 0 else {"rel": 1e-9}
    assert p_value(ours, theirs) == pytest.approx(max(tails), **tolerance)


def test_p_is_between_its_bounds():
    same = np.ones((3, 20), dtype=int)
    assert p_value(same, same) == 1.0
    assert p_value(same, 1 - same) >= SMALLEST_P
    none = np.zeros((1, 400), dtype=int)
    assert p_value(1 - none, none) == SMALLEST_P == 1e-4


def test_p_by_hand():
    # 4 gained, 0 lost of 64: (5 − 1)/66 over sqrt((6/66 − (4/66)²)/66) = 0.0606061/0.0363561 =
    # 1.667011 standard errors, 9.5512 % on both sides; no draw is below 0 and few are 0.
    none, four = np.zeros((1, 64)), np.zeros((1, 64))
    four[0, :4] = 1
    assert p_value(four, none) == pytest.approx(0.095512, abs=1e-5)


def test_holm_by_hand():
    # Sorted 0.01 0.02 0.03 0.6, times 4, 3, 2, 1: 0.04 0.06 0.06 0.6; equal ones stay equal.
    assert holm([0.03, 0.6, 0.01, 0.02]) == pytest.approx([0.06, 0.6, 0.04, 0.06])
    assert holm([0.4, 0.4]) == [0.8, 0.8]
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
    # Two of the three comparisons are still to come, or one of four.
    assert holm([0.01], 3) == [pytest.approx(0.03)]
    assert holm([0.02, 0.01], 3) == pytest.approx([0.04, 0.03])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=9))
def test_holm_is_statsmodels(p_values):
    expected = multipletests(p_values, method="holm")[1]
    np.testing.assert_allclose(holm(p_values), expected, rtol=1e-12)


@settings(max_examples=50, deadline=None)
@given(seeds, st.integers(1, 7), st.integers(1, 6))
def test_iqm_is_scipys_trimmed_mean(seed, rows, columns):
    scores = np.random.default_rng(seed).random((rows, columns))
    assert iqm(scores) == pytest.approx(scipy_stats.trim_mean(scores, 0.25, axis=None))


def widened(draws, mean, runs):
    """The wider of the draws' quantiles and of t with their deviation, from scipy."""
    error = np.std(draws) * np.sqrt(runs / (runs - 1))
    t = scipy_stats.t.interval(0.95, runs - 1, loc=mean, scale=error)
    low, high = np.quantile(draws, [0.025, 0.975])
    return min(low, t[0]), max(high, t[1])


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
    low, high = widened(draws, scipy_stats.trim_mean(scores, 0.25, axis=None), 5)
    assert found.mean == pytest.approx(scipy_stats.trim_mean(scores, 0.25, axis=None))
    assert (found.low, found.high) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))
    assert (found.seeds, found.episodes) == (5, 7)


def test_a_difference_of_iqms_draws_seeds_in_pairs():
    scores = np.random.default_rng(0).random((7, 5))
    found = iqm_difference(scores + 0.1, scores)
    assert found.mean == pytest.approx(0.1)
    assert (found.low, found.high) == (pytest.approx(0.1), pytest.approx(0.1))


GROUPS = (4, 4, 1, 4, 9)  # three of five settings share their runs; labels are any numbers


def drawn_by_group(table, generator):
    """Seeds of each group once, by loops."""
    runs = table.shape[1]
    picks = {group: [generator.integers(runs) for _ in range(runs)] for group in GROUPS}
    return np.array(
        [[row[s] for s in picks[group]] for row, group in zip(table, GROUPS, strict=True)]
    )


@settings(max_examples=3, deadline=None)
@given(seeds)
def test_settings_that_share_runs_share_draws(seed):
    generator = np.random.default_rng(seed)
    luck = generator.normal(size=(1, 4))
    ours, theirs = (luck + 0.3 * generator.normal(size=(5, 4)) for _ in range(2))
    means, apart, likely = [], [], []
    for _ in range(3000):
        first, second = drawn_by_group(np.stack([ours, theirs], axis=2), generator).T.swapaxes(1, 2)
        means.append(scipy_stats.trim_mean(first.T, 0.25, axis=None))
        apart.append(means[-1] - scipy_stats.trim_mean(second.T, 0.25, axis=None))
        pairs = (
            drawn_by_group(ours, generator)[:, :, None] - drawn_by_group(theirs, generator)[:, None]
        )
        likely.append((pairs > 0).mean() + (pairs == 0).mean() / 2)
    for found, draws, limits in (
        (iqm_interval(ours, GROUPS), means, (-9, 9)),
        (iqm_difference(ours, theirs, GROUPS), apart, (-9, 9)),
        (probability_of_improvement(ours, theirs, GROUPS), likely, (0, 1)),
    ):
        low, high = np.clip(widened(draws, found.mean, 4), *limits)
        tolerance = 0.05 * (high - low)
        assert found.low == pytest.approx(low, abs=tolerance)
        assert found.high == pytest.approx(high, abs=tolerance)


def test_shared_runs_widen_the_interval():
    luck = np.random.default_rng(1).normal(size=(1, 4))
    scores = luck + 0.1 * np.random.default_rng(2).normal(size=(7, 4))
    apart, shared = iqm_interval(scores), iqm_interval(scores, [0] * 7)
    assert shared.mean == apart.mean
    assert shared.high - shared.low > 1.5 * (apart.high - apart.low)
    worse = np.zeros((7, 4))
    apart, shared = (probability_of_improvement(scores, worse, g) for g in ((), [0] * 7))
    assert shared.high - shared.low > 1.5 * (apart.high - apart.low)


def test_two_runs_that_are_alike_everywhere_are_still_two():
    # Eight settings that repeat the same three rates say no more than one setting does.
    one = np.array([[0.2, 0.5, 0.6]])
    found, alone = iqm_interval(np.repeat(one, 8, axis=0), [3] * 8), iqm_interval(one)
    assert found.high - found.low == pytest.approx(alone.high - alone.low, rel=0.35)


# Four groups of three seeds, as in the study of seven settings, and no difference at all.
def test_marks_without_a_difference_are_rare():
    generator, groups, marks = np.random.default_rng(0), (0, 0, 0, 0, 1, 2, 3), np.zeros(2)
    for _ in range(200):
        ours, theirs = (
            0.7 * generator.normal(size=(4, 3))[list(groups)] + 0.3 * generator.normal(size=(7, 3))
            for _ in range(2)
        )
        improved = probability_of_improvement(ours, theirs, groups)
        marks += (
            iqm_difference(ours, theirs, groups).sign != 0,
            improved.low > EVEN or improved.high < EVEN,
        )
    assert (marks <= 0.05 * 200 + 3).all(), marks  # quantiles alone mark about one in five


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
    assert min(m, n) == 1 or 0 <= found.low <= found.high <= 1


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
    found = probability_of_improvement(ours, theirs)
    low, high = np.clip(widened(draws, found.mean, 4), 0, 1)
    assert (found.low, found.high) == (pytest.approx(low, abs=0.03), pytest.approx(high, abs=0.03))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (iqm_interval(OURS / 100), RLIABLE_IQM),
        (probability_of_improvement(OURS / 100, THEIRS / 100), RLIABLE_IMPROVEMENT),
    ],
)
def test_intervals_are_rliables_widened_for_few_seeds(found, expected):
    # rliable's quantiles lie 1.959964 deviations out; t's with n seeds lie t·sqrt(n/(n − 1)) out:
    # 2.776445·1.118034 for 5, 3.182446·1.154701 for 4.
    wider = {5: 3.104160, 4: 3.674772}[found.seeds] / 1.959964
    assert found.mean == pytest.approx(expected[0], abs=1e-8)
    half = wider * (expected[2] - expected[1]) / 2
    ends = np.clip([found.mean - half, found.mean + half], 0, 1)
    assert (found.low, found.high) == pytest.approx(tuple(ends), abs=0.025)


def test_a_narrower_level_narrows_the_interval():
    wide, narrow = iqm_interval(OURS / 100), iqm_interval(OURS / 100, level=0.5)
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high
    # Of t with 4 degrees of freedom the middle half is 0.740697 / 2.776445 as wide as 95 %.
    ratio = (narrow.high - narrow.low) / (wide.high - wide.low)
    assert ratio == pytest.approx(0.2668, abs=1e-3)


def test_one_seed_tells_nothing_of_others():
    one = OURS[:, :1] / 100
    for found in (
        iqm_interval(one),
        iqm_difference(one + 0.1, one),
        probability_of_improvement(OURS / 100, one),
    ):
        assert np.isnan([found.low, found.high]).all()
        assert (found.sign, found.seeds, found.episodes) == (0, 1, 7)


def test_tables_that_do_not_match_are_refused(unchecked):
    scores = np.zeros((3, 2))
    with pytest.raises(ValueError, match="settings"):
        probability_of_improvement(scores, np.zeros((2, 2)))
    with pytest.raises(ValueError, match="numbers of seeds"):
        iqm_difference(scores, np.zeros((3, 3)))
    with pytest.raises(ValueError, match="2 groups for 3 settings"):
        iqm_interval(scores, (0, 1))
    with pytest.raises(ValueError, match="shapes differ"):
        p_value(scores, np.zeros((1, 2)))


# The interval is the widest of three; here all three are made by other means.
@settings(max_examples=5, deadline=None)
@given(seeds)
def test_the_interval_is_the_widest_of_three(seed):
    ours, theirs = outcomes(seed, gain=0.1, runs=4, episodes=50)
    difference = ours.astype(float) - theirs
    generator = np.random.default_rng(seed + 1)
    draws = []
    for _ in range(3000):
        rows, columns = generator.integers(4, size=4), generator.integers(50, size=50)
        draws.append(np.mean([[difference[row, column] for column in columns] for row in rows]))
    up, down = (((sign * difference > 0).sum() + 1) / 202 for sign in (1, -1))
    half = scipy_stats.norm.isf(0.025) * np.sqrt((up + down - (up - down) ** 2) / 202)
    values = difference.mean(1)
    t = scipy_stats.t.interval(0.95, 3, loc=values.mean(), scale=scipy_stats.sem(values))
    spans = np.array([np.quantile(draws, [0.025, 0.975]), (up - down - half, up - down + half), t])
    found = paired_difference(ours, theirs)
    assert found.low == pytest.approx(np.nanmin(spans[:, 0]), abs=0.012)
    assert found.high == pytest.approx(np.nanmax(spans[:, 1]), abs=0.012)


# With one seed t drops out, and scipy draws the episodes in pairs.
@settings(max_examples=5, deadline=None)
@given(seeds)
def test_the_bootstrap_of_one_seed_is_scipys_paired_one(seed):
    ours, theirs = outcomes(seed, gain=0.1, runs=1, episodes=150)
    expected = scipy_stats.bootstrap(
        (ours[0], theirs[0]),
        lambda a, b, axis: (a - b).mean(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=4000,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    draws = bootstrap(ours.astype(float) - theirs, "episodes", 4000)
    assert np.quantile(draws, [0.025, 0.975]) == pytest.approx(tuple(expected), abs=0.008)
