"""One cell of a grid, from nothing to its record; whatever is already there is not made again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from roadvla.envs.suite import SETTINGS
from roadvla.errors import UserError
from roadvla.evaluation.definition import definition
from roadvla.evaluation.evaluate import SPLITS, Evaluation, evaluate
from roadvla.evaluation.files import film_path, find_evaluation, write_evaluation
from roadvla.evaluation.machine import describe_machine
from roadvla.evaluation.records import (
    CurvePoint,
    Outcomes,
    RunRecord,
    outcomes_of,
    read_record,
    write_record,
)
from roadvla.experiments.grid import Cell, Grid, union
from roadvla.experiments.stages import attribute, ensure_run, ensure_warm_up, trained
from roadvla.files import read_json
from roadvla.policy.base import Policy
from roadvla.train.checkpoint import checkpoint_folder, latest_checkpoint
from roadvla.train.config import Experiment
from roadvla.train.listed import DamagedError
from roadvla.train.metrics import read_metrics
from roadvla.train.parts import parts_of
from roadvla.train.run_folder import CONFIG
from roadvla.train.serialize import to_dict

_SHARED_SERIES = ("iteration", "env_steps")
_KEPT = ("rollout/", "policy/", "guidance/", "critic/", "time/", "memory/")
_DROPPED = ("_steps_per_second",)
_DIGITS = 5


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Who asked for a grid, noted in every record.

    Attributes:
        command: What was typed.
        commit: Of the source tree; ``""`` if unknown.
    """

    command: str
    commit: str


def is_finished(cell: Cell, grid: Grid) -> bool:
    """Whether a cell's record is there and says all that is asked of it.

    Raises:
        UserError: If the record is damaged or was changed by hand, or is of more episodes than are
            asked for: they would be lost.
    """
    record = _known(cell, grid)
    if record is None:
        return False
    asked = grid.budget.episodes
    measured = {(o.env, o.split): o.episodes for o in record.outcomes}
    most = max(measured.values(), default=0)
    if most > asked:
        raise UserError(
            f"{_path(cell, grid)} holds {most} episodes of a set and {asked} are asked for: ask "
            f"for --episodes {most}, or choose another --output"
        )
    drawn = {(p.env, p.split, p.iteration, p.episodes) for p in record.curve}
    wanted = [(env, split) for env in cell.envs for split in SPLITS]
    points = {
        (*key, iteration, grid.budget.curve_episodes)
        for key in wanted
        for iteration in cell.curve or (0,)
    }
    return points <= drawn and all(measured.get(key) == asked for key in wanted)


def finished_cells(grid: Grid) -> set[str]:
    """Name the cells that have nothing left to do.

    Raises:
        UserError: As ``is_finished``.
    """
    return {name for name, cell in grid.cells.items() if is_finished(cell, grid)}


def run_cell(cell: Cell, grid: Grid, origin: Origin) -> None:
    """Train and measure a cell, and write its record.

    Raises:
        UserError: If something that it needs is gone, or a file is damaged.
    """
    folder = grid.folder(cell.name)
    experiment = cell.experiment
    known = _known(cell, grid)
    if known is not None:
        # Another study has measured it in settings of its own: they stay.
        cell = replace(cell, envs=union(cell.envs, (outcomes.env for outcomes in known.outcomes)))
    if experiment is None:
        if grid.warm_up is not None:
            ensure_warm_up(grid.warm_up)
    elif not _is_trained(cell, folder):
        _check_sources(experiment, cell)
        ensure_run(experiment)
    measuring = _Measuring(cell, grid, experiment or grid.base)
    outcomes = tuple(measuring.final())
    curve = tuple(measuring.curve())
    write_record(_record(cell, grid, origin, folder, outcomes, curve), grid.root / "records")


def _path(cell: Cell, grid: Grid) -> Path:
    return grid.root / "records" / f"{cell.name}.json"


def _known(cell: Cell, grid: Grid) -> RunRecord | None:
    path = _path(cell, grid)
    return read_record(path) if path.exists() else None


def _is_trained(cell: Cell, folder: Path) -> bool:
    """Whether its last checkpoint is there, also if what it started from has been moved since."""
    root = folder / "checkpoints"
    with suppress(DamagedError):
        return latest_checkpoint(root) == checkpoint_folder(root, cell.curve[-1])
    return False


