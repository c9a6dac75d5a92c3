"""Where bodies and robot start. Poses are x y z (m) and a quaternion w x y z, in the world frame.

Bodies are dropped from small heights and come to rest during ``SETTLE_SUBSTEPS``.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from roadvla.envs.maniskill.episodes import Episodes
from roadvla.envs.maniskill.positions import positions
from roadvla.envs.maniskill.settings import Variant
from roadvla.envs.maniskill.shifts import (
    DistractorObject,
    DistractorReceptacle,
    PoseShift,
    Reposition,
)

YAWS = tuple(n * math.pi / 8 for n in (0, 2, 4, 6, -1, -3, -5, -7))
"""Of the object, radians; the last four are those of Position's test set."""

ROBOT_POSE = (0.147, 0.028, 0.870, 0.0, 0.0, 0.0, 1.0)
ROBOT_LIFT = 1.0
"""How far up the robot waits while bodies settle, metres."""

SETTLE_SUBSTEPS = (50, 600)
"""Physics steps: the first always, then the others if the chosen bodies still move."""
SETTLE_SPEED = (1e-3, 1e-2)
"""Above these they move: summed speeds, m/s and rad/s."""

START_QPOS = (-0.01840777, 0.0398835, 0.22242722, -0.00460194, 1.36524296, 0.00153398, 0.037, 0.037)
"""Waist, shoulder, elbow, forearm, wrist angle and rotation (rad), two fingers (m)."""

_OFFSETS = (-0.15, -0.08, 0.0, 0.08, 0.15)
_WRIST_OFFSETS = (-0.6, -0.3, 0.0, 0.3, 0.6)
_MOST_FORWARD = 0.25

_OBJECTS_X = 1.0
_RECEPTACLES_X = 2.0
_PARKED_SPACING = 0.3


def spawn_poses(variant: Variant, episodes: Episodes) -> Float[Tensor, "B 3 7"]:
    """Poses from which object, receptacle and distractor are dropped; NaN where there is none.

    Where RL4VLA's distractor is the target itself, both are at the distractor's place.
    """
    poses = _slots(variant, episodes)
    if isinstance(variant.shift, DistractorObject):
        same = episodes.distractor == episodes.object
        poses[:, 0] = torch.where(same[:, None], poses[:, 2], poses[:, 0])
    poses[:, 2, :].masked_fill_((episodes.distractor < 0)[:, None], torch.nan)
    return poses


def teleport_poses(variant: Variant, episodes: Episodes) -> Float[Tensor, "B 7"]:
    """Poses to which the object is lifted when it is repositioned.

    Raises:
        ValueError: If the variant does not reposition.
    """
    if not isinstance(variant.shift, Reposition):
        raise ValueError(f"{variant.env_id} does not reposition")
    return _slots(variant, episodes)[:, 2]


def object_poses(
    variant: Variant, episodes: Episodes, *, teleported: bool = False
) -> Float[Tensor, "B O 7"]:
    """Poses of all built objects: the chosen ones dropped over the table, the others parked.

    Args:
        variant: Which id of the suite.
        episodes: What the episodes contain.
        teleported: Whether to take the object's pose after it has been repositioned.
    """
    poses = spawn_poses(variant, episodes)
    parked = _parked(_OBJECTS_X, variant.built_objects, poses)
    target = teleport_poses(variant, episodes) if teleported else poses[:, 0]
    placed = _place(parked, episodes.object, target)
    if isinstance(variant.shift, DistractorObject):
        placed = _place(placed, episodes.distractor, poses[:, 2])
    return placed


def receptacle_poses(variant: Variant, episodes: Episodes) -> Float[Tensor, "B R 7"]:
    """Poses of all built receptacles: the chosen ones dropped over the table, the others parked."""
    poses = spawn_poses(variant, episodes)
    parked = _parked(_RECEPTACLES_X, variant.built_receptacles, poses)
    placed = _place(parked, episodes.receptacle, poses[:, 1])
    if isinstance(variant.shift, DistractorReceptacle):
        placed = _place(placed, episodes.distractor, poses[:, 2])
    return placed


def start_qpos(variant: Variant, episodes: Episodes) -> Float[Tensor, "B 8"]:
    """Joint positions in which the robot starts: rad, and m for the two fingers."""
    start = torch.tensor(START_QPOS, device=episodes.extra.device).repeat(len(episodes.extra), 1)
    if isinstance(variant.shift, PoseShift):
        start[:, :6] += joint_offsets().to(start.device)[episodes.extra]
    return start


@lru_cache
def joint_offsets() -> Float[Tensor, "N 6"]:
    """List EEPose's offsets on the arm's joints, rad: zeros, then 14,375 others; read only.

    Shoulder and elbow together lean at most 0.25 rad either way. One of the others is zeros again.
    """
    axes = [torch.tensor(_OFFSETS)] * 5 + [torch.tensor(_WRIST_OFFSETS)]
    offsets = torch.cartesian_prod(*axes)
    possible = (offsets[:, 1] + offsets[:, 2]).abs() <= _MOST_FORWARD
    return torch.cat([torch.zeros(1, 6), offsets[possible]])


def _slots(variant: Variant, episodes: Episodes) -> Float[Tensor, "B 3 7"]:
    """Poses at the three places of each episode; the third is NaN in pairs."""
    device = episodes.position.device
    place = positions(variant.layout).to(device)[episodes.position]
    height = torch.tensor(variant.heights, dtype=place.dtype, device=device)
    turned = _turned(episodes.yaw)
    flat = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=place.dtype, device=device).expand_as(turned)
    third = flat if isinstance(variant.shift, DistractorReceptacle) else turned
    quaternion = torch.stack([turned, flat, third], dim=1)
    height = height[None, :, None].expand(len(place), -1, -1)
    return torch.cat([place, height, quaternion], dim=-1).float()


def _turned(yaw: Int[Tensor, " B"]) -> Float[Tensor, "B 4"]:
    """Quaternion of a rotation about z by an entry of ``YAWS``, float64."""
    half = torch.tensor(YAWS, dtype=torch.float64, device=yaw.device)[yaw] / 2
    zero = torch.zeros_like(half)
    return torch.stack([half.cos(), zero, zero, half.sin()], dim=-1)


def _parked(x: float, count: int, like: Float[Tensor, "B _ 7"]) -> Float[Tensor, "B M 7"]:
    """Where bodies wait that an episode does not use: in a row beside the table, 1 m up."""
    poses = like.new_zeros(len(like), count, 7)
    poses[..., 0] = x
    poses[..., 1] = _PARKED_SPACING * torch.arange(count, device=like.device)
    poses[..., 2:4] = 1.0
    return poses


def _place(
    poses: Float[Tensor, "B M 7"], index: Int[Tensor, " B"], pose: Float[Tensor, "B 7"]
) -> Float[Tensor, "B M 7"]:
    """Give one body of each episode another pose."""
    return poses.scatter(1, index[:, None, None].expand(-1, 1, 7), pose[:, None])
