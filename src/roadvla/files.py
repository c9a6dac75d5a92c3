"""Text that came from somewhere else, parsed so that damage or malice ends in one known error."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path
from typing import Any

MAX_JSON = 64 << 20
"""Bytes; the largest JSON file that a checkpoint of 7 billion parameters has is a tenth of it."""
MAX_METRICS = 1 << 30
"""Bytes; a run of a million iterations logs that much."""
MAX_TENSORS = 16 << 30
"""Bytes; of an adapter, a small policy or an optimiser, not of a base model, which is not read
whole."""
_LONGEST = 1 << 63


def read_bytes(path: Path, *, limit: int) -> bytes:
    """Read a file that must not be larger than what such files are.

    Args:
        path: The file.
        limit: In bytes.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no plain file, or larger.
    """
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise ValueError("it is not a plain file")
    if about.st_size > limit:
        raise ValueError(f"it has {about.st_size:,} bytes, more than the {limit:,} it may have")
    return path.read_bytes()


def read_json(path: Path) -> Any:
    """Parse a JSON file as ``parse_json`` does.

    Raises:
        OSError: If it cannot be read.
        ValueError: As ``parse_json``; if it is no text, or larger than ``MAX_JSON``.
    """
    return parse_json(read_bytes(path, limit=MAX_JSON).decode())


def parse_json(text: str | bytes) -> Any:
    """Parse JSON more strictly than Python does: what this package writes passes.

    Numbers that are written out are finite, and whole ones fit 64 bits. ``NaN`` and ``Infinity``,
    which Python writes, are left to those who know what they stand for.

    Raises:
        ValueError: If it is no JSON, holds such a number, or is nested too deep to be read.
    """
    try:
        return json.loads(text, parse_float=_finite, parse_int=_whole)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it holds {text[:20]}, which is too large")
    return value


def _whole(text: str) -> int:
    value = int(text) if len(text) < 20 else _LONGEST
    if abs(value) >= _LONGEST:
        raise ValueError(f"it holds {text[:20]}…, which is too large")
    return value
