"""Results folders as studies leave them, made of made-up but plausible numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from roadvla.evaluation.evaluate import SPLITS
from roadvla.evaluation.failures import MODES
from roadvla.evaluation.records import CurvePoint, Outcomes, RunRecord, write_record
from roadvla.evaluation.results import StudyRecord, write_study

SETTINGS = ("VR-UnseenTable", "CR-MultiObject", "ER-Repositioning")
SEEDS = (0, 1, 2)


def outcomes(env: str, split: str, rate: float, seed: int, *, episodes: int = 200) -> Outcomes:
    """Episodes of which about this share succeeds; harder ones fail under every method."""
    hardness = np.random.default_rng([7, *env.encode(), *split.encode()]).random(episodes)
    luck = np.random.default_rng([seed, *env.encode()]).normal(0, 0.02)
    success = hardness < rate + luck
    modes = np.where(success, MODES.index("success"), MODES.index("no_grasp"))
    modes[(hardness > 0.9) & ~success] = MODES.index("drift")
    return Outcomes(
        env=env,
        split=split,
        success=success,
        success_once=success,
        grasped=success | (hardness > 0.9),
        modes=tuple(modes.tolist()),
        mode_names=MODES,
        temperature=0.6,
        seed=0,
        horizon=24,
        machine="a processor",
        date="2026-11-26T00:00:00+00:00",
    )


def record(method: str, env: str, seed: int, rates: tuple[float, float], **changes) -> RunRecord:
    """One run that climbs from 30 % to its rates."""
    curve = [
        CurvePoint(env=env, split=split, iteration=i, env_steps=1000 * i, episodes=100,
                   success=round(30 + (100 * rate - 30) * i / 10), grasped=60)
        for i in range(2, 11, 2)
        for split, rate in zip(SPLITS, rates, strict=True)
    ]  # fmt: skip
    steps = tuple(range(1, 11))
    entropy = tuple(1.4 - 0.01 * i for i in steps)
    made = RunRecord(
        name=f"{method}-{env}-seed{seed}",
        method=method,
        env=env,
        envs=(env,),
        seed=seed,
        sim="tabletop",
        identity=f"{method}{env}{seed}",
        definition="0123456789ab",
        version="0.1.0",
        commit="abcdef123456",
        command="roadvla study table1",
        machine="a processor",
        started="2026-11-26T00:00:00+00:00",
        config={"algorithm": {"algo": method}},
        env_steps=10_000,
        extra_env_steps=10_000 if method == "road" else 0,
        outcomes=tuple(outcomes(env, s, r, seed) for s, r in zip(SPLITS, rates, strict=True)),
        curve=tuple(curve),
        series={
            "iteration": steps,
            "env_steps": tuple(1000 * i for i in steps),
            "policy/entropy": entropy,
            "guidance/weight_mean": tuple(0.001 * i for i in steps),
            "time/iteration": (2.0 if method == "road" else 1.5,) * 10,
            "time/rollout": (1.0,) * 10,
            "time/update": (0.5,) * 10,
            "memory/peak_mb": (300.0,) * 10,
        },
    )
    return replace(made, **changes)


def study(name: str = "table1", methods=("ppo", "road"), **changes) -> StudyRecord:
    """All settings, all seeds."""
    made = StudyRecord(
        name=name,
        title=f"Title of {name}",
        paper="Table 1",
        claim="A claim.",
        baseline=methods[0],
        methods=tuple(methods),
        settings=SETTINGS,
        seeds=SEEDS,
        budget="full",
        episodes=200,
        command=f"roadvla study {name}",
        cells={
            m: {e: {str(s): f"{m}-{e}-seed{s}" for s in SEEDS} for e in SETTINGS} for m in methods
        },
        warmup="warmup-0",
    )
    return replace(made, **changes)


def write_results(root: Path, *, gain: float = 0.1, studies=None, leave_out=()) -> Path:
    """A folder with PPO at 60/40 % and ROAD that much better."""
    warm = record("warm-up", SETTINGS[0], 0, (0.3, 0.2))
    start = [
        CurvePoint(env=e, split=s, iteration=0, env_steps=0, episodes=100, success=30, grasped=50)
        for e in SETTINGS
        for s in SPLITS
    ]
    write_record(
        replace(
            warm,
            name="warmup-0",
            env=None,
            outcomes=tuple(
                outcomes(env, split, rate, 0)
                for env in SETTINGS
                for split, rate in zip(SPLITS, (0.3, 0.2), strict=True)
            ),
            curve=tuple(start),
            series={},
        ),
        root / "records",
    )
    for method, better in (("ppo", 0.0), ("road", gain)):
        for env in SETTINGS:
            for seed in SEEDS:
                made = record(method, env, seed, (0.6 + better, 0.4 + better))
                if made.name not in leave_out:
                    write_record(made, root / "records")
    for entry in studies or [study()]:
        write_study(entry, root / "studies")
    return root
