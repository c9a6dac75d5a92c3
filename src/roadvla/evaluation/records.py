"""Result files: one small JSON per run with all that tables and figures need, sealed by a checksum.

Outcomes of episodes are kept one by one, as bits, so that whoever reads the file can pair them. A
file that was changed by hand, or made by code whose episodes differ, is refused, never averaged.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from roadvla.errors import UserError
from roadvla.evaluation.evaluate import SPLITS, Evaluation
from roadvla.evaluation.failures import MODES
from roadvla.evaluation.sealed import AGAIN, read_sealed, write_sealed
from roadvla.evaluation.typed import check_fields

_BITS = ("success", "success_once", "grasped")


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """What became of the episodes of one set, ids 0 to N − 1.

    Attributes:
        env: Setting, by paper alias.
        split: ``train`` (in distribution) or ``test`` (out of distribution).
        success: At the last step.
        success_once: At any step.
        grasped: The right object was held at any step.
        modes: How each episode ended, as indices into ``mode_names``; empty where not known.
        mode_names: Names of the failure modes.
        judged_by: Hash of the code that named the modes; ``""`` where it was not noted.
        temperature: Of the action sampling.
        seed: Of the action sampling.
        horizon: Actions per episode.
        machine: Where it was measured.
        date: ISO 8601, UTC.
        simulator: How it simulated, where there is a choice.
    """

    env: str
    split: str
    success: Bool[np.ndarray, " N"]
    success_once: Bool[np.ndarray, " N"]
    grasped: Bool[np.ndarray, " N"]
    modes: tuple[int, ...] = ()
    mode_names: tuple[str, ...] = ()
    judged_by: str = ""
    temperature: float
    seed: int
    horizon: int
    machine: str
    date: str
    simulator: dict[str, Any] = field(default_factory=dict)

    @property
    def episodes(self) -> int:
        """N."""
        return len(self.success)


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """Success of a checkpoint on the way.

    Attributes:
        env: Setting.
        split: ``train`` or ``test``.
        iteration: Of the checkpoint.
        env_steps: Of the checkpoint.
        episodes: How many were run: ids 0 to ``episodes`` − 1.
        success: Of how many, at the last step.
        grasped: In how many the right object was held at any step.
    """

    env: str
    split: str
    iteration: int
    env_steps: int
    episodes: int
    success: int
    grasped: int


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One finished cell of a study: a training run, or the policy all runs started from.

    Attributes:
        name: Of the file, unique in its folder: method, setting and seed.
        method: Label in tables; the runs of one method differ in seed and setting only.
        env: Setting it was adapted on; ``None`` for the warm-up.
        envs: Settings it stands for: those with the same training distribution.
        seed: Of the run.
        sim: Simulator.
        identity: Hash of all that decides the run's outcome.
        definition: Hash of the code that decides what an episode is; results are comparable only
            where it is the same.
        version: Of roadvla.
        commit: Of the source tree; ``""`` if it was not known, ending in ``+`` if it was changed.
        command: What was typed.
        machine: Where it was trained.
        started: ISO 8601, UTC.
        config: Resolved configuration.
        env_steps: Environment steps taken.
        extra_env_steps: Steps that its reference critic or its start had taken before, beyond the
            warm-up.
        outcomes: Final evaluations.
        curve: Evaluations on the way, in order.
        series: Logged metrics by name, one value per iteration (``None`` where not logged), beside
            ``iteration`` and ``env_steps``.
    """

    name: str
    method: str
    env: str | None
    envs: tuple[str, ...]
    seed: int
    sim: str
    identity: str
    definition: str
    version: str
    commit: str
    command: str
    machine: str
    started: str
    config: dict[str, Any]
    env_steps: int
    extra_env_steps: int
    outcomes: tuple[Outcomes, ...]
    curve: tuple[CurvePoint, ...] = ()
    series: dict[str, tuple[float | int | None, ...]] = field(default_factory=dict)

    def outcome(self, env: str, split: str) -> Outcomes | None:
        """Final evaluation of a set; ``None`` if it was not measured."""
        for found in self.outcomes:
            if (found.env, found.split) == (env, split):
                return found
        return None


def outcomes_of(evaluation: Evaluation, env: str | None = None) -> Outcomes:
    """Condense an evaluation whose episodes are 0 to N − 1.

    Args:
        evaluation: Of any set.
        env: Setting to note it under, one that shares the set; its own unless given.

    Raises:
        ValueError: If the episodes are others.
    """
    if evaluation.episode_ids != tuple(range(evaluation.episodes)):
        raise ValueError("a record needs the episodes 0 to N - 1, in order")
    return Outcomes(
        env=env or evaluation.env,
        split=evaluation.split,
        success=np.array(evaluation.success, dtype=bool),
        success_once=np.array(evaluation.success_once, dtype=bool),
        grasped=np.array(evaluation.grasped, dtype=bool),
        modes=evaluation.modes,
        mode_names=MODES if evaluation.modes else (),
        judged_by=evaluation.judged_by,
        temperature=evaluation.temperature,
        seed=evaluation.seed,
        horizon=evaluation.horizon,
        machine=evaluation.machine,
        date=evaluation.date,
        simulator=evaluation.simulator,
    )


