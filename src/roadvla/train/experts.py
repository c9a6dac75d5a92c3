"""Scripted experts, one per simulator: they solve the suite from simulator state."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Float
from torch import Tensor

from roadvla.envs import SIMULATORS
from roadvla.envs.base import VectorEnv
from roadvla.errors import unknown_name

if TYPE_CHECKING:
    from roadvla.envs.maniskill.env import ManiSkillEnv

Expert = Callable[[VectorEnv, Float[Tensor, " B"], torch.Generator], Tensor]
"""Chooses actions, [B, 7], given the environment, a gain per episode and a generator."""


def expert_of(sim: str, noise: float) -> Expert:
    """Choose a simulator's expert.

    Args:
        sim: ``tabletop`` or ``maniskill``.
        noise: Standard deviation of its noise, in fractions of the motions' limits.

    Raises:
        UserError: If there is no such simulator.
    """
    if sim not in SIMULATORS:
        raise unknown_name("simulator", sim, SIMULATORS)
    if sim == "maniskill":

        def act(env: VectorEnv, gain: Float[Tensor, " B"], generator: torch.Generator) -> Tensor:
            from roadvla.envs.maniskill import expert

            running = cast("ManiSkillEnv", env)
            return expert.act(running, gain=gain, noise=noise, generator=generator)

        return act

    from roadvla.envs.tabletop import TabletopEnv, expert

    def act_on_tabletop(
        env: VectorEnv, gain: Float[Tensor, " B"], generator: torch.Generator
    ) -> Tensor:
        running = cast("TabletopEnv", env)
        return expert.act(running, gain=gain, noise=noise, generator=generator)

    return act_on_tabletop
