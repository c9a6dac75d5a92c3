"""A stateless proportional controller that solves the task from simulator state."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from roadvla.envs.tabletop.dynamics import MAX_ROTATION, MAX_TRANSLATION, yaw_error
from roadvla.envs.tabletop.env import TabletopEnv
from roadvla.envs.tabletop.scene import ELONGATED

_ABOVE = 0.10
_NEAR = 0.025
_AT = 0.015
_CARRY = 0.09
_LOWER = 0.03
_RETREAT = 0.13


def act(
    env: TabletopEnv,
    *,
    gain: Float[Tensor, "#B"] | float = 0.8,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "B 7"]:
    """Return the expert's action for every running episode.

    Approach above the object, descend, close, lift, carry to above the receptacle, lower, open,
    retreat. Every phase is read off the current state, so it recovers from any disturbance.

    Args:
        env: A running tabletop environment.
        gain: Fraction of the remaining error covered per step, in (0, 1].
        noise: Standard deviation of noise on the six motions, in fractions of the action limits.
        generator: Source of the noise.
    """
    state, scene = env.state, env.scene
    tip = state.gripper[:, :3]
    target, goal = state.object_position[:, 0], scene.receptacle_xy[:, 0]
    holding = state.held == 0
    placed = state.success

    to_target = target - tip
    to_goal = goal - target[:, :2]
    yaw = yaw_error(state.object_yaw, state.gripper[:, 5:])[:, 0]
    yaw = torch.where(ELONGATED.to(tip.device)[scene.shape[:, 0]], yaw, 0.0)
    aligned = (yaw.abs() < 0.35) & (state.gripper[:, 3:5].abs().amax(1) < 0.35)

    reach = _norm(to_target)
    descend = (reach < _NEAR) & aligned
    height_reach = torch.where(descend, to_target[:, 2], target[:, 2] + _ABOVE - tip[:, 2])
    grasp = (reach < _AT) & (to_target[:, 2].abs() < 0.02) & aligned

    carry = _norm(to_goal)
    over = carry < _NEAR
    low = target[:, 2] < 0.06
    height_carry = torch.where(over, _LOWER - target[:, 2], _CARRY - target[:, 2])
    lifted = (target[:, 2] > 0.05)[:, None]
    xy_carry = torch.where(lifted | over[:, None], to_goal, torch.zeros_like(to_goal))
    release = over & low

    xy = torch.where(holding[:, None], xy_carry, to_target[:, :2])
    xy = torch.where(placed[:, None], torch.zeros_like(xy), xy)
    z = torch.where(holding, height_carry, height_reach)
    z = torch.where(placed, _RETREAT - tip[:, 2], z)
    turn = torch.where(holding | placed, 0.0, yaw)
    opened = torch.where(holding, release, ~grasp) | placed
    rotation = torch.stack([-state.gripper[:, 3], -state.gripper[:, 4], turn], 1)
    motion = torch.cat([xy, z[:, None], rotation], 1)
    limits = motion.new_tensor([MAX_TRANSLATION] * 3 + [MAX_ROTATION] * 3)
    scale = torch.as_tensor(gain, device=tip.device).view(-1, 1)
    motion = torch.clamp(motion * scale, -limits, limits)
    if noise:
        jitter = torch.randn(motion.shape, generator=generator, device=motion.device)
        motion = torch.clamp(motion + noise * jitter * limits, -limits, limits)
    return torch.cat([motion, opened.float()[:, None]], 1)


def _norm(xy: Tensor) -> Tensor:
    return torch.sqrt(xy[:, 0].square() + xy[:, 1].square())
