"""The 17 ids of RL4VLA's suite as rows: what each set of episodes draws from, and what is shifted.

All ranges are half-open and absolute: an object's index is the same in every set.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

from roadvla.envs.maniskill.objects import OBJECTS, RECEPTACLES
from roadvla.envs.maniskill.shifts import (
    DistractorObject,
    DistractorReceptacle,
    InstructionShift,
    PoseShift,
    Reposition,
    Shift,
    TextureShift,
    WholeImageShift,
)
from roadvla.envs.suite import SETTINGS
from roadvla.errors import unknown_name

ObjSet = Literal["train", "test", "all"]
SETS: tuple[ObjSet, ...] = get_args(ObjSet)

Layout = Literal["pairs", "pairs_and_ring", "objects_apart", "receptacles_apart"]
"""Which table of positions (``positions.py``)."""

PREFIX = "PutOnPlateInScene25"
HORIZON = 80
"""Control steps of an episode; success is read at the last."""


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """The indices that each set draws from.

    Attributes:
        train: What policies are adapted on.
        test: What is out of distribution.
        all: Both.
    """

    train: range
    test: range
    all: range

    def of(self, obj_set: str) -> range:
        """Return the indices of a set by name.

        Raises:
            UserError: If there is no such set.
        """
        if obj_set not in SETS:
            raise unknown_name("set", obj_set, SETS)
        return {"train": self.train, "test": self.test, "all": self.all}[obj_set]


def _always(indices: range) -> Ranges:
    return Ranges(train=indices, test=indices, all=indices)


_SEEN = _always(range(16))
_ONE = _always(range(1))
_FOUR = _always(range(4))
_PAIRS = _always(range(784))
_TRIPLES = _always(range(2104))
_OBJECTS = Ranges(train=range(16), test=range(16, 25), all=range(25))
_TABLES = Ranges(train=range(16), test=range(16, 21), all=range(21))
_OTHER_16 = Ranges(train=range(1), test=range(1, 17), all=range(17))


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One id of the suite; the defaults are what most ids share in training.

    Attributes:
        env_id: RL4VLA's name.
        objects: Targets.
        receptacles: Receptacles named in the instruction.
        tables: Background pictures.
        extra: What the shift draws from: pictures, templates, joint offsets, distractors.
        positions: Rows of the layout's table.
        yaws: Entries of ``poses.YAWS``.
        layout: The table of positions.
        heights: From where object, receptacle and third body, if any, are dropped, metres.
        shift: What distinguishes the id, beyond its ranges.
    """

    env_id: str
    objects: Ranges = _SEEN
    receptacles: Ranges = _ONE
    tables: Ranges = _SEEN
    extra: Ranges = _ONE
    positions: Ranges = _PAIRS
    yaws: Ranges = _FOUR
    layout: Layout = "pairs"
    heights: tuple[float, float, float] = (0.95, 0.95, 0.95)
    shift: Shift | None = None

    @property
    def built_objects(self) -> int:
        """How many of ``OBJECTS``, from the first, RL4VLA puts into the scene."""
        return 1 if self.objects.all == range(1) else len(OBJECTS)

    @property
    def built_receptacles(self) -> int:
        """How many of ``RECEPTACLES``, from the first, RL4VLA puts into the scene."""
        return 1 if self.receptacles.all == range(1) else len(RECEPTACLES)

    def reposition_step(self, obj_set: str) -> int:
        """After how many actions the object is moved in this set; 0 for never."""
        self.objects.of(obj_set)
        return self.shift.step if isinstance(self.shift, Reposition) and obj_set != "train" else 0


