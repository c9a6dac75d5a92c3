"""What the scenes are made of: 25 objects, 17 receptacles, 21 tables, and how large a body is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from roadvla.errors import UserError
from roadvla.files import read_json


@dataclass(frozen=True, kw_only=True)
class Model:
    """A rigid body that the scenes use.

    Attributes:
        folder: Its folder in the asset collection; meshes lie there.
        name: What instructions call it, spelling mistakes included.
        density: kg/m³.
        scale: Factor on the meshes. RL4VLA's table has a list of them that its code never reads.
    """

    folder: str
    name: str
    density: int
    scale: float = 1.0


def _numbered(first: str, rows: tuple[tuple[str, int], ...]) -> tuple[Model, ...]:
    """Folders are numbered from 1 and end in _1, all but the first, which came from SIMPLER."""
    models = []
    for number, (name, density) in enumerate(rows, start=1):
        folder = first if number == 1 else f"{number:03d}_{name}_1"
        models.append(Model(folder=folder, name=name, density=density))
    return tuple(models)


OBJECTS = _numbered(
    "001_carrot_simpler",
    (
        ("carrot", 1044),
        ("kitchen shovel", 557),
        ("bread", 526),
        ("plastic bottle", 1916),
        ("7up can", 790),
        ("zuchinni", 715),
        ("ketchup bottle", 500),
        ("watering can", 1591),
        ("pipe", 1116),
        ("toy bear", 667),
        ("fast food cup", 500),
        ("plant", 1051),
        ("banana", 500),
        ("hamburger", 863),
        ("golf ball", 500),
        ("BBQ sauce", 1057),
        ("travel cup", 1018),
        ("pepper", 835),
        ("nonstop can", 1248),
        ("potato", 1355),
        ("baguette", 1367),
        ("champagne glass", 500),
        ("kitchen spoon", 500),
        ("onion", 1137),
        ("cup", 1018),
    ),
)
"""To be picked up; the first 16 are seen in training."""

RECEPTACLES = _numbered(
    "001_plate_simpler",
    (
        ("plate", 1003),
        ("cloth", 6975),
        ("carpet", 2815),
        ("newspaper", 2278),
        ("sheet metal", 2389),
        ("drawing tablet", 2868),
        ("tomato slice", 3089),
        ("pizza", 3862),
        ("flat bowl", 4847),
        ("gramophone disk", 2193),
        ("frying pan", 5104),
        ("mouse pad", 3332),
        ("cutting board", 3107),
        ("chess board", 6368),
        ("manhole cover", 3743),
        ("envelope", 1824),
        ("notepad", 3087),
    ),
)
"""To put it on; the first is seen in training."""

TABLES = tuple(
    f"{number:03d}_{name}.png"
    for number, name in enumerate(
        (
            "table_simpler",
            "blue plastic table_1",
            "TV cabinet_1",
            "picnic table_1",
            "dest_1",
            "table_1",
            "yellow desk_1",
            "table_2",
            "table_3",
            "table_4",
            "table_5",
            "pink table_1",
            "table_6",
            "grass table_1",
            "table_7",
            "coloful desk_1",
            "glass table_1",
            "green table_1",
            "pink desk_1",
            "stone table_1",
            "dining table_2",
        ),
        start=1,
    )
)
"""Pictures, 640x480, that everything but the robot and the bodies is replaced by."""

TEXTURES = tuple(f"{number:03d}.png" for number in range(1, 22))
"""Pictures, 640x480, that the overlays are cut from."""


def read_boxes(database: Path, models: tuple[Model, ...]) -> Float[Tensor, "M 2 3"]:
    """Read the models' bounding boxes, lowest and highest corner in metres, from a model table.

    Args:
        database: A ``model_db.json`` of RL4VLA's assets.
        models: ``OBJECTS`` or ``RECEPTACLES``, which the file must describe.

    Raises:
        UserError: If the file cannot be read or describes other models.
    """
    try:
        entries: dict[str, Any] = read_json(database)
        found = [(folder, row["name"], row["density"]) for folder, row in entries.items()]
        corners = [[row["bbox"]["min"], row["bbox"]["max"]] for row in entries.values()]
        boxes = torch.tensor(corners, dtype=torch.float32).view(-1, 2, 3)
    except OSError as error:
        raise UserError(f"cannot read the model table {database}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{database} is not a model table of RL4VLA's assets: {error!r}") from error
    if found != [(model.folder, model.name, model.density) for model in models]:
        raise UserError(
            f"{database} describes other models than the {len(models)} from {models[0].folder} to "
            f"{models[-1].folder}: fetch the assets again"
        )
    return boxes * torch.tensor([model.scale for model in models])[:, None, None]


def half_sizes(
    boxes: Float[Tensor, "M 2 3"], index: Int[Tensor, " B"], quaternion: Float[Tensor, "B 4"]
) -> Float[Tensor, "B 3"]:
    """Half extents along the world's axes of bodies that are turned: what success is judged by.

    The extent of the eight turned corners is |R| times the extent of the box.

    Args:
        boxes: Of all models, metres.
        index: Which model each body is.
        quaternion: How it is turned, w x y z, of unit length.

    Returns:
        Metres.
    """
    half = ((boxes[:, 1] - boxes[:, 0]) / 2).to(quaternion.device)[index]
    return (rotation_matrix(quaternion).abs() @ half[..., None]).squeeze(-1)


def rotation_matrix(quaternion: Float[Tensor, "*B 4"]) -> Float[Tensor, "*B 3 3"]:
    """Turn unit quaternions w x y z into matrices."""
    w, x, y, z = quaternion.unbind(-1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
