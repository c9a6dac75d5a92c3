"""Every file that the suite needs: where it comes from and how it is known."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from roadvla.envs.maniskill.assets import AssetFolders
from roadvla.errors import UserError
from roadvla.files import read_json

Root = Literal["maniskill", "rl4vla"]
"""Which of the two asset folders: ManiSkill's data, or RL4VLA's models and pictures."""
Mirror = Literal["github", "hub"]
"""Where RL4VLA's files are public: its repository, or RLinf's copy on the Hugging Face hub."""

_FILE = Path(__file__).with_name("catalog.json")


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One file, and what is known of its original.

    Attributes:
        collection: The collection it belongs to.
        root: The folder that holds it.
        path: Where in that folder, with slashes.
        size: Bytes, where known.
        sha256: Of the whole file, where known.
        blob: First digits of its git object id, where nothing better is known.
        pixels: SHA-256 of a picture's RGB values, where its file was compressed anew but the
            picture is the same.
        reduced: SHA-256 of a copy with smaller textures, which is in circulation.
        stand_in: SHA-256 of a plain shape that is in circulation in its place.
    """

    collection: str
    root: Root
    path: str
    size: int | None = None
    sha256: str | None = None
    blob: str | None = None
    pixels: str | None = None
    reduced: str | None = None
    stand_in: str | None = None

    @property
    def checksum(self) -> str | None:
        """The checksum of the original with its kind; ``None`` if none is known."""
        known = {"sha256": self.sha256, "pixels": self.pixels, "git": self.blob}
        return next((f"{kind} {value}" for kind, value in known.items() if value), None)

    def below(self, folders: AssetFolders) -> Path:
        """Where the file lies, or would lie."""
        return root_of(self.root, folders) / self.path


@dataclass(frozen=True, kw_only=True)
class Collection:
    """Files of one origin.

    Attributes:
        name: Of the collection.
        root: The folder that holds it.
        folder: Its own folder there; empty if it has none.
        origin: Whose files they are.
        licence: As stated there.
        assets: The files.
        uid: ManiSkill's name for the archive that has them.
        archive: That archive's address; without one, the mirrors have the files one by one.
        archive_sha256: Its checksum, where ManiSkill states one.
    """

    name: str
    root: Root
    folder: str
    origin: str
    licence: str
    assets: tuple[Asset, ...]
    uid: str | None = None
    archive: str | None = None
    archive_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """All files.

    Attributes:
        mirrors: Addresses that RL4VLA's files lie below.
        collections: Files by origin.
    """

    mirrors: dict[str, str]
    collections: tuple[Collection, ...]

    @property
    def assets(self) -> tuple[Asset, ...]:
        """The files of all collections."""
        return tuple(asset for group in self.collections for asset in group.assets)


def root_of(root: Root, folders: AssetFolders) -> Path:
    """Return the folder of that name."""
    return folders.maniskill if root == "maniskill" else folders.rl4vla


@cache
def read_catalog(file: Path = _FILE) -> Catalog:
    """Read the catalogue that the package ships."""
    data = read_json(file)
    return Catalog(
        mirrors=data["mirrors"], collections=tuple(_collection(row) for row in data["collections"])
    )


def check_relative(path: str) -> str:
    """Return a path that stays in the folder it is meant for.

    Raises:
        UserError: If it would lead out of it.
    """
    if not path or "\\" in path or PurePosixPath(path).is_absolute() or ".." in Path(path).parts:
        raise UserError(f"{path!r} leads out of the asset folder: refused")
    return path


def _collection(row: dict[str, Any]) -> Collection:
    own = {key: value for key, value in row.items() if key != "files"}
    assets = []
    for file in row["files"]:
        path = check_relative(str(PurePosixPath(row["folder"]) / file["path"]))
        shared = {"collection": row["name"], "root": row["root"], "path": path}
        assets.append(Asset(**file | shared))
    return Collection(**own, assets=tuple(assets))