def write_record(record: RunRecord, folder: Path) -> Path:
    """Write ``NAME.json``, atomically.

    Raises:
        UserError: If the folder cannot be written.
    """
    data = asdict(record)
    data["outcomes"] = [_packed(outcomes) for outcomes in record.outcomes]
    return write_sealed(folder / f"{record.name}.json", data)


def read_record(path: Path) -> RunRecord:
    """Read a record, refusing one that was damaged or changed by hand.

    Raises:
        UserError: If the file is missing, damaged, changed, or of another format.
    """
    data = read_sealed(path)
    try:
        data["outcomes"] = tuple(_unpacked(outcomes) for outcomes in data["outcomes"])
        data["curve"] = tuple(_point(point) for point in data["curve"])
        data["envs"] = tuple(data["envs"])
        data["series"] = {name: tuple(values) for name, values in data["series"].items()}
        check_fields(RunRecord, data)
        record = RunRecord(**data)
    except (TypeError, KeyError, ValueError, AttributeError, binascii.Error) as error:
        raise UserError(f"{path} is not a result file ({error}): {AGAIN}") from error
    if record.name != path.stem:
        raise UserError(f"{path} calls itself {record.name!r}: it was renamed; {AGAIN}")
    return record


def check_comparable(records: Iterable[RunRecord]) -> None:
    """Refuse results of episodes that are not the same.

    Raises:
        UserError: If simulator, episode-defining code or sampling differ between records, or the
            version of roadvla between runs of one method, which are averaged over.
    """
    versions: dict[str, RunRecord] = {}
    first: RunRecord | None = None
    sampling: dict[tuple[str, str], tuple[RunRecord, Outcomes]] = {}
    for record in records:
        first = first or record
        for what in ("sim", "definition"):
            ours, theirs = getattr(record, what), getattr(first, what)
            if ours != theirs:
                raise UserError(
                    f"{first.name} and {record.name} were made by different versions of the "
                    f"environments ({what} {theirs}, {ours}): their episodes differ; run the study "
                    f"again in another folder"
                )
        alike = versions.setdefault(record.method, record)
        if alike.version != record.version:
            raise UserError(
                f"{alike.name} and {record.name} are runs of one method by roadvla {alike.version} "
                f"and {record.version}: they are not averaged over; run the method again in "
                f"another folder"
            )
        for outcomes in record.outcomes:
            other, theirs = sampling.setdefault((outcomes.env, outcomes.split), (record, outcomes))
            for what in ("temperature", "horizon", "seed", "simulator"):
                if getattr(outcomes, what) != getattr(theirs, what):
                    raise UserError(
                        f"{other.name} and {record.name} evaluated {outcomes.env} "
                        f"{outcomes.split} with {what} {getattr(theirs, what)} and "
                        f"{getattr(outcomes, what)}: evaluate them alike"
                    )


def _point(data: dict[str, Any]) -> CurvePoint:
    check_fields(CurvePoint, data)
    return CurvePoint(**data)


def _packed(outcomes: Outcomes) -> dict[str, Any]:
    data = {**outcomes.__dict__, "episodes": outcomes.episodes}
    for name in _BITS:
        data[name] = base64.b64encode(np.packbits(data[name]).tobytes()).decode()
    data["modes"] = "".join(chr(ord("a") + mode) for mode in outcomes.modes)
    return data


def _unpacked(data: dict[str, Any]) -> Outcomes:
    episodes = data.pop("episodes")
    if type(episodes) is not int or episodes < 1 or data["split"] not in SPLITS:
        raise ValueError("a set of episodes is empty or of an unknown split")
    for name in _BITS:
        raw = np.frombuffer(base64.b64decode(data[name], validate=True), dtype=np.uint8)
        if len(raw) != math.ceil(episodes / 8):
            raise ValueError(f"{name} does not have {episodes} episodes")
        data[name] = np.unpackbits(raw, count=episodes).astype(bool)
    data["mode_names"] = tuple(data["mode_names"])
    data["modes"] = tuple(ord(mode) - ord("a") for mode in data["modes"])
    if data["modes"] and (
        len(data["modes"]) != episodes
        or not all(0 <= mode < len(data["mode_names"]) for mode in data["modes"])
    ):
        raise ValueError("its failure modes do not fit its episodes")
    if data["modes"] and data["mode_names"] != MODES:
        raise ValueError("its failure modes are those of another version")
    check_fields(Outcomes, data, skip=_BITS)
    return Outcomes(**data)
