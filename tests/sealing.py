"""Checksums made anew after a change: what whoever means harm can do, and damage cannot."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def sealed_by(data: dict[str, Any], separators: tuple[str, str] | None = None) -> dict[str, Any]:
    """Put an object's own checksum into it."""
    body = {key: value for key, value in data.items() if key != "sha256"}
    text = json.dumps(body, sort_keys=True, separators=separators)
    return {**body, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def reseal(folder: Path) -> None:
    """Let a checkpoint's manifest list what its folder now holds."""
    path = folder / "manifest.json"
    files = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for found in sorted(folder.rglob("*"))
        if found.is_file() and (name := found.relative_to(folder).as_posix()) != path.name
        for data in (found.read_bytes(),)
    }
    path.write_text(json.dumps(sealed_by({"format": 2, "files": files})))
