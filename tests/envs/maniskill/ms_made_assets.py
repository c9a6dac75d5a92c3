"""Files made for tests of assets, and a folder that has none."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from roadvla.envs.maniskill.catalog import Asset

BEAR = "45a65227a7ac2f391458971aa9dbebaddf515228"  # git hash-object of glb("bear")


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def glb(name: str) -> bytes:
    """The smallest file that is a mesh by its form."""
    head = json.dumps({"asset": {"version": "2.0"}, "meshes": [{"name": name}]}).encode()
    head += b" " * (-len(head) % 4)
    sizes = [(2).to_bytes(4, "little"), (20 + len(head)).to_bytes(4, "little")]
    return b"".join([b"glTF", *sizes, len(head).to_bytes(4, "little"), b"JSON", head])


def png(values: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG", **options)
    return buffer.getvalue()


def asset_at(path: str, **known: Any) -> Asset:
    return Asset(collection="objects", root="rl4vla", path=path, **known)


def point_nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Let the assets belong in a folder that does not exist yet; return ManiSkill's root in it."""
    monkeypatch.setenv("MS_ASSET_DIR", str(tmp_path / "ms"))
    monkeypatch.delenv("ROADVLA_ASSETS", raising=False)
    return tmp_path / "ms" / "data"


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
