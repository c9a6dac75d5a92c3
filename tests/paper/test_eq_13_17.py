"""Eq. 13-17: Theorem 1 on thousands of random finite decision processes."""

from __future__ import annotations

import math

import pytest
import torch
from processes import (
    ACTIONS,
    BINS,
    STATES,
    STEPS,
    between,
    random_policy,
    random_process,
    random_reward,
)

from roadvla.objective import (
    FiniteMDP,
    calibration_error,
    centred_reward,
    divergence,
    evaluate_policy,
    improvement_bound,
    joint_log_probs,
    kl_by_token,
    proximal_teacher,
    sequence_reward,
    state_distributions,
    token_teacher,
)

COUNT = 700


def test_eq_13_centred_reward_has_no_mean_under_the_student() -> None:
    policy, reward = random_policy(50), random_reward(50)
    probs = joint_log_probs(policy).exp()
    assert (probs * centred_reward(policy, reward)).sum(-1).abs().max() < 1e-13
    assert (probs * sequence_reward(reward)).sum(-1).abs().max() > 0.1


def test_eq_13_golden() -> None:
    # One token, p = (3/4, 1/4, 0), r = (1, 5, 9): mean 2, so r̄ = (-1, 3, 7).
    logits = torch.tensor([3.0, 1.0, 0.0]).double().log().view(1, 1, 1, 3)
    reward = torch.tensor([1.0, 5.0, 9.0]).double().view(1, 1, 1, 3)
    expected = torch.tensor([-1.0, 3.0, 7.0]).double()
    assert torch.allclose(centred_reward((logits,), reward).flatten(), expected)


def test_eq_13_centring_leaves_the_teacher_unchanged() -> None:
    logits, reward = torch.randn(2, 30, BINS, dtype=torch.float64)
    centred = reward - (logits.softmax(-1) * reward).sum(-1, keepdim=True)
    plain = proximal_teacher(logits, reward, tau=0.6).softmax(-1)
    assert torch.allclose(proximal_teacher(logits, centred, tau=0.6).softmax(-1), plain)


def test_eq_14_error_is_the_smallest_that_aligns() -> None:
    mdp, policy, reward = random_process(60), random_policy(60), random_reward(60)
    _, advantage = evaluate_policy(mdp, joint_log_probs(policy).exp())
    teacher = joint_log_probs(token_teacher(policy, reward)).exp()
    centred = centred_reward(policy, reward)
    reached = state_distributions(mdp, joint_log_probs(random_policy(60)).exp()) > 0
    assert not reached.all()
    error = calibration_error(advantage, centred, teacher, reached, beta=0.4)
    slack = (teacher * (advantage - 0.4 * centred)).sum(-1) + error[:, None, None]
    slack = slack.masked_fill(~reached, math.inf).flatten(1).amin(1)
    assert torch.allclose(slack, torch.zeros(60, dtype=torch.float64), atol=1e-12)


def test_eq_15_distance_is_the_kl_of_whole_actions() -> None:
    teacher, student = random_policy(40), random_policy(40)
    joint = divergence(joint_log_probs(teacher), joint_log_probs(student))
    assert torch.allclose(kl_by_token(teacher, student).sum(-1), joint)


@pytest.mark.parametrize("student_kind", ["any", "near the teacher", "near the policy", "teacher"])
@pytest.mark.parametrize("tau", [0.3, 1.0, 3.0])
def test_eq_16_holds(student_kind: str, tau: float) -> None:
    """12 × 700 processes: both sides by enumeration."""
    mdp, policy, reward = random_process(COUNT), random_policy(COUNT, 1.5), random_reward(COUNT)
    teacher = token_teacher(policy, reward, tau=tau)
    student = {
        "any": random_policy(COUNT, 3.0),
        "near the teacher": between(policy, teacher, 1.0 + 0.2 * torch.randn(COUNT).double()),
        "near the policy": between(policy, teacher, 0.2 * torch.rand(COUNT).double()),
        "teacher": teacher,
    }[student_kind]
    for beta in (0.01, 1.0, 10.0):
        result = improvement_bound(mdp, policy, student, reward, tau=tau, beta=beta)
        slack = result.student_performance - result.lower_bound
        assert result.lower_bound.isfinite().all()
        assert slack.min() >= -1e-9
        if student_kind == "teacher":
            assert result.distillation_cost.max() < 1e-6


def test_eq_16_is_tight_where_it_should_be() -> None:
    """One context, student = teacher: what is lost is β(E_q*[r̄] − τ KL), no more."""
    mdp = FiniteMDP(
        transition=torch.ones(9, 1, ACTIONS, 1, dtype=torch.float64),
        reward=torch.randn(9, 1, ACTIONS, dtype=torch.float64),
        initial=torch.ones(9, 1, dtype=torch.float64),
        horizon=1,
    )
    policy = tuple(x[:, :1, :1] for x in random_policy(9))
    reward, tau, beta = random_reward(9)[:, :1, :1], 0.7, 0.2
    teacher = token_teacher(policy, reward, tau=tau)
    result = improvement_bound(mdp, policy, teacher, reward, tau=tau, beta=beta)
    probs = joint_log_probs(teacher).exp()
    gain = (probs * centred_reward(policy, reward)).sum(-1).flatten()
    lost = beta * (gain - tau * kl_by_token(teacher, policy).sum(-1).flatten())
    slack = result.student_performance - result.lower_bound
    assert torch.allclose(slack, lost, atol=1e-6)
    assert (lost > 0).all()


def test_eq_16_needs_its_constants() -> None:
    """The mean and the spread of A, and a teacher far away, make every term count."""
    mdp, policy, reward = random_process(COUNT), random_policy(COUNT), random_reward(COUNT)
    result = improvement_bound(mdp, policy, random_policy(COUNT), reward, beta=0.5)
    bare = result.performance + result.improvement
    assert (bare > result.student_performance).any()
    assert (bare - result.calibration_error > result.student_performance).any()
    near = token_teacher(policy, reward)
    matched = improvement_bound(mdp, policy, near, reward, beta=0.5)
    bare = matched.performance + matched.improvement
    assert (bare > matched.student_performance).any()


def test_eq_17_chain_rule() -> None:
    teacher, student = random_policy(40), random_policy(40)
    shares = kl_by_token(teacher, student)
    joint = divergence(joint_log_probs(teacher), joint_log_probs(student))
    assert shares.shape == (40, STEPS, STATES, 2)
    assert torch.allclose(shares.sum(-1), joint)
    # The first share needs no prefix; the second is averaged over the teacher's prefixes.
    first = divergence(teacher[0], student[0]).squeeze(-1)
    assert torch.allclose(shares[..., 0], first)
    second = divergence(teacher[1], student[1])
    wrong = (student[0].softmax(-1).squeeze(-2) * second).sum(-1)
    right = (teacher[0].softmax(-1).squeeze(-2) * second).sum(-1)
    assert torch.allclose(shares[..., 1], right)
    assert not torch.allclose(shares[..., 1], wrong)
