from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import oracles
from roadvla.objective import (
    FiniteMDP,
    calibration_error,
    centred_reward,
    evaluate_policy,
    improvement_bound,
    joint_log_probs,
    kl_by_token,
    sequence_reward,
    state_distributions,
    token_teacher,
)

S, V, K, T = 2, 2, 2, 3
A = V**K


def policy(*lead: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(*lead, T, S, V**k, V, dtype=torch.float64) for k in range(K))


def process(*lead: int) -> FiniteMDP:
    transition = torch.rand(*lead, S, A, S, dtype=torch.float64)
    initial = torch.rand(*lead, S, dtype=torch.float64)
    return FiniteMDP(
        transition=transition / transition.sum(-1, keepdim=True),
        reward=torch.randn(*lead, S, A, dtype=torch.float64),
        initial=initial / initial.sum(-1, keepdim=True),
        horizon=T,
    )


def test_joint_probabilities_multiply_along_the_prefix() -> None:
    tables = policy()
    joint = joint_log_probs(tables).exp()
    assert torch.allclose(joint.sum(-1), torch.ones(T, S, dtype=torch.float64))
    for first in range(V):
        for second in range(V):
            expected = oracles.action_probability(
                [table[1, 0].tolist() for table in tables], (first, second)
            )
            assert math.isclose(joint[1, 0, first * V + second].item(), expected, rel_tol=1e-12)


def test_rewards_of_whole_actions() -> None:
    tables, reward = policy(), torch.randn(T, S, K, V, dtype=torch.float64)
    plain, centred = sequence_reward(reward), centred_reward(tables, reward)
    for first in range(V):
        for second in range(V):
            r1, r2 = reward[2, 1, 0], reward[2, 1, 1]
            p1, p2 = tables[0][2, 1, 0].softmax(-1), tables[1][2, 1, first].softmax(-1)
            action = first * V + second
            assert torch.isclose(plain[2, 1, action], r1[first] + r2[second])
            expected = r1[first] - (p1 * r1).sum() + r2[second] - (p2 * r2).sum()
            assert torch.isclose(centred[2, 1, action], expected)


def test_performance_is_the_mean_reward_of_all_trajectories() -> None:
    mdp, probs = process(), joint_log_probs(policy()).exp()
    performance, advantage = evaluate_policy(mdp, probs)
    expected = oracles.performance(
        mdp.transition.tolist(), mdp.reward.tolist(), mdp.initial.tolist(), T, probs.tolist()
    )
    assert math.isclose(performance.item(), expected, rel_tol=1e-12)
    assert torch.allclose((probs * advantage).sum(-1), torch.zeros(T, S, dtype=torch.float64))
    # At the last step nothing follows: A = r - E[r].
    reward = mdp.reward - (probs[-1] * mdp.reward).sum(-1, keepdim=True)
    assert torch.allclose(advantage[-1], reward)


def test_states_flow_as_a_hand_made_chain_says() -> None:
    # Action 0 stays, the others swap; uniform over 4 actions: stay 1/4, swap 3/4, start in 0.
    # d = (1, 0), (1/4, 3/4), (1/16 + 9/16, 3/16 + 3/16) = (5/8, 3/8)
    transition = torch.eye(2, dtype=torch.float64).flip(0)[:, None].repeat(1, A, 1)
    transition[:, 0] = torch.eye(2, dtype=torch.float64)
    reward = torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None].expand(S, A)
    mdp = FiniteMDP(transition, reward, torch.tensor([1.0, 0.0], dtype=torch.float64), T)
    probs = torch.full((T, S, A), 0.25, dtype=torch.float64)
    visits = state_distributions(mdp, probs)
    assert visits.tolist() == [[1.0, 0.0], [0.25, 0.75], [0.625, 0.375]]
    performance, advantage = evaluate_policy(mdp, probs)
    assert math.isclose(performance.item(), (0.75 + 0.375) / 3)
    # Q_2(0, stay) = 0 and Q_2(0, swap) = 1 with one step to go, so V_2(0) = 3/4.
    assert advantage[1, 0].tolist() == [-0.75, 0.25, 0.25, 0.25]


