"""What happened to a run beside its numbers: one JSON line each in ``notes.jsonl``."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path

from roadvla.errors import UserError

NOTES = "notes.jsonl"


def add_note(folder: Path, iteration: int, text: str) -> None:
    """Append a note; it is on disk when this returns.

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
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": now, "iteration": iteration, "note": text}) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space, then go on with --resume"
        ) from error
