"""From studies to cells: which runs there are to make, once each, and what each needs first."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from roadvla.envs import horizon
from roadvla.envs.suite import SETTINGS
from roadvla.errors import UserError, unknown_name
from roadvla.evaluation.definition import definition
from roadvla.evaluation.results import StudyRecord
from roadvla.experiments.budgets import Budget, warm_up_of
from roadvla.experiments.methods import CRITIC_SHARES, PPO, Method
from roadvla.experiments.paper_studies import Study
from roadvla.files import read_json
from roadvla.policy import BACKBONE_FOLDER
from roadvla.train.config import Experiment
from roadvla.train.serialize import decisive
from roadvla.train.warmup import WarmUp

WARMUP = "warmup"
# What changes nothing about what is learned.
_ASIDE = (
    *("name", "output", "init", "device", "evaluation"),
    *("checkpoint_every", "keep_checkpoints", "kept_iterations"),
)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a grid: what to train, what must be there first, what to measure.

    Attributes:
        name: Of its folder and its record, unique: what it is, and a hash of what decides it.
        method: Label.
        seed: Of the run.
        experiment: What to train; ``None`` for the warm-up itself.
        envs: Settings to evaluate, all of one training distribution.
        identity: Hash of all that decides the outcome.
        needs: Cells that must be finished before.
        extra_env_steps: Steps that its critic or its start had taken before.
        curve: Iterations at which success is measured.
        alone: Whether it runs with nothing beside it.
    """

    name: str
    method: str
    seed: int
    experiment: Experiment | None
    envs: tuple[str, ...]
    identity: str
    needs: tuple[str, ...] = ()
    extra_env_steps: int = 0
    curve: tuple[int, ...] = ()
    alone: bool = False


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The cells of some studies.

    Attributes:
        root: Folder of everything.
        warm_up: How the start of all runs is made; ``None`` if a checkpoint serves as it is.
        base: PPO within the budget.
        budget: What runs and evaluations may cost.
        cells: By name; those that are needed come before those that need them.
        studies: What each study consists of.
    """

    root: Path
    warm_up: WarmUp | None
    base: Experiment
    budget: Budget
    cells: dict[str, Cell]
    studies: tuple[StudyRecord, ...]

    def folder(self, name: str) -> Path:
        """Run folder of a cell; the warm-up's is the policy itself."""
        return self.root / "runs" / name


def build_grid(
    studies: Sequence[Study],
    *,
    base: Experiment,
    budget: Budget,
    seeds: Sequence[int],
    root: Path,
    command: str,
    only: Sequence[str] = (),
    settings: Sequence[str] = (),
) -> Grid:
    """Resolve studies into cells; what two of them share is made once.

    Args:
        studies: At least one.
        base: PPO within the budget (``budgets.base_experiment``).
        budget: What it may cost.
        seeds: One run of each method and training distribution per seed.
        root: Folder of everything.
        command: What was typed.
        only: Patterns of methods to run; all unless given. What the studies consist of stays.
        settings: Settings to run; all of each study unless given. Likewise.

    Raises:
        UserError: If a pattern or setting fits nothing, or the budget is less than one iteration.
    """
    _check_choice(studies, only, settings)
    builder = _Builder(base, budget, root.resolve())
    records = []
    for study in studies:
        names: dict[str, dict[str, dict[str, str]]] = {}
        for method in study.methods:
            chosen = not only or any(fnmatch.fnmatch(method.name, pattern) for pattern in only)
            for env in study.settings:
                wanted = chosen and (not settings or env in settings)
                names.setdefault(method.name, {})[env] = {
                    str(seed): builder.add(method, env, seed, run=wanted) for seed in seeds
                }
        records.append(
            StudyRecord(
                name=study.name,
                title=study.title,
                paper=study.paper,
                claim=study.claim,
                baseline=study.methods[0].name,
                methods=tuple(method.name for method in study.methods),
                settings=study.settings,
                seeds=tuple(seeds),
                budget=budget.name,
                episodes=budget.episodes,
                command=command,
                cells=names,
                warmup=builder.warmup.name,
            )
        )
    builder.finish()
    return Grid(
        root=builder.root,
        warm_up=builder.warm_up,
        base=base,
        budget=budget,
        cells=builder.cells,
        studies=tuple(records),
    )