@pytest.mark.parametrize("seed", range(4))
def test_every_term_against_floats(seed: int) -> None:
    torch.manual_seed(seed)
    mdp, old, new = process(), policy(), policy()
    reward = torch.randn(T, S, K, V, dtype=torch.float64)
    tau, beta = 0.7, 0.3
    result = improvement_bound(mdp, old, new, reward, tau=tau, beta=beta)
    q, p, s = (joint_log_probs(x).exp() for x in (token_teacher(old, reward, tau=tau), old, new))
    performance, advantage = evaluate_policy(mdp, p)
    visits, centred = state_distributions(mdp, s), centred_reward(old, reward)
    gain = cost = 0.0
    bound, error = 0.0, -math.inf
    for t in range(T):
        for state in range(S):
            bound = max(bound, *(abs(x) for x in advantage[t, state].tolist()))
            aligned = (q * (beta * centred - advantage))[t, state].sum().item()
            error = max(error, aligned)
    for t in range(T):
        for state in range(S):
            target, visit = q[t, state].tolist(), visits[t, state].item() / T
            gain += visit * beta * tau * oracles.kl(target, p[t, state].tolist())
            cost += visit * 2**0.5 * bound * oracles.kl(target, s[t, state].tolist()) ** 0.5
    assert math.isclose(result.improvement.item(), gain, rel_tol=1e-10)
    assert math.isclose(result.distillation_cost.item(), cost, rel_tol=1e-10)
    assert math.isclose(result.calibration_error.item(), error, rel_tol=1e-10)
    assert math.isclose(result.advantage_bound.item(), bound, rel_tol=1e-12)
    assert torch.equal(result.performance, performance)
    assert torch.equal(result.student_performance, evaluate_policy(mdp, s)[0])
    expected = performance.item() + gain - cost - error
    assert math.isclose(result.lower_bound.item(), expected, rel_tol=1e-9)


def test_unreached_contexts_do_not_count() -> None:
    # State 1 is never entered; a large reward there would raise B and ε_cal if it counted.
    stay = torch.eye(2, dtype=torch.float64)[:, None].repeat(1, A, 1)
    reward = torch.zeros(S, A, dtype=torch.float64)
    reward[1, 0] = 100.0
    mdp = FiniteMDP(stay, reward, torch.tensor([1.0, 0.0], dtype=torch.float64), T)
    old, token_reward = policy(), torch.randn(T, S, K, V, dtype=torch.float64)
    new = policy()
    new[1][:, 1, 0, 0] = -math.inf  # nor does it matter that the student misses mass there
    result = improvement_bound(mdp, old, new, token_reward)
    assert result.advantage_bound.item() == 0.0
    assert result.distillation_cost.item() == 0.0
    teacher = joint_log_probs(token_teacher(old, token_reward)).exp()
    aligned = (teacher * centred_reward(old, token_reward)).sum(-1)[:, 0].max()
    assert torch.isclose(result.calibration_error, aligned)


def test_student_without_the_teachers_mass_costs_everything() -> None:
    new = policy()
    new[0][..., 0] = -math.inf
    result = improvement_bound(
        process(), policy(), new, torch.randn(T, S, K, V, dtype=torch.float64)
    )
    assert result.distillation_cost.item() == math.inf
    assert result.lower_bound.item() == -math.inf
    assert result.improvement.isfinite()


def test_kl_by_token_ignores_prefixes_the_teacher_never_takes() -> None:
    teacher, student = policy(), policy()
    teacher[0][..., 0] = -math.inf
    student[1][..., 0, 0] = -math.inf
    assert kl_by_token(teacher, student).isfinite().all()


def test_leading_dimensions_batch() -> None:
    mdp, old, new = process(3), policy(3), policy(3)
    reward = torch.randn(3, T, S, K, V, dtype=torch.float64)
    batch = improvement_bound(mdp, old, new, reward)
    for i in range(3):
        single = improvement_bound(
            FiniteMDP(mdp.transition[i], mdp.reward[i], mdp.initial[i], T),
            tuple(x[i] for x in old),
            tuple(x[i] for x in new),
            reward[i],
        )
        assert torch.isclose(batch.lower_bound[i], single.lower_bound)
        assert torch.isclose(batch.student_performance[i], single.student_performance)


@pytest.mark.usefixtures("unchecked")
def test_refusals() -> None:
    mdp = process()
    with pytest.raises(ValueError, match="horizon"):
        FiniteMDP(mdp.transition, mdp.reward, mdp.initial, 0)
    with pytest.raises(ValueError, match="transition"):
        FiniteMDP(2 * mdp.transition, mdp.reward, mdp.initial, T)
    with pytest.raises(ValueError, match="initial"):
        FiniteMDP(mdp.transition, mdp.reward, mdp.initial - 1.0, T)
    with pytest.raises(ValueError, match="initial"):
        FiniteMDP(mdp.transition, mdp.reward, torch.tensor([1.5, -0.5]).double(), T)
    probs = torch.zeros(T, S, A)
    with pytest.raises(ValueError, match="beta"):
        calibration_error(probs, probs, probs, torch.ones(T, S, dtype=torch.bool), beta=0.0)
    reward = torch.zeros(T, S, K, V, dtype=torch.float64)
    with pytest.raises(ValueError, match="tau"):
        improvement_bound(mdp, policy(), policy(), reward, tau=0.0)
