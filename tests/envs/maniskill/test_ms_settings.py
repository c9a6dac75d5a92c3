"""The 17 rows: names, shifts, layouts, and what is built for them."""

from __future__ import annotations

import pytest

from roadvla.envs.maniskill.settings import PREFIX, SETS, VARIANTS, variant
from roadvla.envs.maniskill.shifts import (
    DistractorObject,
    DistractorReceptacle,
    InstructionShift,
    PoseShift,
    Reposition,
    TextureShift,
    WholeImageShift,
)
from roadvla.envs.suite import SETTINGS
from roadvla.errors import UserError


def test_there_are_17_ids_and_table_3_uses_them() -> None:
    assert len(VARIANTS) == 17
    assert all(env_id == row.env_id for env_id, row in VARIANTS.items())
    for alias, row in SETTINGS.items():
        assert variant(alias).env_id == row.rl4vla_id


def test_unknown_names() -> None:
    with pytest.raises(UserError, match="did you mean 'PutOnPlateInScene25PositionChangeTo-v1'"):
        variant("PutOnPlateInScene25PositionChange-v1")
    with pytest.raises(UserError, match="unknown environment"):
        variant("VR-Unknown")


def test_shifts_and_layouts() -> None:
    shifts = {
        env_id.removeprefix(PREFIX): row.shift
        for env_id, row in VARIANTS.items()
        if row.shift is not None
    }
    assert shifts == {
        "VisionTexture03-v1": TextureShift(opacity=0.3),
        "VisionTexture05-v1": TextureShift(opacity=0.5),
        "VisionWhole03-v1": WholeImageShift(opacity=0.3),
        "VisionWhole05-v1": WholeImageShift(opacity=0.5),
        "Instruct-v1": InstructionShift(),
        "MultiCarrot-v1": DistractorObject(),
        "MultiPlate-v1": DistractorReceptacle(),
        "EEPose-v1": PoseShift(),
        "PositionChangeTo-v1": Reposition(),
    }
    layouts = {
        env_id.removeprefix(PREFIX): row.layout
        for env_id, row in VARIANTS.items()
        if row.layout != "pairs"
    }
    assert layouts == {
        "MultiCarrot-v1": "objects_apart",
        "MultiPlate-v1": "receptacles_apart",
        "Position-v1": "pairs_and_ring",
        "PositionChangeTo-v1": "objects_apart",
    }


def test_what_is_built_and_when_objects_move() -> None:
    built = {
        env_id.removeprefix(PREFIX): (row.built_objects, row.built_receptacles)
        for env_id, row in VARIANTS.items()
    }
    assert {name for name, (objects, _) in built.items() if objects == 1} == {
        "Single-v1",
        "MainImage-v3",
    }
    assert {objects for objects, _ in built.values()} == {1, 25}
    assert {name: count for name, (_, count) in built.items() if count > 1} == {
        "Plate-v1": 17,
        "MultiPlate-v1": 17,
    }
    steps = [variant("ER-Repositioning").reposition_step(name) for name in SETS]
    assert steps == [0, 5, 5]
    assert [variant("ER-InitPose").reposition_step(name) for name in SETS] == [0, 0, 0]
    with pytest.raises(UserError, match="unknown set"):
        variant("ER-Repositioning").reposition_step("eval")