class _Builder:
    """Collects cells; each is added with what it needs, once."""

    def __init__(self, base: Experiment, budget: Budget, root: Path) -> None:
        self.base, self.budget, self.root = base, budget, root
        self.warm_up = warm_up_of(budget, base, "")
        start = {
            "warm_up": None if self.warm_up is None else {**asdict(self.warm_up), "output": None},
            "backbone": _backbone_digest() if base.policy == "tiny" else base.checkpoint,
            "definition": definition(base.sim),
        }
        identity = _digest(start)
        self.warmup = Cell(
            name=f"{WARMUP}-{identity[:8]}",
            method="warm-up",
            seed=0,
            experiment=None,
            envs=(),
            identity=identity,
        )
        if self.warm_up is not None:
            output = str(root / "runs" / self.warmup.name)
            self.warm_up = replace(self.warm_up, output=output)
        self.cells: dict[str, Cell] = {self.warmup.name: self.warmup}

    def add(self, method: Method, env: str, seed: int, *, run: bool) -> str:
        """Add a cell if it is to be run, and name it in any case."""
        cell, needed = self._cell(method, env, seed)
        if run:
            for other in needed:
                self.cells.setdefault(other.name, other)
            known = self.cells.get(cell.name, cell)
            self.cells[cell.name] = replace(known, envs=union(known.envs, (env,)))
        return cell.name

    def finish(self) -> None:
        """Let the warm-up be measured wherever a method is."""
        warmup = replace(
            self.warmup, envs=union((), (env for cell in self.cells.values() for env in cell.envs))
        )
        self.cells = {
            warmup.name: warmup,
            **{n: c for n, c in self.cells.items() if n != warmup.name},
        }

    def _cell(self, method: Method, env: str, seed: int) -> tuple[Cell, list[Cell]]:
        """Resolve a method, and the PPO run that it takes a critic or a start from."""
        trained_on = _shared(env)
        total = self._iterations(trained_on, method.steps)
        needed: list[Cell] = []
        paths: dict[str, str | None] = {"init": None, "critic": None}
        sources: dict[str, object] = {"start": self.warmup.identity, "critic": None}
        extra, per_iteration = 0, self._steps(trained_on)
        if self.warm_up is not None:
            paths["init"] = str(self.root / "runs" / self.warmup.name)
        if method.critic is not None or method.start is not None:
            ppo, _ = self._cell(PPO, trained_on, seed)
            needed.append(ppo)
            for what, key, share in (
                ("start", "init", method.start),
                ("critic", "critic", method.critic),
            ):
                if share is None:
                    continue
                (at,) = self._at(trained_on, PPO.steps, (share,))
                sources[what] = [ppo.identity, at]
                folder = self.root / "runs" / ppo.name / "checkpoints" / f"iteration_{at:06d}"
                paths[key] = str(folder)
                extra = max(extra, at * per_iteration)
        algorithm = replace(
            self.base.algorithm, **method.algorithm, reference_critic=paths["critic"]
        )
        curve = self._at(trained_on, method.steps, self.budget.curve)
        kept = set(curve)
        if method == PPO:
            kept |= set(self._at(trained_on, method.steps, CRITIC_SHARES))
        experiment = replace(
            self.base,
            name=method.name,
            env=trained_on,
            seed=seed,
            init=paths["init"],
            algorithm=algorithm,
            optimizer=replace(self.base.optimizer, **method.optimizer),
            rollout=replace(self.base.rollout, total_env_steps=total * per_iteration),
            kept_iterations=tuple(sorted(kept)),
        )
        identity = _digest({**_decisive(experiment), **sources, "alone": method.alone})
        name = f"{method.name}-{trained_on}-seed{seed}-{identity[:8]}"
        cell = Cell(
            name=name,
            method=method.name,
            seed=seed,
            experiment=replace(experiment, output=str(self.root / "runs" / name)),
            envs=(),
            identity=identity,
            needs=(self.warmup.name, *(other.name for other in needed)),
            extra_env_steps=extra,
            curve=curve,
            alone=method.alone,
        )
        return cell, needed

    def _steps(self, env: str) -> int:
        return self.budget.num_envs * horizon(env, "train", self.base.sim)

    def _iterations(self, env: str, share: float) -> int:
        whole = self.base.iterations(horizon(env, "train", self.base.sim))
        return max(1, round(share * whole))

    def _at(self, env: str, steps: float, shares: Iterable[float]) -> tuple[int, ...]:
        """Iterations at these shares of a run, each once."""
        total = self._iterations(env, steps)
        return tuple(dict.fromkeys(max(1, round(share * total)) for share in shares))


def _check_choice(studies: Sequence[Study], only: Sequence[str], settings: Sequence[str]) -> None:
    methods = {method.name for study in studies for method in study.methods}
    for pattern in only:
        if not fnmatch.filter(methods, pattern):
            raise unknown_name("method", pattern, methods)
    known = {env for study in studies for env in study.settings}
    for env in settings:
        if env not in known:
            raise unknown_name("setting", env, known)


def _shared(env: str) -> str:
    """First of the settings that have a setting's training distribution."""
    if env not in SETTINGS:
        raise unknown_name("setting", env, SETTINGS)
    train = SETTINGS[env].distribution("train")
    return next(alias for alias, row in SETTINGS.items() if row.distribution("train") == train)


def union(first: Iterable[str], second: Iterable[str]) -> tuple[str, ...]:
    """Join two groups of settings, in the order of the suite."""
    chosen = {*first, *second}
    return tuple(alias for alias in SETTINGS if alias in chosen)


def _decisive(experiment: Experiment) -> dict[str, object]:
    data = {k: v for k, v in decisive(experiment).items() if k not in _ASIDE}
    return {**data, "algorithm": {**data["algorithm"], "reference_critic": None}}


def _digest(data: object) -> str:
    text = json.dumps(data, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _backbone_digest() -> str:
    path = Path(str(BACKBONE_FOLDER)) / "policy.json"
    try:
        return str(read_json(path)["sha256"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"the shipped backbone at {path} is damaged: install roadvla again"
        ) from error
