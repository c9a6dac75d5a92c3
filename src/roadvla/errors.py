"""Exceptions that reach people: one line naming the value, what was expected, the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input; the command line prints its message as one line and exits with code 2.

    Args:
        message: May quote what a file says: what is not printable, line breaks and the terminal's
            commands among it, is escaped.
    """

    def __init__(self, message: str = "") -> None:
        if not message.isprintable():
            message = "".join(
                char if char.isprintable() else char.encode("unicode_escape").decode()
                for char in message
            )
        super().__init__(message)


class WorkerError(RuntimeError):
    """A worker process failed, died or hung; the message ends with what it wrote last."""


class LostContactError(WorkerError):
    """Another process of a distributed run is gone or does not answer."""


class FailedCheckError(Exception):
    """A check was made and failed; the command line prints one line and exits with code 1."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Build the error for a name that does not exist, with the nearest one that does.

    Args:
        kind: What was named, e.g. ``"preset"``.
        name: The name given.
        known: The names there are.
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return UserError(f"unknown {kind} {name!r}: {hint}known: {', '.join(names)}")
