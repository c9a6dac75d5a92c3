"""Settings with names: Table 4, RL4VLA's, and what learns on the tabletop.

A preset is an ``Experiment``; each is derived from another with ``dataclasses.replace``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from roadvla.errors import unknown_name
from roadvla.policy.settings import OpenVLASettings
from roadvla.train.config import (
    Algorithm,
    EvaluationConfig,
    Experiment,
    Optimizer,
    RolloutConfig,
)

PAPER = Experiment(
    name="paper",
    sim="maniskill",
    device="cuda",
    policy="openvla",
    checkpoint="gen-robot/openvla-7b-rlvla-warmup",
    output="runs/paper",
    openvla=OpenVLASettings(norm_key="bridge_orig", lora_rank=32, inference_batch=32),
    algorithm=Algorithm(
        algo="road",
        combine="add",
        teacher_logits="live",
        teacher="exponential",
        token_weighting="none",
        alpha=0.5,
        eta=1.0,
        clip=2.0,
        divergence="forward_kl",
        positive_only=False,
        gate=True,
        distill_coef=0.5,
        distill_reduction="mean",
        entropy_coef=0.01,
        gamma=0.99,
        lam=0.95,
        epochs=1,
    ),
    optimizer=Optimizer(
        learning_rate=1e-4,
        value_learning_rate=3e-3,
        betas=(0.9, 0.999),
        weight_decay=0.01,
        grad_clip=1.0,
        schedule="cosine",
        minibatch=8,
        accumulation=20,
    ),
    rollout=RolloutConfig(num_envs=64, total_env_steps=850_000, temperature=1.0),
    evaluation=EvaluationConfig(every=10, episodes=64, final_episodes=128, temperature=0.6),
    checkpoint_every=40,
)
"""Table 4 where Table 4 speaks; RL4VLA's values where only RL4VLA does."""


@dataclass(frozen=True)
class Elsewhere:
    """A row of Table 4 that is no setting of an experiment.

    Attributes:
        printed: Its value in the paper.
        where: What decides it here.
    """

    printed: int | float | str
    where: str


ELSEWHERE: dict[str, Elsewhere] = {
    "Episode length (steps)": Elsewhere(80, "the simulator's horizon"),
    "Distillation temperature": Elsewhere(
        1.0, "fixed: teacher and student share the behaviour's logits"
    ),
    "Global token weight": Elsewhere(1.0, "fixed: token_weighting 'none'"),
    "Reference critic type": Elsewhere(
        "PPO value head", "the trunk and value head at --reference-critic"
    ),
}
"""The rows of Table 4 that no setting holds."""

RL4VLA = replace(
    PAPER,
    name="rl4vla",
    output="runs/rl4vla",
    algorithm=replace(PAPER.algorithm, algo="ppo", entropy_coef=0.0),
    optimizer=replace(PAPER.optimizer, grad_clip=10.0, schedule="constant"),
    rollout=replace(PAPER.rollout, total_env_steps=2_000_000),
)
"""The PPO that the paper builds on, with its own constants (reading R6)."""

TABLETOP_PPO = replace(
    PAPER,
    name="tabletop-ppo",
    sim="tabletop",
    device="cpu",
    policy="tiny",
    checkpoint=None,
    output="runs/tabletop-ppo",
    openvla=OpenVLASettings(),
    algorithm=replace(
        PAPER.algorithm, algo="ppo", epochs=3, entropy_coef=0.001, value_only_iterations=2
    ),
    optimizer=replace(
        PAPER.optimizer,
        value_learning_rate=1e-3,
        weight_decay=0.0,
        warmup_iterations=5,
        minibatch=128,
        accumulation=1,
    ),
    rollout=replace(PAPER.rollout, total_env_steps=92_160),
    evaluation=replace(PAPER.evaluation, episodes=128, final_episodes=512),
    checkpoint_every=10,
)

TABLETOP_ROAD = replace(
    TABLETOP_PPO,
    name="tabletop-road",
    output="runs/tabletop-road",
    algorithm=replace(TABLETOP_PPO.algorithm, algo="road"),
)
"""The PPO surrogate plus 0.5 · AGD."""

TABLETOP_ROAD_REPLACE = replace(
    TABLETOP_ROAD,
    name="tabletop-road-replace",
    output="runs/tabletop-road-replace",
    algorithm=replace(
        TABLETOP_ROAD.algorithm, combine="replace", distill_coef=1.0, entropy_coef=0.0
    ),
)
"""Algorithm 1 as printed: AGD alone. It drifts at this scale (docs/readings.md)."""

