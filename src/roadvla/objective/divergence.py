"""How far a student's token distribution is from its teacher's (Eq. 6, 12, 15)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from roadvla.objective.tensors import at_least_float32, require_same_shape

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]


def divergence(
    teacher_logits: Float[Tensor, "*N K V"],
    student_logits: Float[Tensor, "*N K V"],
    *,
    kind: Divergence = "forward_kl",
) -> Float[Tensor, "*N K"]:
    """Divergence between teacher q and student p at every token (Eq. 6, 12).

        forward_kl:  KL(q‖p) = Σ_u q(u) log q(u)/p(u)                             (12, 15)
        reverse_kl:  KL(p‖q)
        jsd:         ½ KL(q‖m) + ½ KL(p‖m),  m = ½(q + p)                         (6)

    Computed in float32 or better, and exact for logits of ±1e4. A bin that both mask with −inf
    contributes nothing. Where q has mass and p has none, KL(q‖p) is +inf by definition, with the
    finite gradient p − q; where p has mass and q has none, KL(p‖q) is +inf and so is its gradient;
    the JSD is at most log 2 everywhere. Each token needs at least one unmasked bin.

    Args:
        teacher_logits: Logits of q; treated as a constant.
        student_logits: Logits of p, raw (temperature 1).
        kind: Which divergence.

    Returns:
        Divergence per token in nats; gradient flows to ``student_logits`` alone.

    Raises:
        ValueError: If the shapes differ or ``kind`` is unknown.
    """
    require_same_shape("teacher_logits, student_logits", teacher_logits, student_logits)
    log_q = at_least_float32(teacher_logits.detach()).log_softmax(-1)
    log_p = at_least_float32(student_logits).log_softmax(-1)
    if kind == "forward_kl":
        return _kl(log_q, log_p)
    if kind == "reverse_kl":
        return _kl(log_p, log_q)
    if kind == "jsd":
        # Along ∂m the two halves add up to the constant −½ Σ ∂p = 0: m may be held fixed.
        log_m = torch.logaddexp(log_q, log_p.detach()) - math.log(2.0)
        return 0.5 * _kl(log_q, log_m) + 0.5 * _kl(log_p, log_m)
    raise ValueError(f"kind must be 'forward_kl', 'reverse_kl' or 'jsd', got {kind!r}")


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a‖b) over the last dimension, where 0 · anything is 0."""
    probability = log_a.exp()
    log_ratio = torch.where(probability > 0.0, log_a - log_b, 0.0)
    return (probability * log_ratio).sum(-1)
