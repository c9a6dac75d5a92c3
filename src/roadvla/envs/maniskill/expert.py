"""A stateless controller that solves the suite from simulator state, on the controller's target.

Above the object, down to the middle of its box, close, lift, over the receptacle, lower, open,
retreat. Every phase is read off the current state, so it recovers from any disturbance.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from roadvla.envs.maniskill.env import ManiSkillEnv
from roadvla.envs.maniskill.objects import rotation_matrix

MAX_TRANSLATION, MAX_YAW = 0.02, 0.25
"""Largest motions of one action, metres and radians."""

_TABLE = 0.8695
_ABOVE = 0.08
_FINGERTIPS, _PALM = 0.018, 0.018
"""From the point between the fingers down to their tips, and up to the palm, metres: tips that
press on the table do not close, and a palm on top of the object goes no deeper."""
_ALIGNED, _NEAR, _AT = 0.12, 0.012, 0.012
_CARRY, _LIFTED, _OVER, _LOW = 0.09, 0.04, 0.015, 0.012
_RETREAT = 0.15
_OPEN, _EMPTY = 0.0350, 0.0165
_HELD = 2
_ANGLES = 36
"""Grasps are tried at this many angles of the half circle."""
_TURNING = 0.004
"""What a turn of the hand by a quarter is worth in width of the grasp, metres."""


def act(
    env: ManiSkillEnv,
    *,
    gain: Float[Tensor, "#B"] | float = 1.0,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "B 7"]:
    """Return the expert's action for every running episode.

    Args:
        env: A running environment.
        gain: Fraction of the remaining error covered per step, in (0, 1].
        noise: Standard deviation of noise on the motions, in fractions of their limits.
        generator: Source of the noise.
    """
    state = env.state
    hand, aim = state.hand[:, :3], state.aim[:, :3]
    centre, half, turned = _box(env, state.bodies[:, 0], receptacle=False)
    plate, plate_half, _ = _box(env, state.bodies[:, 1], receptacle=True)
    extent = (turned.abs() @ half[:, :, None])[:, :, 0]
    bottom = centre[:, 2] - extent[:, 2]
    top = plate[:, 2] + plate_half[:, 2]

    holding = state.held >= _HELD
    to_plate = plate[:, :2] - centre[:, :2]
    over = to_plate.norm(dim=1) < _OVER
    low = bottom - top < _LOW
    on_plate = to_plate.norm(dim=1) < plate_half[:, :2].amax(dim=1)
    placed = (state.held == 0) & on_plate & (bottom - top < 2 * _LOW)

    yaw = _turn(state.aim, centre, half, turned)
    grasp = centre.clone()
    # Of a round object that has rolled, the box's highest corner is above anything there is.
    height = torch.minimum(extent[:, 2], centre[:, 2] - _TABLE)
    lowest = (centre[:, 2] + height - _PALM).clamp(min=_TABLE + _FINGERTIPS)
    grasp[:, 2] = torch.maximum(grasp[:, 2], lowest)
    aside = (hand[:, :2] - grasp[:, :2]).norm(dim=1)
    empty = (state.fingers < _EMPTY) & ~holding
    ready = (aside < _NEAR) & (yaw.abs() < _ALIGNED) & ~empty
    at = ready & ((hand[:, 2] - grasp[:, 2]).abs() < _AT)

    approach = grasp - aim
    approach[:, 2] += torch.where(ready, 0.0, _ABOVE)
    carry = torch.cat([to_plate, (_CARRY - (bottom - _TABLE))[:, None]], dim=1)
    lifted = (bottom - _TABLE > _LIFTED) | over
    carry[:, :2] *= lifted[:, None]
    carry[:, 2] = torch.where(over, top + 0.5 * _LOW - bottom, carry[:, 2])
    retreat = torch.zeros_like(aim)
    retreat[:, 2] = _TABLE + _RETREAT - aim[:, 2]

    motion = torch.where(holding[:, None], carry, approach)
    motion = torch.where((at & ~holding)[:, None], torch.zeros_like(motion), motion)
    motion = torch.where(placed[:, None], retreat, motion)
    turn = torch.where(holding | placed | at, torch.zeros_like(yaw), yaw)
    opened = torch.where(holding, over & low, ~at) | placed
    return _action(motion, turn, opened, gain, noise, generator)


def _box(
    env: ManiSkillEnv, pose: Float[Tensor, "B 7"], *, receptacle: bool
) -> tuple[Float[Tensor, "B 3"], Float[Tensor, "B 3"], Float[Tensor, "B 3 3"]]:
    """Centre in the world, half extents along the body's own axes, and these axes."""
    boxes = env.boxes[int(receptacle)].to(pose.device)
    index = env.episodes.receptacle if receptacle else env.episodes.object
    box = boxes[index.to(pose.device)]
    turned = rotation_matrix(pose[:, 3:])
    centre = pose[:, :3] + (turned @ box.mean(dim=1)[:, :, None])[:, :, 0]
    return centre, (box[:, 1] - box[:, 0]) / 2, turned


def _turn(
    aim: Float[Tensor, "B 7"],
    centre: Float[Tensor, "B 3"],
    half: Float[Tensor, "B 3"],
    turned: Float[Tensor, "B 3 3"],
) -> Float[Tensor, " B"]:
    """Yaw, in (-π/2, π/2], by which the fingers come to close along the box's least width."""
    closing = rotation_matrix(aim[:, 3:])[:, :2, 1]
    now = torch.atan2(closing[:, 1], closing[:, 0])
    angles = (torch.arange(_ANGLES, device=aim.device) / _ANGLES - 0.5) * math.pi
    at = now[:, None] + angles
    directions = torch.stack([at.cos(), at.sin()], dim=-1)
    shadows = directions @ turned[:, :2, :]
    width = 2 * (shadows.abs() * half[:, None, :]).sum(dim=-1)
    cost = width + _TURNING * angles.abs() / (math.pi / 2)
    return angles[cost.argmin(dim=1)]


def _action(
    motion: Float[Tensor, "B 3"],
    turn: Float[Tensor, " B"],
    opened: Bool[Tensor, " B"],
    gain: Float[Tensor, "#B"] | float,
    noise: float,
    generator: torch.Generator | None,
) -> Float[Tensor, "B 7"]:
    """Scale, disturb and clip; the robot's base looks along the world's -x."""
    base = torch.cat([-motion[:, :2], motion[:, 2:], turn[:, None]], dim=1)
    limit = base.new_tensor([MAX_TRANSLATION] * 3 + [MAX_YAW])
    moved = base * torch.as_tensor(gain, device=base.device, dtype=base.dtype).view(-1, 1)
    if noise:
        jitter = torch.randn(base.shape, generator=generator, device=base.device)
        moved = moved + noise * jitter * limit
    moved = torch.minimum(torch.maximum(moved, -limit), limit)
    still = torch.zeros(len(base), 2, device=base.device)
    return torch.cat([moved[:, :3], still, moved[:, 3:], opened[:, None].float()], dim=1)
