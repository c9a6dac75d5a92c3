"""Episode id to scene: what stands where, what is asked for, where the gripper starts.

Everything is drawn by counter-based random numbers from the id and built from additions,
multiplications and comparisons only, which round the same way on every device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from roadvla.envs.suite import Distribution
from roadvla.envs.tabletop.noise import choice, uniform

SHAPES = ("ball", "cube", "carrot", "brick")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white")
TRAIN_RECEPTACLES = ("white", "blue", "green", "yellow")

# Half extents in metres; an object rests on the table at half its height.
HALF_EXTENTS = torch.tensor(
    [
        [0.030, 0.030, 0.030],
        [0.026, 0.026, 0.026],
        [0.055, 0.0225, 0.0225],
        [0.0475, 0.020, 0.020],
    ]
)
ELONGATED = torch.tensor([False, False, True, True])
RECEPTACLE_RADIUS = 0.062
REACH = (0.11, 0.14)
NUM_TABLES = 16
NUM_OVERLAYS = 16

_RECEPTACLE_GAP = 0.13
_OBJECT_GAP = 0.105
_START = (0.0, 0.0, 0.14)
_CANDIDATES = 48

# Of the 32 colour-shape pairs three colours of each shape are kept for the test split.
_PAIRS = [(shape, colour) for shape in range(4) for colour in range(8)]
_UNSEEN = [(shape, colour) for shape, colour in _PAIRS if (colour + 2 * shape) % 8 in (1, 3, 6)]
_SEEN = [pair for pair in _PAIRS if pair not in _UNSEEN]
_SEEN_RECEPTACLES = [COLOURS.index(name) for name in TRAIN_RECEPTACLES]
_UNSEEN_RECEPTACLES = [c for c in range(8) if c not in _SEEN_RECEPTACLES]


@dataclass(frozen=True)
class Scene:
    """B scenes with O objects and R receptacles; slot 0 is what the instruction names.

    Attributes:
        shape: Index into ``SHAPES``.
        colour: Index into ``COLOURS``.
        object_xy: Centres on the table, metres.
        object_yaw: Radians.
        receptacle_colour: Index into ``COLOURS``.
        receptacle_shape: 0 for a round plate, 1 for a square tray.
        receptacle_xy: Centres, metres.
        gripper: Start of the gripper's tip: x, y, z in metres, roll, pitch, yaw in radians.
        table: Index of the table-top texture, [0, 16) seen and [16, 32) unseen.
        overlay: Index of the overlay texture.
        moved_xy: Where the object goes if it is repositioned.
    """

    shape: Int[Tensor, "B O"]
    colour: Int[Tensor, "B O"]
    object_xy: Float[Tensor, "B O 2"]
    object_yaw: Float[Tensor, "B O"]
    receptacle_colour: Int[Tensor, "B R"]
    receptacle_shape: Int[Tensor, "B R"]
    receptacle_xy: Float[Tensor, "B R 2"]
    gripper: Float[Tensor, "B 6"]
    table: Int[Tensor, " B"]
    overlay: Int[Tensor, " B"]
    moved_xy: Float[Tensor, "B 2"]

    def instructions(self) -> list[str]:
        """Say what each scene asks for, naming the target object and receptacle."""
        named = torch.stack([self.colour[:, 0], self.shape[:, 0], self.receptacle_colour[:, 0]], 1)
        return [f"put {COLOURS[c]} {SHAPES[s]} on {COLOURS[r]} plate" for c, s, r in named.tolist()]


def sample_scene(episode_ids: Int[Tensor, " B"], distribution: Distribution) -> Scene:
    """Build the scenes with these ids.

    Args:
        episode_ids: Non-negative int64.
        distribution: Which split of which setting.
    """
    receptacle_xy, object_xy, moved_xy = _positions(episode_ids, distribution)
    pairs = _pairs(episode_ids, distribution)
    plates = _receptacle_colours(episode_ids, distribution)
    trays = torch.zeros_like(plates)
    if distribution.lookalikes:
        pairs = _lookalikes(episode_ids, pairs)
        plates = plates[:, :1].expand_as(plates)
        trays[:, 1:] = 1
    count = pairs.shape[1]
    yaw = uniform(episode_ids, 3, count) * math.pi - math.pi / 2
    table = choice(episode_ids, 4, 1, NUM_TABLES)[:, 0]
    return Scene(
        shape=pairs[..., 0],
        colour=pairs[..., 1],
        object_xy=object_xy,
        object_yaw=yaw,
        receptacle_colour=plates,
        receptacle_shape=trays,
        receptacle_xy=receptacle_xy,
        gripper=_gripper(episode_ids, distribution),
        table=table + NUM_TABLES * (distribution.tables == "unseen"),
        overlay=choice(episode_ids, 5, 1, NUM_OVERLAYS)[:, 0],
        moved_xy=moved_xy,
    )


def _distinct(key: Tensor, stream: int, count: int, options: int) -> Tensor:
    """Draw ``count`` different indices below ``options`` per key: a partial shuffle by sorting."""
    return uniform(key, stream, options).argsort(dim=1, stable=True)[:, :count]


def _pairs(ids: Tensor, distribution: Distribution) -> Tensor:
    pool = _UNSEEN if distribution.unseen_objects else _SEEN
    table = torch.tensor(pool, device=ids.device)
    return table[_distinct(ids, 1, 1 + distribution.distractor_objects, len(pool))]


def _lookalikes(ids: Tensor, pairs: Tensor) -> Tensor:
    """Give the distractors the target's colour and other shapes."""
    target = pairs[:, :1]
    turn = 1 + _distinct(ids, 7, pairs.shape[1] - 1, len(SHAPES) - 1)
    shape = torch.cat([target[..., 0], (target[..., 0] + turn) % len(SHAPES)], 1)
    return torch.stack([shape, target[..., 1].expand_as(shape)], -1)


