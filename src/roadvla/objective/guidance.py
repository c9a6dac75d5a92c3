"""Two critics' advantages to one weight per action: calibrate, gate, standardize (Eq. 7-9)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from roadvla.objective.tensors import require_same_shape


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (divisor N) over everything, in double precision.

    In float32 the mean of equal values can miss them by a rounding error, which dividing by a σ
    just as small would blow up to order one.
    """
    values = values.double()
    return values.mean(), values.std(correction=0)


def standardize(values: Float[Tensor, "*N"], *, eps: float = 1e-8) -> Float[Tensor, "*N"]:
    """Shift and scale to mean 0 and standard deviation 1: the inside of the clip (Eq. 9).

        (x − μ) / (σ + ε),  σ with divisor N

    Args:
        values: Anything, over one whole rollout (reading R2): active steps only.
        eps: ε; constant values become 0.

    Returns:
        The standardized values, without gradient.
    """
    mean, deviation = _moments(values.detach())
    return ((values.detach() - mean) / (deviation + eps)).to(values.dtype)


def calibrate(
    advantage_int: Float[Tensor, "*N"], advantage_ref: Float[Tensor, "*N"], *, eps: float = 1e-8
) -> Float[Tensor, "*N"]:
    """Bring the reference advantage to the mean and scale of the intrinsic one (Eq. 7).

        Ã_ref = μ_int + σ_int / (σ_ref + ε) · (Â_ref − μ_ref)

    Args:
        advantage_int: Â_int of the live critic: raw, not normalized, in units of return.
        advantage_ref: Â_ref of the frozen reference critic, on any affine scale.
        eps: ε; a constant reference becomes μ_int.

    Returns:
        Ã_ref, without gradient.

    Raises:
        ValueError: If the shapes differ, for they would broadcast.
    """
    require_same_shape("advantage_int, advantage_ref", advantage_int, advantage_ref)
    mean_int, deviation_int = _moments(advantage_int.detach())
    mean_ref, deviation_ref = _moments(advantage_ref.detach())
    scale = deviation_int / (deviation_ref + eps)
    return (mean_int + scale * (advantage_ref.detach() - mean_ref)).to(advantage_int.dtype)


def agreement_gate(
    advantage_int: Float[Tensor, "*N"], calibrated: Float[Tensor, "*N"]
) -> Bool[Tensor, "*N"]:
    """Where both critics call the action better, or both worse, than expected (Eq. 8).

        g = 1[sign Â_int = sign Ã_ref]

    An advantage of exactly 0 agrees with another exact 0 only (reading R14).

    Args:
        advantage_int: Â_int, raw.
        calibrated: Ã_ref, after ``calibrate`` and not before.

    Raises:
        ValueError: If the shapes differ, for they would broadcast.
    """
    require_same_shape("advantage_int, calibrated", advantage_int, calibrated)
    return advantage_int.sign() == calibrated.sign()


def gated_mix(
    advantage_int: Float[Tensor, "*N"], calibrated: Float[Tensor, "*N"], *, alpha: float = 0.5
) -> Float[Tensor, "*N"]:
    """Blend the two advantages where they agree and keep the intrinsic one elsewhere (Eq. 8).

        Â_mix = Â_int + α g (Ã_ref − Â_int)

    Args:
        advantage_int: Â_int, raw.
        calibrated: Ã_ref, after ``calibrate``.
        alpha: Mixing weight α in [0, 1]; 0 ignores the reference critic, 1 trusts it alone.

    Returns:
        Â_mix in units of return, without gradient.

    Raises:
        ValueError: If α lies outside [0, 1] or the shapes differ.
    """
    agree = agreement_gate(advantage_int, calibrated)
    return _blend(advantage_int, calibrated, agree, alpha)


def _blend(advantage_int: Tensor, calibrated: Tensor, where: Tensor, alpha: float) -> Tensor:
    """Move a share α of the way from one advantage to the other where asked to."""
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    advantage_int, calibrated = advantage_int.detach(), calibrated.detach()
    return torch.where(where, advantage_int + alpha * (calibrated - advantage_int), advantage_int)


