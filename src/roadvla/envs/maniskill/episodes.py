"""Episode ids to what the episodes contain, and back: mixed-radix numbers of up to 34 bits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from roadvla.envs.maniskill.settings import Variant
from roadvla.envs.maniskill.shifts import DistractorObject, DistractorReceptacle
from roadvla.envs.tabletop.noise import choice

_DRAW = 9000
_WORD = 2**24


@dataclass(frozen=True, kw_only=True)
class Episodes:
    """What B episodes contain, as absolute indices (int64): the same in every set.

    Attributes:
        object: Target, in ``objects.OBJECTS``.
        receptacle: Where it goes, in ``objects.RECEPTACLES``.
        table: Background, in ``objects.TABLES``.
        extra: What the shift draws: a texture, a template, a row of joint offsets, the number of
            the distractor; 0 where the variant draws nothing.
        position: Row of the variant's table of positions.
        yaw: In ``poses.YAWS``.
        distractor: In ``OBJECTS`` or ``RECEPTACLES``, whichever the variant adds; -1 for none.
            Follows from the others.
    """

    object: Int[Tensor, " B"]
    receptacle: Int[Tensor, " B"]
    table: Int[Tensor, " B"]
    extra: Int[Tensor, " B"]
    position: Int[Tensor, " B"]
    yaw: Int[Tensor, " B"]
    distractor: Int[Tensor, " B"]


def _digits(variant: Variant, obj_set: str) -> dict[str, range]:
    """The digits of an id with their ranges, most significant first."""
    digits = {
        "object": variant.objects.of(obj_set),
        "extra": variant.extra.of(obj_set),
        "receptacle": variant.receptacles.of(obj_set),
        "table": variant.tables.of(obj_set),
        "position": variant.positions.of(obj_set),
        "yaw": variant.yaws.of(obj_set),
    }
    if not isinstance(variant.shift, DistractorReceptacle):
        return digits
    order = ("object", "receptacle", "extra", "table", "position", "yaw")
    return {name: digits[name] for name in order}


def total(variant: Variant, obj_set: str) -> int:
    """Count the different episodes of a set; for EEPose they exceed 32 bits.

    Raises:
        UserError: If there is no such set.
    """
    return math.prod(len(indices) for indices in _digits(variant, obj_set).values())


def decode(variant: Variant, obj_set: str, episode_ids: Int[Tensor, " B"]) -> Episodes:
    """Take RL4VLA's episode ids apart.

    Args:
        variant: Which id of the suite.
        obj_set: train, test or all.
        episode_ids: int64; beyond the total they start over.

    Raises:
        UserError: If there is no such set.
        ValueError: If the ids are not int64 or one is negative.
    """
    digits = _digits(variant, obj_set)
    _check(episode_ids)
    rest = episode_ids
    found: dict[str, Tensor] = {}
    for name, indices in reversed(digits.items()):
        found[name] = rest % len(indices) + indices.start
        rest = rest // len(indices)
    return Episodes(**found, distractor=_distractor(variant, obj_set, found))


def encode(variant: Variant, obj_set: str, episodes: Episodes) -> Int[Tensor, " B"]:
    """Put the ids together again, each below the total. The distractor's index is not needed.

    Raises:
        UserError: If there is no such set.
        ValueError: If an episode is not in the set.
    """
    ids = torch.zeros_like(episodes.object)
    for name, indices in _digits(variant, obj_set).items():
        digit = getattr(episodes, name) - indices.start
        if bool(((digit < 0) | (digit >= len(indices))).any()):
            raise ValueError(
                f"{name} must be in [{indices.start}, {indices.stop}) in set {obj_set!r}"
            )
        ids = ids * len(indices) + digit
    return ids


def draw_ids(variant: Variant, obj_set: str, keys: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Draw an RL4VLA episode id for each key, uniformly and always the same one.

    Neighbouring ids of RL4VLA are neighbours in everything: the first 3136 all have one object and
    one table. So numbered episodes 0, 1, 2, … are keys of draws, with replacement, as in RL4VLA,
    where ids come from a random generator.

    Args:
        variant: Which id of the suite.
        obj_set: train, test or all.
        keys: int64, not negative.

    Returns:
        int64 in [0, total).

    Raises:
        UserError: If there is no such set.
        ValueError: If the keys are not int64 or one is negative.
    """
    count = total(variant, obj_set)
    _check(keys)
    high, low = choice(keys, _DRAW, 2, _WORD).unbind(-1)
    return (high * _WORD + low) % count


def _check(ids: Tensor) -> None:
    if ids.dtype != torch.int64:
        raise ValueError(f"episode ids must be int64, got {ids.dtype}")
    if bool((ids < 0).any()):
        raise ValueError("episode ids must not be negative")


def _distractor(variant: Variant, obj_set: str, found: Mapping[str, Tensor]) -> Int[Tensor, " B"]:
    """Count on from the target: the ``extra`` + 1 th after it, starting over at the end."""
    number = found["extra"] + 1
    if isinstance(variant.shift, DistractorObject):
        indices = variant.objects.of(obj_set)
        start = found["object"]
        if variant.shift.distinct:
            start = start - indices.start
        return (start + number) % len(indices) + indices.start
    if isinstance(variant.shift, DistractorReceptacle):
        indices = variant.receptacles.of(obj_set)
        among = max(len(indices), len(variant.extra.of(obj_set)) + 1)
        return (found["receptacle"] - indices.start + number) % among + indices.start
    return torch.full_like(number, -1)
