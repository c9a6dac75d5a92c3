from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles
from roadvla.objective import gae, grpo_advantage

# gamma = lam = 1/2, rewards 1 0 2, values 1 2 4, last value 8. Without any end:
#   delta = (1 + 2/2 - 1, 0 + 4/2 - 2, 2 + 8/2 - 4) = (1, 0, 2)
#   A_2 = 2, A_1 = 0 + 2/4 = 1/2, A_0 = 1 + (1/2)/4 = 9/8
REWARDS = torch.tensor([[1.0], [0.0], [2.0]])
VALUES = torch.tensor([[1.0], [2.0], [4.0]])
LAST = torch.tensor([8.0])


def at(*steps: int) -> torch.Tensor:
    flags = torch.zeros(3, 1, dtype=torch.bool)
    flags[list(steps)] = True
    return flags


def run(terminated: torch.Tensor, truncated: torch.Tensor, bootstrap: bool) -> list[float]:
    result, returns = gae(
        REWARDS, VALUES, LAST, terminated, truncated, gamma=0.5, lam=0.5,
        bootstrap_truncated=bootstrap,
    )  # fmt: skip
    assert torch.equal(returns, result + VALUES)
    return result.flatten().tolist()


@pytest.mark.parametrize("bootstrap", [False, True])
def test_unfinished_rollout_bootstraps_from_the_last_value(bootstrap: bool) -> None:
    assert run(at(), at(), bootstrap) == [1.125, 0.5, 2.0]


@pytest.mark.parametrize("bootstrap", [False, True])
def test_termination_never_bootstraps(bootstrap: bool) -> None:
    # delta_1 = 0 - 2 = -2 and nothing of step 2 comes back: A_1 = -2, A_0 = 1 - 2/4
    assert run(at(1), at(), bootstrap) == [0.5, -2.0, 2.0]
    assert run(at(1), at(1), bootstrap) == [0.5, -2.0, 2.0]


def test_truncation_is_terminal_by_default() -> None:
    # delta_2 = 2 - 4 = -2, A_1 = 0 - 2/4, A_0 = 1 - (1/2)/4
    assert run(at(), at(2), False) == [0.875, -0.5, -2.0]
    assert run(at(), at(1), False) == [0.5, -2.0, 2.0]


def test_truncation_bootstraps_when_asked_but_cuts_the_recursion() -> None:
    assert run(at(), at(2), True) == [1.125, 0.5, 2.0]
    # delta_1 = 0 + 4/2 - 2 = 0, A_1 = 0 without step 2's 2/4, A_0 = 1
    assert run(at(), at(1), True) == [1.0, 0.0, 2.0]


def test_value_after_the_end_is_never_read() -> None:
    result, _ = gae(REWARDS, VALUES, torch.tensor([float("nan")]), at(2), at())
    assert result.isfinite().all()


@given(st.integers(0, 2**31), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_matches_the_sum_of_discounted_errors(seed: int, gamma: float, lam: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    steps, episodes = 6, 3
    rewards, values = torch.randn(2, steps, episodes, generator=generator, dtype=torch.float64)
    last = torch.randn(episodes, generator=generator, dtype=torch.float64)
    ends = torch.rand(steps, episodes, generator=generator) < 0.3
    terminated = ends & (torch.rand(steps, episodes, generator=generator) < 0.5)
    result, _ = gae(rewards, values, last, terminated, ends & ~terminated, gamma=gamma, lam=lam)
    expected = oracles.advantages(
        rewards.tolist(), values.tolist(), last.tolist(), ends.tolist(), gamma, lam
    )
    assert torch.allclose(result, torch.tensor(expected, dtype=torch.float64), atol=1e-12)


def test_defaults_are_the_papers() -> None:
    named, _ = gae(REWARDS, VALUES, LAST, at(), at(2), gamma=0.99, lam=0.95)
    default, _ = gae(REWARDS, VALUES, LAST, at(), at(2))
    assert torch.equal(named, default)


def test_no_gradient_flows() -> None:
    values = VALUES.clone().requires_grad_()
    result, returns = gae(REWARDS, values, LAST.clone().requires_grad_(), at(), at())
    assert not result.requires_grad
    assert not returns.requires_grad


@pytest.mark.usefixtures("unchecked")
def test_gae_refuses() -> None:
    with pytest.raises(ValueError, match="one shape"):
        gae(REWARDS, VALUES[:2], LAST, at(), at())
    with pytest.raises(ValueError, match="last_value"):
        gae(REWARDS, VALUES, torch.zeros(2), at(), at())
    for gamma, lam in ((1.1, 0.5), (-0.1, 0.5), (0.5, 1.1), (0.5, -0.1)):
        with pytest.raises(ValueError, match="lie in"):
            gae(REWARDS, VALUES, LAST, at(), at(), gamma=gamma, lam=lam)


def test_group_form_standardizes_outcomes_within_groups() -> None:
    # Outcomes 1 3 | 5 5: mean 2 and sigma 1 give -1 1; equal outcomes give 0 0.
    rewards = torch.tensor([[1.0, 1.0, 2.0, 0.0], [0.0, 2.0, 3.0, 5.0]])
    result = grpo_advantage(rewards, form="group", group_size=2)
    assert torch.allclose(result, torch.tensor([[-1.0, 1.0, 0.0, 0.0]] * 2))
    # All four in one group: outcomes 1 3 5 5, mean 7/2, variance (6.25 + .25 + 2.25 + 2.25)/4
    whole = grpo_advantage(rewards)
    assert torch.allclose(whole[1], torch.tensor([-2.5, -0.5, 1.5, 1.5]) / 2.75**0.5)


def test_batch_form_sums_normalized_rewards_to_go() -> None:
    # Non-zero rewards 1 and 3: mean 2, sigma 1, so they become -1 and 1; zeros stay 0.
    rewards = torch.tensor([[0.0, 1.0], [3.0, 0.0]])
    result = grpo_advantage(rewards, form="batch")
    assert torch.allclose(result, torch.tensor([[1.0, -1.0], [1.0, 0.0]]))


@pytest.mark.filterwarnings("error")
def test_nothing_to_compare_is_no_advantage() -> None:
    for form in ("group", "batch"):
        assert not grpo_advantage(torch.zeros(3, 4), form=form).any()
    one = torch.zeros(3, 4)
    one[1, 2] = 1.0
    assert not grpo_advantage(one, form="batch").any()


@pytest.mark.usefixtures("unchecked")
def test_grpo_refuses() -> None:
    rewards = torch.zeros(2, 4)
    for size in (3, 0):
        with pytest.raises(ValueError, match="must divide"):
            grpo_advantage(rewards, group_size=size)
    with pytest.raises(ValueError, match="no groups"):
        grpo_advantage(rewards, form="batch", group_size=2)
    with pytest.raises(ValueError, match="'rloo'"):
        grpo_advantage(rewards, form="rloo")
