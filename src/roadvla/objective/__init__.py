"""The paper's mathematics: pure functions on tensors, without configuration or I/O."""

from __future__ import annotations

from roadvla.objective.agd import agd_loss, agd_loss_sampled, inverse_prob_weight
from roadvla.objective.bound import (
    FiniteMDP,
    ImprovementBound,
    calibration_error,
    centred_reward,
    evaluate_policy,
    improvement_bound,
    joint_log_probs,
    kl_by_token,
    sequence_reward,
    state_distributions,
    token_teacher,
)
from roadvla.objective.divergence import divergence
from roadvla.objective.guidance import (
    agreement_gate,
    calibrate,
    gated_mix,
    guidance_weight,
    mixed_advantage,
    perturbation_weight,
    standardize,
)
from roadvla.objective.losses import (
    entropy,
    ppo_loss,
    self_distillation_loss,
    sft_loss,
    token_log_probs,
    value_loss,
)
from roadvla.objective.returns import gae, grpo_advantage
from roadvla.objective.teacher import linear_bump, proximal_teacher, teacher_logits

__all__ = [
    "FiniteMDP",
    "ImprovementBound",
    "agd_loss",
    "agd_loss_sampled",
    "agreement_gate",
    "calibrate",
    "calibration_error",
    "centred_reward",
    "divergence",
    "entropy",
    "evaluate_policy",
    "gae",
    "gated_mix",
    "grpo_advantage",
    "guidance_weight",
    "improvement_bound",
    "inverse_prob_weight",
    "joint_log_probs",
    "kl_by_token",
    "linear_bump",
    "mixed_advantage",
    "perturbation_weight",
    "ppo_loss",
    "proximal_teacher",
    "self_distillation_loss",
    "sequence_reward",
    "sft_loss",
    "standardize",
    "state_distributions",
    "teacher_logits",
    "token_log_probs",
    "token_teacher",
    "value_loss",
]
