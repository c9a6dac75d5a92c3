"""What a training run is made of: one frozen tree of settings, checked when it is built."""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from roadvla.errors import UserError, unknown_name

Algo = Literal["ppo", "road", "grpo", "sft"]
Combine = Literal["add", "replace"]
TeacherLogits = Literal["live", "rollout"]
Teacher = Literal["exponential", "odd", "linear"]
TokenWeighting = Literal["none", "inverse_prob"]
Divergence = Literal["forward_kl", "reverse_kl", "jsd"]
Reduction = Literal["mean", "sum"]
SurrogateAdvantage = Literal["int", "mix"]
Ratio = Literal["action", "token"]
GrpoForm = Literal["group", "batch"]
Schedule = Literal["cosine", "constant"]


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """The loss and what feeds it.

    Attributes:
        algo: ``ppo``; ``road`` (advantage-guided self-distillation, AGD); ``grpo`` (no critic);
            ``sft`` (supervised fine-tuning on demonstrations).
        combine: ROAD's loss: the PPO surrogate plus AGD, or AGD in its place (reading R1).
        teacher_logits: Logits that the teacher tilts: those of the current pass, detached, or
            those of the rollout (reading R2).
        teacher: ``exponential`` (Eq. 10), or a variant without its drift: ``odd``, ``linear``.
        token_weighting: Weight of each token's divergence: 1, or 1/max(p_old, delta).
        delta: Floor δ of the probability in ``inverse_prob``, in (0, 1].
        alpha: Mixing weight α of the reference critic in [0, 1] (Eq. 8).
        eta: Perturbation strength η (Eq. 10).
        clip: Bound c on |ω| in standard deviations (Eq. 9).
        divergence: Between teacher and student.
        positive_only: Whether negative ω become 0.
        gate: Whether the critics must agree on the sign for the reference to count (Eq. 8).
        distill_coef: Factor on the AGD loss.
        distill_reduction: AGD's reduction over the K tokens (reading R12).
        surrogate_advantage: Advantage in the PPO surrogate: the live critic's or Eq. 8's.
        ratio: PPO's probability ratio: per action (joint over its tokens) or per token.
        clip_eps: PPO's ε on the ratio.
        value_clip_eps: Bound on the change of the value around the rollout's.
        huber: Threshold δ of the Huber value loss, in units of return.
        value_coef: Factor on the value loss.
        entropy_coef: Factor on the entropy bonus, in nats per token.
        gamma: Discount γ.
        lam: λ of GAE.
        bootstrap_truncated: Whether the value after the horizon counts (reading R11).
        kl_stop: End the iteration's updates when a minibatch's estimate of KL(old‖new), in nats
            per action, exceeds this; ``None`` for never.
        epochs: Passes over each rollout.
        value_only_iterations: First iterations, in which the value head alone learns (PPO, ROAD).
        reference_critic: Finished PPO run, or one of its checkpoints, whose trunk and value head
            are the frozen critic V_ref.
        eps: ε in standardizations.
        grpo_form: Baseline and scale of GRPO's advantage: per group, or RL4VLA's batch form.
        group_size: Episodes with one episode id in GRPO.
    """

    algo: Algo = "ppo"
    combine: Combine = "add"
    teacher_logits: TeacherLogits = "live"
    teacher: Teacher = "exponential"
    token_weighting: TokenWeighting = "none"
    delta: float = 0.03
    alpha: float = 0.5
    eta: float = 1.0
    clip: float = 2.0
    divergence: Divergence = "forward_kl"
    positive_only: bool = False
    gate: bool = True
    distill_coef: float = 0.5
    distill_reduction: Reduction = "mean"
    surrogate_advantage: SurrogateAdvantage = "int"
    ratio: Ratio = "action"
    clip_eps: float = 0.2
    value_clip_eps: float = 0.2
    huber: float = 10.0
    value_coef: float = 1.0
    entropy_coef: float = 0.01
    gamma: float = 0.99
    lam: float = 0.95
    bootstrap_truncated: bool = False
    kl_stop: float | None = None
    epochs: int = 1
    value_only_iterations: int = 0
    reference_critic: str | None = None
    eps: float = 1e-8
    grpo_form: GrpoForm = "group"
    group_size: int = 8

    def __post_init__(self) -> None:
        """Refuse values out of range and settings that contradict each other."""
        _check_choices(self)
        _check_range(self, "delta", above=0.0, most=1.0)
        for name in ("alpha", "gamma", "lam"):
            _check_range(self, name, least=0.0, most=1.0)
        for name in ("eta", "clip", "clip_eps", "value_clip_eps", "huber", "eps"):
            _check_range(self, name, above=0.0)
        for name in ("distill_coef", "value_coef", "entropy_coef", "value_only_iterations"):
            _check_range(self, name, least=0.0)
        for name in ("epochs", "group_size"):
            _check_range(self, name, least=1.0)
        if self.kl_stop is not None:
            _check_range(self, "kl_stop", above=0.0)
        self._check_teacher()
        self._check_combine()
        self._check_reference()

    @property
    def mixes(self) -> bool:
        """Whether the reference critic's advantage enters the update."""
        return self.alpha > 0 and (self.algo == "road" or self.surrogate_advantage == "mix")

    @property
    def critic_only_iterations(self) -> int:
        """Value-only iterations of an algorithm that has a critic."""
        return self.value_only_iterations if self.algo in ("ppo", "road") else 0

    def _check_teacher(self) -> None:
        if self.teacher == "odd" and self.teacher_logits == "rollout":
            raise UserError(
                "teacher 'odd' is defined for the live pass only: set teacher_logits to 'live' "
                "or teacher to 'exponential'"
            )
        if self.teacher == "odd" and self.divergence != "forward_kl":
            raise UserError(
                f"teacher 'odd' is a difference of forward KLs: set divergence to 'forward_kl', "
                f"not {self.divergence!r}"
            )
        if self.teacher == "linear" and self.eta * self.clip > 1:
            raise UserError(
                f"teacher 'linear' needs eta·clip of at most 1, got {self.eta:g}·{self.clip:g}: "
                f"lower eta to {1 / self.clip:g}"
            )
        if self.algo != "road" and self.teacher_logits == "rollout":
            raise UserError(
                f"teacher_logits 'rollout' would only cost memory, algo {self.algo!r} has no "
                f"teacher: set algo to 'road' or teacher_logits to 'live'"
            )

    def _check_combine(self) -> None:
        if self.combine != "replace":
            return
        if self.algo != "road":
            raise UserError(
                f"combine 'replace' is a reading of ROAD's loss: set algo to 'road' or combine "
                f"to 'add', not with algo {self.algo!r}"
            )
        if self.surrogate_advantage == "mix":
            raise UserError(
                "surrogate_advantage 'mix' would not be used, combine 'replace' leaves no "
                "surrogate: set surrogate_advantage to 'int' or combine to 'add'"
            )
        if self.distill_coef == 0:
            raise UserError(
                "combine 'replace' with distill_coef 0 leaves nothing to learn from: set "
                "distill_coef above 0 or combine to 'add'"
            )

    def _check_reference(self) -> None:
        if self.algo == "sft" and self.kl_stop is not None:
            raise UserError(
                f"kl_stop {self.kl_stop:g} needs a rollout, sft has none: set it to none"
            )
        if self.surrogate_advantage == "mix" and self.algo in ("grpo", "sft"):
            raise UserError(
                f"surrogate_advantage 'mix' needs a critic, {self.algo} has none: use 'int'"
            )
        if self.reference_critic is not None and not self.mixes:
            raise UserError(
                f"reference_critic {self.reference_critic!r} would not be used by algo "
                f"{self.algo!r} with alpha {self.alpha:g} and surrogate_advantage "
                f"{self.surrogate_advantage!r}: drop it, or set alpha above 0 and algo to 'road' "
                f"or surrogate_advantage to 'mix'"
            )


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

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        _check_choices(self)
        for name in ("learning_rate", "value_learning_rate", "grad_clip"):
            _check_range(self, name, above=0.0)
        for name in ("weight_decay", "warmup_iterations"):
            _check_range(self, name, least=0.0)
        for name in ("minibatch", "accumulation"):
            _check_range(self, name, least=1.0)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas is {self.betas}: expected two numbers in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How experience is collected.

    Attributes:
        num_envs: B, episodes run at once.
        total_env_steps: Budget, never exceeded: as many iterations are made as fit.
        temperature: Of the behaviour policy; losses use the same.
        end_on_success: Whether an episode terminates at its first success.
    """

    num_envs: int = 64
    total_env_steps: int = 92_160
    temperature: float = 1.0
    end_on_success: bool = False

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        _check_choices(self)
        for name in ("num_envs", "total_env_steps"):
            _check_range(self, name, least=1.0)
        _check_range(self, "temperature", above=0.0)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """When and how success is measured, always on the same numbered episodes.

    Attributes:
        every: Iterations between evaluations; 0 for the final one only.
        episodes: Episodes of each split in an evaluation on the way.
        final_episodes: Episodes of each split at the end; 0 for no evaluation.
        temperature: Of the action sampling; 0 is greedy.
    """

    every: int = 10
    episodes: int = 128
    final_episodes: int = 512
    temperature: float = 0.6

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name in ("every", "final_episodes"):
            _check_range(self, name, least=0.0)
        _check_range(self, "episodes", least=1.0)
        _check_range(self, "temperature", least=0.0)

    def due(self, iteration: int) -> bool:
        """Whether an evaluation follows this many completed iterations."""
        return self.every > 0 and iteration % self.every == 0


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One training run.

    Attributes:
        name: Shown in reports.
        env: Setting of Table 3 to adapt to.
        sim: Simulator.
        seed: Decides episodes, action sampling and minibatches.
        device: Where policy and environments live.
        init: Policy to start from: a warm-up folder, a run or a checkpoint; ``None`` for the
            pretrained backbone.
        output: Run folder.
        demonstrations: File that ``sft`` learns from.
        checkpoint_every: Iterations between checkpoints; the last is always saved.
        keep_checkpoints: Keep all checkpoints, or the last.
    """

    name: str
    env: str = "VR-UnseenTable"
    sim: str = "tabletop"
    seed: int = 0
    device: str = "cpu"
    init: str | None = None
    output: str = "runs/latest"
    demonstrations: str | None = None
    algorithm: Algorithm = field(default_factory=Algorithm)
    optimizer: Optimizer = field(default_factory=Optimizer)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint_every: int = 10
    keep_checkpoints: Literal["last", "all"] = "last"

    def __post_init__(self) -> None:
        """Refuse values out of range and settings that contradict each other."""
        _check_choices(self)
        _check_range(self, "seed", least=0.0)
        _check_range(self, "checkpoint_every", least=1.0)
        algorithm, rollout = self.algorithm, self.rollout
        if algorithm.algo == "grpo" and rollout.num_envs % algorithm.group_size:
            raise UserError(
                f"num_envs {rollout.num_envs} is not a multiple of group_size "
                f"{algorithm.group_size}: change one of them"
            )
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


def _check_choices(node: Any) -> None:
    for name, hint in typing.get_type_hints(type(node)).items():
        if typing.get_origin(hint) is Literal:
            value, choices = getattr(node, name), typing.get_args(hint)
            if value not in choices:
                raise unknown_name(name, str(value), choices)


def _check_range(
    node: Any,
    name: str,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float = math.inf,
) -> None:
    """Refuse a number outside (above, most] or [least, most], NaN and infinity included."""
    value = getattr(node, name)
    low = math.isfinite(value) and (value > above if above is not None else value >= (least or 0))
    if low and value <= most:
        return
    bound = f"above {above:g}" if above is not None else f"at least {least or 0:g}"
    ceiling = f" and at most {most:g}" if most < math.inf else ""
    raise UserError(f"{name} is {value!r}: expected a number {bound}{ceiling}")
