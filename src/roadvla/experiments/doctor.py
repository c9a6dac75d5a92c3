"""``roadvla doctor``: what this machine lacks, and how to mend it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from roadvla.errors import FailedCheckError
from roadvla.experiments.doctor_rows import Row, Verdict

if TYPE_CHECKING:
    from rich.console import Console

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}
_PIP = 'pip install "roadvla[{extra}]"'


def doctor(*, output: Path = Path("runs")) -> None:
    """Look over this machine, from Python to the assets, and say how to mend what is wrong.

    Args:
        output: Folder that runs will be written to.
    """
    found = examine(output)
    print_rows(found)
    failing = [row.name for row in found if row.state == "fail"]
    if failing:
        raise FailedCheckError(
            f"{len(failing)} of {len(found)} checks fail ({', '.join(failing)}): see their fixes"
        )


def examine(output: Path) -> list[Row]:
    """Look at everything; broken drivers are asked in processes of their own.

    Args:
        output: Folder that runs will be written to.
    """
    from roadvla.experiments import doctor_gpu, doctor_machine, doctor_simulator

    gpus, problem = doctor_gpu.find_gpus()
    gpu = bool(gpus)
    grave: Verdict = "warn" if find_spec("mani_skill") is None else "fail"
    torch = doctor_gpu.torch_row(gpus)
    rows = [
        doctor_machine.python_row(),
        doctor_machine.package_row(
            "packages",
            doctor_machine.requirements(),
            missing="fail",
            fix="pip install --upgrade roadvla",
        ),
        torch,
        doctor_gpu.driver_row(gpus, problem),
        doctor_gpu.gpu_memory_row(gpus),
        doctor_machine.memory_row(),
        doctor_machine.shared_memory_row(),
        doctor_machine.disk_row("disk for runs", output),
        doctor_machine.package_row(
            "OpenVLA",
            doctor_machine.requirements("openvla"),
            missing="warn",
            fix=_PIP.format(extra="openvla"),
        ),
        doctor_machine.package_row(
            "ManiSkill",
            doctor_simulator.SIMULATOR,
            missing="warn",
            fix=_PIP.format(extra="maniskill"),
        ),
        doctor_simulator.windowing_row(grave),
        doctor_simulator.vulkan_driver_row(gpu=gpu),
        doctor_simulator.vulkan_device_row(grave, gpu=gpu),
        doctor_simulator.egl_row(gpu=gpu),
    ]
    if torch.state != "fail":  # the package that knows the assets loads torch
        rows += _asset_rows(grave)
    return rows


def print_rows(rows: list[Row], console: Console | None = None) -> None:
    """Print a table, and below it the fixes, each on a line that can be copied.

    Args:
        rows: What was found.
        console: Where to; stdout unless given.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    table = Table("", "what", "found", box=SIMPLE_HEAD)
    for row in rows:
        table.add_row(Text(row.state, style=_COLOURS[row.state]), row.name, Text(row.finding))
    console.print(table)
    fixes: dict[str, list[str]] = {}
    for row in rows:
        if row.state != "ok":
            fixes.setdefault(row.fix, []).append(row.name)
    for fix, names in fixes.items():
        line = f"{', '.join(names)}: {fix}"
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _asset_rows(grave: Verdict) -> list[Row]:
    from roadvla.envs.maniskill.assets import asset_folders
    from roadvla.envs.maniskill.inspection import inspect_all
    from roadvla.experiments.doctor_machine import disk_row
    from roadvla.experiments.doctor_simulator import assets_row

    folders = asset_folders()
    roots = (folders.maniskill, folders.rl4vla)
    return [
        disk_row("disk for assets", folders.maniskill, grave="warn"),
        assets_row(grave, inspect_all(folders), roots),
    ]
