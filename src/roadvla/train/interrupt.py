"""Ctrl-C and a queue's signals: the first lets the iteration finish, the second stops at once.

A process that was started together with others may hear of the same signal more than once: from the
queue, from its launcher, and from a launcher that ends all because one of them has left. So there
the first one counts, and a second Ctrl-C stops at once only if it does not follow at once.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from roadvla.train.launched import is_launched

PREEMPTED = 75
"""Exit code after a queue's signal: sysexits' EX_TEMPFAIL, ask for the job to be run again."""
QUEUE_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_ECHO_SECONDS = 1.0
"""A second Ctrl-C within this time is the first one, passed on."""


class Interrupted(KeyboardInterrupt):
    """The run was stopped by the user; the message says how to go on."""

    code = 128 + signal.SIGINT


class Preempted(Interrupted):
    """The run was stopped by a queue: SIGTERM or SIGUSR1."""

    code = PREEMPTED


def stopped(by: KeyboardInterrupt, message: str) -> Interrupted:
    """Say the same about an interrupt in other words, keeping whether a queue sent it."""
    return Preempted(message) if isinstance(by, Preempted) else Interrupted(message)


class Interrupts:
    """Whether Ctrl-C has been pressed, or a queue has asked to stop."""

    def __init__(self) -> None:
        self._first: KeyboardInterrupt | None = None
        self._noted = 0.0

    @property
    def requested(self) -> bool:
        """Whether the block should come to its end."""
        return self._first is not None

    def request(self, number: int, _: object) -> None:
        """Note the first signal and obey the second, if it is not the first one once more.

        Raises:
            KeyboardInterrupt: At the second.
        """
        if self._first is None:
            self._first, self._noted = _interrupt(number), time.monotonic()
            _hear_once()
        elif not (is_launched() and time.monotonic() - self._noted < _ECHO_SECONDS):
            raise _interrupt(number)

    @property
    def kind(self) -> int:
        """0 if nobody asked to stop, 1 after Ctrl-C, 2 if a queue asked."""
        return 0 if self._first is None else 1 + isinstance(self._first, Preempted)


def raise_interrupt(kind: int) -> None:
    """Stop now if that was asked for, perhaps in another process of the run.

    Args:
        kind: As ``Interrupts.kind``.

    Raises:
        KeyboardInterrupt: If it is 1.
        Preempted: If it is 2.
    """
    if kind == 2:
        raise Preempted("stopped by the queue")
    if kind == 1:
        raise KeyboardInterrupt


@contextmanager
def catch_interrupts() -> Iterator[Interrupts]:
    """Collect signals in the block instead of raising them; only the main thread can."""
    interrupts = Interrupts()
    with _handling(interrupts.request, (signal.SIGINT, *QUEUE_SIGNALS)):
        yield interrupts


@contextmanager
def raise_queue_signals() -> Iterator[None]:
    """Let a queue's signals interrupt the block as Ctrl-C does, as ``Preempted``."""
    with _handling(_raise, QUEUE_SIGNALS):
        yield


@contextmanager
def _handling(handler: object, numbers: tuple[signal.Signals, ...]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in numbers}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, former in previous.items():
            if signal.getsignal(number) == handler:  # else it is ignored until the end
                signal.signal(number, former)


def _raise(number: int, _: object) -> None:
    _hear_once()
    raise _interrupt(number)


def _hear_once() -> None:
    """Ignore the queue from now to the end of this process, if it is one of several.

    What is left to do may be a checkpoint that is just being written.
    """
    if is_launched():
        for number in QUEUE_SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def _interrupt(number: int) -> KeyboardInterrupt:
    name = signal.Signals(number).name
    if number not in QUEUE_SIGNALS:
        return KeyboardInterrupt()
    return Preempted(f"stopped by {name}; run the same command again")
