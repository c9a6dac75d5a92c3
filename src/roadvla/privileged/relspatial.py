"""RelSpatial: where object, receptacle and gripper are from each other, in words (Sec. 4.2.1).

Directions are those of the robot, which both simulators make look along −x: ahead is −x, right is
+y, above is +z. A displacement names its axes by size, the largest first (reading R44).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from roadvla.envs.base import Snapshot
from roadvla.privileged.hints import names

ALIGNED = 0.015
"""Displacement along an axis that is not worth a word, metres."""

_WORDS = ("ahead", "behind", "left", "right", "below", "above")  # − and + of each axis


def relspatial_hints(snapshot: Snapshot, instructions: Sequence[str]) -> list[str]:
    """Describe each episode's state, with the names that its instruction uses.

    Args:
        snapshot: Of B episodes.
        instructions: What the B episodes ask for.
    """
    tip, thing, place = snapshot.tip, snapshot.objects[:, 0], snapshot.receptacles[:, 0]
    way = (place - thing) * thing.new_tensor([1.0, 1.0, 0.0])
    codes = _codes(torch.stack([thing - tip, place - tip, way], dim=1)).flatten(1)
    flags = torch.stack([snapshot.held == 0, snapshot.is_open], dim=1)
    table = torch.cat([codes, flags], dim=1).tolist()  # the one transfer
    hints = []
    for instruction, (*words, grasped, is_open) in zip(instructions, table, strict=True):
        thing_name, place_name = names(instruction)
        to_thing, to_place, move = (_spell(words[start : start + 3]) for start in (0, 3, 6))
        hints.append(
            f"{thing_name} is {_where(to_thing)} gripper, {'' if grasped else 'not '}grasped. "
            f"{place_name} is {_where(to_place)} gripper. "
            f"{thing_name} to {place_name}: {_way(move)}. "
            f"gripper {'open' if is_open else 'closed'}."
        )
    return hints


def _codes(displacements: Float[Tensor, "B D 3"]) -> Int[Tensor, "B D 3"]:
    """Places in ``_WORDS``, the largest displacement first; -1 where it is not worth a word."""
    size = displacements.abs()
    word = 2 * torch.arange(3, device=size.device) + (displacements > 0)
    order = size.argsort(dim=-1, descending=True, stable=True)
    return torch.where(size >= ALIGNED, word, -1).gather(-1, order)


def _spell(codes: list[int]) -> list[str]:
    return [_WORDS[code] for code in codes if code >= 0]


def _where(words: list[str]) -> str:
    return ", ".join(words) if words else "at"


def _way(words: list[str]) -> str:
    return f"move {' and '.join(words)}" if words else "stay"
