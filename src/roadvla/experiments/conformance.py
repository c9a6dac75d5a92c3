"""``roadvla check-env``: environments against the contract, or against recorded episodes."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from roadvla.envs import SETTINGS, ManiSkillSettings, make_env
from roadvla.envs.base import VectorEnv
from roadvla.envs.conformance import check_env
from roadvla.errors import UserError
from roadvla.evaluation.machine import usable_device
from roadvla.train.checks import check_range, check_simulator
from roadvla.train.experts import expert_of

_GAIN = 0.7


@dataclass(frozen=True, kw_only=True)
class Conformance:
    """Put environments through the contract, or compare them with recorded episodes.

    Attributes:
        env: Settings of Table 3, with ``--sim maniskill`` any of RL4VLA's ids, or MODULE:FUNCTION
            that builds an environment of your own when called with the number of episodes. With
            ``--golden`` none means all that the folder has.
        split: A setting's training set or its test set.
        sim: ``tabletop`` or ``maniskill``.
        device: Where the environments live.
        golden: Folder with ``episodes.json`` and ``arrays.npz``, recorded from RL4VLA's own code:
            compare ManiSkill's scenes with it, quantity by quantity.
        pictures: With ``--golden``: whether to draw; ``--no-pictures`` needs no Vulkan device.
        every: With ``--golden``: play every n-th recorded episode only.
        maniskill: How ManiSkill simulates.
    """

    env: tyro.conf.Positional[tuple[str, ...]] = ()
    split: Annotated[Literal["train", "test"], tyro.conf.arg(name="set")] = "test"
    sim: str = "tabletop"
    device: str = "cpu"
    golden: Path | None = None
    pictures: bool = True
    every: int = 1
    maniskill: tyro.conf.OmitArgPrefixes[ManiSkillSettings] = field(
        default_factory=ManiSkillSettings
    )

    def __post_init__(self) -> None:
        """Refuse settings that would not be used, and nothing to check."""
        check_range(self, "every", least=1.0)
        if self.golden is not None:
            self._check_golden()
            return
        check_simulator(self)
        if not self.env:
            raise UserError(f"no environment is named: known are {', '.join(SETTINGS)}")
        if self.every != 1 or not self.pictures:
            raise UserError(
                "--every and --no-pictures are for --golden FOLDER: add it or drop them"
            )

    def _check_golden(self) -> None:
        """Recorded episodes decide everything but where the work is done."""
        used = ManiSkillSettings(
            stand_ins=self.maniskill.stand_ins, processes=self.maniskill.processes
        )
        others = (self.device, self.split, self.sim in ("tabletop", "maniskill"))
        if self.maniskill != used or others != ("cpu", "test", True):
            raise UserError(
                "with --golden only --stand-ins, --processes, --every and --no-pictures are used: "
                "drop the other flags"
            )


def check(wanted: Conformance) -> list[str]:
    """Run the checks and print what they find.

    Returns:
        What is broken, one line each.

    Raises:
        UserError: If there is no such environment or recording.
    """
    if wanted.golden is not None:
        return _compare(wanted, wanted.golden)
    usable_device(wanted.device)
    broken: list[str] = []
    for env in wanted.env:
        broken += _contract(env, wanted, titled=len(wanted.env) > 1)
    return broken


def _contract(env: str, wanted: Conformance, *, titled: bool) -> list[str]:
    act = expert_of(wanted.sim, 0.0)

    def build(num_envs: int) -> VectorEnv:
        return make_env(
            env,
            split=wanted.split,
            num_envs=num_envs,
            sim=wanted.sim,
            device=wanted.device,
            maniskill=wanted.maniskill,
        )

    def solve(running: VectorEnv) -> Tensor:
        gain = torch.full((running.num_envs,), _GAIN, device=running.device)
        return act(running, gain, torch.Generator(running.device))

    if titled:
        print(env)
    checks = check_env(imported(env)) if ":" in env else check_env(build, act=solve)
    for one in checks:
        print(f"{'FAIL' if one.failure else 'ok':<4} {one.name}")
    broken = [f"{one.name}: {one.failure}" for one in checks if one.failure]
    if not broken:
        return []
    return [f"{env} breaks {len(broken)} of {len(checks)} requirements; {broken[0]}"]


def _compare(wanted: Conformance, folder: Path) -> list[str]:
    from roadvla.envs.maniskill.golden import Quantity, read_recording
    from roadvla.envs.maniskill.golden_run import compare
    from roadvla.envs.maniskill.settings import variant

    console = Console()
    with Progress(
        console=Console(stderr=True), transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("recorded episodes", total=None)
        result = compare(
            read_recording(folder),
            env_ids=[variant(env).env_id for env in wanted.env],
            every=wanted.every,
            pictures=wanted.pictures,
            stand_ins=wanted.maniskill.stand_ins,
            processes=wanted.maniskill.processes,
            progress=lambda done, of: progress.update(task, completed=done, total=of),
        )
    rows: Sequence[Quantity] = sorted(result.rows.values(), key=lambda row: row.name)
    table = Table("quantity", "compared", "beyond", "worst", "tolerance", "worst in", box=None)
    for row in rows:
        table.add_row(
            row.name,
            str(row.compared),
            f"[bold red]{row.failed}[/]" if row.failed else "0",
            f"{row.worst:.3g}",
            f"{row.tolerance:g} {row.unit}",
            row.where,
        )
    console.print(table)
    return [
        f"{row.name}: {row.failed} of {row.compared} deviate by more than {row.tolerance:g} "
        f"{row.unit}, at worst {row.worst:.3g} in {row.where}"
        for row in rows
        if row.failed
    ]


def imported(path: str) -> Any:
    """Import what ``MODULE:FUNCTION`` names, from the current folder too.

    Raises:
        UserError: If there is no such thing.
    """
    module, _, name = path.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"cannot import {path!r}: {error}") from error
