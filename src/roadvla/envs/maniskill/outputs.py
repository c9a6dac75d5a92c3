"""What a scene is made from and where it writes what it shows: known to parent and workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from roadvla.envs.maniskill import state
from roadvla.envs.maniskill.options import ManiSkillSettings

FLAGS = ("success", "success_once", "grasped", "consecutive_grasp")

Build = Literal["chosen", "all"]
"""Which bodies a scene holds: those of its episodes, made anew at every reset, or all."""


@dataclass(frozen=True)
class Outputs:
    """What B episodes show after a reset or a step.

    Attributes:
        image: Frames.
        flags: ``FLAGS``.
        state: Packed simulator state (``unpack_state``).
    """

    image: UInt8[Tensor, "B H W 3"]
    flags: Bool[Tensor, "B 4"]
    state: Float[Tensor, "B S"]

    @classmethod
    def empty(cls, count: int, size: tuple[int, int], device: torch.device) -> Outputs:
        """Make room for B episodes."""
        return cls(
            image=torch.zeros((count, *size, 3), dtype=torch.uint8, device=device),
            flags=torch.zeros((count, len(FLAGS)), dtype=torch.bool, device=device),
            state=torch.zeros((count, state.WIDTH), device=device),
        )

    def share(self) -> Outputs:
        """Move to memory that other processes see too."""
        for tensor in (self.image, self.flags, self.state):
            tensor.share_memory_()
        return self

    def rows(self, start: int, stop: int) -> Outputs:
        """The part of some of the episodes."""
        return Outputs(self.image[start:stop], self.flags[start:stop], self.state[start:stop])


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a scene is made from.

    Attributes:
        setting: RL4VLA's id.
        obj_set: train, test or all.
        settings: How it is simulated.
        shader: What draws it.
        build: Which bodies it holds.
        device: ``cpu`` or ``cuda:k``.
    """

    setting: str
    obj_set: str
    settings: ManiSkillSettings
    shader: str
    build: Build
    device: str
