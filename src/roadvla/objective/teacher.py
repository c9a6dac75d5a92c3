"""The advantage-guided teacher: a tilted copy of the student (Eq. 10, 11, 18-24)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from roadvla.objective.tensors import at_least_float32, require_same_shape, require_token_shape

# Largest |c| of the linear teacher: c = 1 would ask for an infinite logit where p = 1.
_LINEAR_LIMIT = 1.0 - 1e-6


def proximal_teacher(
    policy_logits: Float[Tensor, "*N V"], reward: Float[Tensor, "*N V"], *, tau: float = 1.0
) -> Float[Tensor, "*N V"]:
    """Logits of the best distribution that stays near a policy (Eq. 11, 18-20, 22).

        q* = argmax_q { E_{u∼q}[r(u)] − τ KL(q‖p) }                              (11, 18)
        q*(u) ∝ p(u) exp(r(u)/τ)  ⇔  q* = softmax(z + r/τ)                       (19, 20)

    The log-ratio log q*/p is r/τ plus a constant, as stationarity of the Lagrangian asks (21, 22).

    Args:
        policy_logits: z of p = softmax(z), raw; −inf masks a bin, which stays masked.
        reward: Shaping reward r(u) of every bin; a constant added to it changes nothing.
        tau: Temperature τ > 0; the larger, the nearer q* stays to p.

    Returns:
        Logits z + r/τ of q*, without gradient.

    Raises:
        ValueError: If τ is not positive or the shapes differ.
    """
    require_same_shape("policy_logits, reward", policy_logits, reward)
    if not tau > 0.0:
        raise ValueError(f"tau must be positive, got {tau}")
    return at_least_float32(policy_logits.detach()) + at_least_float32(reward.detach()) / tau


def scaled_weight(weight: Float[Tensor, "*N"], eta: float) -> Float[Tensor, "*N 1"]:
    """ηω, ready to meet the K tokens of its action, without gradient.

    Raises:
        ValueError: If η is not positive.
    """
    if not eta > 0.0:
        raise ValueError(f"eta must be positive, got {eta}")
    return eta * at_least_float32(weight.detach()).unsqueeze(-1)


def shift_sampled(
    logits: Float[Tensor, "*N K V"],
    action_tokens: Int[Tensor, "*N K"],
    bump: Float[Tensor, "*N K"],
) -> Float[Tensor, "*N K V"]:
    """Add a bump to the sampled token's logit alone; float32 or better, no gradient."""
    logits = at_least_float32(logits.detach())
    index = action_tokens.long().unsqueeze(-1)
    return logits.scatter_add(-1, index, bump.to(logits.dtype).unsqueeze(-1))


def teacher_logits(
    student_logits: Float[Tensor, "*N K V"],
    action_tokens: Int[Tensor, "*N K"],
    weight: Float[Tensor, "*N"],
    *,
    eta: float = 1.0,
) -> Float[Tensor, "*N K V"]:
    """Logits of the advantage-guided teacher (Eq. 10, 24).

        q*_{t,k} = softmax(z_{t,k} + η ω_t e_{â_{t,k}})

    It is ``proximal_teacher`` with the one-point reward r(u) = τηω 1[u = â] (23).

    Args:
        student_logits: z over the V action bins, raw (temperature 1), live or of the rollout
            (reading R2).
        action_tokens: Sampled bins â.
        weight: Signed ω of each action.
        eta: Perturbation strength η > 0.

    Returns:
        Teacher logits, without gradient.

    Raises:
        ValueError: If η is not positive or ω does not fit the tokens.
    """
    require_token_shape(action_tokens, weight)
    bump = scaled_weight(weight, eta).expand(action_tokens.shape)
    return shift_sampled(student_logits, action_tokens, bump)


def linear_bump(
    log_prob: Float[Tensor, "*N K"], weight: Float[Tensor, "*N"], *, eta: float = 1.0
) -> Float[Tensor, "*N K"]:
    """Logit bump whose teacher differs from the student by a policy gradient (after Eq. 10).

        s = log (1 + c(1 − p_a)) / (1 − c p_a),  c = ηω in (−1, 1)
        ⇒  q* − p = c p_a (e_a − p)  exactly, with no higher order in c

    Our own variant of the teacher, not the paper's (reading R15). c is clamped into (−1, 1), so
    that η should be at most 1 / clip, or the largest weights become equal.

    Args:
        log_prob: log p_a of each sampled token, in nats.
        weight: Signed ω of each action.
        eta: Perturbation strength η > 0.

    Returns:
        s, to be added to the sampled token's logit; without gradient.

    Raises:
        ValueError: If η is not positive or ω does not fit the tokens.
    """
    require_token_shape(log_prob, weight)
    strength = scaled_weight(weight, eta).clamp(-_LINEAR_LIMIT, _LINEAR_LIMIT)
    log_prob = at_least_float32(log_prob.detach()).clamp(max=0.0)
    rest = -torch.expm1(log_prob)
    return torch.log1p(strength * rest) - torch.log1p(-strength * log_prob.exp())
