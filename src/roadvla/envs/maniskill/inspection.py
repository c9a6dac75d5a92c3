"""Whether the assets here are the ones that the suite needs."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
from PIL import Image

from roadvla.envs.maniskill.assets import AssetFolders
from roadvla.envs.maniskill.catalog import Asset, Catalog, read_catalog

_GLB_HEADER = 20
_GIT_LFS = b"version https://git-lfs"


class State(StrEnum):
    """What was found where a file should lie, the best first."""

    OK = "ok"
    UNKNOWN = "not verified"
    REDUCED = "reduced copy"
    STAND_IN = "stand-in"
    DAMAGED = "damaged"
    MISSING = "missing"


UNUSABLE = (State.DAMAGED, State.MISSING)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one file turned out to be.

    Attributes:
        asset: The file that should be there.
        path: Where.
        state: What is there.
        note: Why it is not ``ok``; empty if it is.
    """

    asset: Asset
    path: Path
    state: State
    note: str = ""


def inspect(asset: Asset, path: Path) -> Finding:
    """Compare a file with what is known of its original.

    Args:
        asset: What should be there.
        path: Where; a download that is not in its place yet, say.
    """
    if not path.is_file():
        return Finding(asset=asset, path=path, state=State.MISSING, note="no such file")
    state, note = _judge(asset, path.read_bytes())
    return Finding(asset=asset, path=path, state=state, note=note)


def inspect_all(folders: AssetFolders, catalog: Catalog | None = None) -> list[Finding]:
    """Inspect every file of the catalogue."""
    assets = (catalog or read_catalog()).assets
    return [inspect(asset, asset.below(folders)) for asset in assets]


def stand_ins_in(folders: AssetFolders, catalog: Catalog | None = None) -> list[Finding]:
    """Find the files that are known stand-ins. Only the few that might be are read."""
    assets = (catalog or read_catalog()).assets
    found = (inspect(asset, asset.below(folders)) for asset in assets if asset.stand_in)
    return [finding for finding in found if finding.state is State.STAND_IN]


def count_states(findings: Iterable[Finding]) -> str:
    """Say how many files are in which state, e.g. ``"162 ok, 4 stand-in"``."""
    counts = Counter(finding.state for finding in findings)
    return ", ".join(f"{counts[state]} {state}" for state in State if counts[state])


def _judge(asset: Asset, data: bytes) -> tuple[State, str]:
    digest = hashlib.sha256(data).hexdigest()
    if asset.sha256 is not None:
        if digest == asset.sha256:
            return State.OK, ""
        return State.DAMAGED, _difference(asset, data)
    if digest == asset.stand_in:
        return State.STAND_IN, "a plain shape in place of the original"
    if digest == asset.reduced:
        return State.REDUCED, "the original's shape with textures of at most 512 pixels"
    fault = _fault(Path(asset.path).suffix, data)
    if fault:
        return State.DAMAGED, fault
    if asset.pixels is not None:
        if _pixels(data) == asset.pixels:
            return State.OK, ""
        return State.DAMAGED, "another picture than the original"
    if asset.blob is None:
        return State.UNKNOWN, "well-formed; the original's checksum is not known"
    if _blob(data).startswith(asset.blob):
        return State.OK, ""
    return State.UNKNOWN, f"well-formed, but not the original that is known (git {asset.blob})"


def _difference(asset: Asset, data: bytes) -> str:
    if data.startswith(_GIT_LFS):
        return "a pointer of Git LFS, not the file"
    if len(data) != asset.size:
        return f"{len(data):,} bytes instead of {asset.size:,}"
    return "its SHA-256 is not the original's"


def _fault(suffix: str, data: bytes) -> str:
    """Say what is wrong with a file's form, for its content cannot be told by a checksum."""
    if data.startswith(_GIT_LFS):
        return "a pointer of Git LFS, not the file"
    if suffix == ".png":
        return "" if _pixels(data) else "not a complete PNG picture"
    return _glb_fault(data)


def _glb_fault(data: bytes) -> str:
    if data[:4] != b"glTF" or len(data) < _GLB_HEADER:
        return "not a binary glTF mesh"
    declared = int.from_bytes(data[8:12], "little")
    if declared != len(data):
        return f"{len(data):,} bytes instead of the {declared:,} that it declares"
    length = int.from_bytes(data[12:16], "little")
    try:
        described = json.loads(data[_GLB_HEADER : _GLB_HEADER + length])
    except ValueError:
        return "its description is not JSON"
    return "" if isinstance(described, dict) and described.get("meshes") else "it has no mesh"


def _pixels(data: bytes) -> str | None:
    """Digest a picture's RGB values as ``frames`` reads them; ``None`` if it is not one."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            values = np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return hashlib.sha256(values.tobytes()).hexdigest()


def _blob(data: bytes) -> str:
    """Git's object id of a file: not a safeguard, only a name."""
    header = b"blob %d\0" % len(data)
    return hashlib.sha1(header + data, usedforsecurity=False).hexdigest()
