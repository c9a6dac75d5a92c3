"""Grids of runs over seeds, each a table of declared cells; finished cells are never repeated."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from rich.console import Console

from roadvla.errors import UserError
from roadvla.experiments.presets import get_preset
from roadvla.experiments.stages import ensure_evaluations, ensure_run, ensure_warm_up
from roadvla.report.page import write_report
from roadvla.report.tables import print_table
from roadvla.train.config import Experiment
from roadvla.train.warmup import WarmUp


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One experiment of a study, repeated for every seed.

    Attributes:
        name: Folder and label.
        preset: What it derives from.
        algorithm: Settings of the algorithm that differ from the preset.
        env: Setting it is trained on.
        reference: Cell whose finished run of the same seed is the reference critic.
    """

    name: str
    preset: str
    algorithm: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    env: str = "VR-UnseenTable"
    reference: str | None = None

    def experiment(self, output: Path, seed: int) -> Experiment:
        """Resolve the cell for a seed, below the study's folder."""
        preset = get_preset(self.preset)
        critic = None if self.reference is None else str(_folder(output, self.reference, seed))
        algorithm = replace(preset.algorithm, **self.algorithm, reference_critic=critic)
        return replace(
            preset,
            name=self.name,
            env=self.env,
            seed=seed,
            init=str(output / "warmup"),
            output=str(_folder(output, self.name, seed)),
            algorithm=algorithm,
        )


FIRST_RESULTS = (
    Cell(name="ppo", preset="tabletop-ppo"),
    Cell(name="road-add", preset="tabletop-road", reference="ppo"),
    Cell(name="road-replace", preset="tabletop-road-replace", reference="ppo"),
    Cell(name="ppo-mix", preset="tabletop-ppo-mix", reference="ppo"),
    Cell(name="agd-odd", preset="tabletop-agd-odd", reference="ppo"),
)
"""PPO, both readings of ROAD's loss, PPO on the mixed advantage, and AGD without its drifts."""

EPOCHS = tuple(
    Cell(name=f"ppo-{epochs}-epochs", preset="tabletop-ppo", algorithm={"epochs": epochs})
    for epochs in (1, 3, 5)
)
"""How many passes over a rollout serve PPO best."""


def run_study(
    cells: Sequence[Cell], *, output: Path, seeds: Sequence[int], jobs: int, episodes: int
) -> None:
    """Warm up once, run every cell with every seed, evaluate everything and write the report.

    Args:
        cells: Those that serve as a reference come before those that need them.
        output: Folder of the study; what is finished in it is kept.
        seeds: One run of each cell per seed.
        jobs: Runs at a time, one thread each.
        episodes: Of each split in the final evaluations of all settings.

    Raises:
        UserError: If a cell fails; the others are finished first.
    """
    console = Console(stderr=True)
    warm_up = ensure_warm_up(WarmUp(output=str(output / "warmup")))
    ensure_evaluations(warm_up, episodes=episodes)
    first = [cell for cell in cells if cell.reference is None]
    then = [cell for cell in cells if cell.reference is not None]
    for stage in (first, then):
        experiments = [cell.experiment(output, seed) for seed in seeds for cell in stage]
        _run_all(experiments, jobs, episodes, console)
    command = f"roadvla study {output.name} --seeds {' '.join(map(str, seeds))}"
    print_table(write_report([output], output / "report", command=command), Console())
    console.print(f"Report: {output / 'report' / 'report.md'}")


def _run_all(experiments: Sequence[Experiment], jobs: int, episodes: int, console: Console) -> None:
    failures: list[str] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=jobs, mp_context=context) as pool:
        futures = {pool.submit(_run_cell, e, episodes): e.output for e in experiments}
        for done, future in enumerate(as_completed(futures), start=1):
            failure = future.result()
            failures += [failure] if failure else []
            console.print(f"{done}/{len(futures)} {futures[future]} {failure or 'done'}")
    if failures:
        raise UserError(f"{len(failures)} of {len(experiments)} runs failed; first: {failures[0]}")


def _run_cell(experiment: Experiment, episodes: int) -> str:
    """Run one cell in a process of its own, its output in a file; return what went wrong."""
    torch.set_num_threads(1)
    folder = Path(experiment.output)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_suffix(".log")
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            ensure_run(experiment)
            ensure_evaluations(folder, episodes=episodes)
        except UserError as error:
            return f"{error} (see {log})"
    return ""


def _folder(output: Path, name: str, seed: int) -> Path:
    return output / f"{name}-seed{seed}"


STUDIES: dict[str, tuple[Cell, ...]] = {"first-results": FIRST_RESULTS, "epochs": EPOCHS}
