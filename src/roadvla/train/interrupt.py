"""Ctrl-C: the first lets the iteration finish, the second stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(KeyboardInterrupt):
    """The run was stopped by the user; the message says how to go on."""


class Interrupts:
    """Whether Ctrl-C has been pressed."""

    def __init__(self) -> None:
        self.requested = False

    def request(self, *_: object) -> None:
        """Note the first Ctrl-C and obey the second.

        Raises:
            KeyboardInterrupt: When pressed again.
        """
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def catch_interrupts() -> Iterator[Interrupts]:
    """Collect Ctrl-C in the block instead of raising it; only the main thread can."""
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    previous = signal.signal(signal.SIGINT, interrupts.request)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, previous)
