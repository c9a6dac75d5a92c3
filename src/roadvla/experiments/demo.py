"""``roadvla demo``: warm up, adapt by PPO and by ROAD, evaluate, report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from roadvla.experiments.presets import TABLETOP_PPO, TABLETOP_ROAD
from roadvla.experiments.stages import ensure_evaluations, ensure_run, ensure_warm_up
from roadvla.report.page import write_report
from roadvla.report.tables import print_table
from roadvla.train.config import Experiment
from roadvla.train.warmup import WarmUp

_EPISODES = 128
_FAST_EPISODES = 8


def run(*, output: Path, seed: int, fast: bool) -> None:
    """Run the whole path in small; called again, it goes on where it stopped.

    Args:
        output: Folder for warm-up, runs and report.
        seed: Of every random number.
        fast: A few iterations only: shows that everything runs, not that it learns.
    """
    console = Console(stderr=True)
    episodes = _FAST_EPISODES if fast else _EPISODES

    console.rule("1 of 4: warm-up on expert demonstrations")
    warm = WarmUp(seed=seed, output=str(output / "warmup"))
    warm_up = ensure_warm_up(replace(warm, episodes=8, steps=10) if fast else warm)
    ensure_evaluations(warm_up, episodes=episodes)

    console.rule("2 of 4: adapt by PPO")
    ppo = ensure_run(_scaled(TABLETOP_PPO, output / "ppo", warm_up, seed, fast))

    console.rule("3 of 4: adapt by ROAD-VLA, with the PPO run as reference critic")
    road = _scaled(TABLETOP_ROAD, output / "road", warm_up, seed, fast)
    algorithm = replace(road.algorithm, reference_critic=str(ppo))
    adapted = ensure_run(replace(road, algorithm=algorithm))

    console.rule("4 of 4: evaluate on all seven settings and report")
    for folder in (ppo, adapted):
        ensure_evaluations(folder, episodes=episodes, record=4)
    summary = write_report([output], output / "report", command="roadvla demo")
    print_table(summary, Console())
    console.print(f"Report: {output / 'report' / 'report.md'}")


def _scaled(preset: Experiment, output: Path, warm_up: Path, seed: int, fast: bool) -> Experiment:
    """Point a preset at its folders; shrink it when it only has to run."""
    experiment = replace(preset, seed=seed, init=str(warm_up), output=str(output))
    if not fast:
        return experiment
    return replace(
        experiment,
        optimizer=replace(experiment.optimizer, minibatch=64),
        rollout=replace(experiment.rollout, num_envs=8, total_env_steps=3 * 8 * 24),
        evaluation=replace(experiment.evaluation, every=2, episodes=8, final_episodes=8),
    )
