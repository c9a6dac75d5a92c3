"""Losses that meet or surround the distillation: SFT, PPO, value, self-distillation, entropy."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from roadvla.objective.divergence import Divergence, divergence
from roadvla.objective.tensors import at_least_float32, require_same_shape, require_token_shape

# exp() of a larger log-ratio would overflow on its way to a gradient that clipping discards.
_LOG_RATIO_LIMIT = 20.0


def token_log_probs(
    logits: Float[Tensor, "*N K V"], action_tokens: Int[Tensor, "*N K"]
) -> Float[Tensor, "*N K"]:
    """Log-probability of each sampled token given the tokens before it (Eq. 4).

        log p_{t,k}(â_{t,k}),  p_{t,k} = softmax(z_{t,k}),  z computed from the prefix â_{<k}

    Args:
        logits: Raw logits z over the V action bins, teacher-forced (reading R7).
        action_tokens: Sampled bins â.

    Returns:
        Nats, in float32 or better; summed over K they give log π(a). Gradient flows to ``logits``.
    """
    log_probs = at_least_float32(logits).log_softmax(-1)
    return log_probs.gather(-1, action_tokens.long().unsqueeze(-1)).squeeze(-1)


def entropy(logits: Float[Tensor, "*N K V"]) -> Float[Tensor, "*N K"]:
    """Entropy of each token's distribution: the bonus added to the loss of Eq. 2 (Table 4).

        H(p) = −Σ_u p(u) log p(u)

    Args:
        logits: Raw logits over the bins; a bin masked with −inf contributes nothing.

    Returns:
        Nats per token, between 0 and log V; gradient flows.
    """
    log_probs = at_least_float32(logits).log_softmax(-1)
    probs = log_probs.exp()
    return -(probs * torch.where(probs > 0.0, log_probs, 0.0)).sum(-1)


def sft_loss(
    logits: Float[Tensor, "*N K V"], action_tokens: Int[Tensor, "*N K"]
) -> Float[Tensor, ""]:
    """Supervised fine-tuning on demonstrated actions (Eq. 1).

        L_SFT = −E[log π(a_t | o, l)],  averaged over the K tokens too (reading R16)

    Args:
        logits: Raw logits, teacher-forced with the demonstrated prefix.
        action_tokens: Demonstrated bins.

    Returns:
        The mean over steps and tokens, in nats; gradient flows to ``logits``.
    """
    return -token_log_probs(logits, action_tokens).mean()


def ppo_loss(
    log_probs: Float[Tensor, "*N K"],
    old_log_probs: Float[Tensor, "*N K"],
    advantage: Float[Tensor, "*N"],
    *,
    clip_eps: float = 0.2,
    ratio: Literal["action", "token"] = "action",
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Clipped surrogate of PPO (Eq. 2-3).

        L_PPO = −E[min(r Â, clip(r, 1 − ε, 1 + ε) Â)]                             (2)
        r     = π_θ(a) / π_old(a)                                                 (3)

    ``ratio="action"`` takes one r of the whole action, the product over its K tokens; ``"token"``
    one r per token, each with the action's advantage, averaged. π_old is the policy that collected
    the rollout (reading R3). |log r| is limited to 20, so that nothing overflows.

    Args:
        log_probs: Log-probability of each sampled token under the policy in training, in nats.
        old_log_probs: The same under the behaviour policy, at the same temperature.
        advantage: Â of each action, standardized over the rollout or raw.
        clip_eps: PPO's ε > 0.
        ratio: ``"action"`` or ``"token"``.

    Returns:
        The loss, with gradient to ``log_probs`` alone, and the share of ratios outside
        [1 − ε, 1 + ε], without gradient.

    Raises:
        ValueError: If shapes do not fit, ε is not positive, or ``ratio`` is unknown.
    """
    require_same_shape("log_probs, old_log_probs", log_probs, old_log_probs)
    require_token_shape(log_probs, advantage)
    if not clip_eps > 0.0:
        raise ValueError(f"clip_eps must be positive, got {clip_eps}")
    if ratio not in ("action", "token"):
        raise ValueError(f"ratio must be 'action' or 'token', got {ratio!r}")
    log_ratio = at_least_float32(log_probs) - at_least_float32(old_log_probs.detach())
    if ratio == "action":
        log_ratio = log_ratio.sum(-1, keepdim=True)
    odds = log_ratio.clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT).exp()
    gain = advantage.detach().unsqueeze(-1)
    surrogate = torch.minimum(odds * gain, odds.clamp(1.0 - clip_eps, 1.0 + clip_eps) * gain)
    clip_fraction = ((odds.detach() - 1.0).abs() > clip_eps).to(odds.dtype).mean()
    return -surrogate.mean(), clip_fraction


