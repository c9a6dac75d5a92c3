"""Theorem 1 as numbers: every term by enumeration on finite decision processes (Eq. 13-17, 25-36).

Here a context h_t is a state s at step t, an action is a = (a_1, …, a_K) with V values per token,
and A = V^K actions are indexed with the first token most significant. A policy is K tables of
logits, the k-th with one row per prefix a_{<k}: [..., T, S, V^(k−1), V]. Leading dimensions *M
batch whole decision processes. Nothing here is sampled, and nothing is meant for training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from roadvla.objective.divergence import divergence
from roadvla.objective.teacher import proximal_teacher

TokenPolicy: TypeAlias = tuple[Float[Tensor, "*M T S _ V"], ...]


@dataclass(frozen=True)
class FiniteMDP:
    """A decision process with S states, A actions and a fixed horizon, undiscounted.

    Attributes:
        transition: P(s' | s, a).
        reward: Expected reward r(s, a).
        initial: Distribution of the first state.
        horizon: Number of steps T.

    Raises:
        ValueError: If the horizon is below 1 or a distribution does not sum to 1.
    """

    transition: Float[Tensor, "*M S A S"]
    reward: Float[Tensor, "*M S A"]
    initial: Float[Tensor, "*M S"]
    horizon: int

    def __post_init__(self) -> None:
        if self.horizon < 1:
            raise ValueError(f"horizon must be at least 1, got {self.horizon}")
        for name, probs in (("transition", self.transition), ("initial", self.initial)):
            total = probs.sum(-1)
            if (probs < 0).any() or not torch.allclose(total, torch.ones_like(total)):
                raise ValueError(f"{name} must hold distributions over its last dimension")


@dataclass(frozen=True)
class ImprovementBound:
    """Both sides of Theorem 1, term by term (Eq. 16, 36).

    Attributes:
        performance: J(π_θ), reward per step.
        student_performance: J(π_θ'), the left side.
        improvement: 1/T Σ_t E[βτ KL(q*‖π_θ)].
        distillation_cost: 1/T Σ_t E[√2 B √D_dist]; infinite where π_θ' misses mass of q*.
        calibration_error: ε_cal, the smallest that Eq. 14 allows for this β; may be negative
            (reading R19).
        advantage_bound: B, the largest |A| at a state that π_θ' reaches (reading R19).
    """

    performance: Float[Tensor, "*M"]
    student_performance: Float[Tensor, "*M"]
    improvement: Float[Tensor, "*M"]
    distillation_cost: Float[Tensor, "*M"]
    calibration_error: Float[Tensor, "*M"]
    advantage_bound: Float[Tensor, "*M"]

    @property
    def lower_bound(self) -> Float[Tensor, "*M"]:
        """The right side of Eq. 16."""
        return self.performance + self.improvement - self.distillation_cost - self.calibration_error


def joint_log_probs(policy: TokenPolicy) -> Float[Tensor, "*M T S A"]:
    """Log-probability of every whole action under an autoregressive policy (Eq. 25).

    log π(a | h) = Σ_k log p_k(a_k | a_{<k}, h)
    """
    total = torch.zeros_like(policy[0][..., 0, :1])
    for logits in policy:
        total = (total.unsqueeze(-1) + logits.log_softmax(-1)).flatten(-2)
    return total


def token_teacher(
    policy: TokenPolicy, token_reward: Float[Tensor, "*M T S K V"], *, tau: float = 1.0
) -> TokenPolicy:
    """The teacher of every token, for every prefix (Eq. 11, 24-25, 28-30).

        q*_k(· | a_{<k}, h) = softmax(z_k + r_k / τ)

    As maximizer it gains at least what it costs: E_{q*}[r̄] ≥ τ KL(q*‖π_θ), for each token (28-29)
    and for whole actions (30). The reward of a token is the same for all prefixes (reading R18).

    Args:
        policy: π_θ.
        token_reward: r_{t,k}(u); Eq. 23's is not 0 at one point only.
        tau: Temperature τ > 0.

    Raises:
        ValueError: If τ is not positive.
    """
    rewards = token_reward.unsqueeze(-2).unbind(-3)
    return tuple(
        proximal_teacher(logits, reward.expand_as(logits), tau=tau)
        for logits, reward in zip(policy, rewards, strict=True)
    )


def sequence_reward(token_reward: Float[Tensor, "*M T S K V"]) -> Float[Tensor, "*M T S A"]:
    """Reward of every whole action, the sum over its tokens (Sec. 4.2.2, below Eq. 11).

    r_t(a) = Σ_k r_{t,k}(a_k)
    """
    total = torch.zeros_like(token_reward[..., 0, :1])
    for reward in token_reward.unbind(-2):
        total = (total.unsqueeze(-1) + reward.unsqueeze(-2)).flatten(-2)
    return total


def centred_reward(
    policy: TokenPolicy, token_reward: Float[Tensor, "*M T S K V"]
) -> Float[Tensor, "*M T S A"]:
    """Reward of every whole action, each token's centred under the policy (Eq. 13, 27).

    r̄_t(a) = Σ_k (r_{t,k}(a_k) − E_{v∼p_k(·|a_{<k})}[r_{t,k}(v)])
    """
    total = torch.zeros_like(token_reward[..., 0, :1])
    for logits, reward in zip(policy, token_reward.unsqueeze(-2).unbind(-3), strict=True):
        mean = (logits.softmax(-1) * reward).sum(-1, keepdim=True)
        total = (total.unsqueeze(-1) + reward - mean).flatten(-2)
    return total


def kl_by_token(teacher: TokenPolicy, policy: TokenPolicy) -> Float[Tensor, "*M T S K"]:
    """Each token's share of KL(teacher‖policy); their sum is the whole (Eq. 17, 26).

    E_{a_{<k}∼q*}[KL(q*_k(· | a_{<k}) ‖ p_k(· | a_{<k}))]
    """
    prefix = torch.zeros_like(teacher[0][..., 0, :1])
    shares: list[Tensor] = []
    for target, logits in zip(teacher, policy, strict=True):
        weight = prefix.exp()
        kl = divergence(target, logits, kind="forward_kl")
        shares.append((weight * torch.where(weight > 0, kl, 0.0)).sum(-1))
        prefix = (prefix.unsqueeze(-1) + target.log_softmax(-1)).flatten(-2)
    return torch.stack(shares, -1)


def evaluate_policy(
    mdp: FiniteMDP, probs: Float[Tensor, "*M T S A"]
) -> tuple[Float[Tensor, "*M"], Float[Tensor, "*M T S A"]]:
    """Performance J and advantage A_t(s, a) of a policy (Eq. 35, reading R17).

        J = 1/T E[Σ_t r_t],   A_t = Q_t − V_t,   Q_t = r + E[V_{t+1}],   V_{T+1} = 0

    J is a mean per step and A an undiscounted sum to go: the scaling in which Eq. 35 holds.

    Args:
        mdp: The decision process.
        probs: π_t(a | s) of whole actions.
    """
    value = torch.zeros_like(mdp.initial)
    advantages: list[Tensor] = []
    for step in range(mdp.horizon - 1, -1, -1):
        to_go = mdp.reward + (mdp.transition @ value[..., None, :, None]).squeeze(-1)
        value = (probs[..., step, :, :] * to_go).sum(-1)
        advantages.append(to_go - value.unsqueeze(-1))
    performance = (mdp.initial * value).sum(-1) / mdp.horizon
    return performance, torch.stack(advantages[::-1], -3)


def state_distributions(
    mdp: FiniteMDP, probs: Float[Tensor, "*M T S A"]
) -> Float[Tensor, "*M T S"]:
    """Distribution d_t of the state at every step under a policy (Eq. 16, 35)."""
    state = mdp.initial
    states = [state]
    for step in range(mdp.horizon - 1):
        flow = state.unsqueeze(-1) * probs[..., step, :, :]
        state = (flow.unsqueeze(-1) * mdp.transition).sum((-3, -2))
        states.append(state)
    return torch.stack(states, -2)


def calibration_error(
    advantage: Float[Tensor, "*M T S A"],
    centred: Float[Tensor, "*M T S A"],
    teacher_probs: Float[Tensor, "*M T S A"],
    reached: Bool[Tensor, "*M T S"],
    *,
    beta: float,
) -> Float[Tensor, "*M"]:
    """Smallest ε_cal with which the reward is aligned with the advantage (Eq. 14, 31).

        ε_cal = max over reached h of β E_{a∼q*}[r̄(a)] − E_{a∼q*}[A(h, a)]

    Args:
        advantage: A of π_θ.
        centred: r̄ of every action.
        teacher_probs: q* of whole actions.
        reached: Contexts in the support of the distilled student's state distribution.
        beta: Slope β > 0.

    Raises:
        ValueError: If β is not positive.
    """
    if not beta > 0.0:
        raise ValueError(f"beta must be positive, got {beta}")
    shortfall = (teacher_probs * (beta * centred - advantage)).sum(-1)
    return shortfall.masked_fill(~reached, -math.inf).flatten(-2).amax(-1)


def improvement_bound(
    mdp: FiniteMDP,
    policy: TokenPolicy,
    student: TokenPolicy,
    token_reward: Float[Tensor, "*M T S K V"],
    *,
    tau: float = 1.0,
    beta: float = 1.0,
) -> ImprovementBound:
    """Every term of Theorem 1 for a policy, its teacher and a distilled student (Eq. 14-16, 32-36).

        J(π_θ') ≥ J(π_θ) + 1/T Σ_t E_{h∼d^θ'}[βτ KL(q*‖π_θ) − √2 B √KL(q*‖π_θ')] − ε_cal

    √2 comes from |E_π'[A] − E_q*[A]| ≤ 2B TV(q*, π') (33) and Pinsker's TV ≤ √(KL/2) (32).

    Args:
        mdp: The decision process.
        policy: π_θ, around which the teacher is built.
        student: π_θ', any policy.
        token_reward: Shaping reward r_{t,k}(u) of the teacher.
        tau: Temperature τ > 0 of the teacher.
        beta: Slope β > 0 of the calibration.

    Raises:
        ValueError: If τ or β is not positive.
    """
    teacher = token_teacher(policy, token_reward, tau=tau)
    teacher_probs, student_probs = joint_log_probs(teacher).exp(), joint_log_probs(student).exp()
    performance, advantage = evaluate_policy(mdp, joint_log_probs(policy).exp())
    student_performance, _ = evaluate_policy(mdp, student_probs)
    visits = state_distributions(mdp, student_probs)
    reached = visits > 0

    def expected(per_state: Tensor) -> Tensor:
        """Mean over the steps, expectation over the student's states."""
        return (visits * torch.where(reached, per_state, 0.0)).sum((-2, -1)) / mdp.horizon

    bound = advantage.abs().amax(-1).masked_fill(~reached, 0.0).flatten(-2).amax(-1)
    distance = kl_by_token(teacher, student).sum(-1).clamp(min=0.0).sqrt()
    return ImprovementBound(
        performance=performance,
        student_performance=student_performance,
        improvement=beta * tau * expected(kl_by_token(teacher, policy).sum(-1)),
        distillation_cost=math.sqrt(2.0) * bound * expected(distance),
        calibration_error=calibration_error(
            advantage, centred_reward(policy, token_reward), teacher_probs, reached, beta=beta
        ),
        advantage_bound=bound,
    )
