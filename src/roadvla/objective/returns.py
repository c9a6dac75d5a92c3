"""From rewards to advantages: generalized advantage estimation and GRPO's two forms."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from roadvla.objective.tensors import require_same_shape


def gae(
    rewards: Float[Tensor, "T B"],
    values: Float[Tensor, "T B"],
    last_value: Float[Tensor, " B"],
    terminated: Bool[Tensor, "T B"],
    truncated: Bool[Tensor, "T B"],
    *,
    gamma: float = 0.99,
    lam: float = 0.95,
    bootstrap_truncated: bool = False,
) -> tuple[Float[Tensor, "T B"], Float[Tensor, "T B"]]:
    """Generalized advantage estimation: the Â of Eq. 2 and the Â_int, Â_ref of Eq. 7-8.

        δ_t = r_t + γ V_{t+1} b_t − V_t
        Â_t = δ_t + γ λ c_t Â_{t+1},   R_t = Â_t + V_t

    c_t = 0 at a terminated or truncated step: no recursion crosses the end of an episode.
    b_t = 0 at a terminated step and, unless ``bootstrap_truncated``, at a truncated one (reading
    R11). A truncation that bootstraps takes V_{t+1}: ``last_value`` at the last step, ``values[t +
    1]`` before it, which is right where an ended episode is frozen until the rollout ends rather
    than reset, as in every environment here (reading R13). A step that is both terminated and
    truncated does not bootstrap; a last step that is neither bootstraps from ``last_value``.

    Args:
        rewards: r_t, received after the action of step t.
        values: V_t of the observation before the action, raw, in units of return.
        last_value: V of the observation after the last step.
        terminated: True where the task itself ended the episode.
        truncated: True where only the time limit did.
        gamma: Discount γ in [0, 1].
        lam: λ in [0, 1].
        bootstrap_truncated: Whether the time limit leaves the value of what would have followed.

    Returns:
        Advantages (not normalized) and returns, both without gradient.

    Raises:
        ValueError: If shapes differ, or γ or λ lies outside [0, 1].
    """
    require_same_shape(
        "rewards, values, terminated, truncated", rewards, values, terminated, truncated
    )
    require_same_shape("one step's values and last_value", values[0], last_value)
    if not (0.0 <= gamma <= 1.0 and 0.0 <= lam <= 1.0):
        raise ValueError(f"gamma and lam must lie in [0, 1], got {gamma} and {lam}")
    rewards, values, last_value = rewards.detach(), values.detach(), last_value.detach()
    ended = terminated | truncated
    without_future = terminated if bootstrap_truncated else ended
    next_values = torch.cat([values[1:], last_value[None]]).masked_fill(without_future, 0.0)
    deltas = rewards + gamma * next_values - values
    carry = gamma * lam * (~ended).to(values.dtype)
    advantages = torch.empty_like(values)
    running = torch.zeros_like(last_value)
    for t in range(len(rewards) - 1, -1, -1):
        running = deltas[t] + carry[t] * running
        advantages[t] = running
    return advantages, advantages + values


def grpo_advantage(
    rewards: Float[Tensor, "T B"],
    *,
    form: Literal["group", "batch"] = "group",
    group_size: int | None = None,
    eps: float = 1e-8,
) -> Float[Tensor, "T B"]:
    """Advantage without a critic, in one of two forms (the GRPO that Sec. 3.2 names beside Eq. 2).

        group:  Â_{t,b} = (R_b − μ_group) / (σ_group + ε),   R_b = Σ_t r_{t,b}
        batch:  Â_{t,b} = Σ_{s≥t} r̃_{s,b},   r̃ = (r − μ) / (σ + ε) where r ≠ 0, else 0

    ``group`` compares whole episodes that began alike. ``batch`` is RL4VLA's: μ and σ are those of
    all non-zero rewards of the rollout, and nothing is subtracted per group. σ divides by N.
    Rewards after an episode's end must be 0, as the environments here give them.

    Args:
        rewards: Rewards of B episodes; for ``group``, members of a group stand side by side.
        form: ``"group"`` or ``"batch"``.
        group_size: Episodes per group, a divisor of B; ``None``: all B are one group. For ``group``
            alone.
        eps: ε; keeps the result finite where all rewards are equal.

    Returns:
        The advantage of every step, without gradient.

    Raises:
        ValueError: If ``form`` is unknown, ``group_size`` does not divide B, or is given for
            ``batch``.
    """
    rewards = rewards.detach()
    if form == "group":
        episodes = rewards.shape[1]
        size = episodes if group_size is None else group_size
        if size < 1 or episodes % size:
            raise ValueError(f"group_size {size} must divide the {episodes} episodes")
        outcome = rewards.sum(0).view(-1, size)
        deviation = outcome - outcome.mean(1, keepdim=True)
        scale = outcome.std(1, correction=0, keepdim=True) + eps
        return (deviation / scale).view(1, -1).expand_as(rewards).clone()
    if form != "batch":
        raise ValueError(f"form must be 'group' or 'batch', got {form!r}")
    if group_size is not None:
        raise ValueError("the batch form has no groups: leave group_size out")
    earned = rewards != 0
    if not earned.any():
        return torch.zeros_like(rewards)
    nonzero = rewards[earned]
    scaled = (rewards - nonzero.mean()) / (nonzero.std(correction=0) + eps)
    return scaled.masked_fill(~earned, 0.0).flip(0).cumsum(0).flip(0)
