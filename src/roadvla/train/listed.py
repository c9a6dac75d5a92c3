"""The files that a checkpoint's manifest lists: which may be listed, and how they are opened.

Whoever changes a manifest can recompute its checksum too. So what it says is not believed: only
plain files inside the checkpoint's own folder are ever opened.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from roadvla.errors import UserError

STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
DESCRIPTION = "policy.json"
WEIGHTS = ("policy.safetensors", "adapter_model.safetensors")
"""One of these holds the policy's weights, according to its kind."""
ELSEWHERE = "take another checkpoint or start a new run"
Files = dict[str, dict[str, Any]]

_MOST = 1000
_LONGEST = 255
# No folder above, no root, no drive, nothing that a terminal or a file system takes for something
# else. What this package writes into a checkpoint is called like this.
_PART = r"(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._+=@-]+"
_NAME = re.compile(rf"{_PART}(?:/{_PART})*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class DamagedError(UserError):
    """A checkpoint is not as it was written."""


def check_listed(files: object, source: Path, *, sized: bool, needed: tuple[str, ...]) -> Files:
    """Make sure that a list of files is one, and lists what every checkpoint has.

    Args:
        files: Size and checksum by name, as read.
        source: The file that says so, for messages.
        sized: Whether sizes are recorded.
        needed: Names that must be among them.

    Returns:
        The same.

    Raises:
        DamagedError: If it is anything else.
    """
    if not isinstance(files, dict) or len(files) > _MOST:
        raise _odd(source, f"it does not list up to {_MOST} files by name")
    for name, entry in files.items():
        if not isinstance(name, str) or len(name) > _LONGEST or not _NAME.fullmatch(name):
            raise _odd(source, f"it lists {name[:40]!r}, which is no name of a file inside")
        keys = {"size", "sha256"} if sized else {"sha256"}
        if not isinstance(entry, dict) or entry.keys() != keys:
            raise _odd(source, f"it does not record {' and '.join(sorted(keys))} of {name}")
        if sized and (type(entry["size"]) is not int or entry["size"] < 0):
            raise _odd(source, f"the size of {name} is no number of bytes")
        if not isinstance(entry["sha256"], str) or not _SHA256.fullmatch(entry["sha256"]):
            raise _odd(source, f"the checksum of {name} is no SHA-256")
    for name in needed:
        if name not in files:
            raise _odd(source, f"it does not list {name}")
    return files


def check_file(folder: Path, name: str, expected: dict[str, Any]) -> None:
    """Make sure that a listed file is there and of its size, if one is recorded.

    Raises:
        DamagedError: If not.
    """
    with _opened(folder, name, expected):
        pass


def compare_file(folder: Path, name: str, expected: dict[str, Any]) -> None:
    """Read a listed file and compare it with its checksum.

    Raises:
        DamagedError: If it is missing or differs.
    """
    with _opened(folder, name, expected) as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    _compare(folder / name, found, expected)


def read_listed(folder: Path, name: str, expected: dict[str, Any], *, limit: int) -> bytes:
    """Read a listed file that is as it was written.

    Args:
        folder: The checkpoint.
        name: As listed.
        expected: Its size, if that is recorded, and checksum.
        limit: Bytes that such a file may have.

    Raises:
        DamagedError: If it is missing, differs or is larger.
    """
    path = folder / name
    with _opened(folder, name, expected) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise _odd(path, f"it has {size:,} bytes, more than the {limit:,} it may have")
        data = file.read(limit + 1)
    _compare(path, hashlib.sha256(data).hexdigest(), expected)
    return data


@contextmanager
def _opened(folder: Path, name: str, expected: dict[str, Any]) -> Iterator[BufferedReader]:
    path = folder / name
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise _odd(path, "it is a link that leads out of the checkpoint")
        # Without O_NONBLOCK a pipe that nobody writes to would be waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise _odd(path, "it is no plain file")
            if about.st_size != expected.get("size", about.st_size):
                raise _odd(path, f"it has {about.st_size} bytes, not {expected['size']}")
            yield file
    except (OSError, RuntimeError) as error:  # links that lead in a circle: either, by version
        reason = getattr(error, "strerror", None) or error
        raise DamagedError(f"{path} is missing or damaged ({reason}); {ELSEWHERE}") from error


def _compare(path: Path, found: str, expected: dict[str, Any]) -> None:
    if found != expected["sha256"]:
        raise _odd(path, "its checksum is not the recorded one")


def _odd(path: Path, what: str) -> DamagedError:
    return DamagedError(f"{path} is damaged: {what}; {ELSEWHERE}")
