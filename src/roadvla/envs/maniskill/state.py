"""Simulator state of B episodes: privileged, for experts and analyses, never for a policy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

WIDTH = 7 + 7 + 1 + 1 + 3 * 7
"""Numbers per episode in the packed form that ``PutOnPlateScene.state`` returns."""


@dataclass(frozen=True)
class State:
    """Poses are x y z (m) and a quaternion w x y z, in the world frame.

    Attributes:
        hand: Of the point between the fingertips.
        aim: Where the controller wants the hand to be; it lags behind.
        fingers: Mean position of the two fingers, metres: 0.015 closed, 0.037 open.
        held: Steps of the present grasp of the object; 0 without one.
        bodies: Object, receptacle and distractor; NaN without one.
    """

    hand: Float[Tensor, "B 7"]
    aim: Float[Tensor, "B 7"]
    fingers: Float[Tensor, " B"]
    held: Float[Tensor, " B"]
    bodies: Float[Tensor, "B 3 7"]


def unpack_state(packed: Float[Tensor, "B S"]) -> State:
    """Take the packed form apart."""
    hand, aim, fingers, held, bodies = torch.split(packed, [7, 7, 1, 1, 21], dim=1)
    return State(
        hand=hand,
        aim=aim,
        fingers=fingers[:, 0],
        held=held[:, 0],
        bodies=bodies.unflatten(1, (3, 7)),
    )
