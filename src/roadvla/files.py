"""Text that came from somewhere else, parsed so that damage or malice ends in one known error."""

from __future__ import annotations

import json
import math
from typing import Any

_LONGEST = 1 << 63


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
