"""``roadvla demo``: warm up, adapt by PPO and by ROAD, evaluate, report."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from roadvla.experiments.presets import TABLETOP_PPO, TABLETOP_ROAD
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

_EPISODES = 128
_FAST_EPISODES = 8


def run(*, output: Path, seed: int, fast: bool) -> None:
    """Run the whole path in small; called again, it goes on where it stopped.

    Args:
        output: Folder for warm-up, runs and report.
        seed: Of every random number.
        fast: A few iterations only: shows that everything runs, not that it learns.

    Raises:
        Interrupted: After Ctrl-C; what was finished is kept.
        UserError: If the folder holds results of other settings, or cannot be written.
    """
    flags = ["--output", str(output), "--seed", str(seed), *(["--fast"] if fast else [])]
    command = shlex.join(["roadvla", "demo", *flags])
    with continued_by(command):
        _run(output, seed, fast, command)


def _run(output: Path, seed: int, fast: bool, command: str) -> None:
    console = Console(stderr=True)
    episodes = _FAST_EPISODES if fast else _EPISODES

    console.rule("1 of 4: warm-up on expert demonstrations")
    warm = WarmUp(seed=seed, output=str(output / "warmup"))
    warm_up = ensure_warm_up(replace(warm, episodes=8, steps=10) if fast else warm)
    plain = _scaled(TABLETOP_PPO, output / "ppo", warm_up, seed, fast)
    # The runs end with this many of the setting they train on; compare with no fewer.
    more = {plain.env: plain.evaluation.final_episodes}
    ensure_evaluations(warm_up, episodes=episodes, more=more)

    console.rule("2 of 4: adapt by PPO")
    ppo = ensure_run(plain)

    console.rule("3 of 4: adapt by ROAD-VLA, with the PPO run as reference critic")
    road = _scaled(TABLETOP_ROAD, output / "road", warm_up, seed, fast)
    algorithm = replace(road.algorithm, reference_critic=str(ppo))
    adapted = ensure_run(replace(road, algorithm=algorithm))

    console.rule("4 of 4: evaluate on all seven settings and report")
    for folder in (ppo, adapted):
        ensure_evaluations(folder, episodes=episodes, record=4)
    summary = write_report([output], output / "report", command=command)
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
