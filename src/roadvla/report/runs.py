"""Finding and reading run folders, strictly: a damaged file is named, never skipped."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from roadvla.errors import UserError
from roadvla.evaluation.evaluate import Evaluation
from roadvla.evaluation.files import film_path, read_evaluation
from roadvla.files import MAX_METRICS, parse_json, read_bytes, read_json

_SKIPPED_FOLDERS = {"checkpoints", "tensorboard", "evaluation"}
_SEED_SUFFIX = re.compile(r"[-_ /]+(?:seed|s)[-_ =]?\d+$")
# What may differ between the runs of one method: where and when it ran, and what it started from.
_FREE_SETTINGS = {
    "name", "seed", "env", "output", "device", "init", "checkpoint_every", "reference_critic",
    "roadvla_version", "command", "started", "machine", "resumed",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run folder.

    Attributes:
        folder: Where it lies.
        method: The experiment's name without its seed: runs of one method differ in seed only.
        seed: Of the run.
        env: Setting it was trained on; ``None`` if its configuration does not say.
        config: Its resolved configuration.
        metrics: One mapping per iteration, in order.
        evaluations: Its final evaluations by (setting, split).
        films: Recorded frames by (setting, split).
    """

    folder: Path
    method: str
    seed: int
    env: str | None
    config: dict[str, Any]
    metrics: tuple[dict[str, Any], ...]
    evaluations: dict[tuple[str, str], Evaluation]
    films: dict[tuple[str, str], Path]

    @property
    def algo(self) -> str | None:
        """The algorithm's name; ``None`` if the configuration does not say."""
        value = self.setting("algorithm", "algo")
        return value if isinstance(value, str) else None

    @property
    def is_warmup(self) -> bool:
        """Whether this is a policy that adaptation starts from, not an adapted one."""
        return self.algo == "sft" or (self.algo is None and not self.metrics)

    def setting(self, *keys: str) -> Any:
        """Look a nested configuration value up; ``None`` if there is none."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Environment steps and values of a metric where it was logged as a finite number."""
        points = [(row["env_steps"], row.get(name)) for row in self.metrics]
        points = [(step, value) for step, value in points if _is_finite(value)]
        table = np.array(points, dtype=np.float64).reshape(-1, 2)
        return table[:, 0], table[:, 1]


def read_runs(paths: Sequence[Path]) -> tuple[Run, ...]:
    """Read every run folder in or below the given paths, in a stable order.

    Raises:
        UserError: If a path does not exist, there is no run, a file is damaged, or two runs claim
            to be the same method and seed, or the same method with different settings.
    """
    folders: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path} is not a folder: give a run folder or one that holds runs")
        found = list(_find(path))
        if not found:
            raise UserError(
                f"no run in {path}: a run folder holds config.json and metrics.jsonl or evaluation/"
            )
        folders.update((folder.resolve(), folder) for folder in found)
    if not folders:
        raise UserError("no run given: name at least one run folder")
    runs = tuple(_read_run(folder) for folder in folders.values())
    _check_grouping(runs)
    return runs


def read_metrics(path: Path) -> tuple[dict[str, Any], ...]:
    """Read a metrics file; a last line cut short, as a running job leaves it, is left out.

    Raises:
        UserError: If another line is damaged, lacks its counters or does not follow in order.
    """
    try:
        text = read_bytes(path, limit=MAX_METRICS).decode()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    rows: list[dict[str, Any]] = []
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line)
        except ValueError as error:
            if number == len(lines) and not text.endswith("\n"):
                break
            raise UserError(f"{path} line {number} is not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path} line {number} is not a JSON object")
        for name in ("iteration", "env_steps"):
            if type(row.get(name)) is not int:
                raise UserError(f"{path} line {number}: {name!r} is not a whole number")
        if rows and row["iteration"] <= rows[-1]["iteration"]:
            raise UserError(
                f"{path} line {number}: iteration {row['iteration']} does not follow"
                f" {rows[-1]['iteration']}"
            )
        rows.append(row)
    return tuple(rows)


def _find(path: Path) -> Iterator[Path]:
    for parent, names, files in os.walk(path):
        names[:] = sorted(n for n in names if n not in _SKIPPED_FOLDERS and n[0] != ".")
        folder = Path(parent)
        if "config.json" in files and (
            "metrics.jsonl" in files or (folder / "evaluation").is_dir()
        ):
            yield folder


def _read_run(folder: Path) -> Run:
    path = folder / "config.json"
    try:
        config = read_json(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} does not hold a configuration")
    name, seed, env = config.get("name", folder.name), config.get("seed", 0), config.get("env")
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{path}: name is {name!r}, not a text")
    if type(seed) is not int:
        raise UserError(f"{path}: seed is {seed!r}, not a whole number")
    if not isinstance(env, str | None):
        raise UserError(f"{path}: env is {env!r}, not a text")
    metrics = folder / "metrics.jsonl"
    evaluations = {}
    films = {}
    for file in sorted((folder / "evaluation").glob("*.json")):
        evaluation = read_evaluation(file)
        key = (evaluation.env, evaluation.split)
        if key in evaluations:
            raise UserError(f"{folder / 'evaluation'} holds two evaluations of {' '.join(key)}")
        evaluations[key] = evaluation
        if film_path(file).is_file():
            films[key] = film_path(file)
    return Run(
        folder=folder,
        method=_SEED_SUFFIX.sub("", name) or name,
        seed=seed,
        env=env,
        config=config,
        metrics=read_metrics(metrics) if metrics.is_file() else (),
        evaluations=evaluations,
        films=films,
    )


def _check_grouping(runs: Sequence[Run]) -> None:
    """Refuse to average runs that are not repetitions of one another."""
    first: dict[tuple[str, str | None], Run] = {}
    taken: dict[tuple[str, str | None, int], Run] = {}
    for run in runs:
        other = taken.setdefault((run.method, run.env, run.seed), run)
        if other is not run:
            raise UserError(
                f"{other.folder} and {run.folder} are both {run.method!r} with seed {run.seed}: "
                "leave one out, or change the name in one of their config.json files"
            )
        other = first.setdefault((run.method, run.env), run)
        ours, theirs = dict(_flatten(run.config)), dict(_flatten(other.config))
        for key in sorted({*ours, *theirs}):
            if ours.get(key) != theirs.get(key) and not _FREE_SETTINGS & set(key.split(".")):
                raise UserError(
                    f"{other.folder} and {run.folder} are both {run.method!r} but {key} is "
                    f"{theirs.get(key)!r} and {ours.get(key)!r}: give one another name"
                )


def _flatten(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
