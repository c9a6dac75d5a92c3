"""Kinematics of the gripper and of what it holds: no forces, no trigonometry, no loop over B.

As in the scenes, only exactly rounded operations touch the state, so that a state is bit-identical
in any batch and on any device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from roadvla.envs.tabletop.noise import uniform
from roadvla.envs.tabletop.scene import ELONGATED, HALF_EXTENTS, Scene

MAX_TRANSLATION = 0.04
MAX_ROTATION = 0.35
OPEN_THRESHOLD = 0.5
SUCCESS_RADIUS = 0.045

_LOW = (-0.17, -0.21, 0.012)
_HIGH = (0.17, 0.21, 0.20)
_MAX_TILT = 1.0
_GRASP_DISTANCE = 0.030
_GRASP_HEIGHT = 0.040
_GRASP_YAW = 0.6
_GRASP_TILT = 0.6
_DROP_HEIGHT = 0.04
_DROP_JITTER = 0.03
_HOLD_STEPS = 5
_NOTHING = -1
_DROP_STREAM = 1000


@dataclass(frozen=True)
class State:
    """What changes during an episode.

    Attributes:
        gripper: Tip position (m) and roll, pitch, yaw (rad).
        is_open: Whether the gripper is open.
        held: Slot of the held object, -1 for none.
        object_position: Centres, metres; held objects move with the gripper.
        object_yaw: Radians.
        elapsed: Actions so far, the same for all.
        grasped: Whether the target has ever been held.
        hold_count: For how many consecutive steps the target has been held.
        held_long: Whether it has ever been held for five consecutive steps.
        success: Whether the target now lies released on the target receptacle.
        success_once: Whether it ever has.
        ended: Whether the episode is over; then nothing changes any more.
    """

    gripper: Float[Tensor, "B 6"]
    is_open: Bool[Tensor, " B"]
    held: Int[Tensor, " B"]
    object_position: Float[Tensor, "B O 3"]
    object_yaw: Float[Tensor, "B O"]
    elapsed: int
    grasped: Bool[Tensor, " B"]
    hold_count: Int[Tensor, " B"]
    held_long: Bool[Tensor, " B"]
    success: Bool[Tensor, " B"]
    success_once: Bool[Tensor, " B"]
    ended: Bool[Tensor, " B"]

    def potential(self) -> Float[Tensor, " B"]:
        """Return 0.1·grasped + 0.1·held long + 1.0·(success ∧ grasped), RL4VLA's potential."""
        placed = self.success & self.grasped
        return 0.1 * self.grasped.float() + 0.1 * self.held_long.float() + placed.float()


def initial_state(scene: Scene) -> State:
    """Put everything where the scene says, with an open and empty gripper."""
    rest = HALF_EXTENTS.to(scene.shape.device)[scene.shape][..., 2:]
    no = torch.zeros_like(scene.table, dtype=torch.bool)
    return State(
        gripper=scene.gripper,
        is_open=~no,
        held=torch.full_like(scene.table, _NOTHING),
        object_position=torch.cat([scene.object_xy, rest], -1),
        object_yaw=scene.object_yaw,
        elapsed=0,
        grasped=no,
        hold_count=torch.zeros_like(scene.table),
        held_long=no,
        success=no,
        success_once=no,
        ended=no,
    )


def advance(
    state: State,
    scene: Scene,
    action: Float[Tensor, "B 7"],
    episode_ids: Int[Tensor, " B"],
    *,
    reposition_step: int,
) -> State:
    """Apply one action: move, then open or close, then (once, if asked) teleport the target.

    Args:
        state: Before the action.
        scene: What the state started from.
        action: Δxyz (m), Δrpy (rad), gripper; clipped to the limits here.
        episode_ids: Key of the randomness of drops.
        reposition_step: After which action the target is teleported; 0 for never.
    """
    gripper = _move(state.gripper, action)
    is_open = action[:, 6] > OPEN_THRESHOLD
    position, yaw = _carry(state, gripper)
    closing = state.is_open & ~is_open
    grabbed = _graspable(gripper, position, yaw, scene)
    held = torch.where(is_open, _NOTHING, torch.where(closing, grabbed, state.held))
    released = torch.where(is_open, state.held, _NOTHING)
    position = _drop(position, released, scene, episode_ids, state.elapsed)
    elapsed = state.elapsed + 1
    if elapsed == reposition_step:
        position = position.clone()
        position[:, 0, :2] = scene.moved_xy
        position[:, 0, 2] = HALF_EXTENTS.to(position.device)[scene.shape[:, 0], 2]
        held = torch.where(held == 0, _NOTHING, held)
    moved = replace(
        state, gripper=gripper, is_open=is_open, held=held, object_position=position, object_yaw=yaw
    )
    return replace(_freeze(state, _judge(moved, scene)), elapsed=elapsed)


