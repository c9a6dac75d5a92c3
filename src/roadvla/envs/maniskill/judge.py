"""What an episode has achieved: RL4VLA's success, grasps and potential, on B episodes at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_MARGIN, _GAP, _LEAST_FORCE = 0.01, 0.05, 0.03
_LONG_GRASP = 5


def on_receptacle(
    object_position: Float[Tensor, "B 3"],
    receptacle_position: Float[Tensor, "B 3"],
    object_half: Float[Tensor, "B 3"],
    receptacle_half: Float[Tensor, "B 3"],
    force: Float[Tensor, "B 3"],
) -> Bool[Tensor, " B"]:
    """Whether the object lies on the receptacle; it may still be held.

    The horizontal distance must be within the receptacle's largest half extent and 1 cm, the object
    above it and within 5 cm of touching, and the two must press on each other.

    Args:
        object_position: Of its origin, metres.
        receptacle_position: Of its origin, metres.
        object_half: Half extents along the world's axes after settling, metres.
        receptacle_half: The same of the receptacle.
        force: Between the two, newtons.
    """
    offset = object_position - receptacle_position
    near = offset[:, :2].norm(dim=1) <= receptacle_half.amax(dim=1) + _MARGIN
    height = offset[:, 2]
    low = (height > 0) & (height - receptacle_half[:, 2] - object_half[:, 2] <= _GAP)
    return near & low & (force.norm(dim=1) > _LEAST_FORCE)


@dataclass(frozen=True)
class Progress:
    """How B episodes stand.

    Attributes:
        grasp_count: Steps of the grasp that lasts.
        grasped: Whether there has been a grasp.
        consecutive_grasp: Whether one has lasted five steps.
        success: Whether the object lies on its receptacle now.
        success_once: Whether it ever has.
    """

    grasp_count: Int[Tensor, " B"]
    grasped: Bool[Tensor, " B"]
    consecutive_grasp: Bool[Tensor, " B"]
    success: Bool[Tensor, " B"]
    success_once: Bool[Tensor, " B"]

    @classmethod
    def start(cls, count: int, device: torch.device) -> Progress:
        """Nothing achieved yet."""
        no = torch.zeros(count, dtype=torch.bool, device=device)
        return cls(torch.zeros(count, dtype=torch.int64, device=device), no, no, no, no)

    def after(self, grasping: Bool[Tensor, " B"], success: Bool[Tensor, " B"]) -> Progress:
        """One step later.

        Args:
            grasping: Whether the gripper holds the object.
            success: Whether the object lies on its receptacle.
        """
        count = (self.grasp_count + 1) * grasping
        return Progress(
            grasp_count=count,
            grasped=self.grasped | grasping,
            consecutive_grasp=self.consecutive_grasp | (count >= _LONG_GRASP),
            success=success,
            success_once=self.success_once | success,
        )


def potential(
    grasped: Bool[Tensor, " B"],
    consecutive_grasp: Bool[Tensor, " B"],
    success: Bool[Tensor, " B"],
) -> Float[Tensor, " B"]:
    """0.1·grasped + 0.1·consecutive + 1.0·(success ∧ grasped); rewards are its differences."""
    return 0.1 * grasped.float() + 0.1 * consecutive_grasp.float() + (success & grasped).float()
