from __future__ import annotations

import math

import pytest
import torch

from roadvla.objective import linear_bump, proximal_teacher, teacher_logits, token_log_probs


def test_bump_lands_on_the_sampled_token_only() -> None:
    logits = torch.randn(3, 2, 5)
    tokens = torch.tensor([[0, 4], [1, 1], [2, 3]])
    weight = torch.tensor([1.0, -2.0, 0.5])
    bump = teacher_logits(logits, tokens, weight, eta=0.5) - logits
    expected = torch.zeros_like(logits)
    for n in range(3):
        for k in range(2):
            expected[n, k, tokens[n, k]] = 0.5 * weight[n]
    assert torch.allclose(bump, expected, atol=1e-6)


def test_default_strength_is_one_and_input_is_untouched() -> None:
    logits, tokens = torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.long)
    result = teacher_logits(logits, tokens, torch.tensor([math.log(3.0)]))
    assert torch.allclose(result.softmax(-1), torch.tensor([0.75, 0.25]))
    assert not logits.any()


def test_weight_is_one_per_action_without_leading_dimensions_too() -> None:
    result = teacher_logits(torch.zeros(2, 3), torch.tensor([0, 2]), torch.tensor(1.5))
    assert result.tolist() == [[1.5, 0.0, 0.0], [0.0, 0.0, 1.5]]


def test_masked_bins_stay_masked_and_half_precision_is_raised() -> None:
    logits = torch.tensor([[[0.0, -math.inf, 1.0]]], dtype=torch.bfloat16)
    result = teacher_logits(logits, torch.tensor([[1]]), torch.tensor([2.0]))
    assert result.dtype == torch.float32
    assert result.tolist() == [[[0.0, -math.inf, 1.0]]]


def test_nothing_carries_gradient() -> None:
    logits, weight = torch.zeros(1, 2, 3, requires_grad=True), torch.ones(1, requires_grad=True)
    tokens = torch.zeros(1, 2, dtype=torch.long)
    assert not teacher_logits(logits, tokens, weight).requires_grad
    assert not proximal_teacher(logits, logits).requires_grad
    assert not linear_bump(token_log_probs(logits, tokens), weight).requires_grad


def test_linear_teacher_departs_linearly() -> None:
    logits = torch.randn(6, 4, 9, dtype=torch.float64)
    tokens = torch.randint(9, (6, 4))
    weight = torch.linspace(-2.0, 2.0, 6, dtype=torch.float64)
    log_prob = token_log_probs(logits, tokens)
    bump = linear_bump(log_prob, weight, eta=0.45)
    one_hot = torch.nn.functional.one_hot(tokens, 9)
    student = logits.softmax(-1)
    teacher = (logits + bump.unsqueeze(-1) * one_hot).softmax(-1)
    strength = (0.45 * weight)[:, None, None] * log_prob.exp().unsqueeze(-1)
    assert torch.allclose(teacher - student, strength * (one_hot - student), atol=1e-14)


def test_linear_bump_stays_finite_at_its_limits() -> None:
    log_prob = torch.tensor([[0.0, -1e-7, -0.5, -50.0, -1e4, -math.inf]])
    for weight in (-5.0, -1.0, 1.0, 5.0):
        bump = linear_bump(log_prob, torch.tensor([weight]))
        assert bump.isfinite().all()
        assert torch.equal(bump.sign(), torch.full_like(bump, weight).sign())
    # c = 5 is held below 1: p = e^-0.5 gives q_a = p + c p (1 - p) with c = 1
    bump = linear_bump(log_prob, torch.tensor([5.0]))[0, 2]
    p = math.exp(-0.5)
    assert math.isclose(
        p * math.exp(bump) / (1 + p * math.expm1(bump)), p + p * (1 - p), rel_tol=1e-5
    )


@pytest.mark.usefixtures("unchecked")
def test_refusals() -> None:
    logits, tokens, weight = torch.zeros(3, 2, 5), torch.zeros(3, 2).long(), torch.zeros(3)
    for eta in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="eta"):
            teacher_logits(logits, tokens, weight, eta=eta)
        with pytest.raises(ValueError, match="eta"):
            linear_bump(torch.zeros(3, 2), weight, eta=eta)
    with pytest.raises(ValueError, match="one value per action"):
        teacher_logits(logits, tokens, torch.zeros(1))
    with pytest.raises(ValueError, match="one value per action"):
        linear_bump(torch.zeros(3, 2), torch.zeros(3, 1))
    for tau in (0.0, -1.0):
        with pytest.raises(ValueError, match="tau"):
            proximal_teacher(logits, logits, tau=tau)
    with pytest.raises(ValueError, match="one shape"):
        proximal_teacher(logits, logits[0])
