"""Files read with suspicion and written whole: text that came from somewhere else, and replacing.

Damage or malice in what is read ends in one known error. What is written appears under its name
only when it is complete.
"""

from __future__ import annotations

import fcntl
import glob
import json
import math
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

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
    check_plain(path, limit=limit)
    return path.read_bytes()


def check_plain(path: Path, *, limit: int) -> None:
    """Refuse what is no plain file, a pipe that nobody writes into for one, or too large.

    Args:
        path: The file.
        limit: In bytes.

    Raises:
        OSError: If it cannot be looked at.
        ValueError: If it is no plain file, or larger.
    """
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise ValueError("it is not a plain file")
    if about.st_size > limit:
        raise ValueError(f"it has {about.st_size:,} bytes, more than the {limit:,} it may have")


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


def write_whole(path: Path, data: bytes) -> None:
    """Write a file; it appears whole or not at all, and is on disk when this returns.

    Raises:
        OSError: If the disk is full or the folder cannot be written.
    """
    with written_beside(path, lambda file: file.write(data)) as temporary:
        temporary.replace(path)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put on disk which names a folder holds: until then a crash can undo a renaming.

    Raises:
        OSError: If the disk fails.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def written_beside(path: Path, write: Callable[[BinaryIO], object]) -> Iterator[Path]:
    """Write what is to become a file under a hidden name, on disk in the block.

    The block renames it to ``path``; if it does not, it is gone after. What killed processes left
    of earlier attempts at the same file is removed too.

    Args:
        path: The file to be.
        write: Puts the content into an open file.

    Raises:
        OSError: If the disk is full or the folder cannot be written.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        _remove_left(left)
    temporary, file = _begun(path)
    try:
        with file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _begun(path: Path) -> tuple[Path, BinaryIO]:
    """Open a hidden file beside another, locked: so it can be told from one that was left."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        file = temporary.open("xb")
        with suppress(OSError):  # where there are no locks, nothing is taken for left
            fcntl.flock(file, fcntl.LOCK_EX)
        if temporary.exists():
            return temporary, file
        file.close()  # taken for left by another process, between the two lines above


def _remove_left(found: Path) -> None:
    """Remove a hidden file that nobody is writing."""
    with suppress(OSError), found.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found.unlink()


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
