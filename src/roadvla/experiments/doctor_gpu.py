"""Rows of ``roadvla doctor`` about torch and the NVIDIA driver."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roadvla.experiments.doctor_rows import Answer, Row, ask

_SMI = (
    "nvidia-smi",
    "--query-gpu=name,driver_version,memory.total,memory.free,compute_cap",
    "--format=csv,noheader,nounits",
)
_TORCH = (
    "import json, torch\n"
    "cuda = torch.cuda\n"
    "names = [cuda.get_device_name(i) for i in range(cuda.device_count())]\n"
    "facts = {'version': torch.__version__, 'build': torch.version.cuda, 'devices': names}\n"
    "print('\\n' + json.dumps(facts))"
)
_TIMEOUT = 60.0
_OLDEST_DRIVER = {8: 535, 9: 570}
"""By the GPU's compute capability: the oldest that RLinf's authors advise for drawing."""
_MIB_PER_GB = 1e9 / 2**20


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU, as the driver's own tool describes it.

    Attributes:
        name: Of the product.
        driver: Version.
        total: Memory in GB.
        free: Of that, what no process holds.
        capability: Compute capability, e.g. 9.0 for Hopper.
    """

    name: str
    driver: str
    total: float
    free: float
    capability: float


def find_gpus(answer: Answer | None = None) -> tuple[list[Gpu], str]:
    """Ask the driver for its GPUs.

    Args:
        answer: What nvidia-smi said; it is run unless given.

    Returns:
        The GPUs, and why there are none.
    """
    answer = answer or ask(_SMI, _TIMEOUT)
    if answer.problem:
        return [], answer.problem
    gpus = []
    for line in answer.output.splitlines():
        values = [value.strip() for value in line.split(",")]
        try:
            name, driver, total, free, capability = values
            sizes = [float(size) / _MIB_PER_GB for size in (total, free)]
            gpu = Gpu(
                name=name,
                driver=driver,
                total=sizes[0],
                free=sizes[1],
                capability=float(capability),
            )
        except ValueError:
            return [], f"nvidia-smi says {line.strip()!r}"
        gpus.append(gpu)
    return gpus, "" if gpus else "nvidia-smi names no GPU"


def driver_row(gpus: list[Gpu], problem: str, *, device: Path = Path("/dev/nvidiactl")) -> Row:
    """Judge the NVIDIA driver.

    Args:
        gpus: Found by ``find_gpus``.
        problem: Why it found none.
        device: Exists where the driver is loaded.
    """
    name = "NVIDIA driver"
    if not gpus and not device.exists():
        return Row(name=name, state="ok", finding="none: no NVIDIA GPU here, the processor is used")
    if not gpus:
        finding = f"loaded, but nvidia-smi gives no answer: {problem}"
        fix = "start the container with --gpus all; on the machine itself, reinstall the driver"
        return Row(name=name, state="warn", finding=finding, fix=fix)
    finding = f"{gpus[0].driver}, {len(gpus)} × {gpus[0].name}"
    oldest = max(_OLDEST_DRIVER.get(int(gpu.capability), 0) for gpu in gpus)
    if int(gpus[0].driver.split(".")[0]) >= oldest:
        return Row(name=name, state="ok", finding=finding)
    finding += f": ManiSkill may fail to draw with a driver older than {oldest} on such a GPU"
    fix = f"install a driver of branch {oldest} or newer if it does"
    return Row(name=name, state="warn", finding=finding, fix=fix)


def gpu_memory_row(gpus: list[Gpu]) -> Row:
    """Judge how much of the GPUs' memory is free."""
    name = "GPU memory"
    if not gpus:
        return Row(name=name, state="ok", finding="no GPU")
    finding = ", ".join(f"{gpu.free:.1f} of {gpu.total:.1f} GB free" for gpu in gpus)
    if all(gpu.free > gpu.total / 2 for gpu in gpus):
        return Row(name=name, state="ok", finding=finding)
    fix = "end what holds the memory (nvidia-smi names it); `roadvla plan` says what a run needs"
    return Row(name=name, state="warn", finding=finding, fix=fix)


def torch_row(gpus: list[Gpu], answer: Answer | None = None) -> Row:
    """Judge torch: whether it loads, and whether it sees the GPUs.

    Args:
        gpus: That the driver has.
        answer: What torch said in a process of its own; one is started unless given.
    """
    name = "torch"
    answer = answer or ask((sys.executable, "-c", _TORCH), _TIMEOUT)
    facts = None if answer.problem else last_json(answer.output)
    if facts is None:
        finding = f"does not load: {answer.problem or 'no answer'}"
        return Row(
            name=name, state="fail", finding=finding, fix="pip install --force-reinstall torch"
        )
    built = f"CUDA {facts['build']}" if facts["build"] else "without CUDA"
    finding = f"{facts['version']}, built {'for ' * bool(facts['build'])}{built}"
    if facts["devices"]:
        finding += f": {len(facts['devices'])} × {facts['devices'][0]}"
    if facts["devices"] or not gpus:
        return Row(name=name, state="ok", finding=finding)
    finding += f", sees none of {len(gpus)} GPUs"
    fix = (
        "see that CUDA_VISIBLE_DEVICES hides none and that the driver is new enough for this CUDA "
        "(nvidia-smi says up to which)"
    )
    if not facts["build"]:
        fix = (
            "pip install --force-reinstall torch, from PyPI or the wheel index for your driver's "
            "CUDA on PyTorch's installation page"
        )
    return Row(name=name, state="warn", finding=finding, fix=fix)


def last_json(output: str) -> dict[str, Any] | None:
    """Read the JSON object in the last line, for drivers and libraries print before it."""
    lines = output.strip().splitlines()
    try:
        found = json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
