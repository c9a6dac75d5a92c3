"""Warnings that strangers can cause, so no more of them than a person reads."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from typing import Any

_PAUSE = 10.0
"""Seconds after a warning in which there is no other."""


class Warnings(logging.Handler):
    """Prints a line to stderr, at most one every few seconds; it says how many it left out."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._next, self._left_out = -float("inf"), 0

    def warn(self, text: str) -> None:
        """Print a line, or count it."""
        now = time.monotonic()
        if now < self._next:
            self._left_out += 1
            return
        others = f" (and {self._left_out} more warnings before)" if self._left_out else ""
        self._next, self._left_out = now + _PAUSE, 0
        print(f"roadvla: warning: {' '.join(text.split())[:300]}{others}", file=sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        """Take what websockets reports."""
        cause = record.exc_info[1] if record.exc_info else None
        self.warn(record.getMessage() + (f": {cause!r}" if cause else ""))

    def of_loop(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Take what asyncio reports: an exception handler for an event loop."""
        cause = context.get("exception")
        self.warn(str(context.get("message")) + (f": {cause!r}" if cause else ""))

    def logger(self) -> logging.Logger:
        """Make a logger for websockets whose errors come here."""
        logger = logging.Logger("roadvla.serving", logging.ERROR)
        logger.addHandler(self)
        return logger
