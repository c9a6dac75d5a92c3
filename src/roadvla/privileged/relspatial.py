"""RelSpatial: where object, receptacle and gripper are from each other, in words (Sec. 4.2.1).

Directions are those of the robot, which both simulators make look along −x: ahead is −x, right is
+y, above is +z. A displacement names its axes by size, the largest first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from roadvla.envs.base import Snapshot
from roadvla.privileged.hints import names

ALIGNED = 0.015
"""Displacement along an axis that is not worth a word, metres."""

_WORDS = (("ahead", "behind"), ("left", "right"), ("below", "above"))  # of −, + on each axis


def relspatial_hints(snapshot: Snapshot, instructions: Sequence[str]) -> list[str]:
    """Describe each episode's state, with the names that its instruction uses.

    Args:
        snapshot: Of B episodes.
        instructions: What the B episodes ask for.
    """
    tip, thing, place = snapshot.tip, snapshot.objects[:, 0], snapshot.receptacles[:, 0]
    way = (place - thing) * thing.new_tensor([1.0, 1.0, 0.0])
    # One transfer for all: [B, 3 displacements, 3 axes], signs and the order of their sizes.
    displacements = torch.stack([thing - tip, place - tip, way], dim=1)
    directions = _directions(displacements)
    flags = torch.stack([snapshot.held == 0, snapshot.is_open], dim=1).tolist()
    hints = []
    for instruction, words, (grasped, is_open) in zip(instructions, directions, flags, strict=True):
        thing_name, place_name = names(instruction)
        to_thing, to_place, move = words
        hints.append(
            f"{thing_name} is {_where(to_thing)} gripper, {'' if grasped else 'not '}grasped. "
            f"{place_name} is {_where(to_place)} gripper. "
            f"{thing_name} to {place_name}: {_way(move)}. "
            f"gripper {'open' if is_open else 'closed'}."
        )
    return hints


def _directions(displacements: Float[Tensor, "B D 3"]) -> list[list[list[str]]]:
    """Words of the axes that count, the largest first."""
    order = displacements.abs().argsort(dim=-1, descending=True, stable=True)
    signs = displacements.sign() * (displacements.abs() >= ALIGNED)
    return [
        [
            [_WORDS[axis][sign[axis] > 0] for axis in axes if sign[axis] != 0]
            for axes, sign in zip(episode_order, episode_signs, strict=True)
        ]
        for episode_order, episode_signs in zip(
            order.tolist(), signs.nan_to_num().int().tolist(), strict=True
        )
    ]


def _where(words: list[str]) -> str:
    return ", ".join(words) if words else "at"


def _way(words: list[str]) -> str:
    return f"move {' and '.join(words)}" if words else "stay"
