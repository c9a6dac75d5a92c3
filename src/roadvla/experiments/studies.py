"""``roadvla study``: grids of runs, their results, and the page that shows them."""

from __future__ import annotations

import shlex
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from roadvla.errors import UserError, unknown_name
from roadvla.evaluation.machine import source_commit, usable_device
from roadvla.evaluation.results import read_results, write_study
from roadvla.experiments.budgets import BUDGETS, base_experiment
from roadvla.experiments.cell import Origin, finished_cells
from roadvla.experiments.executors import Executor, LocalProcesses, RayCluster
from roadvla.experiments.grid import Grid, build_grid
from roadvla.experiments.paper_studies import STUDIES
from roadvla.experiments.schedule import run_grid
from roadvla.experiments.stages import continued_by
from roadvla.policy.settings import PolicyKind
from roadvla.report.site import write_page
from roadvla.train.lock import locked

BudgetName = Literal["smoke", "full", "paper"]
ExecutorName = Literal["local", "ray"]


@dataclass(frozen=True, kw_only=True)
class StudyRequest:
    """Which studies to run, and how.

    Attributes:
        names: Which of ``STUDIES``, or ``all``; what they share is run once.
        sim: ``tabletop`` or ``maniskill``.
        budget: How much each run may cost.
        seeds: One run of each method and training distribution per seed; the budget's unless given.
        episodes: Of each set in the final evaluations; the budget's unless given.
        only: Patterns of methods to run now, e.g. ``ppo*``; all unless given.
        settings: Settings to run now; all of each study unless given.
        jobs: Runs at a time.
        executor: Processes here, or tasks of a Ray cluster.
        policy: ``tiny``, or ``openvla`` with its checkpoint.
        checkpoint: OpenVLA in HF format; RL4VLA's warm-up unless given.
        device: Of policies and environments.
        output: Folder of everything; finished cells in it are kept.
    """

    names: tuple[str, ...]
    sim: str = "tabletop"
    budget: BudgetName = "full"
    seeds: tuple[int, ...] = ()
    episodes: int | None = None
    only: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    jobs: int = 1
    executor: ExecutorName = "local"
    policy: PolicyKind = "tiny"
    checkpoint: str | None = None
    device: str = "cpu"
    output: Path | None = None


def run_studies(request: StudyRequest) -> Path:
    """Run every cell that is not finished, then write the page.

    Returns:
        The page.

    Raises:
        Interrupted: After Ctrl-C; running cells save first.
        UserError: If there is no such study, another process works in the folder, or a cell fails;
            the others are finished first.
    """
    root = request.output or Path("runs") / f"study-{request.sim}-{request.budget}"
    command = _command(request, root)
    for name in ("jobs", "episodes"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}: expected 1 or more")
    usable_device(request.device)
    grid = _grid(request, root)
    with continued_by(command), locked(grid.root):
        finished = finished_cells(grid)  # refuses what does not fit before anything is written
        for study in grid.studies:
            write_study(study, grid.root / "studies")
        try:
            origin = Origin(command=command, commit=source_commit())
            run_grid(grid, _executor(request), origin, finished=finished)
        except UserError:
            # What is finished is worth a look, whatever became of the rest.
            with suppress(UserError):
                _write_page(grid, command)
            raise
        return _write_page(grid, command)


def _write_page(grid: Grid, command: str) -> Path:
    page = write_page(read_results(grid.root), grid.root / "report", command=command)
    Console(stderr=True).print(f"Page: {page}", markup=False, soft_wrap=True)
    return page


def _grid(request: StudyRequest, root: Path) -> Grid:
    names = tuple(STUDIES) if request.names == ("all",) else request.names
    if not names:
        raise UserError(f"no study is named: known are all, {', '.join(STUDIES)}")
    for name in names:
        if name not in STUDIES:
            raise unknown_name("study", name, ["all", *STUDIES])
    budget = BUDGETS[request.budget]
    if request.episodes is not None:
        budget = replace(budget, episodes=request.episodes)
    base = base_experiment(
        budget,
        sim=request.sim,
        policy=request.policy,
        checkpoint=request.checkpoint,
        device=request.device,
    )
    return build_grid(
        [STUDIES[name] for name in dict.fromkeys(names)],
        base=base,
        budget=budget,
        seeds=request.seeds or budget.seeds,
        root=root,
        command=_command(replace(request, only=(), settings=()), root),
        only=request.only,
        settings=request.settings,
    )


def _executor(request: StudyRequest) -> Executor:
    if request.executor == "ray":
        gpus = 1.0 if request.device.startswith("cuda") else 0.0
        return RayCluster(request.jobs if request.jobs > 1 else None, gpus=gpus)
    return LocalProcesses(request.jobs, threads=max(1, torch.get_num_threads() // request.jobs))


def _command(request: StudyRequest, root: Path) -> str:
    """Spell the request as it would be typed, with all that is not a default."""
    default = StudyRequest(names=())
    words = ["roadvla", "study", *request.names]
    for name, value in vars(request).items():
        if name in ("names", "output") or value == getattr(default, name):
            continue
        values = value if isinstance(value, tuple) else (value,)
        words += [f"--{name}", *map(str, values)]
    return shlex.join([*words, "--output", str(root)])
