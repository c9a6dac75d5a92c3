"""The machine: which of its devices can be used, and one line to trace a number to it."""

from __future__ import annotations

import os
import platform
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
