"""Rows of ``roadvla doctor`` about ManiSkill: libraries, what draws, assets."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from roadvla.experiments.doctor_gpu import last_json
from roadvla.experiments.doctor_rows import Answer, Row, Verdict, ask
from roadvla.files import read_json

if TYPE_CHECKING:
    from roadvla.envs.maniskill.inspection import Finding

SIMULATOR = [Requirement("mani_skill>=3.0.1,<3.1"), Requirement("sapien>=3.0.3,<4")]
"""The extra ``maniskill``, for an installation without it does not know what it asks for."""

_PROBE = (
    "import json, sapien\n"
    "device = sapien.render.RenderSystem().device\n"
    "print('\\n' + json.dumps({'name': device.name, 'pci': device.pci_string}))"
)
_LOAD = "import ctypes, sys; ctypes.CDLL(sys.argv[1])"
_TIMEOUT = 120.0
_SOFTWARE = ("swiftshader", "llvmpipe", "lavapipe")
_VULKAN = ("/usr/share", "/etc", "/usr/local/share", "~/.local/share")
_EGL = (Path("/usr/share/glvnd/egl_vendor.d"), Path("/etc/glvnd/egl_vendor.d"))
_NVIDIA_MANIFEST = "as root: mkdir -p {folder} && echo '{content}' > {folder}/{file}"
_PIP = 'pip install "roadvla[maniskill]"'
_ON_PROCESSOR = (
    'to draw on the processor: eval "$(roadvla fetch-vulkan ~/.cache/roadvla-vulkan)" (Debian; '
    "the software driver of Debian 12's mesa-vulkan-drivers is not enough for SAPIEN)"
)
_X_FIX = "apt-get install libx11-6 libxext6 (Fedora: dnf install libX11 libXext)"
_IN_CONTAINER = (
    "start the container with -e NVIDIA_DRIVER_CAPABILITIES=all; on the machine itself, install "
    "the driver's graphics libraries (libnvidia-gl-VERSION on Ubuntu, nvidia-driver-libs on Debian)"
)


def library_fault(name: str) -> str:
    """Say why a shared library does not load, in a process that a driver may crash; or nothing."""
    problem = ask((sys.executable, "-c", _LOAD, name), _TIMEOUT).problem
    return problem.removeprefix("OSError: ")


Fault = Callable[[str], str]


def windowing_row(grave: Verdict, *, fault: Fault = library_fault) -> Row:
    """Judge libX11, which SAPIEN loads, and libXext, which NVIDIA's Vulkan driver loads.

    Args:
        grave: What it means if one is missing.
        fault: Says why a library does not load.
    """
    names = ("libX11.so.6", "libXext.so.6")
    missing = [name for name in names if fault(name)]
    if not missing:
        return Row(name="X libraries", state="ok", finding=", ".join(names))
    finding = f"{' and '.join(missing)} missing; no display is needed, but they are"
    return Row(name="X libraries", state=grave, finding=finding, fix=_X_FIX)


def vulkan_driver_row(
    *,
    gpu: bool,
    environment: Mapping[str, str] = os.environ,
    folders: tuple[Path, ...] | None = None,
    fault: Fault = library_fault,
) -> Row:
    """Judge the manifests by which Vulkan's loader finds drivers.

    Args:
        gpu: Whether there is an NVIDIA GPU.
        environment: May name the manifests.
        folders: Where they are installed; the loader's own list unless given.
        fault: Says why a library does not load.
    """
    name = "Vulkan drivers"
    variable = next((v for v in ("VK_DRIVER_FILES", "VK_ICD_FILENAMES") if environment.get(v)), "")
    named = f", by {variable}" if variable else ""
    if variable:
        manifests = [Path(part) for part in environment[variable].split(os.pathsep) if part]
    else:
        manifests = sorted(
            file for at in folders or _vulkan_folders() for file in at.glob("*.json")
        )
    wrong = "; ".join(text for path in manifests if (text := _manifest_fault(path, fault)))
    if wrong and "libX" in wrong:
        return Row(name=name, state="warn", finding=wrong + named, fix=_X_FIX)
    if wrong:
        fix = f"unset {variable}, or correct it" if variable else _IN_CONTAINER
        return Row(name=name, state="warn", finding=wrong + named, fix=fix)
    if manifests:
        loader = "SAPIEN's own loader" if fault("libvulkan.so.1") else "the system's loader"
        finding = f"{', '.join(map(str, manifests))}{named}; {loader}"
        return Row(name=name, state="ok", finding=finding)
    if not gpu:
        return Row(name=name, state="warn", finding="none installed", fix=_ON_PROCESSOR)
    if fault("libGLX_nvidia.so.0"):
        finding = "the NVIDIA driver is here without its graphics libraries"
        return Row(name=name, state="warn", finding=finding, fix=_IN_CONTAINER)
    fix = _nvidia_manifest("/usr/share/vulkan/icd.d", "nvidia_icd.json", "libGLX_nvidia.so.0")
    return Row(name=name, state="warn", finding="no manifest names NVIDIA's driver", fix=fix)


def vulkan_device_row(grave: Verdict, *, gpu: bool, answer: Answer | None = None) -> Row:
    """Ask SAPIEN for the device that it would draw on.

    Args:
        grave: What it means if there is none.
        gpu: Whether there is an NVIDIA GPU.
        answer: What SAPIEN said in a process of its own; one is started unless given.
    """
    name = "Vulkan device"
    answer = answer or ask((sys.executable, "-c", _PROBE), _TIMEOUT)
    device = None if answer.problem else last_json(answer.output)
    if device is None:
        finding = f"SAPIEN finds none: {answer.problem or 'no answer'}"
        if "No module named" in finding:
            return Row(
                name=name, state=grave, finding="not looked for: sapien is missing", fix=_PIP
            )
        fix = f"see the rows above; {_IN_CONTAINER}" if gpu else _ON_PROCESSOR
        return Row(name=name, state=grave, finding=finding, fix=fix)
    finding = f"{device['name']} ({device['pci']})"
    if gpu and any(word in str(device["name"]).lower() for word in _SOFTWARE):
        fix = f"unset VK_ICD_FILENAMES and VK_DRIVER_FILES if they are set; {_IN_CONTAINER}"
        finding += ": the processor draws, though there is a GPU"
        return Row(name=name, state="warn", finding=finding, fix=fix)
    return Row(name=name, state="ok", finding=finding)


def egl_row(*, gpu: bool, folders: tuple[Path, ...] = _EGL, fault: Fault = library_fault) -> Row:
    """Judge EGL, through which NVIDIA's driver works without a display.

    Args:
        gpu: Whether there is an NVIDIA GPU.
        folders: Where vendors are registered.
        fault: Says why a library does not load.
    """
    if fault("libEGL.so.1"):
        state: Verdict = "warn" if gpu else "ok"
        fix = "apt-get install libegl1"
        return Row(name="EGL", state=state, finding="libEGL does not load", fix=fix)
    vendors = sorted(file.name for folder in folders for file in folder.glob("*.json"))
    finding = f"libEGL, vendors: {', '.join(vendors) or 'none'}"
    if not gpu or any("nvidia" in vendor for vendor in vendors):
        return Row(name="EGL", state="ok", finding=finding)
    fix = _nvidia_manifest("/usr/share/glvnd/egl_vendor.d", "10_nvidia.json", "libEGL_nvidia.so.0")
    return Row(name="EGL", state="warn", finding=finding, fix=fix)


def assets_row(grave: Verdict, findings: list[Finding], roots: tuple[Path, Path]) -> Row:
    """Judge the assets.

    Args:
        grave: What it means if some are missing or damaged.
        findings: Of ``inspect_all``.
        roots: Where they belong.
    """
    from roadvla.envs.maniskill.inspection import UNUSABLE, State, count_states

    where = " and ".join(dict.fromkeys(map(str, roots)))
    finding = f"{count_states(findings)} in {where}"
    states = {found.state for found in findings}
    fix = "roadvla assets fetch; or name the folder that has them in MS_ASSET_DIR (RL4VLA's: "
    fix += "ROADVLA_ASSETS)"
    if states.intersection(UNUSABLE):
        return Row(name="assets", state=grave, finding=finding, fix=fix)
    if states & {State.STAND_IN, State.REDUCED}:
        finding += ": results are not those of the original models"
        return Row(name="assets", state="warn", finding=finding, fix="roadvla assets fetch")
    return Row(name="assets", state="ok", finding=finding)


def _vulkan_folders() -> tuple[Path, ...]:
    return tuple(Path(base).expanduser() / "vulkan" / "icd.d" for base in _VULKAN)


def _manifest_fault(path: Path, fault: Fault) -> str:
    try:
        library = str(read_json(path)["ICD"]["library_path"])
    except OSError as error:
        return f"{path}: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return f"{path} is no manifest of a driver"
    # With a slash it lies relative to the manifest; without, where libraries are searched for.
    wrong = fault(str(path.parent / library) if "/" in library else library)
    return f"{path}: {wrong}" if wrong else ""


def _nvidia_manifest(folder: str, file: str, library: str) -> str:
    inner = {"library_path": library}
    if "vulkan" in folder:
        inner["api_version"] = "1.3.0"
    content = json.dumps({"file_format_version": "1.0.0", "ICD": inner})
    return _NVIDIA_MANIFEST.format(folder=folder, file=file, content=content)
