"""What the runs say: rates, the price of the shift, and differences to the baseline."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from roadvla.errors import UserError, unknown_name
from roadvla.evaluation.evaluate import SPLITS, Evaluation
from roadvla.evaluation.stats import (
    Estimate,
    paired_difference,
    seed_interval,
    unpaired_difference,
)
from roadvla.report.runs import Run


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method in one setting.

    Attributes:
        method: Its label.
        warmup: Whether it is the start of the others.
        trained_on: Setting it was adapted on, if not the one it is evaluated in.
        seeds: Seeds of its runs.
        rates: Success rate by split.
        once: Share of episodes with success at any step, by split, over all seeds.
        grasped: Share of episodes with a grasp, by split, over all seeds.
        gap: Δ, in-distribution minus out-of-distribution success rate.
        versus: Difference to the baseline on the same episodes, by split.
    """

    method: str
    warmup: bool
    trained_on: str | None
    seeds: tuple[int, ...]
    rates: dict[str, Estimate]
    once: dict[str, float]
    grasped: dict[str, float]
    gap: Estimate | None
    versus: dict[str, Estimate]


@dataclass(frozen=True)
class Summary:
    """All rows by setting.

    Attributes:
        baseline: The method the others are compared with; ``None`` if there is none.
        rows: By setting, the warm-up first, then the baseline.
    """

    baseline: str | None
    rows: dict[str, tuple[Row, ...]]


def summarize(runs: Sequence[Run], *, baseline: str | None = None) -> Summary:
    """Compute every number of the table.

    Args:
        runs: At least one.
        baseline: Label of the method to compare with; plain PPO unless given.

    Raises:
        UserError: If there is no method of that name, or evaluations cannot be compared.
    """
    methods = order_methods(runs)
    if baseline is not None and baseline not in methods:
        raise unknown_name("method", baseline, methods)
    baseline = baseline or _plain_ppo(runs)
    settings = sorted({env for run in runs for env, _ in run.evaluations})
    rows = {}
    for setting in settings:
        chosen = {method: _evaluated(runs, method, setting) for method in methods}
        for split in SPLITS:
            _check_alike([r for group in chosen.values() for r in group], setting, split)
        rows[setting] = tuple(
            _row(group, chosen.get(baseline or "", []), setting)
            for group in chosen.values()
            if group
        )
    return Summary(baseline, rows)


def order_methods(runs: Sequence[Run]) -> tuple[str, ...]:
    """Labels in the order of tables and figures: warm-up, plain PPO, other PPO, ROAD, the rest."""
    plain = _plain_ppo(runs)
    rank = {"ppo": 2, "road": 3}

    def place(run: Run) -> tuple[int, str]:
        if run.is_warmup:
            return 0, run.method
        return 1 if run.method == plain else rank.get(run.algo or "", 4), run.method

    return tuple(dict.fromkeys(run.method for run in sorted(runs, key=place)))


def _plain_ppo(runs: Sequence[Run]) -> str | None:
    """Label of the PPO runs whose surrogate uses the live critic's advantage alone."""
    names = {
        run.method
        for run in runs
        if run.algo == "ppo" and run.setting("algorithm", "surrogate_advantage") in (None, "int")
    }
    return min(names, key=lambda name: (len(name), name)) if names else None


def _evaluated(runs: Sequence[Run], method: str, setting: str) -> list[Run]:
    """Runs of a method that were evaluated in a setting: those adapted there, if there are any."""
    group = [
        run
        for run in runs
        if run.method == method and any(env == setting for env, _ in run.evaluations)
    ]
    group = [run for run in group if run.env == setting] or group
    group.sort(key=lambda run: run.seed)
    for first, second in itertools.pairwise(group):
        if first.seed == second.seed:
            raise UserError(
                f"{first.folder} and {second.folder} are both {method!r} with seed {first.seed} "
                f"evaluated in {setting}: leave one out"
            )
    return group


def _check_alike(runs: Sequence[Run], setting: str, split: str) -> None:
    having = [run for run in runs if (setting, split) in run.evaluations]
    for run in having[1:]:
        ours, theirs = (r.evaluations[setting, split] for r in (run, having[0]))
        for name in ("sim", "temperature", "horizon"):
            if getattr(ours, name) != getattr(theirs, name):
                raise UserError(
                    f"{having[0].folder} and {run.folder} evaluated {setting} {split} with {name} "
                    f"{getattr(theirs, name)} and {getattr(ours, name)}: evaluate them alike"
                )


def _row(runs: list[Run], baseline: list[Run], setting: str) -> Row:
    held = {split: _by_seed(runs, setting, split) for split in SPLITS}
    against = {split: _by_seed(baseline, setting, split) for split in SPLITS}
    present = [split for split in SPLITS if held[split]]
    both = sorted(set(held["train"]) & set(held["test"]))
    first = runs[0]
    is_baseline = bool(baseline) and first.method == baseline[0].method
    versus = {}
    for split in present:
        difference = None if is_baseline else _versus(held[split], against[split], first.is_warmup)
        if difference is not None:
            versus[split] = difference
    return Row(
        method=first.method,
        warmup=first.is_warmup,
        trained_on=None if first.is_warmup or first.env == setting else first.env,
        seeds=tuple(run.seed for run in runs),
        rates={s: seed_interval(_table(list(held[s].values()))) for s in present},
        once={s: _mean([e.success_once_rate for e in held[s].values()]) for s in present},
        grasped={s: _mean([e.grasp_rate for e in held[s].values()]) for s in present},
        gap=unpaired_difference(
            _table([held["train"][seed] for seed in both]),
            _table([held["test"][seed] for seed in both]),
        )
        if both
        else None,
        versus=versus,
    )


def _by_seed(runs: Sequence[Run], setting: str, split: str) -> dict[int, Evaluation]:
    return {
        run.seed: run.evaluations[setting, split]
        for run in runs
        if (setting, split) in run.evaluations
    }


def _versus(
    ours: dict[int, Evaluation], theirs: dict[int, Evaluation], warmup: bool
) -> Estimate | None:
    """Difference on common seeds and episodes; one warm-up is the start of every seed."""
    if warmup and len(ours) == 1:
        ours = dict.fromkeys(theirs, next(iter(ours.values())))
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return None
    evaluations = [ours[seed] for seed in seeds] + [theirs[seed] for seed in seeds]
    ids = set.intersection(*(set(e.episode_ids) for e in evaluations))
    if not ids:
        return None
    table = _table(evaluations, ids)
    return paired_difference(table[: len(seeds)], table[len(seeds) :])


def _table(evaluations: list[Evaluation], ids: set[int] | None = None) -> Float[np.ndarray, "S N"]:
    """Successes with one row per evaluation, on the episodes that all of them ran."""
    if ids is None:
        ids = set.intersection(*(set(e.episode_ids) for e in evaluations))
    if not ids:
        raise UserError("the seeds of a method share no episode ids: evaluate them alike")
    order = sorted(ids)
    rows = []
    for evaluation in evaluations:
        outcome = dict(zip(evaluation.episode_ids, evaluation.success, strict=True))
        rows.append([float(outcome[i]) for i in order])
    return np.array(rows)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