def _receptacle_colours(ids: Tensor, distribution: Distribution) -> Tensor:
    pool = _UNSEEN_RECEPTACLES if distribution.unseen_receptacles else _SEEN_RECEPTACLES
    table = torch.tensor(pool, device=ids.device)
    return table[_distinct(ids, 2, 1 + distribution.distractor_receptacles, len(pool))]


def _gripper(ids: Tensor, distribution: Distribution) -> Tensor:
    """Start pose: within 2 cm of the usual one or, shifted, anywhere in a far wider box."""
    u = uniform(ids, 6, 6) * 2 - 1
    spread = (0.02, 0.02, 0.02, 0.0, 0.0, 0.0)
    if distribution.shifted_pose:
        spread = (0.10, 0.14, 0.055, 0.25, 0.25, 0.8)
    centre = torch.tensor((*_START, 0.0, 0.0, 0.0), device=ids.device)
    return centre + u * torch.tensor(spread, device=ids.device)


def _positions(ids: Tensor, distribution: Distribution) -> tuple[Tensor, Tensor, Tensor]:
    """Place receptacles, objects and the later position one by one, each clear of those before."""
    reach = torch.tensor(REACH, device=ids.device)

    def candidates(stream: int) -> Tensor:
        return (uniform(ids, stream, 2 * _CANDIDATES).view(-1, _CANDIDATES, 2) * 2 - 1) * reach

    receptacles = [candidates(10)[:, 0]]
    for slot in range(distribution.distractor_receptacles):
        gaps = [_RECEPTACLE_GAP] * len(receptacles)
        receptacles.append(_first_clear(candidates(11 + slot), receptacles, gaps))
    objects: list[Tensor] = []
    for slot in range(1 + distribution.distractor_objects):
        gaps = [_RECEPTACLE_GAP] + [_OBJECT_GAP] * (len(receptacles) - 1 + len(objects))
        objects.append(_first_clear(candidates(20 + slot), [*receptacles, *objects], gaps))
    gaps = [_RECEPTACLE_GAP] + [_OBJECT_GAP] * (len(receptacles) - 1 + len(objects))
    moved = _first_clear(candidates(30), [*receptacles, *objects], gaps)
    return torch.stack(receptacles, 1), torch.stack(objects, 1), moved


def _first_clear(candidates: Tensor, taken: list[Tensor], gaps: list[float]) -> Tensor:
    """Take the first candidate at least ``gaps`` from all taken places, else the clearest one."""
    margin = torch.full(candidates.shape[:2], math.inf, device=candidates.device)
    for place, gap in zip(taken, gaps, strict=True):
        offset = candidates - place[:, None]
        distance_squared = offset[..., 0] * offset[..., 0] + offset[..., 1] * offset[..., 1]
        margin = torch.minimum(margin, distance_squared - gap * gap)
    order = torch.arange(candidates.shape[1], 0, -1, device=candidates.device)
    score = torch.where(margin >= 0, order.float(), margin.clamp(max=0.0))
    return candidates.gather(1, score.argmax(1)[:, None, None].expand(-1, 1, 2))[:, 0]
