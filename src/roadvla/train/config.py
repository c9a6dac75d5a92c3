"""What a training run is made of: one frozen tree of settings, checked when it is built."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from roadvla.envs import ManiSkillSettings
from roadvla.errors import UserError
from roadvla.policy.settings import OpenVLASettings, PolicyKind
from roadvla.policy.temperature import check_temperature
from roadvla.train.algorithm import Algorithm
from roadvla.train.checks import (
    check_choices,
    check_policy,
    check_range,
    check_shares,
    check_simulator,
)

Schedule = Literal["cosine", "constant"]


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW and its schedule.

    Attributes:
        learning_rate: Peak rate of the policy's parameters.
        value_learning_rate: Peak rate of the value head's; it has no warm-up.
        betas: AdamW's β₁ and β₂.
        weight_decay: AdamW's decoupled decay.
        grad_clip: Bound on the norm of the gradient of all parameters together.
        schedule: Half a cosine down to 0 over the run, or constant.
        warmup_iterations: Iterations of linear warm-up of the policy's rate.
        minibatch: Transitions per forward and backward pass.
        accumulation: Passes per optimiser step.
        max_skipped: Optimiser steps of an iteration that may be skipped because their gradient is
            not finite; with more the run stops.
        blocks: Equal parts of the environments, of which every optimiser step uses as much. With
            several processes their number, or a multiple of it, gives all of them equal work.
    """

    learning_rate: float = 1e-4
    value_learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    schedule: Schedule = "cosine"
    warmup_iterations: int = 0
    minibatch: int = 128
    accumulation: int = 1
    max_skipped: int = 5
    blocks: int = 1

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_choices(self)
        for name in ("learning_rate", "value_learning_rate", "grad_clip"):
            check_range(self, name, above=0.0)
        for name in ("weight_decay", "warmup_iterations", "max_skipped"):
            check_range(self, name, least=0.0)
        for name in ("minibatch", "accumulation", "blocks"):
            check_range(self, name, least=1.0)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas is {self.betas}: expected two numbers in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How experience is collected.

    Attributes:
        num_envs: B, episodes run at once.
        total_env_steps: Budget, never exceeded: as many iterations are made as fit.
        temperature: Of the behaviour policy, at least 0.001; losses use the same.
        end_on_success: Whether an episode terminates at its first success.
        overlap: Simulate in two half-batches, one while the policy acts in the other.
    """

    num_envs: int = 64
    total_env_steps: int = 92_160
    temperature: float = 1.0
    end_on_success: bool = False
    overlap: bool = False

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_choices(self)
        for name in ("num_envs", "total_env_steps"):
            check_range(self, name, least=1.0)
        check_temperature(self.temperature, greedy=False)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """When and how success is measured, always on the same numbered episodes.

    Attributes:
        every: Iterations between evaluations; 0 for the final one only.
        episodes: Episodes of each split in an evaluation on the way.
        final_episodes: Episodes of each split at the end; 0 for no evaluation.
        temperature: Of the action sampling: 0 is greedy, or at least 0.001.
    """

    every: int = 10
    episodes: int = 128
    final_episodes: int = 512
    temperature: float = 0.6

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name in ("every", "final_episodes"):
            check_range(self, name, least=0.0)
        check_range(self, "episodes", least=1.0)
        check_temperature(self.temperature)

    def due(self, iteration: int) -> bool:
        """Whether an evaluation follows this many completed iterations."""
        return self.every > 0 and iteration % self.every == 0


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One training run.

    Attributes:
        name: Shown in reports.
        env: Setting of Table 3 to adapt to; with ``sim maniskill`` any of RL4VLA's ids.
        sim: ``tabletop`` or ``maniskill``.
        seed: Decides episodes, action sampling and minibatches.
        device: Where policy and environments live.
        policy: ``tiny``, the small VLA that comes with the package, or ``openvla``.
        checkpoint: OpenVLA in HF format: a folder or the hub's ``owner/name``; ``None`` for the one
            that ``init`` was trained on.
        init: Policy to start from: a warm-up folder, a run, a checkpoint of one, or an adapter
            folder of RL4VLA's; ``None`` for the pretrained backbone, or fresh adapters on
            ``checkpoint``.
        output: Run folder.
        demonstrations: File that ``sft`` learns from.
        openvla: How an OpenVLA is run and adapted.
        maniskill: How ManiSkill simulates.
        checkpoint_every: Iterations between checkpoints; the last is always saved.
        keep_checkpoints: Keep all checkpoints, or the last two.
        kept_iterations: Iterations whose checkpoints are saved and kept in any case.
    """

    name: str
    env: str = "VR-UnseenTable"
    sim: str = "tabletop"
    seed: int = 0
    device: str = "cpu"
    policy: PolicyKind = "tiny"
    checkpoint: str | None = None
    init: str | None = None
    output: str = "runs/latest"
    demonstrations: str | None = None
    openvla: OpenVLASettings = field(default_factory=OpenVLASettings)
    maniskill: ManiSkillSettings = field(default_factory=ManiSkillSettings)
    algorithm: Algorithm = field(default_factory=Algorithm)
    optimizer: Optimizer = field(default_factory=Optimizer)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint_every: int = 10
    keep_checkpoints: Literal["last", "all"] = "last"
    kept_iterations: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse values out of range and settings that contradict each other."""
        check_choices(self)
        check_policy(self)
        check_simulator(self)
        check_range(self, "seed", least=0.0)
        check_range(self, "checkpoint_every", least=1.0)
        algorithm, rollout = self.algorithm, self.rollout
        if algorithm.algo == "grpo" and rollout.num_envs % algorithm.group_size:
            raise UserError(
                f"num_envs {rollout.num_envs} is not a multiple of group_size "
                f"{algorithm.group_size}: change one of them"
            )
        check_shares(self)
        if algorithm.bootstrap_truncated and algorithm.algo in ("grpo", "sft"):
            raise UserError(
                f"bootstrap_truncated needs a critic, {algorithm.algo} has none: set it to false"
            )
        if self.demonstrations is not None and algorithm.algo != "sft":
            raise UserError(
                f"demonstrations {self.demonstrations!r} would not be used by algo "
                f"{algorithm.algo!r}: drop the file or set algo to 'sft'"
            )

    def check_complete(self) -> None:
        """Refuse to start without the files that the algorithm needs.

        Presets leave them open, so they are not checked when the experiment is built.

        Raises:
            UserError: If the reference critic or the demonstrations are not named.
        """
        algorithm = self.algorithm
        if algorithm.mixes and algorithm.reference_critic is None:
            raise UserError(
                f"{self.name} mixes in a reference critic (alpha {algorithm.alpha:g}) but none is "
                f"given: pass --reference-critic with a finished PPO run, or set alpha to 0"
            )
        if algorithm.algo == "sft" and self.demonstrations is None:
            raise UserError(
                "algo 'sft' needs a file of demonstrations: pass --demonstrations with the one "
                "that `roadvla warmup` wrote"
            )

    def iterations(self, horizon: int) -> int:
        """Count the iterations within the budget, with episodes of this many steps.

        Raises:
            UserError: If the budget does not cover one.
        """
        budget, one = self.rollout.total_env_steps, self.rollout.num_envs * horizon
        if budget < one:
            raise UserError(
                f"total_env_steps {budget} is less than one rollout of {self.rollout.num_envs} "
                f"envs × {horizon} steps: raise it to {one} or more, or lower num_envs"
            )
        return budget // one