def value_loss(
    value: Float[Tensor, "*N"],
    old_value: Float[Tensor, "*N"],
    returns: Float[Tensor, "*N"],
    *,
    clip_eps: float | None = 0.2,
    huber: float | None = 10.0,
) -> Float[Tensor, ""]:
    """Regression of the critic that gives Eq. 2 and Eq. 7 their advantages, clipped as PPO clips.

        L_V = E[max(h(V − R), h(V_old + clip(V − V_old, −ε, ε) − R))]
        h(e) = ½e² if |e| ≤ δ, else δ(|e| − ½δ)

    Args:
        value: V in training, in units of return.
        old_value: V stored with the rollout.
        returns: R = Â + V_old, raw.
        clip_eps: ε > 0; ``None`` does not clip.
        huber: δ > 0; ``None`` leaves h(e) = ½e².

    Returns:
        The mean, with gradient to ``value`` alone.

    Raises:
        ValueError: If shapes differ, or ε or δ is not positive.
    """
    require_same_shape("value, old_value, returns", value, old_value, returns)
    if clip_eps is not None and not clip_eps > 0.0:
        raise ValueError(f"clip_eps must be positive or None, got {clip_eps}")
    if huber is not None and not huber > 0.0:
        raise ValueError(f"huber must be positive or None, got {huber}")
    old_value, returns = old_value.detach(), returns.detach()
    errors = _huber(value, returns, huber)
    if clip_eps is not None:
        near = old_value + (value - old_value).clamp(-clip_eps, clip_eps)
        errors = torch.maximum(errors, _huber(near, returns, huber))
    return errors.mean()


def _huber(value: Tensor, target: Tensor, delta: float | None) -> Tensor:
    """Half the squared error, continued by a straight line beyond δ."""
    if delta is None:
        return 0.5 * (value - target).square()
    return functional.huber_loss(value, target, delta=delta, reduction="none")


def self_distillation_loss(
    teacher_logits: Float[Tensor, "*N K V"],
    student_logits: Float[Tensor, "*N K V"],
    *,
    kind: Divergence = "jsd",
    mask: Bool[Tensor, "*N"] | None = None,
) -> Float[Tensor, ""]:
    """Distillation of a privileged teacher along the student's own rollout (Eq. 4-5).

        L_SD = E[1/(TK) Σ_t Σ_k JSD(p^T_{t,k}, p^S_{t,k})]

    Args:
        teacher_logits: Logits of p^T: the same model, conditioned on privileged information and on
            the student's own action prefix; treated as a constant.
        student_logits: Logits of p^S for the same states and prefixes.
        kind: Divergence; Eq. 5 has the JSD.
        mask: Steps where there is privileged information; all unless given.

    Returns:
        The mean over those steps and all tokens, in nats, 0 if there are none; gradient flows to
        ``student_logits`` alone.

    Raises:
        ValueError: If the shapes differ or ``kind`` is unknown.
    """
    divergences = divergence(teacher_logits, student_logits, kind=kind)
    if mask is None:
        return divergences.mean()
    counted = mask.to(divergences.dtype)
    return (divergences.mean(-1) * counted).sum() / counted.sum().clamp(min=1)
