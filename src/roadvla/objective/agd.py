"""Advantage-guided distillation, over all bins or in closed form (Eq. 12).

With w = ηω, p = p(a) the student's probability of the sampled token and a teacher that tilts the
student's *own* logits, everything follows from p alone:

    Z = 1 + p(e^w − 1),   q*(a) = p e^w / Z,   KL(q*‖p) = w q*(a) − log Z
    ∂KL(sg q*‖p)/∂z = −κ (e_a − p_vec),        κ = p(e^w − 1) / Z

So one log-probability per token gives the loss and its gradient exactly: no pass over the bins.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from roadvla.objective.divergence import Divergence, divergence
from roadvla.objective.losses import token_log_probs
from roadvla.objective.teacher import linear_bump, scaled_weight, shift_sampled, teacher_logits
from roadvla.objective.tensors import at_least_float32, require_same_shape, require_token_shape

Reduction = Literal["mean", "sum", "none"]
TeacherForm = Literal["exponential", "odd", "linear"]


def inverse_prob_weight(
    old_log_prob: Float[Tensor, "*N K"], *, delta: float = 0.03
) -> Float[Tensor, "*N K"]:
    """Token weight that takes the factor p(a) out of the gradient of Eq. 12 (reading R15).

        1 / max(p_old(a), δ)

    Args:
        old_log_prob: Log-probability of the sampled token under the behaviour policy, in nats.
        delta: Floor δ in (0, 1]; bounds the weight by 1/δ.

    Returns:
        The weight of each token, without gradient.

    Raises:
        ValueError: If δ lies outside (0, 1].
    """
    if not 0.0 < delta <= 1.0:
        raise ValueError(f"delta must lie in (0, 1], got {delta}")
    return at_least_float32(old_log_prob.detach()).clamp(min=math.log(delta)).neg().exp()


def agd_loss(
    student_logits: Float[Tensor, "*N K V"],
    action_tokens: Int[Tensor, "*N K"],
    weight: Float[Tensor, "*N"],
    *,
    eta: float = 1.0,
    kind: Divergence = "forward_kl",
    reduction: Reduction = "mean",
    teacher: TeacherForm = "exponential",
    behaviour_logits: Float[Tensor, "*N K V"] | None = None,
    token_weight: Float[Tensor, "*N K"] | None = None,
) -> Float[Tensor, "*_"]:
    """Distillation of the student onto its advantage-guided teacher, over all bins (Eq. 12).

        L_AGD = E[1/K Σ_k D(q*_k, p_k)],  D = KL(q*‖p) unless ``kind`` says otherwise

        exponential:  q* = softmax(z + ηω e_a)                                    (10)
        odd:          ½ [KL(q⁺‖p) − KL(q⁻‖p)],  q^± = softmax(z ± ηω e_a)
        linear:       q* = p + c p_a (e_a − p),  c = ηω in (−1, 1)

    Args:
        student_logits: Live logits z over the V bins, raw (temperature 1).
        action_tokens: Sampled bins a.
        weight: Signed ω of each action (Eq. 9).
        eta: Perturbation strength η > 0.
        kind: Divergence D from teacher to student; forward KL alone for the odd teacher.
        reduction: ``"mean"`` over steps and tokens (12); ``"sum"`` over tokens, mean over steps
            (reading R12); ``"none"`` leaves one value per token.
        teacher: Form of the teacher; only the first is the paper's (reading R15).
        behaviour_logits: z_old when the action was sampled, for a rollout-time teacher (reading
            R2); ``None`` tilts the live logits.
        token_weight: Factor on each token's term, e.g. ``inverse_prob_weight``.

    Returns:
        The loss in nats; gradient flows to ``student_logits`` alone.

    Raises:
        ValueError: If shapes do not fit, η is not positive, a name is unknown, or an odd teacher is
            asked for another divergence or of behaviour logits: its halves cancel for neither.
    """
    require_token_shape(action_tokens, weight)
    base = student_logits if behaviour_logits is None else behaviour_logits
    if teacher == "exponential":
        target = teacher_logits(base, action_tokens, weight, eta=eta)
        per_token = divergence(target, student_logits, kind=kind)
    elif teacher == "odd":
        if behaviour_logits is not None:
            raise ValueError("the odd teacher needs live logits: leave behaviour_logits out")
        if kind != "forward_kl":
            raise ValueError(f"the odd teacher is a difference of forward KLs, not of {kind!r}")
        up = teacher_logits(base, action_tokens, weight, eta=eta)
        down = teacher_logits(base, action_tokens, -weight, eta=eta)
        per_token = 0.5 * divergence(up, student_logits) - 0.5 * divergence(down, student_logits)
    elif teacher == "linear":
        bump = linear_bump(token_log_probs(base, action_tokens), weight, eta=eta)
        target = shift_sampled(base, action_tokens, bump)
        per_token = divergence(target, student_logits, kind=kind)
    else:
        raise ValueError(f"teacher must be 'exponential', 'odd' or 'linear', got {teacher!r}")
    return _reduce(per_token, token_weight, reduction)


def agd_loss_sampled(
    log_prob: Float[Tensor, "*N K"],
    weight: Float[Tensor, "*N"],
    *,
    eta: float = 1.0,
    reduction: Reduction = "mean",
    teacher: TeacherForm = "exponential",
    token_weight: Float[Tensor, "*N K"] | None = None,
) -> Float[Tensor, "*_"]:
    """Distillation onto a live teacher in closed form, from log p(a) alone (Eq. 12).

    Value and gradient are those of ``agd_loss`` with live logits and forward KL; the module's
    docstring has the derivation. As a function of log p(a) it is −κ log p(a) with κ held constant:
    a policy gradient whose weight is κ. Where p(a) rounds to 1 the exact 1 − p is lost, so keep
    |ηω| below about 10 in float32.

    Args:
        log_prob: log p(a) of each sampled token under the policy in training, at temperature 1.
        weight: Signed ω of each action (Eq. 9).
        eta: Perturbation strength η > 0.
        reduction: As in ``agd_loss``.
        teacher: As in ``agd_loss``.
        token_weight: As in ``agd_loss``.

    Returns:
        The loss in nats; gradient flows to ``log_prob`` alone.

    Raises:
        ValueError: If shapes do not fit, η is not positive, or a name is unknown.
    """
    require_token_shape(log_prob, weight)
    log_prob = at_least_float32(log_prob)
    detached = log_prob.detach().clamp(max=0.0)
    bump = scaled_weight(weight, eta)
    if teacher == "exponential":
        value, kappa = _tilt(detached, bump)
    elif teacher == "odd":
        value_up, kappa_up = _tilt(detached, bump)
        value_down, kappa_down = _tilt(detached, -bump)
        value, kappa = 0.5 * (value_up - value_down), 0.5 * (kappa_up - kappa_down)
    elif teacher == "linear":
        value, kappa = _tilt(detached, linear_bump(detached, weight, eta=eta))
    else:
        raise ValueError(f"teacher must be 'exponential', 'odd' or 'linear', got {teacher!r}")
    # κ is 0 where log p(a) is −inf, but 0 · −inf is not: hold it finite.
    surrogate = -kappa * log_prob.clamp(min=torch.finfo(log_prob.dtype).min)
    return _reduce(value + (surrogate - surrogate.detach()), token_weight, reduction)


def _tilt(log_prob: Tensor, bump: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q*‖p) and κ for a bump on the sampled token's logit, from log p(a) in (−inf, 0].

    κ = p(e^w − 1)/Z is written with expm1(−|w|), so that no exponential of a large w is taken.
    """
    tiny = torch.finfo(log_prob.dtype).tiny
    log_rest = (-torch.expm1(log_prob)).clamp(min=tiny).log()
    log_z = torch.logaddexp(log_rest, log_prob + bump)
    value = bump * (log_prob + bump - log_z).exp() - log_z
    kappa = (log_prob + bump.relu() - log_z).exp() * -torch.expm1(-bump.abs()) * bump.sign()
    return value, kappa


def _reduce(per_token: Tensor, token_weight: Tensor | None, reduction: Reduction) -> Tensor:
    """Weigh the tokens and average (Eq. 12's 1/TK), sum over K, or leave them."""
    if token_weight is not None:
        require_same_shape("token_weight and the tokens", token_weight, per_token)
        per_token = per_token * token_weight.detach()
    if reduction == "mean":
        return per_token.mean()
    if reduction == "sum":
        return per_token.sum(-1).mean()
    if reduction == "none":
        return per_token
    raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