class _Measuring:
    """Evaluates a cell's checkpoints; each distribution once, noted under every setting it has."""

    def __init__(self, cell: Cell, grid: Grid, experiment: Experiment) -> None:
        self._cell, self._grid, self._experiment = cell, grid, experiment
        self._folder = grid.folder(cell.name)
        self._parts = parts_of(
            experiment.policy, experiment.checkpoint, experiment.openvla, experiment.maniskill
        )
        self._loaded: tuple[Path | None, Policy] | None = None

    def final(self) -> Iterator[Outcomes]:
        budget, cell = self._grid.budget, self._cell
        checkpoint = self._checkpoint(None)
        filmed = budget.filmed if cell.seed == 0 and cell.experiment is not None else 0
        for env, result in self._measure(
            checkpoint, self._folder / "evaluation", budget.episodes, filmed
        ):
            yield outcomes_of(result, env)

    def curve(self) -> Iterator[CurvePoint]:
        """Measure the checkpoints on the way; of the warm-up the start of every curve."""
        episodes = self._grid.budget.curve_episodes
        for iteration in self._cell.curve or (0,):
            checkpoint = self._checkpoint(iteration or None)
            folder = self._folder / "curve" / f"{iteration:06d}"
            for env, result in self._measure(checkpoint, folder, episodes, 0):
                yield CurvePoint(
                    env=env,
                    split=result.split,
                    iteration=iteration,
                    env_steps=result.env_steps or 0,
                    episodes=result.episodes,
                    success=sum(result.success),
                    grasped=sum(result.grasped),
                )

    def _measure(
        self, checkpoint: Path | None, folder: Path, episodes: int, filmed: int
    ) -> Iterator[tuple[str, Evaluation]]:
        first: dict[object, str] = {}
        for env in self._cell.envs:
            for split in SPLITS:
                source = first.setdefault(SETTINGS[env].distribution(split), env)
                film = filmed if split == "test" else 0
                yield env, self._evaluate(checkpoint, folder, source, split, episodes, film)

    def _evaluate(
        self, checkpoint: Path | None, folder: Path, env: str, split: str, episodes: int, film: int
    ) -> Evaluation:
        found = find_evaluation(folder, env, split)
        iteration = None if checkpoint is None else trained(checkpoint)[0]
        target = self._grid.root / "films" / f"{self._cell.name}_{env}.npz"
        wanted = (episodes, iteration)
        # Without its film, a result was cut off between the two: both are made again.
        filmed = not film or target.exists()
        if filmed and found is not None and (found.episodes, found.iteration) == wanted:
            return found
        experiment = self._experiment
        result = evaluate(
            self._policy(checkpoint),
            env=env,
            split=split,
            sim=experiment.sim,
            episodes=episodes,
            temperature=experiment.evaluation.temperature,
            num_envs=min(self._grid.budget.evaluation_envs, episodes),
            device=experiment.device,
            record=film,
            make_env=self._parts.make_env,
        )
        if checkpoint is not None:
            result = attribute(result, checkpoint, base=self._folder)
        path = write_evaluation(result, folder)
        if film:
            target.parent.mkdir(parents=True, exist_ok=True)
            film_path(path).replace(target)
        return result

    def _checkpoint(self, iteration: int | None) -> Path | None:
        """Folder of a policy: the last unless given; ``None`` for the untouched base."""
        if self._cell.experiment is None:
            return self._folder if self._grid.warm_up is not None else None
        iteration = iteration or self._cell.curve[-1]
        return self._folder / "checkpoints" / f"iteration_{iteration:06d}"

    def _policy(self, checkpoint: Path | None) -> Policy:
        if self._loaded is None or self._loaded[0] != checkpoint:
            device = self._experiment.device
            load = self._parts.load_policy
            policy = (
                self._parts.load_backbone(device)
                if checkpoint is None
                else load(checkpoint, device)
            )
            self._loaded = checkpoint, policy
        return self._loaded[1]


def _check_sources(experiment: Experiment, cell: Cell) -> None:
    """Name what a cell starts from if it is gone, and the record that says it was finished."""
    for path in (experiment.init, experiment.algorithm.reference_critic):
        if path is not None and not Path(path).is_dir():
            owner = next(part for part in reversed(Path(path).parts) if part in cell.needs)
            raise UserError(
                f"{cell.name} needs the checkpoint {path}, which is gone: delete runs/{owner} and "
                f"records/{owner}.json to train that cell again"
            )


def _record(
    cell: Cell,
    grid: Grid,
    origin: Origin,
    folder: Path,
    outcomes: tuple[Outcomes, ...],
    curve: tuple[CurvePoint, ...],
) -> RunRecord:
    experiment = cell.experiment
    about: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        about = read_json(folder / CONFIG)
    device = (experiment or grid.base).device
    settings = grid.warm_up if experiment is None else experiment
    checkpoint = folder / "checkpoints" / f"iteration_{cell.curve[-1]:06d}" if cell.curve else None
    return RunRecord(
        name=cell.name,
        method=cell.method,
        env=None if experiment is None else experiment.env,
        envs=cell.envs,
        seed=cell.seed,
        sim=grid.base.sim,
        identity=cell.identity,
        definition=definition(grid.base.sim),
        version=version("roadvla"),
        commit=origin.commit,
        command=origin.command,
        machine=str(about.get("machine", describe_machine(device))),
        started=str(about.get("started", "")),
        config={} if settings is None else _portable(settings, grid.root),
        env_steps=0 if checkpoint is None else trained(checkpoint)[1] or 0,
        extra_env_steps=cell.extra_env_steps,
        outcomes=outcomes,
        curve=curve,
        series=_series(folder) if experiment is not None else {},
    )


def _portable(settings: Any, root: Path) -> dict[str, Any]:
    """Write settings down with paths as seen from the root."""
    data = to_dict(settings)

    def shorten(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: shorten(inner) for name, inner in value.items()}
        if isinstance(value, str) and value.startswith(f"{root}/"):
            return value.removeprefix(f"{root}/")
        return value

    return shorten(data)


def _series(folder: Path) -> dict[str, tuple[float | int | None, ...]]:
    """Read the logged metrics, rounded, as one column each."""
    rows = [row for row in read_metrics(folder) if row["iteration"] > 0]
    names = {
        name: None
        for row in rows
        for name in row
        if name.startswith(_KEPT) and not name.endswith(_DROPPED)
    }
    return {name: tuple(_short(row, name) for row in rows) for name in (*_SHARED_SERIES, *names)}


def _short(row: Mapping[str, Any], name: str) -> float | int | None:
    value = row.get(name)
    if value is None or isinstance(value, int):
        return value
    return float(f"{value:.{_DIGITS}g}")
