"""Eq. 18-25: the proximal problem, its solution, and one token at a time."""

from __future__ import annotations

import math

import torch
from processes import random_policy, random_reward

from roadvla.objective import (
    joint_log_probs,
    proximal_teacher,
    sequence_reward,
    teacher_logits,
    token_teacher,
)

LN2 = math.log(2.0)


def objective(q: torch.Tensor, p: torch.Tensor, r: torch.Tensor, tau: float) -> torch.Tensor:
    return (q * (r - tau * (q / p).log())).sum(-1)


def test_eq_18_gradient_ascent_on_the_simplex_finds_the_teacher() -> None:
    logits, reward = 0.4 * torch.randn(2, 5, 4, dtype=torch.float64)
    free = torch.zeros(5, 4, dtype=torch.float64, requires_grad=True)
    for _ in range(2000):
        value = objective(free.softmax(-1), logits.softmax(-1), reward, 0.5).sum()
        (gradient,) = torch.autograd.grad(value, free)
        free = (free + gradient).detach().requires_grad_()
    expected = proximal_teacher(logits, reward, tau=0.5).softmax(-1)
    assert torch.allclose(free.softmax(-1), expected, atol=1e-6)


def test_eq_19_golden() -> None:
    # p = (1/2, 1/4, 1/4), r/τ = (0, log 2, log 4): weights 2/4 : 2/4 : 4/4
    logits = torch.tensor([[LN2, 0.0, 0.0]])
    reward = torch.tensor([[0.0, LN2, 2 * LN2]])
    teacher = proximal_teacher(logits, reward).softmax(-1)
    assert torch.allclose(teacher, torch.tensor([[0.25, 0.25, 0.5]]))
    assert torch.allclose(proximal_teacher(logits, 3 * reward, tau=3.0).softmax(-1), teacher)


def test_eq_20_shifts_the_logits() -> None:
    logits, reward = torch.randn(2, 3, 8, dtype=torch.float64)
    shifted = proximal_teacher(logits, reward, tau=0.25)
    assert torch.allclose(shifted, logits + 4.0 * reward)
    tilted = logits.softmax(-1) * (reward / 0.25).exp()
    assert torch.allclose(shifted.softmax(-1), tilted / tilted.sum(-1, keepdim=True))


def test_eq_21_lagrangian_is_stationary_at_the_teacher() -> None:
    logits, reward, tau = torch.randn(6, dtype=torch.float64), torch.randn(6).double(), 0.7
    p = logits.softmax(-1)
    q = proximal_teacher(logits, reward, tau=tau).softmax(-1).requires_grad_()
    # From Eq. 22: λ = τ - τ log Σ p exp(r/τ)
    multiplier = (tau - tau * (p * (reward / tau).exp()).sum().log()).requires_grad_()
    lagrangian = objective(q, p, reward, tau) + multiplier * (q.sum() - 1.0)
    by_q, by_multiplier = torch.autograd.grad(lagrangian, [q, multiplier])
    assert by_q.abs().max() < 1e-12
    assert by_multiplier.abs() < 1e-12


def test_eq_22_log_ratio_is_the_reward_up_to_a_constant() -> None:
    logits, reward, tau = torch.randn(5, 6).double(), torch.randn(5, 6).double(), 0.7
    q = proximal_teacher(logits, reward, tau=tau).log_softmax(-1)
    rest = q - logits.log_softmax(-1) - reward / tau
    assert torch.allclose(rest, rest[:, :1].expand(5, 6))
    assert q.isfinite().all()  # full support: the constraint q >= 0 never binds


def test_eq_23_and_24_one_point_reward_is_the_logit_bump() -> None:
    logits, tokens = torch.randn(5, 7, 9, dtype=torch.float64), torch.randint(9, (5, 7))
    weight, tau, eta = torch.randn(5, dtype=torch.float64), 0.6, 1.7
    reward = torch.zeros(5, 7, 9, dtype=torch.float64)
    for n in range(5):
        for k in range(7):
            reward[n, k, tokens[n, k]] = tau * eta * weight[n]
    assert torch.allclose(
        proximal_teacher(logits, reward, tau=tau), teacher_logits(logits, tokens, weight, eta=eta)
    )


def test_eq_25_tokens_compose_into_one_policy() -> None:
    policy, reward = random_policy(10), random_reward(10)
    teacher = token_teacher(policy, reward, tau=0.8)
    joint = joint_log_probs(teacher).exp()
    assert torch.allclose(joint.sum(-1), torch.ones_like(joint[..., 0]))
    first = proximal_teacher(policy[0][:, :, :, 0], reward[:, :, :, 0], tau=0.8).softmax(-1)
    assert torch.allclose(joint.unflatten(-1, (3, 3)).sum(-1), first)
    for prefix in range(3):
        conditional = joint.unflatten(-1, (3, 3))[..., prefix, :] / first[..., prefix, None]
        expected = proximal_teacher(policy[1][..., prefix, :], reward[..., 1, :], tau=0.8)
        assert torch.allclose(conditional, expected.softmax(-1))


def test_per_token_is_not_the_joint_problem() -> None:
    """Two tokens of two values. p_1 = (1/2, 1/2); p_2 = (1/2, 1/2) after 0, (1, 0) after 1.

    Reward 0 for the first token and log 3 for a second 0, so per token q_1 = p_1 = (1/2, 1/2).
    Jointly the prefix matters: 1/4·3 + 1/4 = 1 after 0 and 1/2·3 = 3/2 after 1: q_1 = (2/5, 3/5).
    """
    first = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    second = torch.tensor([[0.0, 0.0], [0.0, -math.inf]]).double().view(1, 1, 2, 2)
    reward = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]]).double().view(1, 1, 2, 2)
    policy = (first, second)
    token_wise = joint_log_probs(token_teacher(policy, reward)).exp().view(2, 2)
    jointly = proximal_teacher(joint_log_probs(policy), sequence_reward(reward))
    jointly = jointly.softmax(-1).view(2, 2)
    assert torch.allclose(token_wise.sum(-1), torch.tensor([0.5, 0.5]).double())
    assert torch.allclose(jointly.sum(-1), torch.tensor([0.4, 0.6]).double())


def test_per_token_is_the_joint_problem_when_tokens_are_independent() -> None:
    first, second = random_policy(10)
    policy, reward = (first, second[..., :1, :].expand_as(second)), random_reward(10)
    token_wise = joint_log_probs(token_teacher(policy, reward, tau=0.5))
    jointly = proximal_teacher(joint_log_probs(policy), sequence_reward(reward), tau=0.5)
    assert torch.allclose(token_wise, jointly.log_softmax(-1))
