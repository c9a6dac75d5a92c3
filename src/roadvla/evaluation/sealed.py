"""JSON files that carry a checksum of themselves: whoever changes one by hand is found out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from roadvla.errors import UserError
from roadvla.files import read_json, write_whole

FORMAT = 1
AGAIN = "delete it and run the study again: only what is missing is made anew"


def write_sealed(path: Path, data: Mapping[str, Any]) -> Path:
    """Write JSON with its format and a checksum of itself, atomically.

    Raises:
        UserError: If the folder cannot be written.
    """
    body = {"format": FORMAT, **data}
    text = json.dumps({**body, "sha256": _digest(body)}, indent=1, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode())
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another folder"
        ) from error
    return path


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what ``write_sealed`` wrote, less format and checksum.

    Raises:
        UserError: If the file is missing, damaged, changed by hand, or of another format.
    """
    try:
        data = read_json(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): {AGAIN}") from error
    if not isinstance(data, dict) or "sha256" not in data:
        raise UserError(f"{path} is not a result file (no checksum): {AGAIN}")
    seal = data.pop("sha256")
    if seal != _digest(data):
        raise UserError(f"{path} was changed after it was written (checksum): {AGAIN}")
    if data.pop("format", None) != FORMAT:
        raise UserError(f"{path} has another format than {FORMAT}: {AGAIN}")
    return data


def _digest(data: Mapping[str, Any]) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
