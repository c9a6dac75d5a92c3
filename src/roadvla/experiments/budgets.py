"""How much a study spends on a run: from seconds, to see that all is connected, to the paper's."""

from __future__ import annotations

from dataclasses import dataclass, replace

from roadvla.experiments.presets import PAPER, TABLETOP_PPO
from roadvla.train.config import Experiment
from roadvla.train.warmup import WarmUp


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a run and its evaluations may cost.

    Attributes:
        name: What it is called.
        num_envs: B.
        env_steps: Environment steps of PPO and of most methods.
        minibatch: Transitions per pass; ``None`` for the preset's.
        episodes: Of each set in the final evaluations.
        evaluation_envs: Episodes run at once in evaluations; the sampled actions depend on it.
        curve: When success is measured on the way, as shares of the run; the last is its end.
        curve_episodes: Of each set in those.
        seeds: One run of each method and training distribution per seed.
        warmup_episodes: Demonstrations of the small policy's warm-up; ``None`` for its own.
        warmup_steps: Its optimiser steps; ``None`` for its own.
        filmed: Out-of-distribution episodes to film, of each setting, for the first seed.
    """

    name: str
    num_envs: int = 64
    env_steps: int
    minibatch: int | None = None
    episodes: int
    evaluation_envs: int = 64
    curve: tuple[float, ...]
    curve_episodes: int
    seeds: tuple[int, ...] = (0, 1, 2)
    warmup_episodes: int | None = None
    warmup_steps: int | None = None
    filmed: int = 2


SMOKE = Budget(
    name="smoke",
    num_envs=8,
    env_steps=4 * 8 * 30,
    minibatch=64,
    episodes=8,
    curve=(0.5, 1.0),
    curve_episodes=8,
    seeds=(0,),
    warmup_episodes=8,
    warmup_steps=10,
    filmed=1,
)
"""Seconds a run: shows that everything is connected, not that anything learns."""

FULL = Budget(
    name="full",
    env_steps=50 * 64 * 24,
    episodes=1152,
    evaluation_envs=384,
    curve=(0.04, 0.08, 0.16, 0.24, 0.4, 0.6, 0.8, 1.0),
    curve_episodes=128,
)
"""The tabletop's: 76,800 steps a run, about two minutes on one core; ±2.5 points a set."""

PAPER_BUDGET = replace(FULL, name="paper", env_steps=850_000, evaluation_envs=64)
"""Table 4's 850,000 steps; on ManiSkill with OpenVLA-7B a day on one GPU (`roadvla plan`)."""

BUDGETS = {budget.name: budget for budget in (SMOKE, FULL, PAPER_BUDGET)}


def base_experiment(
    budget: Budget, *, sim: str, policy: str, checkpoint: str | None, device: str
) -> Experiment:
    """PPO within a budget: what every method of a study departs from.

    Evaluation is the study's own affair, so that it does not depend on when a run was made.
    """
    preset = TABLETOP_PPO if policy == "tiny" else PAPER
    learner = replace(preset.algorithm, algo="ppo")
    optimizer = replace(preset.optimizer, minibatch=budget.minibatch or preset.optimizer.minibatch)
    rollout = replace(preset.rollout, num_envs=budget.num_envs, total_env_steps=budget.env_steps)
    return replace(
        preset,
        sim=sim,
        device=device,
        checkpoint=(checkpoint or preset.checkpoint) if policy == "openvla" else None,
        algorithm=learner,
        optimizer=optimizer,
        rollout=rollout,
        evaluation=replace(preset.evaluation, every=0, final_episodes=0),
    )


def warm_up_of(budget: Budget, base: Experiment, output: str) -> WarmUp | None:
    """The warm-up that all runs start from; ``None`` where the checkpoint is one already."""
    if base.policy != "tiny":
        return None
    default = WarmUp()
    return WarmUp(
        sim=base.sim,
        device="cpu",
        output=output,
        episodes=budget.warmup_episodes or default.episodes,
        steps=budget.warmup_steps or default.steps,
    )
