"""Run folders as results, so that they get the same page as studies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from roadvla.envs.suite import SETTINGS
from roadvla.evaluation.evaluate import SPLITS, Evaluation
from roadvla.evaluation.records import CurvePoint, RunRecord, outcomes_of
from roadvla.evaluation.results import Results, StudyRecord
from roadvla.report.runs import Run
from roadvla.report.summary import Summary

_SERIES = ("rollout/", "policy/", "guidance/", "critic/", "time/", "memory/")


def results_of(runs: Sequence[Run], summary: Summary, *, command: str | None) -> Results | None:
    """Describe runs as a study of their own.

    Args:
        runs: As read from their folders.
        summary: Of the same runs; its baseline is the study's.
        command: What was typed.

    Returns:
        Results; ``None`` if no adapted policy was evaluated in and out of distribution.
    """
    usable = [run for run in runs if _is_usable(run)]
    adapted = [run for run in usable if not run.is_warmup]
    settings = [
        alias
        for alias in dict.fromkeys([*SETTINGS, *(env for r in adapted for env, _ in r.evaluations)])
        if any({(alias, split) for split in SPLITS} <= set(run.evaluations) for run in adapted)
    ]
    if not settings:
        return None
    warm = next((run for run in usable if run.is_warmup), None)
    names = {id(run): f"{number:03d}-{run.folder.name}" for number, run in enumerate(usable)}
    methods = list(dict.fromkeys(run.method for run in adapted))
    if summary.baseline in methods:
        methods.insert(0, methods.pop(methods.index(summary.baseline)))
    seeds = tuple(sorted({run.seed for run in adapted}))
    shared: dict[str, Any] = {
        "paper": "",
        "claim": "",
        "baseline": methods[0],
        "methods": tuple(methods),
        "settings": tuple(settings),
        "seeds": seeds,
        "budget": "",
        "episodes": 0,
        "command": command or "",
        "cells": {m: {s: _cells(adapted, names, m, s) for s in settings} for m in methods},
        "warmup": "" if warm is None else names[id(warm)],
    }
    studies = [
        StudyRecord(name="comparison", title="Success in every setting", **shared),
        StudyRecord(name="failures", title="How episodes fail", **shared),
    ]
    films = {
        (names[id(run)], env): path
        for run in adapted
        for (env, split), path in run.films.items()
        if split == "test"
    }
    return Results(
        Path(),
        {study.name: study for study in studies},
        {names[id(run)]: _record(run, names[id(run)]) for run in usable},
        films,
    )


def _cells(runs: Sequence[Run], names: dict[int, str], method: str, env: str) -> dict[str, str]:
    """Runs evaluated in a setting: those adapted there, if there are any."""
    found = [run for run in runs if run.method == method and (env, "test") in run.evaluations]
    found = [run for run in found if run.env == env] or found
    return {str(run.seed): names[id(run)] for run in found}


def _is_usable(run: Run) -> bool:
    """Whether its evaluations are of the episodes 0 to N - 1, so that they can be paired."""
    evaluations = run.evaluations.values()
    return bool(evaluations) and all(e.episode_ids == tuple(range(e.episodes)) for e in evaluations)


def _record(run: Run, name: str) -> RunRecord:
    first: Evaluation = next(iter(run.evaluations.values()))
    about = {key: run.config.get(key) for key in ("command", "machine", "started")}
    return RunRecord(
        name=name,
        method=run.method,
        env=None if run.is_warmup else run.env,
        envs=tuple(dict.fromkeys(env for env, _ in run.evaluations)),
        seed=run.seed,
        sim=first.sim,
        identity="",
        definition="not recorded",
        version=str(run.config.get("roadvla_version", "unknown")),
        commit="",
        command=str(about["command"] or ""),
        machine=str(about["machine"] or first.machine),
        started=str(about["started"] or first.date),
        config=run.config,
        env_steps=run.metrics[-1]["env_steps"] if run.metrics else 0,
        extra_env_steps=0,
        outcomes=tuple(outcomes_of(evaluation) for evaluation in run.evaluations.values()),
        curve=() if run.is_warmup else tuple(_curve(run)),
        series=_series(run),
    )


def _curve(run: Run) -> list[CurvePoint]:
    """Success on the way, as the metrics have it: rates of an unknown number of episodes."""
    episodes = int(run.setting("evaluation", "episodes") or 1)
    points = []
    for row in run.metrics:
        for split in SPLITS:
            rate = row.get(f"eval/{split}/success_rate")
            if run.env is not None and isinstance(rate, float) and math.isfinite(rate):
                points.append(
                    CurvePoint(
                        env=run.env,
                        split=split,
                        iteration=row["iteration"],
                        env_steps=row["env_steps"],
                        episodes=episodes,
                        success=round(rate * episodes),
                        grasped=round(row.get(f"eval/{split}/grasp_rate", 0.0) * episodes),
                    )
                )
    return points


def _series(run: Run) -> dict[str, tuple[float | int | None, ...]]:
    rows = [row for row in run.metrics if row["iteration"] > 0]
    found = {name: None for row in rows for name in row if name.startswith(_SERIES)}
    names = ["iteration", "env_steps", *found]
    return {name: tuple(row.get(name) for row in rows) for name in names} if rows else {}
