"""One process per output folder: a lock that dies with the process that holds it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from roadvla.errors import UserError

LOCK = "run.lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder in the block, so that no second process writes into it.

    The system drops the lock when the process ends, however it ends; the file stays and says who
    held it last.

    Args:
        folder: Made if need be.

    Raises:
        UserError: If another process holds it, or it cannot be written or locked.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; choose another --output"
        ) from error
    try:
        _take(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def check_free(folder: Path) -> None:
    """Refuse a folder that another process holds, and change nothing.

    Raises:
        UserError: If one does.
    """
    if (folder / LOCK).exists():
        with locked(folder):
            pass


def _take(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "unknown"
        raise UserError(
            f"{folder} is in use by another process ({holder}): wait for it, stop it, or choose "
            f"another --output"
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot lock {folder / LOCK}: {error.strerror or error}; choose an --output on a file "
            f"system with locks"
        ) from error
    # On a full disk the lock holds all the same; what has to be written next says that it is full.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
