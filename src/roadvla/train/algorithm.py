"""The loss of a run and what feeds it, as checked settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from roadvla.errors import UserError
from roadvla.train.checks import check_choices, check_range

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
Hints = Literal["none", "relspatial", "plan", "mcts"]
Control = Literal["none", "shuffled", "uniform", "time_centred"]


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
        hints: What a text-guided teacher is told, which takes the advantage-guided one's place
            (Sec. 4.2.1): where things are, a plan and where things are, or what succeeded before
            in a similar state.
        eta: Perturbation strength η (Eq. 10).
        clip: Bound c on |ω| in standard deviations (Eq. 9).
        divergence: Between teacher and student.
        positive_only: Whether negative ω become 0.
        gate: Whether the critics must agree on the sign for the reference to count (Eq. 8).
        distill_coef: Factor on the AGD loss.
        distill_reduction: AGD's reduction over the K tokens (reading R12).
        control: What ω (of ``ppo``: the surrogate's advantage) is replaced by, to find out what it
            is worth: the same values dealt to other steps, 1 everywhere, or what is left of it
            when each time step's mean is taken out.
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
    hints: Hints = "none"
    alpha: float = 0.5
    eta: float = 1.0
    clip: float = 2.0
    divergence: Divergence = "forward_kl"
    positive_only: bool = False
    gate: bool = True
    distill_coef: float = 0.5
    distill_reduction: Reduction = "mean"
    control: Control = "none"
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
        check_choices(self)
        check_range(self, "delta", above=0.0, most=1.0)
        for name in ("alpha", "gamma", "lam"):
            check_range(self, name, least=0.0, most=1.0)
        for name in ("eta", "clip", "clip_eps", "value_clip_eps", "huber", "eps"):
            check_range(self, name, above=0.0)
        for name in ("distill_coef", "value_coef", "entropy_coef", "value_only_iterations"):
            check_range(self, name, least=0.0)
        for name in ("epochs", "group_size"):
            check_range(self, name, least=1.0)
        if self.kl_stop is not None:
            check_range(self, "kl_stop", above=0.0)
        self._check_hints()
        self._check_teacher()
        self._check_combine()
        self._check_reference()

    @property
    def mixes(self) -> bool:
        """Whether the reference critic's advantage enters the update."""
        weighs = self.algo == "road" and self.hints == "none"
        return self.alpha > 0 and (weighs or self.surrogate_advantage == "mix")

    @property
    def critic_only_iterations(self) -> int:
        """Value-only iterations of an algorithm that has a critic."""
        return self.value_only_iterations if self.algo in ("ppo", "road") else 0

    def _check_hints(self) -> None:
        if self.hints == "none":
            return
        if self.algo != "road":
            raise UserError(
                f"hints {self.hints!r} are for ROAD's teacher, algo {self.algo!r} has none: set "
                f"algo to 'road' or hints to 'none'"
            )
        plain = {
            "teacher": "exponential",
            "teacher_logits": "live",
            "token_weighting": "none",
            "distill_reduction": "mean",
            "control": "none",
            "positive_only": False,
        }
        for name, value in plain.items():
            if getattr(self, name) != value:
                raise UserError(
                    f"{name} {getattr(self, name)!r} would not be used, hints {self.hints!r} leave "
                    f"no weight ω: set {name} to {value!r} or hints to 'none'"
                )

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
        if self.control != "none" and self.algo in ("grpo", "sft"):
            raise UserError(
                f"control {self.control!r} is for algo 'ppo' and 'road': set it to 'none' with "
                f"{self.algo}"
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
