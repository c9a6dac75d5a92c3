"""What a process is told by whoever started it together with others: torchrun, ``launch``, srun."""

from __future__ import annotations

import os

_UNNAMED = ("", "none")


def is_launched() -> bool:
    """Whether this is one of several processes that were started together."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def was_restarted() -> bool:
    """Whether torchrun on this machine has started its processes again after one failed.

    Another machine's torchrun counts for itself: one that came later starts at 0.
    """
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def launch_id() -> str | None:
    """Name of the launch, the same on all machines and after every restart, if it has one."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return None if name in _UNNAMED else name


def speaks() -> bool:
    """Whether this process is the one that prints results."""
    return os.environ.get("RANK", "0") == "0"
