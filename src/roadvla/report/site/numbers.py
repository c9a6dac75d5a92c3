"""Every number of the page, computed from records: rates, intervals, differences, p-values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float

from roadvla.evaluation.aggregate import (
    holm,
    iqm_difference,
    iqm_interval,
    p_value,
    probability_of_improvement,
)
from roadvla.evaluation.evaluate import SPLITS
from roadvla.evaluation.records import RunRecord
from roadvla.evaluation.results import Results, StudyRecord
from roadvla.evaluation.stats import (
    Estimate,
    mean_and_std,
    paired_difference,
    paired_mean_difference,
    seed_interval,
    unpaired_difference,
)

_NAMED = 4
"""So many comparisons are listed by name in a sentence."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One method in one setting.

    Attributes:
        method: Its label.
        setting: By paper alias.
        seeds: Seeds that are finished.
        wanted: Seeds that the study asks for.
        rate: Success rate by split, with its interval.
        spread: Mean and standard deviation over seeds by split, as fractions.
        grasped: Share of episodes with a grasp by split.
        gap: Δ, in minus out of distribution.
        versus: Difference to the baseline on the same episodes, by split.
        p: Its p-value by split, not adjusted.
        adjusted: Its p-value by split after Holm's correction over the settings.
        env_steps: Steps taken in training.
        extra_env_steps: Steps that went before, into its critic or start.
    """

    method: str
    setting: str
    seeds: tuple[int, ...]
    wanted: int
    rate: dict[str, Estimate] = field(default_factory=dict)
    spread: dict[str, tuple[float, float]] = field(default_factory=dict)
    grasped: dict[str, Estimate] = field(default_factory=dict)
    gap: Estimate | None = None
    versus: dict[str, Estimate] = field(default_factory=dict)
    p: dict[str, float] = field(default_factory=dict)
    adjusted: dict[str, float] = field(default_factory=dict)
    env_steps: int = 0
    extra_env_steps: int = 0

    @property
    def complete(self) -> bool:
        """Whether every seed is there."""
        return len(self.seeds) == self.wanted


@dataclass(frozen=True, kw_only=True)
class Overall:
    """One method over all settings of a study.

    Attributes:
        method: Its label.
        mean: Mean over settings by split, and its deviation over seeds.
        iqm: Interquartile mean over settings and seeds by split.
        versus: Difference of the means to the baseline, on the same episodes.
        iqm_versus: Difference of the interquartile means.
        improvement: Probability that a run beats one of the baseline.
    """

    method: str
    mean: dict[str, tuple[float, float]]
    iqm: dict[str, Estimate]
    versus: dict[str, Estimate]
    iqm_versus: dict[str, Estimate]
    improvement: dict[str, Estimate]


def cells(results: Results, study: StudyRecord, method: str, setting: str) -> dict[int, RunRecord]:
    """Finished records of a method in a setting, by seed."""
    found = {}
    for seed, name in study.cells[method][setting].items():
        record = results.measured(study, name, setting)
        if record is not None:
            found[int(seed)] = record
    return found


def table(
    records: dict[int, RunRecord], setting: str, split: str, what: str = "success"
) -> Bool[np.ndarray, "S N"]:
    """Outcomes of the same episodes, one row per seed; the fewest that all have."""
    rows = []
    for record in records.values():
        outcomes = record.outcome(setting, split)
        if outcomes is not None:
            rows.append(getattr(outcomes, what))
    count = min(map(len, rows), default=0)
    return np.array([row[:count] for row in rows], dtype=bool).reshape(len(rows), count)


def entries(results: Results, study: StudyRecord, *, p_values: bool = False) -> list[Entry]:
    """Compute a study's rows, setting by setting, in its own order.

    Args:
        results: All records.
        study: Which.
        p_values: Whether to compute p-values and adjust them over the settings.
    """
    made = [
        _entry(results, study, method, setting, p_values)
        for setting in study.settings
        for method in study.methods
    ]
    return _adjusted(made, len(study.settings)) if p_values else made


def overall(results: Results, study: StudyRecord) -> list[Overall]:
    """Average over the settings, on the seeds that every method has finished everywhere."""
    seeds = set(study.seeds)
    for method in study.methods:
        for setting in study.settings:
            seeds &= set(cells(results, study, method, setting))
    if not seeds:
        return []
    kept = sorted(seeds)
    tables = {
        (method, split): [
            table({s: cells(results, study, method, setting)[s] for s in kept}, setting, split)
            for setting in study.settings
        ]
        for method in study.methods
        for split in SPLITS
    }
    for place in range(len(study.settings)):
        for split in SPLITS:
            fewest = min(tables[method, split][place].shape[1] for method in study.methods)
            for method in study.methods:
                tables[method, split][place] = tables[method, split][place][:, :fewest]
    groups = _sharing(study, kept)
    return [_overall(method, study.baseline, tables, groups) for method in study.methods]


def verdict(difference: Estimate | None, ours: str, theirs: str) -> str:
    """Say what an interval establishes, and no more."""
    if difference is None:
        return "not measured yet"
    words = f"{100 * difference.mean:+.1f} points, 95 % interval {interval(difference, sign=True)}"
    if not difference.sign:
        return f"no difference established ({words})"
    return f"{ours if difference.sign > 0 else theirs} better ({words})"


def established(entries: Sequence[Entry], baseline: str) -> str:
    """Count the comparisons that the intervals decide; empty if there is nothing to compare."""
    compared = [entry for entry in entries if entry.versus]
    if not compared:
        return ""
    parts = []
    for split, where in (("test", "out of distribution"), ("train", "in distribution")):
        up, down = (
            _counted([e for e in compared if split in e.versus and e.versus[split].sign == sign])
            for sign in (1, -1)
        )
        parts.append(f"{where} {up} better and {down} worse")
    return (
        f"Here: of {len(compared)} comparisons with {baseline}, not corrected for their number, "
        f"{'; '.join(parts)}."
    )


def interval(estimate: Estimate, *, sign: bool = False) -> str:
    """Spell an interval in percent or points; one seed tells nothing of other runs."""
    if math.isnan(estimate.low):
        return "one seed: unknown"
    form = "{:+.1f}" if sign else "{:.1f}"
    return f"{form.format(100 * estimate.low)} to {form.format(100 * estimate.high)}"


def _counted(entries: Sequence[Entry]) -> str:
    """How many, and which where they are few enough to name."""
    if not entries:
        return "none is"
    names = f" ({', '.join(f'{e.method} on {e.setting}' for e in entries)})"
    few = len(entries) <= _NAMED
    return f"{len(entries)}{names if few else ''} {'is' if len(entries) == 1 else 'are'}"


def _entry(
    results: Results, study: StudyRecord, method: str, setting: str, p_values: bool
) -> Entry:
    ours = cells(results, study, method, setting)
    theirs = cells(results, study, study.baseline, setting)
    common = sorted(set(ours) & set(theirs))
    first = next(iter(ours.values()), None)
    entry = Entry(
        method=method,
        setting=setting,
        seeds=tuple(sorted(ours)),
        wanted=len(study.cells[method][setting]),
        env_steps=0 if first is None else first.env_steps,
        extra_env_steps=0 if first is None else first.extra_env_steps,
    )
    if first is None:
        return entry
    for split in SPLITS:
        outcomes = table(ours, setting, split)
        entry.rate[split] = seed_interval(outcomes.astype(float))
        entry.spread[split] = mean_and_std(outcomes.mean(axis=1))
        entry.grasped[split] = seed_interval(table(ours, setting, split, "grasped").astype(float))
        if method != study.baseline and common:
            pair = paired(ours, theirs, common, setting, split)
            entry.versus[split] = paired_difference(*pair)
            if p_values:
                entry.p[split] = p_value(*pair)
    gap = unpaired_difference(
        table(ours, setting, "train").astype(float), table(ours, setting, "test").astype(float)
    )
    return Entry(**{**entry.__dict__, "gap": gap})


def paired(
    ours: dict[int, RunRecord],
    theirs: dict[int, RunRecord],
    seeds: list[int],
    setting: str,
    split: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes of the same episodes under two methods, one row per seed."""
    first, second = (table({s: r[s] for s in seeds}, setting, split) for r in (ours, theirs))
    count = min(first.shape[1], second.shape[1])
    return first[:, :count].astype(float), second[:, :count].astype(float)


