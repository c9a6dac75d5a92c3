"""Procedural textures, made once on the CPU from fixed seeds: table tops and overlays."""

from __future__ import annotations

import functools
import math

import torch
from jaxtyping import Float
from torch import Tensor

from roadvla.envs.tabletop.scene import NUM_OVERLAYS, NUM_TABLES

OVERLAY_SIZE = 96


@functools.cache
def overlays(seed: int = 7) -> Float[Tensor, "X S S 3"]:
    """Smooth random colour fields, 0 to 1, that wrap around at their edges."""
    return torch.stack([_smooth(_generator(seed, i), OVERLAY_SIZE) for i in range(NUM_OVERLAYS)])


def table_colours(points: Float[Tensor, "P 2"]) -> Float[Tensor, "X P 3"]:
    """Colour of all 32 table tops at points of the table plane.

    The first 16 are plain or wooden and pale; the others are checkered, marbled or dotted and
    saturated.

    Args:
        points: x, y in metres.
    """
    seen = [_wood(_generator(11, i), points, plain=i % 2 == 0) for i in range(NUM_TABLES)]
    makers = (_checker, _marble, _dots)
    unseen = [makers[i % 3](_generator(13, i), points) for i in range(NUM_TABLES)]
    return torch.stack(seen + unseen).clamp(0, 1)


def _generator(seed: int, index: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * seed + index)


def _rand(g: torch.Generator, low: float, high: float, *size: int) -> Tensor:
    return low + (high - low) * torch.rand(*size, generator=g)


def _smooth(g: torch.Generator, size: int) -> Tensor:
    """Sum of a few whole-period cosines per channel, stretched to [0, 1]."""
    axis = torch.arange(size) / size * 2 * math.pi
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    field = torch.zeros(size, size, 3)
    for _ in range(6):
        k = torch.randint(-2, 3, (2,), generator=g)
        wave = torch.cos(k[0] * x + k[1] * y + _rand(g, 0.0, 2 * math.pi, 1))
        field += wave[..., None] * _rand(g, -1.0, 1.0, 3)
    low, high = field.amin((0, 1)), field.amax((0, 1))
    return (field - low) / (high - low + 1e-6)


def _wood(g: torch.Generator, points: Tensor, *, plain: bool) -> Tensor:
    """Pale, hardly saturated ground with (unless plain) a wavy grain."""
    ground = _rand(g, 0.38, 0.72, 1) + _rand(g, -0.07, 0.07, 3)
    if plain:
        return ground.expand(len(points), 3)
    angle = _rand(g, 0.0, math.pi, 1)
    along = points[:, 0] * torch.cos(angle) + points[:, 1] * torch.sin(angle)
    across = points[:, 1] * torch.cos(angle) - points[:, 0] * torch.sin(angle)
    grain = torch.sin(
        across * _rand(g, 60.0, 140.0, 1) + 2 * torch.sin(along * _rand(g, 8.0, 20.0, 1))
    )
    return ground + 0.06 * grain[:, None]


def _two_colours(g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two saturated colours that differ in lightness."""
    first, second = _rand(g, 0.05, 0.95, 3), _rand(g, 0.05, 0.95, 3)
    return 0.75 * first, 0.25 + 0.75 * second


def _checker(g: torch.Generator, points: Tensor) -> Tensor:
    first, second = _two_colours(g)
    cells = torch.floor(points / _rand(g, 0.04, 0.09, 1)).sum(-1)
    return torch.where((cells % 2 == 0)[:, None], first, second)


def _marble(g: torch.Generator, points: Tensor) -> Tensor:
    first, second = _two_colours(g)
    k = _rand(g, 12.0, 30.0, 2)
    vein = torch.sin((points * k).sum(-1) + 3 * torch.sin(points[:, 0] * _rand(g, 20.0, 45.0, 1)))
    return first + (second - first) * (0.5 + 0.5 * vein)[:, None]


def _dots(g: torch.Generator, points: Tensor) -> Tensor:
    first, second = _two_colours(g)
    pitch = _rand(g, 0.05, 0.09, 1)
    offset = points / pitch - torch.round(points / pitch)
    return torch.where((offset.square().sum(-1) < 0.09)[:, None], first, second)
