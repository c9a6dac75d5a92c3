"""Rows of ``roadvla doctor`` about Python, packages, memory and disks."""

from __future__ import annotations

import os
import shutil
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from roadvla import __version__
from roadvla.experiments.doctor_rows import Row, Verdict

GB = 1e9
OLDEST_PYTHON = (3, 11)
_RUN_DISK, _LEAST_DISK = 5 * GB, 0.5 * GB
_SHARED = 0.5 * GB
"""64 environments' frames, and room to spare."""
_MAIN, _WORKER = 3 * GB, 1.6 * GB
"""Resident memory of the training process, and of one that simulates with full textures."""


def python_row(version: tuple[int, ...] = sys.version_info[:3]) -> Row:
    """Judge the interpreter."""
    shown = ".".join(map(str, version))
    finding = f"{shown} ({sys.executable}), roadvla {__version__}"
    if version >= OLDEST_PYTHON:
        return Row(name="Python", state="ok", finding=finding)
    oldest = ".".join(map(str, OLDEST_PYTHON))
    fix = f"install Python {oldest} or newer, remove .venv and run make again"
    return Row(name="Python", state="fail", finding=finding, fix=fix)


def package_row(name: str, needs: list[Requirement], *, missing: Verdict, fix: str) -> Row:
    """Judge a group of packages.

    Args:
        name: Of the row.
        needs: The packages and their versions.
        missing: What it means if one is missing.
        fix: What installs them.
    """
    found, wrong = [], []
    for need in needs:
        try:
            version = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{need.name} missing")
            continue
        if need.specifier.contains(version, prereleases=True):
            found.append(f"{need.name} {version}")
        else:
            wrong.append(f"{need.name} {version}, made for {need.specifier}")
    finding = ", ".join([*wrong, *found])
    if not wrong:
        return Row(name=name, state="ok", finding=finding)
    gone = any(text.endswith("missing") for text in wrong)
    return Row(name=name, state=missing if gone else "warn", finding=finding, fix=fix)


def requirements(extra: str = "") -> list[Requirement]:
    """List what roadvla needs, by what it was installed with: always, or for one extra.

    Args:
        extra: Name of the extra; without it, what is always needed.
    """
    try:
        lines = metadata.requires("roadvla") or []
    except metadata.PackageNotFoundError:  # run from its source, not installed
        return []
    needs = [Requirement(line) for line in lines]
    if not extra:
        return [need for need in needs if need.marker is None or need.marker.evaluate()]
    return [need for need in needs if need.marker and need.marker.evaluate({"extra": extra})]


def disk_row(name: str, folder: Path, *, free: float | None = None, grave: Verdict = "fail") -> Row:
    """Judge the room on a folder's disk.

    Args:
        name: Of the row.
        folder: It or its parents need not exist yet.
        free: Bytes; measured unless given.
        grave: What it means if there is next to nothing.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free if free is None else free
    finding = f"{free / GB:.1f} GB free for {folder}"
    if free >= _RUN_DISK:
        return Row(name=name, state="ok", finding=finding)
    fix = f"free {_RUN_DISK / GB:.0f} GB, or name a folder on another disk"
    return Row(name=name, state="warn" if free >= _LEAST_DISK else grave, finding=finding, fix=fix)


def memory_row(
    *, total: float | None = None, limit: float | None = None, processes: int | None = None
) -> Row:
    """Judge the memory, a container's limit included.

    Args:
        total: The machine's bytes; measured unless given.
        limit: The container's or job's bytes; looked up unless given.
        processes: That simulate by default; one per usable core unless given.
    """
    total = _total_memory() if total is None else total
    limit = memory_limit() if limit is None else limit
    processes = _usable_cores() if processes is None else processes
    usable = min(total, limit)
    finding = f"{usable / GB:.1f} GB"
    if limit < total:
        finding += f", this container's limit, of {total / GB:.1f} GB"
    fit = int((usable - _MAIN) / _WORKER)
    if fit >= processes:
        return Row(name="memory", state="ok", finding=finding)
    finding += f"; {processes} simulating processes and a policy may need "
    finding += f"{(_MAIN + processes * _WORKER) / GB:.0f} GB"
    fix = f"simulate ManiSkill in {max(1, fit)} processes, or raise the container's limit"
    return Row(name="memory", state="warn", finding=finding, fix=fix)


def memory_limit(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> float:
    """Find the least limit that control groups, of either version, put on this process.

    Args:
        root: Where the control groups are mounted.
        own: Which groups this process is in.

    Returns:
        Bytes; infinity without a limit.
    """
    files = [root / "memory.max", root / "memory" / "memory.limit_in_bytes"]
    for line in _lines(own):
        _, controllers, group = line.split(":", 2)
        mounted, name = root, "memory.max"
        if "memory" in controllers.split(","):
            mounted, name = root / "memory", "memory.limit_in_bytes"
        elif controllers:
            continue
        inner = mounted / group.lstrip("/")
        files += [at / name for at in (inner, *inner.parents) if at.is_relative_to(root)]
    limits = [text for file in files for text in _lines(file)[:1] if text.isdecimal()]
    return min((float(limit) for limit in limits), default=float("inf"))


def shared_memory_row(folder: Path = Path("/dev/shm"), *, size: float | None = None) -> Row:
    """Judge the shared memory, through which simulating processes hand frames over.

    Args:
        folder: Where it is mounted.
        size: Bytes; measured unless given.
    """
    name = "shared memory"
    fix = f"start the container with --shm-size=2g, or as root: mount -o remount,size=2g {folder}"
    if size is None and not folder.is_dir():
        return Row(name=name, state="warn", finding=f"no {folder}", fix=fix)
    size = shutil.disk_usage(folder).total if size is None else size
    finding = f"{size / GB:.2f} GB in {folder}"
    if size >= _SHARED:
        return Row(name=name, state="ok", finding=finding)
    return Row(name=name, state="warn", finding=finding, fix=fix)


def _total_memory() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
