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
