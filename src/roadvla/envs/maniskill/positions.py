"""Where bodies may stand: pairs and triples of cells of a 6x6 grid, and of a ring around it."""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from roadvla.envs.maniskill.settings import Layout

CENTRE = (-0.16, 0.00)
"""Of the grid, and so of where bodies stand on average."""
_HALF_WIDTH = 0.075
_GRID = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
_WIDER = (-0.2, *_GRID, 1.2)
_NEAR = 0.070
_FAR = 0.150


def _cells(steps: tuple[float, ...]) -> Float[Tensor, "N 2"]:
    """Cells of a square grid, x slow and y fast, metres, float64.

    72 ordered pairs of cells are 15 cm apart but for rounding, and 20 of them count as farther.
    To keep these 20, coordinates and distances round step by step as in RL4VLA: in float64, with
    these operations in this order, and no fused or compensated ones (hypot gives other triples).
    """
    x, y = ([(2 * step - 1) * _HALF_WIDTH + centre for step in steps] for centre in CENTRE)
    return torch.cartesian_prod(
        torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    )


def _farther(cells: Float[Tensor, "N 2"], distance: float) -> Bool[Tensor, "N N"]:
    difference = cells[:, None] - cells[None, :]
    square = difference * difference
    return (square[..., 0] + square[..., 1]).sqrt() > distance


def _pairs(cells: Float[Tensor, "N 2"]) -> Float[Tensor, "P 3 2"]:
    """Object and receptacle on different cells, object slow; there is no third."""
    pairs = cells[_farther(cells, _NEAR).nonzero()]
    return torch.cat([pairs, torch.full_like(pairs[:, :1], torch.nan)], dim=1)


def _triples(
    cells: Float[Tensor, "N 2"], object_third: float, receptacle_third: float
) -> Float[Tensor, "P 3 2"]:
    """Object, receptacle and third body, object slowest, with the given least distances."""
    near = _farther(cells, _NEAR)[:, :, None]
    to_object = _farther(cells, object_third)[:, None, :]
    to_receptacle = _farther(cells, receptacle_third)[None, :, :]
    return cells[(near & to_object & to_receptacle).nonzero()]


def _ring() -> Float[Tensor, "N 2"]:
    """The 28 cells around the grid."""
    cells = _cells(_WIDER)
    outer = cells - torch.tensor(CENTRE, dtype=torch.float64)
    return cells[(outer.abs() > _HALF_WIDTH + 0.01).any(-1)]


@lru_cache
def positions(layout: Layout) -> Float[Tensor, "P 3 2"]:
    """List the positions of object, receptacle and third body, metres, float64; read only.

    - ``pairs``: 784 pairs on the grid; the third is NaN, as in the next.
    - ``pairs_and_ring``: these, then 628 on the ring.
    - ``objects_apart``: 2104 triples, object and third more than 15 cm apart.
    - ``receptacles_apart``: 2104 triples, receptacle and third more than 15 cm apart.
    """
    grid = _cells(_GRID)
    if layout == "objects_apart":
        return _triples(grid, _FAR, _NEAR)
    if layout == "receptacles_apart":
        return _triples(grid, _NEAR, _FAR)
    return _pairs(grid) if layout == "pairs" else torch.cat([_pairs(grid), _pairs(_ring())])