def _move(gripper: Tensor, action: Tensor) -> Tensor:
    low, high = gripper.new_tensor(_LOW), gripper.new_tensor(_HIGH)
    step = action[:, :3].clamp(-MAX_TRANSLATION, MAX_TRANSLATION)
    position = torch.minimum(torch.maximum(gripper[:, :3] + step, low), high)
    turn = gripper[:, 3:] + action[:, 3:6].clamp(-MAX_ROTATION, MAX_ROTATION)
    tilt = turn[:, :2].clamp(-_MAX_TILT, _MAX_TILT)
    return torch.cat([position, tilt, turn[:, 2:]], 1)


def _carry(state: State, gripper: Tensor) -> tuple[Tensor, Tensor]:
    """Move the held object along; it keeps its offset from the tip and turns with the yaw."""
    slots = torch.arange(state.object_yaw.shape[1], device=gripper.device)
    is_held = state.held[:, None] == slots
    shift = (gripper[:, :3] - state.gripper[:, :3])[:, None]
    turn = (gripper[:, 5] - state.gripper[:, 5])[:, None]
    position = torch.where(is_held[..., None], state.object_position + shift, state.object_position)
    return position, torch.where(is_held, state.object_yaw + turn, state.object_yaw)


def _graspable(gripper: Tensor, position: Tensor, yaw: Tensor, scene: Scene) -> Tensor:
    """Slot of the nearest object that closing now would grasp, -1 for none."""
    offset = position - gripper[:, None, :3]
    distance_squared = offset[..., 0] * offset[..., 0] + offset[..., 1] * offset[..., 1]
    near = distance_squared < _GRASP_DISTANCE * _GRASP_DISTANCE
    level = offset[..., 2].abs() < _GRASP_HEIGHT
    aligned = yaw_error(yaw, gripper[:, 5:6]).abs() < _GRASP_YAW
    aligned |= ~ELONGATED.to(gripper.device)[scene.shape]
    tilt_squared = gripper[:, 3] * gripper[:, 3] + gripper[:, 4] * gripper[:, 4]
    upright = (tilt_squared < _GRASP_TILT * _GRASP_TILT)[:, None]
    possible = near & level & aligned & upright
    best = torch.where(possible, distance_squared, math.inf).min(1)
    return torch.where(best.values < math.inf, best.indices, _NOTHING)


def yaw_error(yaw: Float[Tensor, "B O"], reference: Float[Tensor, "B 1"]) -> Float[Tensor, "B O"]:
    """Signed angle from ``reference`` to ``yaw`` modulo π, in [-π/2, π/2]: a box has two fronts."""
    turn = yaw - reference
    return turn - math.pi * (turn / math.pi).round()


def _drop(position: Tensor, released: Tensor, scene: Scene, ids: Tensor, elapsed: int) -> Tensor:
    """Let the released object fall to the table; from above 4 cm it lands a little elsewhere."""
    slots = torch.arange(position.shape[1], device=position.device)
    falls = released[:, None] == slots
    rest = HALF_EXTENTS.to(position.device)[scene.shape][..., 2]
    jitter = (uniform(ids, _DROP_STREAM + elapsed, 2) * 2 - 1)[:, None] * _DROP_JITTER
    high = position[..., 2] - rest > _DROP_HEIGHT
    xy = torch.where((falls & high)[..., None], position[..., :2] + jitter, position[..., :2])
    z = torch.where(falls, rest, position[..., 2])
    return torch.cat([xy, z[..., None]], -1)


def _judge(state: State, scene: Scene) -> State:
    """Update the sticky grasp flags and the instantaneous success."""
    holding = state.held == 0
    hold_count = torch.where(holding, state.hold_count + 1, 0)
    offset = state.object_position[:, 0, :2] - scene.receptacle_xy[:, 0]
    distance_squared = offset[:, 0] * offset[:, 0] + offset[:, 1] * offset[:, 1]
    success = (distance_squared < SUCCESS_RADIUS * SUCCESS_RADIUS) & ~holding
    return replace(
        state,
        grasped=state.grasped | holding,
        hold_count=hold_count,
        held_long=state.held_long | (hold_count >= _HOLD_STEPS),
        success=success,
        success_once=state.success_once | success,
    )


def _freeze(old: State, new: State) -> State:
    """Keep the old state where the episode had ended."""

    def keep(before: Tensor, after: Tensor) -> Tensor:
        ended = old.ended.view(-1, *[1] * (after.dim() - 1))
        return torch.where(ended, before, after)

    return State(
        gripper=keep(old.gripper, new.gripper),
        is_open=keep(old.is_open, new.is_open),
        held=keep(old.held, new.held),
        object_position=keep(old.object_position, new.object_position),
        object_yaw=keep(old.object_yaw, new.object_yaw),
        elapsed=new.elapsed,
        grasped=keep(old.grasped, new.grasped),
        hold_count=keep(old.hold_count, new.hold_count),
        held_long=keep(old.held_long, new.held_long),
        success=keep(old.success, new.success),
        success_once=keep(old.success_once, new.success_once),
        ended=old.ended,
    )