def _adjusted(made: list[Entry], comparisons: int) -> list[Entry]:
    """Correct for all comparisons that a method makes over the settings, also those to come."""
    for method in dict.fromkeys(entry.method for entry in made):
        for split in SPLITS:
            compared = [e for e in made if e.method == method and split in e.p]
            for entry, p in zip(
                compared, holm([e.p[split] for e in compared], comparisons), strict=True
            ):
                entry.adjusted[split] = p
    return made


def _sharing(study: StudyRecord, seeds: list[int]) -> list[int]:
    """Group of each setting: that of the first setting that a method ran the same runs for."""
    runs = [
        {study.cells[method][setting][str(seed)] for method in study.methods for seed in seeds}
        for setting in study.settings
    ]
    groups: list[int] = []
    for place, ours in enumerate(runs):
        known = (groups[before] for before in range(place) if ours & runs[before])
        groups.append(next(known, place))
    return groups


def _overall(
    method: str,
    baseline: str,
    tables: dict[tuple[str, str], list[np.ndarray]],
    groups: list[int],
) -> Overall:
    made = Overall(method=method, mean={}, iqm={}, versus={}, iqm_versus={}, improvement={})
    for split in SPLITS:
        ours, theirs = _rates(tables[method, split]), _rates(tables[baseline, split])
        made.mean[split] = mean_and_std(ours.mean(axis=0))
        made.iqm[split] = iqm_interval(ours, groups)
        if method == baseline:
            continue
        pooled = _pooled(tables[method, split], tables[baseline, split], groups)
        made.versus[split] = paired_mean_difference(*pooled)
        made.iqm_versus[split] = iqm_difference(ours, theirs, groups)
        made.improvement[split] = probability_of_improvement(ours, theirs, groups)
    return made


def _pooled(
    ours: list[np.ndarray], theirs: list[np.ndarray], groups: list[int]
) -> tuple[list[np.ndarray], list[float]]:
    """Differences of each set of episodes, and for how many settings it stands.

    Settings that share their runs and their episodes, as four do in distribution, have the same
    table: it is one measurement, not four.
    """
    kept: dict[int, int] = {}
    for place, group in enumerate(groups):
        twins = (
            before
            for before in kept
            if groups[before] == group
            and np.array_equal(ours[before], ours[place])
            and np.array_equal(theirs[before], theirs[place])
        )
        first = next(twins, place)
        kept[first] = kept.get(first, 0) + 1
    differences = [ours[place].astype(float) - theirs[place] for place in kept]
    return differences, [count / len(groups) for count in kept.values()]


def _rates(tables: list[np.ndarray]) -> Float[np.ndarray, "M S"]:
    return np.array([outcomes.mean(axis=1) for outcomes in tables])
