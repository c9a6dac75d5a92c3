"""The vector-environment contract that tabletop and ManiSkill obey."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """Result of one action in every environment.

    Attributes:
        image: RGB frame after the action, 0 to 255.
        reward: Difference of the potential 0.1·grasped + 0.1·consecutive + 1.0·(success ∧ grasped).
        terminated: True where the task ended the episode. Never by default: episodes have a fixed
            length and success is read at the last step, as in RL4VLA.
        truncated: True at the horizon.
        info: ``success`` (now), ``success_once``, ``grasped`` and ``consecutive_grasp`` (both are
            sticky: true once they have been true), each Bool [B]; ``lost`` where an episode's
            simulation died, whose numbers mean nothing; environments may add more.
    """

    image: UInt8[Tensor, "B H W 3"]
    reward: Float[Tensor, " B"]
    terminated: Bool[Tensor, " B"]
    truncated: Bool[Tensor, " B"]
    info: dict[str, Tensor]


@dataclass(frozen=True)
class Snapshot:
    """Where things are, in metres and radians of the world frame: privileged, never for a policy.

    Slot 0 is what the instruction names; a slot that an episode lacks is NaN.

    Attributes:
        tip: Point between the fingertips.
        objects: Centres of what can be grasped.
        receptacles: Centres of where it can go.
        held: Slot of the object in the gripper, -1 for none.
        is_open: Whether the gripper is open.
        usual_place: Where receptacles stand on average in training.
    """

    tip: Float[Tensor, "B 3"]
    objects: Float[Tensor, "B O 3"]
    receptacles: Float[Tensor, "B R 3"]
    held: Int[Tensor, " B"]
    is_open: Bool[Tensor, " B"]
    usual_place: Float[Tensor, " 2"]


@runtime_checkable
class Privileged(Protocol):
    """An environment that also says where things are; both simulators do."""

    def snapshot(self) -> Snapshot:
        """Where things are now.

        Raises:
            RuntimeError: Before the first reset.
        """
        ...


@runtime_checkable
class VectorEnv(Protocol):
    """B episodes that start together and are stepped as one batch of tensors on one device.

    The episode id alone decides everything an episode contains: the scene, the instruction and all
    later randomness. So the same id and the same actions give the same episode in any batch.
    After an episode has terminated its state is frozen, its reward 0, its info kept.
    """

    num_envs: int
    horizon: int
    image_shape: tuple[int, int, int]
    device: torch.device

    @property
    def instructions(self) -> Sequence[str]:
        """What each of the B running episodes asks for."""
        ...

    def reset(self, episode_ids: Int[Tensor, " B"]) -> UInt8[Tensor, "B H W 3"]:
        """Start the episodes with these ids (int64) and return the first frames.

        Raises:
            ValueError: If there are not exactly ``num_envs`` ids or an id is negative.
        """
        ...

    def step(self, action: Float[Tensor, "B 7"]) -> Step:
        """Apply Δx Δy Δz (m), Δroll Δpitch Δyaw (rad) and the gripper (above 0.5 opens).

        Values beyond the environment's limits are clipped to them.

        Raises:
            ValueError: If the shape is wrong or a value is not finite.
            RuntimeError: If called before ``reset`` or after the horizon.
        """
        ...


def check_ids(episode_ids: Tensor, num_envs: int) -> None:
    """Refuse what ``VectorEnv.reset`` must refuse.

    Raises:
        ValueError: If there are not exactly ``num_envs`` ids or one is negative.
    """
    if episode_ids.shape != (num_envs,):
        raise ValueError(f"got {tuple(episode_ids.shape)} episode ids, expected ({num_envs},)")
    if bool((episode_ids < 0).any()):
        raise ValueError(f"episode ids must not be negative, got {int(episode_ids.min())}")


def check_step(action: Tensor, num_envs: int, *, elapsed: int, horizon: int) -> None:
    """Refuse what ``VectorEnv.step`` must refuse once there has been a reset.

    Raises:
        ValueError: If the shape is wrong or a value is not finite.
        RuntimeError: If the horizon is reached.
    """
    if action.shape != (num_envs, 7):
        raise ValueError(f"action has shape {tuple(action.shape)}, not ({num_envs}, 7)")
    if elapsed >= horizon:
        raise RuntimeError(f"the episodes ended after {horizon} steps: reset first")
    if not bool(torch.isfinite(action).all()):
        raise ValueError("action holds a value that is not finite")
