"""Eq. 26-36: the proof of Theorem 1, each step as an inequality between numbers."""

from __future__ import annotations

import torch
from processes import STEPS, random_policy, random_process, random_reward

from roadvla.objective import (
    calibration_error,
    centred_reward,
    divergence,
    evaluate_policy,
    improvement_bound,
    joint_log_probs,
    kl_by_token,
    proximal_teacher,
    state_distributions,
    token_teacher,
)

COUNT, TAU, BETA = 300, 0.7, 0.5


def test_eq_26_chain_rule_of_the_teacher() -> None:
    policy, reward = random_policy(COUNT), random_reward(COUNT)
    teacher = token_teacher(policy, reward, tau=TAU)
    joint = divergence(joint_log_probs(teacher), joint_log_probs(policy))
    assert torch.allclose(kl_by_token(teacher, policy).sum(-1), joint)


def test_eq_27_token_reward_centred_per_prefix() -> None:
    policy, reward = random_policy(COUNT), random_reward(COUNT)
    centred = centred_reward(policy, reward).unflatten(-1, (3, 3))
    # The second token's part has mean 0 after every prefix, so that of the first remains.
    first = (policy[1].softmax(-1) * centred).sum(-1)
    mean = (policy[0].softmax(-1).squeeze(-2) * reward[..., 0, :]).sum(-1, keepdim=True)
    assert torch.allclose(first, reward[..., 0, :] - mean)


def test_eq_28_29_every_token_improves_by_at_least_its_kl() -> None:
    logits, reward = torch.randn(2, 5000, 6, dtype=torch.float64)
    for tau in (0.1, 1.0, 10.0):
        teacher = proximal_teacher(logits, reward, tau=tau)
        centred = reward - (logits.softmax(-1) * reward).sum(-1, keepdim=True)
        gain = (teacher.softmax(-1) * centred).sum(-1)
        assert (gain - tau * divergence(teacher, logits)).min() >= -1e-12


def test_eq_30_whole_actions_improve_by_at_least_their_kl() -> None:
    policy, reward = random_policy(COUNT), random_reward(COUNT)
    teacher = token_teacher(policy, reward, tau=TAU)
    gain = (joint_log_probs(teacher).exp() * centred_reward(policy, reward)).sum(-1)
    assert (gain - TAU * kl_by_token(teacher, policy).sum(-1)).min() >= -1e-12


def test_eq_31_calibration_carries_over_to_the_advantage() -> None:
    mdp, policy, reward = random_process(COUNT), random_policy(COUNT), random_reward(COUNT)
    _, advantage = evaluate_policy(mdp, joint_log_probs(policy).exp())
    teacher = token_teacher(policy, reward, tau=TAU)
    probs, centred = joint_log_probs(teacher).exp(), centred_reward(policy, reward)
    reached = state_distributions(mdp, probs) > 0
    error = calibration_error(advantage, centred, probs, reached, beta=BETA)[:, None, None]
    left = (probs * advantage).sum(-1)
    middle = BETA * (probs * centred).sum(-1) - error
    right = BETA * TAU * kl_by_token(teacher, policy).sum(-1) - error
    assert (left - middle)[reached].min() >= -1e-12
    assert (middle - right)[reached].min() >= -1e-12


def test_eq_32_pinsker() -> None:
    q, p = joint_log_probs(random_policy(COUNT, 3.0)), joint_log_probs(random_policy(COUNT, 3.0))
    variation = 0.5 * (q.exp() - p.exp()).abs().sum(-1)
    assert (variation <= (0.5 * divergence(q, p)).sqrt() + 1e-12).all()
    # Tight for near pairs of fair coins: q = 1/2 ± e gives TV = e and KL = 2e² + O(e⁴).
    coin = torch.tensor([[0.5 + 1e-3, 0.5 - 1e-3]]).double().log()
    bound = (0.5 * divergence(coin, torch.zeros(1, 2).double())).sqrt()
    assert torch.allclose(bound, torch.tensor([1e-3]).double(), rtol=1e-5)


def test_eq_33_34_transfer_to_the_student() -> None:
    mdp, policy, reward = random_process(COUNT), random_policy(COUNT), random_reward(COUNT)
    student = random_policy(COUNT)
    _, advantage = evaluate_policy(mdp, joint_log_probs(policy).exp())
    teacher = token_teacher(policy, reward, tau=TAU)
    q, s = joint_log_probs(teacher).exp(), joint_log_probs(student).exp()
    visits = state_distributions(mdp, s)
    result = improvement_bound(mdp, policy, student, reward, tau=TAU, beta=BETA)
    bound = result.advantage_bound[:, None, None]
    gap = ((s - q) * advantage).sum(-1).abs()
    variation = 0.5 * (s - q).abs().sum(-1)
    root = kl_by_token(teacher, student).sum(-1).sqrt()
    reached = visits > 0
    assert (2 * bound * variation - gap)[reached].min() >= -1e-12
    assert (2**0.5 * bound * root - 2 * bound * variation)[reached].min() >= -1e-12
    floor = (
        BETA * TAU * kl_by_token(teacher, policy).sum(-1)
        - result.calibration_error[:, None, None]
        - 2**0.5 * bound * root
    )
    assert ((s * advantage).sum(-1) - floor)[reached].min() >= -1e-12


def test_eq_35_performance_difference() -> None:
    """J as mean reward per step and A as an undiscounted sum to go: exact, with no slack."""
    mdp, policy, student = random_process(COUNT), random_policy(COUNT), random_policy(COUNT)
    s = joint_log_probs(student).exp()
    before, advantage = evaluate_policy(mdp, joint_log_probs(policy).exp())
    after, _ = evaluate_policy(mdp, s)
    gains = state_distributions(mdp, s) * (s * advantage).sum(-1)
    assert torch.allclose(after - before, gains.sum((-2, -1)) / STEPS, atol=1e-12)
    assert (after - before).abs().max() > 0.5


def test_eq_36_gathers_the_per_state_bounds() -> None:
    mdp, policy, reward = random_process(COUNT), random_policy(COUNT), random_reward(COUNT)
    student = random_policy(COUNT)
    result = improvement_bound(mdp, policy, student, reward, tau=TAU, beta=BETA)
    teacher = token_teacher(policy, reward, tau=TAU)
    visits = state_distributions(mdp, joint_log_probs(student).exp())
    per_state = (
        BETA * TAU * kl_by_token(teacher, policy).sum(-1)
        - 2**0.5
        * result.advantage_bound[:, None, None]
        * kl_by_token(teacher, student).sum(-1).sqrt()
    )
    right = result.performance + (visits * per_state).sum((-2, -1)) / STEPS
    assert torch.allclose(result.lower_bound, right - result.calibration_error)
    assert (result.student_performance >= result.lower_bound - 1e-12).all()
