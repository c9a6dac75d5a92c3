"""Adaptation curves: by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from roadvla.evaluation.curves import convergence_step, late_variance, peak

STEPS = (10, 20, 30, 40, 50)


# Means over two seeds: 0.2, 0.5, 0.71, 0.69, 0.70.
CURVES = np.array([[0.1, 0.4, 0.72, 0.68, 0.70], [0.3, 0.6, 0.70, 0.70, 0.70]])


def test_it_settles_where_it_stays_within_two_points_of_its_end():
    assert convergence_step(STEPS, CURVES) == 30
    # At half a point of tolerance 0.71 and 0.69 are still on the way.
    assert convergence_step(STEPS, CURVES, tolerance=0.005) == 50
    assert convergence_step(STEPS, CURVES, tolerance=0.01) == 30


def test_passing_by_the_final_level_is_not_settling():
    curve = np.array([[0.7, 0.2, 0.7, 0.3, 0.7]])
    assert convergence_step(STEPS, curve) == 50
    assert convergence_step(STEPS, np.full((2, 5), 0.4)) == 10


def test_the_peak_is_of_the_mean_and_the_first_of_its_kind():
    assert peak(STEPS, CURVES) == (pytest.approx(0.71), 30)
    assert peak(STEPS, np.array([[0.1, 0.5, 0.5, 0.4, 0.5]])) == (0.5, 20)


# From 70 % of 50, so 35, on: points at 40 and 50. Seed 1: 68, 70 has variance 2; seed 2 none.
def test_late_variance_is_of_each_seed_over_the_last_thirty_percent():
    assert late_variance(STEPS, CURVES) == pytest.approx(1.0)
    # With 40 %: from 30 on. Seed 1: 72, 68, 70 has variance 4; seed 2: 70, 70, 70 none.
    assert late_variance(STEPS, CURVES, share=0.4) == pytest.approx(2.0)
    assert math.isnan(late_variance(STEPS, CURVES, share=0.1))


# The boundary at 70 % of 100 is 70: in; 69 is out. 80, 70 has variance 50; with the 0, more.
def test_a_point_at_the_boundary_is_late():
    assert late_variance((69, 70, 100), np.array([[0.0, 0.8, 0.7]])) == pytest.approx(50)
    # 1 − 0.9 is a little below 0.1 in floating point, 1 − 0.7 a little above 0.3.
    assert late_variance((30, 100), np.array([[0.8, 0.7]]), share=0.7) == pytest.approx(50)


# Each seed is restless about its own level: 70, 80 and 20, 10 have variance 50 each; the mean
# curve, 45 and 45, has none, and the spread between seeds does not count.
def test_late_variance_is_not_of_the_mean_curve():
    assert late_variance((70, 100), np.array([[0.7, 0.8], [0.2, 0.1]])) == pytest.approx(50)


# Single seeds settle at 30 and 20; the mean 0.25, 0.5, 0.49, 0.5 does at 20.
def test_it_is_the_mean_over_seeds_that_settles():
    curves = np.array([[0.3, 0.45, 0.5, 0.5], [0.2, 0.55, 0.48, 0.5]])
    assert convergence_step(STEPS[:4], curves) == 20
    assert convergence_step(STEPS[:4], curves[:1]) == 30


def test_one_point_is_its_own_end_and_peak():
    one = np.array([[0.4], [0.6]])
    assert convergence_step((7,), one) == 7
    assert peak((7,), one) == (0.5, 7)
    assert math.isnan(late_variance((7,), one))


@pytest.mark.parametrize("measure", [convergence_step, peak, late_variance])
def test_a_curve_needs_a_step_for_each_point(measure):
    with pytest.raises(ValueError, match="4 steps for 5 points"):
        measure(STEPS[:4], CURVES)
    with pytest.raises(ValueError, match="0 steps for 0 points"):
        measure((), np.zeros((2, 0)))
