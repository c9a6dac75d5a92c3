"""Eq. 10-12: the teacher and its distillation, by hand and against Algorithm 1 over floats."""

from __future__ import annotations

import math

import pytest
import torch

import oracles
from roadvla.objective import (
    agd_loss,
    agd_loss_sampled,
    gae,
    guidance_weight,
    proximal_teacher,
    teacher_logits,
    token_log_probs,
)

LN2, LN3 = math.log(2.0), math.log(3.0)


def test_eq_10_golden() -> None:
    # p = (1/2, 1/4, 1/4); ηω = log 3 on the second bin: weights 2 : 3 : 1.
    logits = torch.tensor([[[LN2, 0.0, 0.0]]])
    teacher = teacher_logits(logits, torch.tensor([[1]]), torch.tensor([2.0]), eta=LN3 / 2)
    assert torch.allclose(teacher.softmax(-1), torch.tensor([2 / 6, 3 / 6, 1 / 6]))
    # A negative weight takes away what a positive one gives: 2 : 1/3 : 1 = 6 : 1 : 3
    teacher = teacher_logits(logits, torch.tensor([[1]]), torch.tensor([-LN3]))
    assert torch.allclose(teacher.softmax(-1), torch.tensor([6 / 10, 1 / 10, 3 / 10]))


def test_eq_11_teacher_beats_every_distribution() -> None:
    bins, tau, trials = 6, 0.8, 4000
    logits = torch.randn(20, bins, dtype=torch.float64)
    reward = torch.randn(20, bins, dtype=torch.float64)

    def objective(q: torch.Tensor) -> torch.Tensor:
        ratio = (q / logits.softmax(-1)).log()
        return (q * torch.where(q > 0, reward - tau * ratio, 0.0)).sum(-1)

    best = proximal_teacher(logits, reward, tau=tau).softmax(-1)
    optimum = objective(best)
    spread = torch.distributions.Dirichlet(torch.full((bins,), 0.5).double())
    assert (objective(spread.sample((trials, 20))) < optimum).all()
    near = best * (1.0 + 0.05 * torch.randn(trials, 20, bins, dtype=torch.float64)).clamp(min=0.0)
    assert (objective(near / near.sum(-1, keepdim=True)) < optimum).all()
    # The value at the optimum is the soft maximum τ log E_p[exp(r/τ)].
    soft = tau * (logits.log_softmax(-1) + reward / tau).logsumexp(-1)
    assert torch.allclose(optimum, soft)


@pytest.mark.parametrize("form", ["dense", "closed"])
def test_eq_12_golden(form: str) -> None:
    # p = (1/2, 1/2) and ω = ±log 3: q* = (3/4, 1/4) or (1/4, 3/4), both at
    # KL = 3/4 log(3/2) + 1/4 log(1/2). A third token with p = 1 cannot move: KL = 0.
    logits = torch.tensor([[[0.0, 0.0], [0.0, 0.0], [0.0, -1e4]]] * 2, requires_grad=True)
    tokens, weight = torch.tensor([[0, 1, 0], [1, 0, 0]]), torch.tensor([LN3, -LN3])
    if form == "dense":
        loss = agd_loss(logits, tokens, weight)
    else:
        loss = agd_loss_sampled(token_log_probs(logits, tokens), weight)
    value = 0.75 * math.log(1.5) - 0.25 * LN2
    assert math.isclose(loss.item(), 2 / 3 * value, rel_tol=1e-6)
    loss.backward()
    assert logits.grad is not None
    # p - q* = (1/2 - 3/4, 1/2 - 1/4), over N K = 6
    assert torch.allclose(logits.grad[0, 0], torch.tensor([-0.25, 0.25]) / 6)
    assert torch.allclose(logits.grad[1, 1], torch.tensor([0.25, -0.25]) / 6)
    assert not logits.grad[:, 2].any()


def test_eq_12_golden_odd() -> None:
    # p = 1/4, w = log 3: q⁺ = 3/(3 + 3) = 1/2, q⁻ = (1/3)/(1/3 + 3) = 1/10.
    # KL(q⁺‖p) = ½ log 2 + ½ log(2/3), KL(q⁻‖p) = .1 log .4 + .9 log 1.2
    log_prob = torch.full((1, 1), math.log(0.25), dtype=torch.float64)
    loss = agd_loss_sampled(log_prob, torch.tensor([LN3]).double(), teacher="odd")
    up = 0.5 * LN2 + 0.5 * math.log(2 / 3)
    down = 0.1 * math.log(0.4) + 0.9 * math.log(1.2)
    assert math.isclose(loss.item(), 0.5 * (up - down), rel_tol=1e-6)


def test_algorithm_1_end_to_end() -> None:
    steps, envs, tokens_per_action, bins = 5, 4, 3, 6
    rewards, values, reference = torch.randn(3, steps, envs, dtype=torch.float64)
    last, last_reference = torch.randn(2, envs, dtype=torch.float64)
    truncated = torch.zeros(steps, envs, dtype=torch.bool)
    truncated[-1] = True
    logits = torch.randn(steps, envs, tokens_per_action, bins, dtype=torch.float64)
    tokens = torch.randint(bins, (steps, envs, tokens_per_action))
    nothing = torch.zeros_like(truncated)
    own, _ = gae(rewards, values, last, nothing, truncated)
    other, _ = gae(rewards, reference, last_reference, nothing, truncated)
    weight, _ = guidance_weight(own, other)
    loss = agd_loss(logits, tokens, weight)

    flat = [
        [x for row in oracles.advantages(
            rewards.tolist(), critic.tolist(), final.tolist(), truncated.tolist(), 0.99, 0.95
        ) for x in row]
        for critic, final in ((values, last), (reference, last_reference))
    ]  # fmt: skip
    weights, _, _ = oracles.guidance(flat[0], flat[1], 0.5, 2.0, 1e-8)
    expected = oracles.agd_loss(
        logits.flatten(0, 1).tolist(), tokens.flatten(0, 1).tolist(), weights, 1.0
    )
    assert math.isclose(loss.item(), expected, rel_tol=1e-10)
