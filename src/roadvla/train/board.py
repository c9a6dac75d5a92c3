"""TensorBoard's event file, written at once and by the caller's own thread.

TensorBoard's writer hands events to a thread, whose errors (a full disk) nobody can catch.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PREFIX = "events.out.tfevents."


class Board:
    """Appends scalars to an event file of its own.

    Args:
        folder: For the event files; made if need be.
        start: First step of what follows. Events of earlier files at this step or later, from work
            that was lost, are hidden.

    Raises:
        OSError: If the file cannot be written.
    """

    def __init__(self, folder: Path, *, start: int) -> None:
        # Imported here: TensorBoard takes long to load and only training needs it.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        # The messages are made at run time; the type checker cannot see them.
        self._event: Any = getattr(event_pb2, "Event")  # noqa: B009
        self._session: Any = getattr(event_pb2, "SessionLog")  # noqa: B009
        self._summary: Any = getattr(summary_pb2, "Summary")  # noqa: B009
        self._record_writer = RecordWriter
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{_PREFIX}{_number(folder)}"
        self._append(self._event(wall_time=time.time(), step=start, file_version="brain.Event:2"))
        self.hide(start)

    def hide(self, start: int) -> None:
        """Hide all events so far at this step or later, in this file and earlier ones.

        Raises:
            OSError: If the file cannot be written.
        """
        begins = self._session(status=self._session.START)
        self._append(self._event(wall_time=time.time(), step=start, session_log=begins))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append the scalars of one step; they are on disk when this returns.

        Raises:
            OSError: If the file cannot be written.
        """
        values = [
            self._summary.Value(tag=name, simple_value=value) for name, value in scalars.items()
        ]
        summary = self._summary(value=values)
        self._append(self._event(wall_time=time.time(), step=step, summary=summary))

    def _append(self, *events: Any) -> None:
        data = io.BytesIO()
        writer = self._record_writer(data)
        for event in events:
            writer.write(event.SerializeToString())
        with self._path.open("ab") as file:
            file.write(data.getvalue())
            file.flush()
            os.fsync(file.fileno())


def _number(folder: Path) -> int:
    """Number a new file so that it is read last, even if the clock was set back meanwhile.

    TensorBoard reads the files of a folder in the order of their names.
    """
    names = (path.name.removeprefix(_PREFIX) for path in folder.glob(f"{_PREFIX}*"))
    return max([time.time_ns(), *(int(name) + 1 for name in names if name.isdecimal())])
