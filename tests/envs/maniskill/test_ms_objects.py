"""Models: names, folders, boxes, and how large a turned body is."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ms_recorded import ASSETS, needs_assets

from roadvla.envs.maniskill.objects import (
    OBJECTS,
    RECEPTACLES,
    TABLES,
    TEXTURES,
    half_sizes,
    read_boxes,
)
from roadvla.errors import UserError


def table(**changes: Any) -> dict[str, Any]:
    rows = {
        model.folder: {
            "name": model.name,
            "density": model.density,
            "bbox": {"min": [-0.01 * (i + 1), -0.02, -0.03], "max": [0.01, 0.02, 0.04]},
        }
        for i, model in enumerate(RECEPTACLES)
    }
    rows["001_plate_simpler"].update(changes)
    return rows


def test_names_and_folders() -> None:
    assert (len(OBJECTS), len(RECEPTACLES), len(TABLES), len(TEXTURES)) == (25, 17, 21, 21)
    assert (OBJECTS[5].name, OBJECTS[5].folder) == ("zuchinni", "006_zuchinni_1")
    assert (OBJECTS[16].name, OBJECTS[24].name) == ("travel cup", "cup")
    assert OBJECTS[0].folder == "001_carrot_simpler"
    assert (RECEPTACLES[0].folder, RECEPTACLES[16].folder) == ("001_plate_simpler", "017_notepad_1")
    assert (TABLES[0], TABLES[15]) == ("001_table_simpler.png", "016_coloful desk_1.png")
    assert (TEXTURES[0], TEXTURES[20]) == ("001.png", "021.png")


@needs_assets
def test_names_and_densities_of_the_assets() -> None:
    assert read_boxes(ASSETS / "more_carrot" / "model_db.json", OBJECTS).shape == (25, 2, 3)
    assert read_boxes(ASSETS / "more_plate" / "model_db.json", RECEPTACLES).shape == (17, 2, 3)
    for kind, models in (("more_carrot", OBJECTS), ("more_plate", RECEPTACLES)):
        assert all((ASSETS / kind / m.folder / "collision.obj").is_file() for m in models)
        rows = json.loads((ASSETS / kind / "model_db.json").read_text())
        assert all(row["scales"] == [models[0].scale] for row in rows.values())
    rows = json.loads((ASSETS / "more_table" / "model_db.json").read_text())
    assert tuple(rows) == TABLES
    assert tuple(row["texture"] for row in rows.values()) == TEXTURES
    assert [row["mix"] for row in rows.values()] == [0.0] + [1.0] * 20
    assert all((ASSETS / "more_table" / "imgs" / name).is_file() for name in TABLES)
    assert all((ASSETS / "more_table" / "textures" / name).is_file() for name in TEXTURES)


@needs_assets
def test_extents_of_the_assets() -> None:
    boxes = read_boxes(ASSETS / "more_carrot" / "model_db.json", OBJECTS)
    extents = ((boxes[:, 1] - boxes[:, 0]) * 1000).round()
    assert extents[0].tolist() == [118, 32, 41]
    assert extents[24].tolist() == [59, 44, 37]
    boxes = read_boxes(ASSETS / "more_plate" / "model_db.json", RECEPTACLES)
    assert ((boxes[0, 1] - boxes[0, 0]) * 1000).round().tolist() == [110, 110, 6]


def test_boxes_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "model_db.json"
    path.write_text(json.dumps(table()))
    boxes = read_boxes(path, RECEPTACLES)
    assert boxes[2].flatten().tolist() == pytest.approx([-0.03, -0.02, -0.03, 0.01, 0.02, 0.04])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read the model table"),
        ("[1, 2", "is not a model table"),
        ("[1, 2]", "is not a model table"),
        ("{}", "describes other models than the 17"),
        (json.dumps(table(name="dish")), "describes other models"),
        (json.dumps(table(density=1000)), "describes other models"),
        (json.dumps(table(bbox={"min": [0, 0, 0]})), "is not a model table"),
        (json.dumps(table(bbox={"min": [0, 0], "max": [0, 0, 0]})), "is not a model table"),
    ],
)
def test_bad_tables(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "model_db.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_boxes(path, RECEPTACLES)


def turn(q: list[float], v: tuple[float, ...]) -> list[float]:
    """Rotate a vector by a quaternion, as v + 2 w (u x v) + 2 u x (u x v)."""

    def cross(a: list[float], b: list[float]) -> list[float]:
        return [
            a[1] * b[2] - a[2] * b[1],
            a[2] * b[0] - a[0] * b[2],
            a[0] * b[1] - a[1] * b[0],
        ]

    w, u = q[0], q[1:]
    once = cross(u, list(v))
    twice = cross(u, once)
    return [v[i] + 2 * w * once[i] + 2 * twice[i] for i in range(3)]


def test_half_sizes_are_those_of_the_turned_corners() -> None:
    boxes = torch.tensor([[[-0.06, -0.02, -0.01], [0.05, 0.015, 0.02]], [[0.0, 0, 0], [1, 2, 3]]])
    quaternion = torch.nn.functional.normalize(torch.randn(20, 4), dim=-1)
    index = torch.arange(20) % 2
    found = half_sizes(boxes, index, quaternion)
    for b in range(20):
        low, high = boxes[index[b]].tolist()
        corners = itertools.product(*zip(low, high, strict=True))
        turned = torch.tensor([turn(quaternion[b].tolist(), corner) for corner in corners])
        extent = turned.amax(0) - turned.amin(0)
        torch.testing.assert_close(found[b], extent / 2, atol=1e-6, rtol=1e-5)
