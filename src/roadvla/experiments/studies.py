"""Grids of runs over seeds, each a table of declared cells; finished cells are never repeated."""

from __future__ import annotations

import contextlib
import multiprocessing
import shlex
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from rich.console import Console

from roadvla.errors import UserError, unknown_name
from roadvla.experiments.presets import get_preset
from roadvla.experiments.stages import (
    continued_by,
    ensure_evaluations,
    ensure_run,
    ensure_warm_up,
)
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


def run_study(name: str, *, output: Path, seeds: Sequence[int], jobs: int, episodes: int) -> None:
    """Warm up once, run every cell with every seed, evaluate everything and write the report.

    Args:
        name: Which of ``STUDIES``.
        output: Folder of the study; what is finished in it is kept.
        seeds: One run of each cell per seed.
        jobs: Runs at a time, one thread each.
        episodes: Of each split in the final evaluations of all settings; the setting a run trains
            on has the preset's number if that is more.

    Raises:
        Interrupted: After Ctrl-C; running cells save first.
        UserError: If there is no such study, or a cell fails; the others are finished first.
    """
    if name not in STUDIES:
        raise unknown_name("study", name, STUDIES)
    flags = ["--seeds", *map(str, seeds), "--jobs", str(jobs), "--episodes", str(episodes)]
    command = shlex.join(["roadvla", "study", name, *flags, "--output", str(output)])
    with continued_by(command):
        _run_study(STUDIES[name], output, seeds, jobs, episodes)
        summary = write_report([output], output / "report", command=command)
    print_table(summary, Console())
    Console(stderr=True).print(f"Report: {output / 'report' / 'report.md'}")


def _run_study(
    cells: Sequence[Cell], output: Path, seeds: Sequence[int], jobs: int, episodes: int
) -> None:
    """Cells that serve as a reference come before those that need them."""
    console = Console(stderr=True)
    first = [cell for cell in cells if cell.reference is None]
    then = [cell for cell in cells if cell.reference is not None]
    stages = [
        [cell.experiment(output, seed) for seed in seeds for cell in stage]
        for stage in (first, then)
    ]
    warm_up = ensure_warm_up(WarmUp(output=str(output / "warmup")))
    # Runs end with this many of the setting they train on; compare with no fewer.
    more = {e.env: e.evaluation.final_episodes for stage in stages for e in stage}
    ensure_evaluations(warm_up, episodes=episodes, more=more)
    for experiments in stages:
        _run_all(experiments, jobs, episodes, console)


def _run_all(experiments: Sequence[Experiment], jobs: int, episodes: int, console: Console) -> None:
    failures: list[str] = []
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(max_workers=jobs, mp_context=context, initializer=_begin_worker)
    try:
        with _deferred_interrupt():
            futures = {pool.submit(_run_cell, e, episodes): e.output for e in experiments}
        for done, (output, failure) in enumerate(_finished(futures), start=1):
            failures += [failure] if failure else []
            console.print(f"{done}/{len(futures)} {output} {failure or 'done'}", markup=False)
    except KeyboardInterrupt:
        console.print("stopping: the running cells save first; Ctrl-C again stops them at once")
        raise
    except BrokenProcessPool as error:
        raise UserError(
            "a run's process died, perhaps for want of memory: lower --jobs; the same command goes "
            "on where it stopped"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
    if failures:
        raise UserError(f"{len(failures)} of {len(experiments)} runs failed; first: {failures[0]}")


def _finished(futures: Mapping[Future[str], str]) -> Iterator[tuple[str, str]]:
    """Yield each cell's folder and failure as it ends."""
    for future in as_completed(futures):
        yield futures[future], future.result()


def _run_cell(experiment: Experiment, episodes: int) -> str:
    """Run one cell in a process of its own, its output in a file; return what went wrong."""
    torch.set_num_threads(1)
    folder = Path(experiment.output)
    log = folder.with_suffix(".log")
    try:
        with _STOP.heeded():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with (
                log.open("a") as file,
                contextlib.redirect_stdout(file),
                contextlib.redirect_stderr(file),
            ):
                ensure_run(experiment)
                ensure_evaluations(folder, episodes=episodes)
    except (UserError, OSError) as error:
        return f"{error} (see {log})"
    except KeyboardInterrupt as interrupt:
        return str(interrupt) or "stopped"
    return ""


class _Stop:
    """Ctrl-C in a worker: it stops the running cell and keeps the next from starting."""

    def __init__(self) -> None:
        self._requested = self._running = False

    def request(self, *_: object) -> None:
        """Note it; between cells there is nothing to interrupt."""
        self._requested = True
        if self._running:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        """Let Ctrl-C end the block; after one, the block is not entered any more."""
        try:
            self._running = True
            if self._requested:
                raise KeyboardInterrupt
            yield
        except KeyboardInterrupt:
            self._requested = True  # the trainer catches the signal itself and says so here
            raise
        finally:
            self._running = False


_STOP = _Stop()


def _begin_worker() -> None:
    """Take Ctrl-C from now on; a worker is started with it blocked, lest it die while importing."""
    signal.signal(signal.SIGINT, _STOP.request)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[None]:
    """Hold Ctrl-C back in the block; processes started in it are born with it held back."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _folder(output: Path, name: str, seed: int) -> Path:
    return output / f"{name}-seed{seed}"


STUDIES: dict[str, tuple[Cell, ...]] = {"first-results": FIRST_RESULTS, "epochs": EPOCHS}