_ROWS = (
    Variant(env_id="Main-v3", objects=_OBJECTS, tables=_TABLES),
    Variant(env_id="Single-v1", objects=_ONE, tables=_ONE),
    Variant(env_id="MainCarrot-v3", objects=_OBJECTS, tables=_ONE),
    Variant(env_id="MainImage-v3", objects=_ONE, tables=_TABLES),
    Variant(env_id="VisionImage-v1", tables=_TABLES),
    Variant(env_id="VisionTexture03-v1", extra=_OTHER_16, shift=TextureShift(opacity=0.3)),
    Variant(env_id="VisionTexture05-v1", extra=_OTHER_16, shift=TextureShift(opacity=0.5)),
    Variant(env_id="VisionWhole03-v1", extra=_OTHER_16, shift=WholeImageShift(opacity=0.3)),
    Variant(env_id="VisionWhole05-v1", extra=_OTHER_16, shift=WholeImageShift(opacity=0.5)),
    Variant(env_id="Carrot-v1", objects=_OBJECTS),
    Variant(env_id="Instruct-v1", extra=_OTHER_16, shift=InstructionShift()),
    Variant(env_id="Plate-v1", receptacles=_OTHER_16),
    Variant(
        env_id="MultiCarrot-v1",
        objects=_OBJECTS,
        extra=Ranges(train=range(15), test=range(8), all=range(24)),
        positions=_TRIPLES,
        layout="objects_apart",
        heights=(0.95, 0.92, 1.00),
        shift=DistractorObject(),
    ),
    Variant(
        env_id="MultiPlate-v1",
        receptacles=_OTHER_16,
        tables=_always(range(21)),
        extra=Ranges(train=range(16), test=range(15), all=range(16)),
        positions=_TRIPLES,
        layout="receptacles_apart",
        heights=(1.00, 0.92, 0.96),
        shift=DistractorReceptacle(),
    ),
    Variant(
        env_id="Position-v1",
        positions=Ranges(train=range(784), test=range(784, 1412), all=range(1412)),
        yaws=Ranges(train=range(4), test=range(4, 8), all=range(8)),
        layout="pairs_and_ring",
    ),
    Variant(
        env_id="EEPose-v1",
        extra=Ranges(train=range(1), test=range(1, 14376), all=range(14376)),
        shift=PoseShift(),
    ),
    Variant(
        env_id="PositionChangeTo-v1",
        positions=_TRIPLES,
        layout="objects_apart",
        heights=(0.95, 0.92, 1.00),
        shift=Reposition(),
    ),
)

VARIANTS: dict[str, Variant] = {
    PREFIX + row.env_id: dataclasses.replace(row, env_id=PREFIX + row.env_id) for row in _ROWS
}


@dataclass(frozen=True, kw_only=True)
class Fixes:
    """Oddities of RL4VLA that can be put right; all off, episodes are RL4VLA's own.

    Attributes:
        distinct_distractors: MultiCarrot's distractor is never the target.
        seen_tables: MultiPlate keeps to the 16 tables of training instead of using all 21 in
            every set. Episode ids then stand for other episodes.
        own_texture_box: A texture is stretched to the episode's own bounding box, not to the
            largest in the batch. The vector-environment contract asks for this.
    """

    distinct_distractors: bool = False
    seen_tables: bool = False
    own_texture_box: bool = False


def variant(name: str, fixes: Fixes | None = None) -> Variant:
    """Look a row up by the paper's alias or RL4VLA's id, with or without ``PREFIX``, and fix it.

    Raises:
        UserError: If there is none of that name.
    """
    env_id = SETTINGS[name].rl4vla_id if name in SETTINGS else name
    env_id = PREFIX + env_id if PREFIX + env_id in VARIANTS else env_id
    if env_id not in VARIANTS:
        raise unknown_name("environment", name, [*SETTINGS, *VARIANTS])
    return _fixed(VARIANTS[env_id], fixes or Fixes())


def _fixed(row: Variant, fixes: Fixes) -> Variant:
    shift = row.shift
    if fixes.distinct_distractors and isinstance(shift, DistractorObject):
        shift = dataclasses.replace(shift, distinct=True)
    if fixes.own_texture_box and isinstance(shift, TextureShift):
        shift = dataclasses.replace(shift, fit="own")
    leaks = fixes.seen_tables and isinstance(shift, DistractorReceptacle)
    return dataclasses.replace(row, shift=shift, tables=_SEEN if leaks else row.tables)
