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

    The system drops the lock when the process ends, however it ends. What a killed process leaves
    is a file that says who it was; it locks nobody out.

    Args:
        folder: Made if need be.

    Raises:
        UserError: If another process holds it, or it cannot be written or locked.
    """
    path = folder / LOCK
    descriptor = _open(path)
    try:
        _take(descriptor, folder)
        while not _is_at(descriptor, path):  # its holder left, and took the file away
            os.close(descriptor)
            descriptor = _open(path)
            _take(descriptor, folder)
        _sign(descriptor)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
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


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; choose another --output"
        ) from error


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that a path names."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    """Note who holds the lock."""
    # On a full disk it holds all the same; what has to be written next says that it is full.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)


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