TABLETOP_PPO_MIX = replace(
    TABLETOP_PPO,
    name="tabletop-ppo-mix",
    output="runs/tabletop-ppo-mix",
    algorithm=replace(TABLETOP_PPO.algorithm, surrogate_advantage="mix"),
)
"""PPO on Eq. 8's advantage: what the reference critic is worth without AGD."""

TABLETOP_AGD_ODD = replace(
    TABLETOP_ROAD_REPLACE,
    name="tabletop-agd-odd",
    output="runs/tabletop-agd-odd",
    algorithm=replace(
        TABLETOP_ROAD_REPLACE.algorithm,
        teacher="odd",
        token_weighting="inverse_prob",
        delta=0.03,
        distill_reduction="sum",
    ),
)
"""AGD alone with both drifts removed."""

DEMO = replace(TABLETOP_PPO, name="demo", output="runs/demo-run")
"""What ``roadvla demo`` adapts with, for PPO; its own runs and report lie in ``runs/demo``."""

DEBUG = replace(
    TABLETOP_PPO,
    name="debug",
    output="runs/debug",
    optimizer=replace(TABLETOP_PPO.optimizer, minibatch=64),
    rollout=replace(TABLETOP_PPO.rollout, num_envs=8, total_env_steps=3 * 8 * 24),
    evaluation=replace(TABLETOP_PPO.evaluation, every=2, episodes=8, final_episodes=8),
    checkpoint_every=1,
)
"""Three small iterations, in seconds: whether everything is connected, not whether it learns."""

PRESETS: dict[str, Experiment] = {
    preset.name: preset
    for preset in (
        PAPER,
        RL4VLA,
        TABLETOP_PPO,
        TABLETOP_ROAD,
        TABLETOP_ROAD_REPLACE,
        TABLETOP_PPO_MIX,
        TABLETOP_AGD_ODD,
        DEMO,
        DEBUG,
    )
}

_ALL = {
    "sim": "the embedded simulator needs no download",
    "device": "runs on a laptop",
    "policy": "the small policy learns on a laptop; `--policy openvla` exchanges it",
    "checkpoint": "the small policy starts from a backbone that the package ships",
    "openvla.norm_key": "a checkpoint's only action statistics need no name",
    "checkpoint_every": "an iteration takes seconds",
    "algorithm.epochs": "the choice of `docs/readings.md`; `study readings` varies it",
    "algorithm.entropy_coef": "the small policy starts at 1.4 nats a token; 0.01 would flatten it",
    "algorithm.value_only_iterations": "the value head starts untrained",
    "optimizer.value_learning_rate": "a smaller head on a detached trunk",
    "optimizer.weight_decay": "the whole policy is trained, not an adapter",
    "optimizer.warmup_iterations": "the first advantages come from an untrained critic",
    "optimizer.minibatch": "the small policy fits 128 transitions in one pass",
    "optimizer.accumulation": "no need: see minibatch",
    "rollout.total_env_steps": "60 iterations of 64 × 24 steps: minutes on two cores",
    "evaluation.episodes": "episodes are cheap here",
    "evaluation.final_episodes": "episodes are cheap here: ±4 points at 95 %",
}
_ALGORITHM_1 = {
    "algorithm.combine": "Algorithm 1 updates on AGD alone (reading R1)",
    "algorithm.distill_coef": "Algorithm 1 has no coefficient",
    "algorithm.entropy_coef": "Algorithm 1 has no entropy bonus",
}
_PPO = {"algorithm.algo": "the baseline"}

DEPARTURES: dict[str, dict[str, str]] = {
    "tabletop-ppo": {**_ALL, **_PPO},
    "tabletop-road": _ALL,
    "tabletop-road-replace": {**_ALL, **_ALGORITHM_1},
    "tabletop-ppo-mix": {
        **_ALL,
        **_PPO,
        "algorithm.surrogate_advantage": "isolates the reference critic (reading R8)",
    },
    "tabletop-agd-odd": {
        **_ALL,
        **_ALGORITHM_1,
        "algorithm.teacher": "removes the second-order drift (reading R15)",
        "algorithm.token_weighting": "removes the first-order drift (reading R15)",
        "algorithm.distill_reduction": "a sum over the tokens, as the joint policy gradient has",
    },
    "demo": {**_ALL, **_PPO},
    "debug": {
        **_ALL,
        **_PPO,
        "rollout.num_envs": "seconds, not minutes",
        "evaluation.every": "seconds, not minutes",
    },
}
"""Where the tabletop presets depart from ``paper``, setting by setting, and why."""


def get_preset(name: str) -> Experiment:
    """Look a preset up.

    Raises:
        UserError: If there is none of that name; the nearest is suggested.
    """
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name]
