"""What a checkpoint consists of: every file's size and checksum, and how older formats are read.

``manifest.json`` in the checkpoint's folder:

    format   2
    files    {name: {"size": bytes, "sha256": hex}}, every other file of the folder
    sha256   of the two above, so that damage to the manifest is not taken for another version

The checksum tells of damage, not of who wrote it: what is listed is checked by ``listed.py``.

Format 1 had no manifest: ``state.json`` held the optimiser's checksum, and ``policy.json`` that of
its weights. ``_from_format_1`` makes a manifest of the two; a later format adds its own such step.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from roadvla.errors import UserError
from roadvla.files import read_json
from roadvla.train.listed import (
    DESCRIPTION,
    ELSEWHERE,
    OPTIMIZER,
    STATE,
    WEIGHTS,
    DamagedError,
    Files,
    check_file,
    check_listed,
    compare_file,
)

FORMAT = 2
MANIFEST = "manifest.json"
_SHOWN = 60


def write_manifest(folder: Path) -> None:
    """List every file of a folder that is complete, and flush them all to disk.

    Raises:
        OSError: If the disk is full.
    """
    files: Files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb+") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
            files[path.relative_to(folder).as_posix()] = {"size": file.tell(), "sha256": digest}
    content = {"format": FORMAT, "files": files}
    write_synced(folder / MANIFEST, as_json({**content, "sha256": _digest(content)}))


def read_files(folder: Path) -> Files:
    """Read what a checkpoint of any known format consists of.

    Returns:
        By name: ``sha256``, and ``size`` where the format records it. All names are of files inside
        the folder; whether they are there has not been looked at.

    Raises:
        DamagedError: If that cannot be told.
        UserError: If the checkpoint is of a format that this version does not know.
    """
    path = folder / MANIFEST
    if not path.exists():
        state = read_object(folder / STATE)
        found = state.get("format")
        if type(found) is not int or found not in (*_MIGRATIONS, FORMAT):
            raise _unknown(folder / STATE, found)
        if found == FORMAT:
            raise DamagedError(f"{path} is missing; {ELSEWHERE}")
        return _MIGRATIONS[found](folder, state)
    data = read_object(path)
    recorded = data.pop("sha256", None)
    if recorded != _digest(data):
        raise DamagedError(f"{path} is damaged: its checksum is not the recorded one; {ELSEWHERE}")
    found = data.get("format")
    if type(found) is not int or found != FORMAT:
        raise _unknown(path, found)
    files = check_listed(
        data.get("files"), path, sized=True, needed=(STATE, OPTIMIZER, DESCRIPTION)
    )
    if not files.keys() & set(WEIGHTS):
        raise DamagedError(f"{path} is damaged: it lists no weights of a policy; {ELSEWHERE}")
    return files


def verify(folder: Path) -> None:
    """Read every file of a checkpoint and compare it with what was written.

    Raises:
        DamagedError: If one is missing or differs; it is named.
        UserError: If the checkpoint is of a format that this version does not know.
    """
    for name, expected in read_files(folder).items():
        compare_file(folder, name, expected)


def seal(folder: Path) -> int:
    """Number a checkpoint by what it consists of, below 2⁶³, if all files have their sizes.

    Two processes that find the same number see the same checkpoint, as far as can be told without
    reading it all.

    Raises:
        DamagedError: If a file is missing or of another size.
        UserError: If the checkpoint is of a format that this version does not know.
    """
    files = read_files(folder)
    for name, expected in files.items():
        check_file(folder, name, expected)
    return int(_digest(files)[:15], 16)


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DamagedError: If there is none.
    """
    try:
        data = read_json(path)
    except (OSError, ValueError) as error:
        raise DamagedError(f"{path} is missing or damaged ({error}); {ELSEWHERE}") from error
    if not isinstance(data, dict):
        raise DamagedError(f"{path} does not hold an object; {ELSEWHERE}")
    return data


def as_json(data: dict[str, Any]) -> bytes:
    """Spell out an object as this package's JSON files do."""
    return (json.dumps(data, indent=1) + "\n").encode()


def write_synced(path: Path, data: bytes) -> None:
    """Write a file that is on disk when this returns.

    Raises:
        OSError: If the disk is full.
    """
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _from_format_1(folder: Path, state: dict[str, Any]) -> Files:
    """Gather the checksums that format 1 kept in two files; it recorded no sizes."""
    policy = read_object(folder / DESCRIPTION).get("sha256", {})
    weights = {WEIGHTS[0]: policy} if isinstance(policy, str) else policy
    if not isinstance(weights, dict):
        raise DamagedError(f"{folder / DESCRIPTION} is damaged: it holds no checksums; {ELSEWHERE}")
    files = {name: {"sha256": digest} for name, digest in weights.items()}
    files[OPTIMIZER] = {"sha256": state.get("sha256")}
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise DamagedError(f"{folder} holds no weights of a policy; {ELSEWHERE}")
    return check_listed(files, folder / STATE, sized=False, needed=(OPTIMIZER,))


_MIGRATIONS: dict[int, Callable[[Path, dict[str, Any]], Files]] = {1: _from_format_1}


def _digest(content: dict[str, Any]) -> str:
    try:
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    except RecursionError:  # it can be read a little deeper than written
        return ""


def _unknown(path: Path, found: object) -> UserError:
    """Tell a newer format from one that never was."""
    newer = type(found) is int and found > FORMAT
    known = [*_MIGRATIONS, FORMAT]
    return (UserError if newer else DamagedError)(
        f"{path} has format {repr(found)[:_SHOWN]}, expected one of {known}: if a newer roadvla "
        f"wrote it, use that, or {ELSEWHERE}"
    )
