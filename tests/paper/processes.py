"""Random finite decision processes, policies and token rewards for the proofs."""

from __future__ import annotations

import torch
from torch import Tensor

from roadvla.objective import FiniteMDP

STEPS, STATES, BINS, TOKENS = 3, 3, 3, 2
ACTIONS = BINS**TOKENS


def random_process(count: int) -> FiniteMDP:
    """Sparse and dense dynamics alike, so that some states are never reached."""
    transition = torch.rand(count, STATES, ACTIONS, STATES, dtype=torch.float64) ** 4
    transition[: count // 2] *= transition[: count // 2] > 0.05
    transition[..., 0] += 1e-3
    initial = torch.rand(count, STATES, dtype=torch.float64)
    initial[: count // 2, 1:] = 0.0
    return FiniteMDP(
        transition=transition / transition.sum(-1, keepdim=True),
        reward=torch.randn(count, STATES, ACTIONS, dtype=torch.float64),
        initial=initial / initial.sum(-1, keepdim=True),
        horizon=STEPS,
    )


def random_policy(count: int, scale: float = 1.0) -> tuple[Tensor, ...]:
    return tuple(
        scale * torch.randn(count, STEPS, STATES, BINS**k, BINS, dtype=torch.float64)
        for k in range(TOKENS)
    )


def random_reward(count: int) -> Tensor:
    return torch.randn(count, STEPS, STATES, TOKENS, BINS, dtype=torch.float64)


def between(first: tuple[Tensor, ...], second: tuple[Tensor, ...], share: Tensor) -> tuple:
    """Geometric mixture of two policies, with a share for each process."""
    mix = share.view(-1, 1, 1, 1, 1)
    return tuple((1.0 - mix) * x + mix * y for x, y in zip(first, second, strict=True))
