from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from roadvla.objective import (
    agd_loss,
    agd_loss_sampled,
    divergence,
    inverse_prob_weight,
    teacher_logits,
    token_log_probs,
)

FORMS = ("exponential", "odd", "linear")
N, K, V = 5, 7, 11


def sample(
    seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(N, K, V, generator=generator, dtype=dtype)
    tokens = torch.randint(V, (N, K), generator=generator)
    weight = torch.randn(N, generator=generator, dtype=dtype).clamp(-2.0, 2.0)
    return logits.requires_grad_(), tokens, weight


def push(loss: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Minus the gradient, the direction a step of descent takes."""
    return -torch.autograd.grad(loss, logits)[0]


def along(logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sampled token's probability [.., 1] and e_a - p."""
    probs = logits.detach().softmax(-1)
    return probs.gather(-1, tokens[..., None]), torch.nn.functional.one_hot(tokens, V) - probs


@given(
    st.integers(0, 2**31),
    st.floats(0.05, 3.0),
    st.sampled_from(FORMS),
    st.sampled_from(["mean", "sum", "none"]),
    st.floats(0.1, 5.0),
)
def test_closed_form_is_the_dense_form(
    seed: int, eta: float, teacher: str, reduction: str, scale: float
) -> None:
    logits, tokens, weight = sample(seed, scale=scale)
    factor = torch.rand(N, K, dtype=torch.float64)
    dense = agd_loss(
        logits, tokens, weight, eta=eta, reduction=reduction, teacher=teacher, token_weight=factor
    )
    closed = agd_loss_sampled(
        token_log_probs(logits, tokens), weight,
        eta=eta, reduction=reduction, teacher=teacher, token_weight=factor,
    )  # fmt: skip
    assert dense.shape == closed.shape
    assert torch.allclose(dense, closed, rtol=1e-9, atol=1e-12)
    difference = push(dense.sum(), logits) - push(closed.sum(), logits)
    assert difference.abs().max() < 1e-10


@pytest.mark.parametrize("teacher", FORMS)
def test_closed_form_in_float32(teacher: str) -> None:
    logits, tokens, weight = sample(dtype=torch.float32, scale=3.0)
    dense = agd_loss(logits, tokens, weight, teacher=teacher, eta=0.5)
    closed = agd_loss_sampled(token_log_probs(logits, tokens), weight, teacher=teacher, eta=0.5)
    assert torch.allclose(dense, closed, atol=1e-6)
    assert torch.allclose(push(dense, logits), push(closed, logits), atol=1e-6)


def test_exponential_push() -> None:
    logits, tokens, weight = sample()
    p, direction = along(logits, tokens)
    tilt = torch.expm1(0.7 * weight)[:, None, None]
    kappa = p * tilt / (1.0 + p * tilt)
    for loss in (
        agd_loss(logits, tokens, weight, eta=0.7),
        agd_loss_sampled(token_log_probs(logits, tokens), weight, eta=0.7),
    ):
        assert torch.allclose(push(loss, logits), kappa * direction / (N * K), atol=1e-15)


def test_odd_push_is_odd_and_symmetric() -> None:
    logits, tokens, weight = sample()
    p, direction = along(logits, tokens)
    factor = inverse_prob_weight(token_log_probs(logits, tokens), delta=1e-9)
    w = (0.7 * weight)[:, None, None]
    expected = w.sinh() / (1.0 + 2.0 * p * (1.0 - p) * (w.cosh() - 1.0)) * direction / (N * K)
    for loss in (
        agd_loss(logits, tokens, weight, eta=0.7, teacher="odd", token_weight=factor),
        agd_loss_sampled(
            token_log_probs(logits, tokens), weight, eta=0.7, teacher="odd", token_weight=factor
        ),
    ):
        assert torch.allclose(push(loss, logits), expected, atol=1e-15)
    reversed_push = push(agd_loss(logits, tokens, -weight, teacher="odd"), logits)
    assert torch.allclose(
        reversed_push, -push(agd_loss(logits, tokens, weight, teacher="odd"), logits), atol=1e-15
    )


def test_linear_push_is_a_policy_gradient() -> None:
    logits, tokens, weight = sample()
    p, direction = along(logits, tokens)
    c = (0.45 * weight)[:, None, None]
    loss = agd_loss(logits, tokens, weight, eta=0.45, teacher="linear", reduction="sum")
    assert torch.allclose(push(loss, logits), c * p * direction / N, atol=1e-15)
    factor = inverse_prob_weight(token_log_probs(logits, tokens), delta=1e-9)
    loss = agd_loss_sampled(
        token_log_probs(logits, tokens), weight,
        eta=0.45, teacher="linear", reduction="sum", token_weight=factor,
    )  # fmt: skip
    assert torch.allclose(push(loss, logits), c * direction / N, atol=1e-14)


def test_rollout_teacher_pulls_back_to_the_behaviour_policy() -> None:
    logits, tokens, weight = sample()
    old, _, _ = sample(1)
    loss = agd_loss(logits, tokens, weight, behaviour_logits=old, reduction="sum")
    p, p_old = logits.detach().softmax(-1), old.detach().softmax(-1)
    target = teacher_logits(old, tokens, weight).softmax(-1)
    assert torch.allclose(push(loss, logits), ((p_old - p) + (target - p_old)) / N, atol=1e-15)
    linear = agd_loss(
        logits, tokens, weight, behaviour_logits=old, reduction="sum", teacher="linear", eta=0.4
    )
    p_a, direction = along(old, tokens)
    c = (0.4 * weight)[:, None, None]
    assert torch.allclose(push(linear, logits), (p_old - p + c * p_a * direction) / N, atol=1e-15)


def test_behaviour_equal_to_live_is_the_live_teacher() -> None:
    logits, tokens, weight = sample()
    live = agd_loss(logits, tokens, weight)
    stored = agd_loss(logits, tokens, weight, behaviour_logits=logits.detach().clone())
    assert torch.equal(push(live, logits), push(stored, logits))


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_kinds_and_reductions(kind: str) -> None:
    logits, tokens, weight = sample()
    target = teacher_logits(logits, tokens, weight, eta=0.5)
    expected = divergence(target, logits, kind=kind)
    results = {
        how: agd_loss(logits, tokens, weight, eta=0.5, kind=kind, reduction=how)
        for how in ("none", "sum", "mean")
    }
    assert torch.equal(results["none"], expected)
    assert torch.allclose(results["sum"], expected.sum() / N)
    assert torch.allclose(results["mean"], expected.sum() / (N * K))
    assert torch.equal(results["mean"], agd_loss(logits, tokens, weight, eta=0.5, kind=kind))


def test_gradient_reaches_the_student_alone() -> None:
    logits, tokens, weight = sample()
    old, _, _ = sample(1)
    weight.requires_grad_()
    factor = torch.rand(N, K, dtype=torch.float64, requires_grad=True)
    agd_loss(logits, tokens, weight, behaviour_logits=old, token_weight=factor).backward()
    log_prob = token_log_probs(logits, tokens)
    agd_loss_sampled(log_prob, weight, token_weight=factor).backward()
    assert logits.grad is not None
    assert old.grad is None
    assert weight.grad is None
    assert factor.grad is None


@given(st.integers(0, 2**31))
def test_no_weight_no_loss_no_push(seed: int) -> None:
    logits, tokens, weight = sample(seed, torch.float32)
    for teacher in FORMS:
        for loss in (
            agd_loss(logits, tokens, 0.0 * weight, teacher=teacher),
            agd_loss_sampled(token_log_probs(logits, tokens), 0.0 * weight, teacher=teacher),
        ):
            assert loss.abs() < 1e-6
            assert push(loss, logits).abs().max() < 1e-7


@pytest.mark.parametrize("teacher", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_closed_form_survives_extremes(teacher: str, dtype: torch.dtype) -> None:
    log_prob = torch.tensor(
        [[0.0, -1e-7, -1e-3, -1.0, -50.0, -1e4, -math.inf]], dtype=dtype, requires_grad=True
    )
    for weight in (-1000.0, -50.0, -2.0, 0.0, 2.0, 50.0, 1000.0):
        loss = agd_loss_sampled(
            log_prob, torch.tensor([weight], dtype=dtype), teacher=teacher, reduction="none"
        )
        assert loss.isfinite().all()
        (gradient,) = torch.autograd.grad(loss.sum(), log_prob)
        assert gradient.isfinite().all()
        if teacher != "odd":
            assert loss.min() >= -1e-4


def test_closed_form_survives_a_certain_token() -> None:
    logits = torch.tensor([[[1e4, -1e4, 0.0]]], requires_grad=True)
    for weight in (-1000.0, -2.0, 2.0, 1000.0):
        log_prob = token_log_probs(logits, torch.tensor([[0]]))
        assert not push(agd_loss_sampled(log_prob, torch.tensor([weight])), logits).any()


def test_closed_form_raises_half_precision() -> None:
    log_prob = torch.full((2, 3), -1.0, dtype=torch.bfloat16, requires_grad=True)
    loss = agd_loss_sampled(log_prob, torch.ones(2))
    assert loss.dtype == torch.float32
    loss.backward()
    assert log_prob.grad is not None


def test_inverse_prob_weight_has_a_floor() -> None:
    old = torch.tensor([[0.5, 0.04, 0.02, 0.0]]).log().requires_grad_()
    weight = inverse_prob_weight(old, delta=0.03)
    assert torch.allclose(weight, torch.tensor([[2.0, 25.0, 100 / 3, 100 / 3]]))
    assert torch.equal(weight, inverse_prob_weight(old))
    assert not weight.requires_grad


@pytest.mark.usefixtures("unchecked")
def test_refusals() -> None:
    logits, tokens, weight = sample()
    log_prob = token_log_probs(logits, tokens)
    with pytest.raises(ValueError, match="odd teacher needs live"):
        agd_loss(logits, tokens, weight, teacher="odd", behaviour_logits=logits)
    with pytest.raises(ValueError, match="forward KLs, not of 'jsd'"):
        agd_loss(logits, tokens, weight, teacher="odd", kind="jsd")
    for function, first in ((agd_loss, (logits, tokens)), (agd_loss_sampled, (log_prob,))):
        with pytest.raises(ValueError, match="'even'"):
            function(*first, weight, teacher="even")
        with pytest.raises(ValueError, match="'total'"):
            function(*first, weight, reduction="total")
        with pytest.raises(ValueError, match="eta"):
            function(*first, weight, eta=0.0)
        with pytest.raises(ValueError, match="one value per action"):
            function(*first, weight[:, None])
        with pytest.raises(ValueError, match="token_weight"):
            function(*first, weight, token_weight=torch.ones(1, K))
    for delta in (0.0, 1.5):
        with pytest.raises(ValueError, match="delta"):
            inverse_prob_weight(log_prob, delta=delta)


def expected_push(p: float, eta: float) -> float:
    """E[q_a - p_a] of a sampled token for ω ~ clip(N(0, 1), -2, 2), independent of the action."""
    grid = torch.linspace(-8.0, 8.0, 40001, dtype=torch.float64)
    density = torch.exp(-0.5 * grid.square())
    density = density / density.sum()
    log_prob = torch.full((len(grid), 1), math.log(p), dtype=torch.float64, requires_grad=True)
    loss = agd_loss_sampled(log_prob, grid.clamp(-2.0, 2.0), eta=eta, reduction="none")
    (gradient,) = torch.autograd.grad((density[:, None] * loss).sum(), log_prob)
    return -(gradient.sum() * (1.0 - p)).item()  # d log p_a / d z_a = 1 - p_a


def test_weights_that_know_nothing_still_push() -> None:
    """The drift of raw distillation: up for rare tokens, down for confident ones."""
    probabilities = (0.02, 0.1, 0.4, 0.8, 0.95)
    strong = [expected_push(p, 1.0) for p in probabilities]
    weak = [expected_push(p, 0.25) for p in probabilities]
    assert strong == pytest.approx([0.010, 0.032, 0.016, -0.037, -0.021], abs=6e-4)
    assert weak == pytest.approx([0.0005, 0.0021, 0.0013, -0.0028, -0.0012], abs=1e-4)
    # Second order in η: a quarter of η leaves about a sixteenth of the drift.
    assert expected_push(0.1, 0.02) / expected_push(0.1, 0.005) == pytest.approx(16.0, rel=0.01)


@pytest.mark.parametrize("cure", ["none", "inverse_prob", "odd", "odd and inverse_prob", "linear"])
def test_what_each_cure_removes(cure: str) -> None:
    """Push of one state, enumerated over its actions, for a weight that is the same for all."""
    logits = torch.randn(1, 1, V, dtype=torch.float64).repeat(V, 1, 1).requires_grad_()
    tokens = torch.arange(V)[:, None]
    probs = logits[0, 0].detach().softmax(-1)
    log_prob = token_log_probs(logits, tokens)
    factor = inverse_prob_weight(log_prob, delta=1e-9)
    bias = 1e-3

    def drift(size: float) -> torch.Tensor:
        terms = agd_loss_sampled(
            log_prob, torch.full((V,), size, dtype=torch.float64), reduction="none",
            teacher=cure.split(" ")[0] if cure[0] in "ol" else "exponential",
            token_weight=factor if "inverse" in cure or cure == "linear" else None,
        )  # fmt: skip
        loss = (probs[:, None] * terms).sum()
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        return -gradient.sum((0, 1))

    first = (drift(bias) - drift(-bias)) / (2 * bias)  # odd part
    second = (drift(bias) + drift(-bias)) / (2 * bias**2)  # even part
    first_order = probs * (probs - probs.square().sum())
    has_first = cure in ("none", "odd")
    has_second = cure in ("none", "inverse_prob")
    assert torch.allclose(first, first_order if has_first else 0.0 * probs, atol=1e-6)
    assert (second.abs().max() > 1e-3) == has_second
    if cure == "inverse_prob":  # flattens: - Σ_a p_a · p_a (e_a - p), at order ω²
        assert torch.allclose(second, -first_order, atol=1e-5)
