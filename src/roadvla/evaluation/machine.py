"""The machine: which of its devices can be used, and one line to trace a number to it."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

from roadvla.errors import UserError

_CPU_INFO = Path("/proc/cpuinfo")


def usable_device(name: str) -> torch.device:
    """Turn a device's name into a device that is there.

    Raises:
        UserError: If there is no such device here.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device {name!r}: use 'cpu' or 'cuda'") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} cannot be used: use 'cpu' or 'cuda'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {name!r} is not available here: use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device {name!r} is not available here: there are {torch.cuda.device_count()}, "
            f"counted from cuda:0"
        )
    return device


def describe_machine(device: str | torch.device = "cpu") -> str:
    """Name the processor, the cores this process may use, the GPU if it is used, and torch.

    Args:
        device: Where the work ran.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [_cpu_model(), f"{cores} cores"]
    if torch.device(device).type == "cuda":
        parts.append(torch.cuda.get_device_name(device))
    return ", ".join([*parts, f"torch {torch.__version__}"])


def source_commit() -> str:
    """Commit of the source tree that runs: ``""`` if unknown, ending in ``+`` if it was changed.

    Where the tree travels without its history, ``ROADVLA_COMMIT`` can say it.
    """
    told = os.environ.get("ROADVLA_COMMIT")
    if told:
        return told
    here = Path(__file__).resolve().parent
    try:
        head = _git(here, "rev-parse", "--short=12", "HEAD")
        # An installed copy may lie in another project's tree; only our own tracks this file.
        _git(here, "ls-files", "--error-unmatch", Path(__file__).name)
        changed = _git(here, "status", "--porcelain", "--untracked-files=no", "--", here.parent)
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"{head}+" if changed else head


def _git(folder: Path, *arguments: str | Path) -> str:
    command = ["git", "-C", str(folder), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return " ".join(value.split())
    return platform.processor() or platform.machine() or "unknown processor"
