"""Eq. 7-9: two critics to one weight, by hand and against Algorithm 1 written over floats.

Â_int = (3, -1, 3, -1): μ = 1, σ = 2.  Â_ref = 10 + (7, -1, 1, -7): μ = 10, σ = 5.
(7) Ã_ref = 1 + 2/5 (7, -1, 1, -7) = (3.8, .6, 1.4, -1.8)
(8) signs + - + - against + + + -: g = (1, 0, 1, 1), Â_mix = (3.4, -1, 2.2, -1.4) for α = 1/2
(9) μ_mix = .8, deviations (2.6, -1.8, 1.4, -2.2), σ² = (6.76 + 3.24 + 1.96 + 4.84)/4 = 4.2
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles
from roadvla.objective import (
    agreement_gate,
    calibrate,
    gated_mix,
    guidance_weight,
    mixed_advantage,
    perturbation_weight,
)

OWN = torch.tensor([3.0, -1.0, 3.0, -1.0], dtype=torch.float64)
REFERENCE = torch.tensor([17.0, 9.0, 11.0, 3.0], dtype=torch.float64)
CALIBRATED = [3.8, 0.6, 1.4, -1.8]
MIXED = [3.4, -1.0, 2.2, -1.4]


def test_eq_07_golden() -> None:
    assert calibrate(OWN, REFERENCE).tolist() == pytest.approx(CALIBRATED, abs=1e-7)
    # ε = 5 beside σ_ref = 5 halves the slope.
    halved = [1.0 + 0.5 * (x - 1.0) for x in CALIBRATED]
    assert calibrate(OWN, REFERENCE, eps=5.0).tolist() == pytest.approx(halved)


def test_eq_08_golden() -> None:
    calibrated = torch.tensor(CALIBRATED, dtype=torch.float64)
    assert agreement_gate(OWN, calibrated).tolist() == [True, False, True, True]
    assert gated_mix(OWN, calibrated).tolist() == pytest.approx(MIXED)
    assert gated_mix(OWN, calibrated, alpha=0.25).tolist() == pytest.approx([3.2, -1, 2.6, -1.2])
    mixed, agree = mixed_advantage(OWN, REFERENCE)
    assert mixed.tolist() == pytest.approx(MIXED, abs=1e-7)
    assert agree.tolist() == [True, False, True, True]
    # Without the gate the second step moves too: -1 + 1/2 (.6 + 1) = -.2
    mixed, agree = mixed_advantage(OWN, REFERENCE, gate=False)
    assert mixed.tolist() == pytest.approx([3.4, -0.2, 2.2, -1.4], abs=1e-7)
    assert agree.tolist() == [True, False, True, True]


def test_eq_09_golden() -> None:
    standard = [x / 4.2**0.5 for x in (2.6, -1.8, 1.4, -2.2)]  # 1.27 -.88 .68 -1.07
    mixed = torch.tensor(MIXED, dtype=torch.float64)
    assert perturbation_weight(mixed).tolist() == pytest.approx(standard, abs=1e-7)
    clipped = [1.0, standard[1], standard[2], -1.0]
    assert perturbation_weight(mixed, clip=1.0).tolist() == pytest.approx(clipped, abs=1e-7)
    positive = [1.0, 0.0, standard[2], 0.0]
    assert perturbation_weight(mixed, clip=1.0, positive_only=True).tolist() == pytest.approx(
        positive, abs=1e-7
    )
    # ε = σ halves it.
    half = perturbation_weight(mixed, eps=4.2**0.5).tolist()
    assert half == pytest.approx([0.5 * x for x in standard])


def test_eq_09_default_clip_is_two() -> None:
    outlier = torch.zeros(100, dtype=torch.float64)
    outlier[0], outlier[1] = 100.0, -100.0
    weight = perturbation_weight(outlier)
    assert weight.max().item() == 2.0
    assert weight.min().item() == -2.0


@given(
    st.lists(st.tuples(st.floats(-3, 3), st.floats(-30, 30)), min_size=2, max_size=12),
    st.floats(0.0, 1.0),
    st.floats(0.1, 3.0),
)
def test_eq_07_09_are_lines_11_to_17_of_algorithm_1(
    pairs: list[tuple[float, float]], alpha: float, clip: float
) -> None:
    own = torch.tensor([x for x, _ in pairs], dtype=torch.float64)
    other = torch.tensor([y for _, y in pairs], dtype=torch.float64)
    # With ε not tiny, rounding cannot decide a sign or a quotient of rounding errors.
    weights, gates, mixed = oracles.guidance(own.tolist(), other.tolist(), alpha, clip, 1e-3)
    weight, agree = guidance_weight(own, other, alpha=alpha, clip=clip, eps=1e-3)
    if agree.tolist() == gates:
        assert weight.tolist() == pytest.approx(weights, abs=1e-7)
        result, _ = mixed_advantage(own, other, alpha=alpha, eps=1e-3)
        assert result.tolist() == pytest.approx(mixed, abs=1e-9)
    else:  # only where a calibrated value is a rounding error away from 0
        differs = agree != torch.tensor(gates)
        assert (calibrate(own, other, eps=1e-3)[differs].abs() < 1e-12).all()
