"""Which checkpoint a run goes on from: the newest that is as it was written, alike everywhere."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

from roadvla.errors import UserError
from roadvla.train.checkpoint import (
    checkpoint_folder,
    iterations_in,
    latest_checkpoint,
    point_at,
    read_progress,
)
from roadvla.train.manifest import ELSEWHERE, MANIFEST, STATE, DamagedError, verify
from roadvla.world import World

_NONE, _UNSEEN = -1, -1


def shared_checkpoint(root: Path, world: World) -> tuple[Path | None, str]:
    """Let the first process choose the checkpoint that all of them go on from.

    Only the first reads every file to check it. The others make sure that they see the same
    manifest, which holds every file's checksum.

    Args:
        root: The run's ``checkpoints`` folder.
        world: The processes of the run.

    Returns:
        As ``good_checkpoint``; why newer ones were passed over is told in the first process alone.

    Raises:
        UserError: As ``good_checkpoint``, or if a process does not see the first one's choice.
    """
    found, passed_over = good_checkpoint(root) if world.is_first else (None, "")
    chosen = _NONE if found is None else int(found.name.rpartition("_")[2])
    number = world.first(chosen)
    if number == _NONE:
        return None, ""
    folder = checkpoint_folder(root, number)
    if not world.agree(_seen(folder)):
        raise UserError(
            f"{folder} is not the same checkpoint for all processes: give them one folder that "
            f"they share, or copy it whole to every machine"
        )
    return folder, passed_over


def _seen(folder: Path) -> int:
    """A number below 2⁶³ that tells one checkpoint's manifest from another's."""
    for name in (MANIFEST, STATE):
        with suppress(OSError):
            digest = hashlib.sha256((folder / name).read_bytes()).digest()
            return int.from_bytes(digest[:7], "big")
    return _UNSEEN


def good_checkpoint(root: Path) -> tuple[Path | None, str]:
    """Find the newest checkpoint of a run's ``checkpoints`` folder that is as it was written.

    Every file is read and compared with its recorded checksum. ``latest.json`` is pointed at what
    is found if it names something else.

    Args:
        root: The folder.

    Returns:
        The checkpoint, ``None`` if the run has none yet; and why newer ones were passed over, if
        any were.

    Raises:
        UserError: If there are checkpoints and none is good, or one is of an unknown format.
    """
    try:
        named = latest_checkpoint(root)
        damaged: list[str] = []
    except DamagedError as error:
        named, damaged = None, [_reason(error)]
    for number in iterations_in(root):
        folder = checkpoint_folder(root, number)
        try:
            verify(folder)
            read_progress(folder)
        except DamagedError as error:
            damaged.append(_reason(error))
            continue
        if folder != named:
            with suppress(OSError):  # on a full disk: the next save says so
                point_at(folder)
        return folder, "; ".join(damaged)
    if damaged:
        raise UserError(
            f"{root} holds no checkpoint that can be used ({'; '.join(damaged)}): start a new run, "
            f"or delete that folder to begin this one again"
        )
    return None, ""


def _reason(error: DamagedError) -> str:
    return str(error).removesuffix(f"; {ELSEWHERE}")
