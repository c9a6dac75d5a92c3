"""Where the meshes and pictures of the suite lie."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from roadvla.errors import UserError

VISUALS = ("textured.obj", "textured.dae", "textured.glb")
"""Names of a model's visual mesh; the first that exists is taken."""
COLLISION = "collision.obj"


@dataclass(frozen=True, kw_only=True)
class AssetFolders:
    """Roots of the asset collections.

    Attributes:
        maniskill: ManiSkill's data folder, ``$MS_ASSET_DIR/data``.
        rl4vla: RL4VLA's objects, receptacles, tables and textures.
    """

    maniskill: Path
    rl4vla: Path

    @property
    def robot(self) -> Path:
        """The robot's URDF."""
        return self.maniskill / "robots" / "widowx" / "wx250s.urdf"

    @property
    def stage(self) -> Path:
        """Table and room; only their collision shapes are used."""
        bridge = self.maniskill / "tasks" / "bridge_v2_real2sim_dataset"
        return bridge / "stages" / "bridge_table_1_v1.glb"

    @property
    def objects(self) -> Path:
        """Folders of objects, and their table of models."""
        return self.rl4vla / "more_carrot"

    @property
    def receptacles(self) -> Path:
        """Folders of receptacles, and their table of models."""
        return self.rl4vla / "more_plate"

    @property
    def tables(self) -> Path:
        """Pictures of tables."""
        return self.rl4vla / "more_table" / "imgs"

    @property
    def textures(self) -> Path:
        """Pictures that overlays are cut from."""
        return self.rl4vla / "more_table" / "textures"


def asset_folders() -> AssetFolders:
    """Find the roots: ``MS_ASSET_DIR``, as ManiSkill reads it, and ``ROADVLA_ASSETS``.

    ``ROADVLA_ASSETS`` is the folder that holds ``more_carrot``, ``more_plate`` and ``more_table``;
    without it, that is ``tasks/rl4vla`` in ManiSkill's data folder.
    """
    root = Path(os.environ.get("MS_ASSET_DIR") or Path.home() / ".maniskill")
    own = os.environ.get("ROADVLA_ASSETS")
    maniskill = root / "data"
    return AssetFolders(
        maniskill=maniskill, rl4vla=Path(own) if own else maniskill / "tasks" / "rl4vla"
    )


def require(path: Path) -> Path:
    """Return a file that must exist.

    Raises:
        UserError: If it does not; the message says how to get it.
    """
    if not path.is_file():
        # Nothing stands in for collision shapes, model tables and pictures.
        other = ", or pass --stand-ins for plain shapes" if path.suffix == ".glb" else ""
        raise UserError(
            f"asset {path} is missing: `roadvla assets fetch` fetches what is missing; if it lies "
            f"elsewhere, name that folder in MS_ASSET_DIR or ROADVLA_ASSETS{other}"
        )
    return path


def visual_of(model: Path) -> Path | None:
    """Find a model's visual mesh; ``None`` without one."""
    return next((model / name for name in VISUALS if (model / name).is_file()), None)
