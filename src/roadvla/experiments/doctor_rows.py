"""One row of ``roadvla doctor``, and a way to ask other programs that may hang or crash."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warn", "fail"]

_LAST_WAIT = 5.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was looked at, what was found, and what mends it.

    Attributes:
        name: What was looked at.
        state: ``fail`` if something that is installed cannot work; ``warn`` if less can be done, or
            something is missing that only some runs need.
        finding: What was found.
        fix: What to do; needed unless all is well.
    """

    name: str
    state: Verdict
    finding: str
    fix: str = ""

    def __post_init__(self) -> None:
        """Refuse bad news without a remedy."""
        if self.state != "ok" and not self.fix:
            raise ValueError(f"row {self.name!r} is {self.state!r} and has no fix")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a program said.

    Attributes:
        problem: Why its output is of no use; empty if it is.
        output: What it printed.
    """

    problem: str = ""
    output: str = ""


def ask(command: Sequence[str], timeout: float) -> Answer:
    """Run a program that may be absent, crash or hang, as broken drivers make it.

    Args:
        command: The program and its arguments.
        timeout: Seconds after which it is given up.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    except OSError as error:
        return Answer(problem=error.strerror or str(error))
    try:
        output, complaints = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        # One that is stuck in the driver is not even reached by that.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=_LAST_WAIT)
        return Answer(problem=f"no answer in {timeout:g} s")
    if process.returncode < 0:
        return Answer(problem=f"crashed ({signal.Signals(-process.returncode).name})")
    if process.returncode:
        lines = (complaints.strip() or output.strip()).splitlines()
        last = lines[-1] if lines else f"exit code {process.returncode}"
        return Answer(problem=last, output=output)
    return Answer(output=output)
