"""A Vulkan driver that draws on the processor: SwiftShader, out of Debian's Chromium."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from roadvla.errors import UserError

LIBRARY, MANIFEST = "libvk_swiftshader.so", "vk_swiftshader_icd.json"
"""The driver, and what names it to Vulkan's loader; wherever both lie in one folder, it works."""

_PACKAGES = ("chromium-common", "chromium")
"""Debian packages that have them; which of the two depends on the release."""
_TIMEOUT = 600.0

Run = Callable[[Sequence[str], Path], str]
"""Runs a command in a folder; returns why it failed, or nothing."""


def fetch_software_vulkan(folder: Path, *, run: Run | None = None) -> Path:
    """Put the driver into a folder, out of a package that apt downloads and verifies.

    The package is not installed, and none of its scripts run.

    Args:
        folder: Gets the two files; nothing is fetched if it has them.
        run: Runs apt-get and dpkg-deb; as processes unless given.

    Returns:
        The file to name in ``VK_ICD_FILENAMES``.

    Raises:
        UserError: If there is no apt here, or the package cannot be had or lacks the driver.
    """
    manifest = folder / MANIFEST
    if manifest.is_file() and (folder / LIBRARY).is_file():
        return manifest
    if run is None:
        _demand("apt-get", "dpkg-deb")
    with tempfile.TemporaryDirectory() as scratch:
        problems = []
        for package in _PACKAGES:
            unpacked = Path(scratch) / package
            unpacked.mkdir()
            problem = _unpack(package, unpacked, run or _run) or _copy(unpacked, folder)
            if not problem:
                return manifest
            problems.append(f"{package}: {problem}")
    raise UserError(
        f"no software driver for Vulkan ({'; '.join(problems)}): run `apt-get update` first, as "
        f"root; where apt has no Chromium of Debian's (Ubuntu has a stub), copy {LIBRARY} and "
        f"{MANIFEST} from a Debian machine into {folder}"
    )


def _unpack(package: str, into: Path, run: Run) -> str:
    problem = run(("apt-get", "download", package), into)
    if problem:
        return problem
    files = sorted(into.glob("*.deb"))
    if not files:
        return "apt-get downloaded nothing"
    return run(("dpkg-deb", "--extract", files[0].name, "."), into)


def _copy(unpacked: Path, folder: Path) -> str:
    found = [next(unpacked.rglob(name), None) for name in (LIBRARY, MANIFEST)]
    sources = [path for path in found if path is not None]
    if len(sources) < len(found):
        return "the package has no SwiftShader"
    folder.mkdir(parents=True, exist_ok=True)
    for source in sources:
        shutil.copyfile(source, folder / source.name)
    return ""


def _demand(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            raise UserError(
                f"{program} is not here, so Debian's package of SwiftShader cannot be had: copy "
                f"{LIBRARY} and {MANIFEST} from a Debian machine, and name the second in "
                f"VK_ICD_FILENAMES"
            )


def _run(command: Sequence[str], folder: Path) -> str:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, timeout=_TIMEOUT
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return ""
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"{command[0]} ended with code {done.returncode}"
