"""The environment suite: Table 3's settings on each simulator, behind one vector contract."""

from __future__ import annotations

import torch

from roadvla.envs.base import Step, VectorEnv
from roadvla.envs.suite import SETTINGS, Distribution, Setting, setting
from roadvla.errors import unknown_name

__all__ = [
    "SETTINGS",
    "Distribution",
    "Setting",
    "Step",
    "VectorEnv",
    "make_env",
    "setting",
]

SIMULATORS = ("tabletop",)


def make_env(
    env: str,
    *,
    split: str,
    num_envs: int,
    sim: str = "tabletop",
    device: str | torch.device = "cpu",
    end_on_success: bool = False,
) -> VectorEnv:
    """Build B environments of one split of one setting.

    Args:
        env: Setting of Table 3, by paper alias or RL4VLA id.
        split: ``train`` (in distribution) or ``test`` (out of distribution).
        num_envs: B.
        sim: Which simulator.
        device: Where its tensors live.
        end_on_success: Whether episodes terminate at their first success.

    Raises:
        UserError: If there is no such simulator, setting or split.
    """
    if sim not in SIMULATORS:
        raise unknown_name("simulator", sim, SIMULATORS)
    from roadvla.envs.tabletop import TabletopEnv

    return TabletopEnv(
        env, split=split, num_envs=num_envs, device=device, end_on_success=end_on_success
    )