def mixed_advantage(
    advantage_int: Float[Tensor, "*N"],
    advantage_ref: Float[Tensor, "*N"],
    *,
    alpha: float = 0.5,
    eps: float = 1e-8,
    gate: bool = True,
) -> tuple[Float[Tensor, "*N"], Bool[Tensor, "*N"]]:
    """Calibrated and gated blend of two critics' advantages, in units of return (Eq. 7-8).

    PPO on the mixed advantage (reading R8) takes this, standardized, in place of Â_int.

    Args:
        advantage_int: Â_int of the live critic: raw, not normalized, in units of return.
        advantage_ref: Â_ref of the frozen reference critic, on any affine scale.
        alpha: Mixing weight α in [0, 1]; 0 ignores the reference critic.
        eps: ε of the calibration.
        gate: False blends everywhere, whether or not the critics agree.

    Returns:
        Â_mix and whether the critics agree (measured either way), both without gradient.

    Raises:
        ValueError: If α lies outside [0, 1] or the shapes differ.
    """
    calibrated = calibrate(advantage_int, advantage_ref, eps=eps)
    agree = agreement_gate(advantage_int, calibrated)
    where = agree if gate else torch.ones_like(agree)
    return _blend(advantage_int, calibrated, where, alpha), agree


def perturbation_weight(
    advantage_mix: Float[Tensor, "*N"],
    *,
    clip: float = 2.0,
    eps: float = 1e-8,
    positive_only: bool = False,
) -> Float[Tensor, "*N"]:
    """Standardize and clip the mixed advantage to the signed weight ω (Eq. 9).

        ω = clip((Â_mix − μ_mix) / (σ_mix + ε), −c, c)

    Args:
        advantage_mix: Â_mix of one whole rollout, raw.
        clip: Bound c > 0 on |ω|, in standard deviations.
        eps: ε; constant advantages give ω = 0.
        positive_only: Keep [ω]₊ alone, Table 5's sign gate (reading R4).

    Returns:
        ω in [−c, c], without gradient.

    Raises:
        ValueError: If c is not positive.
    """
    if not clip > 0.0:
        raise ValueError(f"clip must be positive, got {clip}")
    return standardize(advantage_mix, eps=eps).clamp(0.0 if positive_only else -clip, clip)


def guidance_weight(
    advantage_int: Float[Tensor, "*N"],
    advantage_ref: Float[Tensor, "*N"],
    *,
    alpha: float = 0.5,
    clip: float = 2.0,
    eps: float = 1e-8,
    gate: bool = True,
    positive_only: bool = False,
) -> tuple[Float[Tensor, "*N"], Bool[Tensor, "*N"]]:
    """Calibrated, agreement-gated weight ω of the advantage-guided teacher (Eq. 7-9).

        Ã_ref = μ_int + σ_int / (σ_ref + ε) · (Â_ref − μ_ref)                     (7)
        Â_mix = Â_int + α g (Ã_ref − Â_int),  g = 1[sign Â_int = sign Ã_ref]      (8)
        ω     = clip((Â_mix − μ_mix) / (σ_mix + ε), −c, c)                        (9)

    Args:
        advantage_int: Â_int of the live critic: raw, not normalized, in units of return.
        advantage_ref: Â_ref of the frozen reference critic, on any affine scale.
        alpha: Mixing weight α in [0, 1]; 0 ignores the reference critic.
        clip: Bound c on |ω|, in standard deviations.
        eps: ε; keeps ω finite when an estimate is constant.
        gate: False blends whether or not the critics agree.
        positive_only: Keep [ω]₊ alone (reading R4).

    Returns:
        The signed weight ω and the agreement gate g, both without gradient.

    Raises:
        ValueError: If α lies outside [0, 1], c is not positive, or the shapes differ.
    """
    advantage_mix, agree = mixed_advantage(
        advantage_int, advantage_ref, alpha=alpha, eps=eps, gate=gate
    )
    weight = perturbation_weight(advantage_mix, clip=clip, eps=eps, positive_only=positive_only)
    return weight, agree
