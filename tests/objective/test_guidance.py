from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from roadvla.objective import (
    agreement_gate,
    calibrate,
    gated_mix,
    guidance_weight,
    mixed_advantage,
    perturbation_weight,
    standardize,
)

SEEDS = st.integers(0, 2**31)


def pair(seed: int, size: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    own, other = torch.randn(2, size, generator=generator, dtype=torch.float64)
    return own, 0.7 * own + other


@given(SEEDS, st.floats(0.01, 100.0), st.floats(-50.0, 50.0))
def test_calibration_forgets_the_references_scale(seed: int, scale: float, shift: float) -> None:
    own, other = pair(seed)
    plain = calibrate(own, other, eps=0.0)
    moved = calibrate(own, scale * other + shift, eps=0.0)
    assert torch.allclose(plain, moved, atol=1e-8)
    assert torch.allclose(plain.mean(), own.mean(), atol=1e-10)
    assert torch.allclose(plain.std(correction=0), own.std(correction=0), atol=1e-10)


def test_calibrating_an_estimate_to_itself_changes_nothing() -> None:
    own, _ = pair(3)
    assert torch.allclose(calibrate(own, own), own)


@given(SEEDS, st.floats(0.0, 1.0), st.floats(0.05, 3.0), st.booleans(), st.booleans())
def test_weight_is_bounded_and_its_sign_gate_holds(
    seed: int, alpha: float, clip: float, gate: bool, positive_only: bool
) -> None:
    own, other = pair(seed)
    signed, _ = guidance_weight(own, other, alpha=alpha, clip=clip, gate=gate)
    weight, _ = guidance_weight(
        own, other, alpha=alpha, clip=clip, gate=gate, positive_only=positive_only
    )
    assert signed.abs().max() <= clip
    assert signed.min() < 0.0 < signed.max()
    assert torch.equal(weight, signed.relu() if positive_only else signed)


@given(SEEDS, st.floats(0.0, 1.0))
def test_gate_keeps_the_intrinsic_estimate_where_critics_disagree(seed: int, alpha: float) -> None:
    own, other = pair(seed)
    mixed, agree = mixed_advantage(own, other, alpha=alpha)
    calibrated = calibrate(own, other)
    assert torch.equal(agree, own.sign() == calibrated.sign())
    assert torch.equal(mixed[~agree], own[~agree])
    assert torch.allclose(mixed[agree], ((1 - alpha) * own + alpha * calibrated)[agree])
    assert torch.equal(mixed, gated_mix(own, calibrated, alpha=alpha))
    ungated, reported = mixed_advantage(own, other, alpha=alpha, gate=False)
    assert torch.equal(reported, agree)
    assert torch.allclose(ungated, (1 - alpha) * own + alpha * calibrated)


def test_zero_agrees_with_zero_alone() -> None:
    own = torch.tensor([0.0, 0.0, 0.0, 1.0, -1.0])
    other = torch.tensor([-0.0, 1.0, -1.0, 0.0, 0.0])
    assert agreement_gate(own, other).tolist() == [True, False, False, False, False]


def test_extremes_of_alpha() -> None:
    own, other = pair(1)
    assert torch.equal(gated_mix(own, other, alpha=0.0), own)
    only = gated_mix(own, other, alpha=1.0)
    agree = own.sign() == other.sign()
    assert torch.allclose(only[agree], other[agree])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_estimates_give_no_guidance(dtype: torch.dtype) -> None:
    # 1536 times .1 in float32: a mean rounded to float32 would miss .1 by about sigma itself.
    constant = torch.full((1536,), 0.1, dtype=dtype)
    varied = torch.linspace(-1.0, 2.0, 1536, dtype=dtype)
    assert perturbation_weight(constant).abs().max() < 1e-6
    assert guidance_weight(constant, constant)[0].abs().max() < 1e-6
    assert torch.allclose(calibrate(varied, constant), varied.mean().expand(1536))


def test_any_leading_shape_is_one_population() -> None:
    own, other = (x.view(8, 5) for x in pair(2))
    weight, agree = guidance_weight(own, other)
    flat, flat_agree = guidance_weight(own.flatten(), other.flatten())
    assert torch.equal(weight.flatten(), flat)
    assert torch.equal(agree.flatten(), flat_agree)


def test_composition_and_defaults() -> None:
    own, other = pair(4)
    weight, agree = guidance_weight(own, other)
    mixed, reported = mixed_advantage(own, other, alpha=0.5, eps=1e-8, gate=True)
    assert torch.equal(weight, perturbation_weight(mixed, clip=2.0, eps=1e-8))
    assert torch.equal(weight, standardize(mixed).clamp(-2.0, 2.0))
    assert torch.equal(agree, reported)
    everywhere, _ = mixed_advantage(own, other, alpha=0.3, gate=False)
    weight, agree = guidance_weight(own, other, alpha=0.3, clip=1.5, gate=False)
    assert torch.equal(weight, perturbation_weight(everywhere, clip=1.5))
    assert torch.equal(agree, reported)


def test_float32_in_float32_out_and_no_gradient() -> None:
    own, other = (x.float().requires_grad_() for x in pair(5))
    for result in (*guidance_weight(own, other), calibrate(own, other), standardize(own)):
        assert not result.requires_grad
        assert result.dtype in (torch.float32, torch.bool)
    assert not gated_mix(own, other).requires_grad
    assert not perturbation_weight(own).requires_grad


@pytest.mark.usefixtures("unchecked")
def test_refusals() -> None:
    own, other = torch.zeros(4), torch.zeros(4)
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="alpha"):
            guidance_weight(own, other, alpha=alpha)
    for clip in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="clip"):
            perturbation_weight(own, clip=clip)
    for function in (calibrate, agreement_gate, gated_mix, mixed_advantage, guidance_weight):
        with pytest.raises(ValueError, match="one shape"):
            function(own, torch.zeros(4, 1))
