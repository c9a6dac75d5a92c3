"""What happened to a run beside its numbers: one JSON line each in ``notes.jsonl``."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path

from roadvla.errors import UserError

NOTES = "notes.jsonl"


def add_note(folder: Path, iteration: int, text: str) -> None:
    """Append a note; it is on disk when this returns. A last line that was cut off goes.

    Args:
        folder: Of the run.
        iteration: Iterations completed when it happened.
        text: What happened.

    Raises:
        UserError: If the folder cannot be written.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    path = folder / NOTES
    try:
        with path.open("a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)  # what a kill left of a last line
            row = {"time": now, "iteration": iteration, "note": text}
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space, then go on with --resume"
        ) from error
