"""Makes the backbone the tiny VLA starts from, as OpenVLA-7B starts from its pretraining."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from roadvla.policy.tiny import TinyVLA
from roadvla.train.primitives import Primitives, PrimitiveSampler
from roadvla.types import Observation


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """How the shipped backbone is made.

    Attributes:
        steps: Optimizer steps.
        batch: States per step.
        learning_rate: Peak of the cosine schedule.
        warmup_steps: Linear warm-up at its start.
        weight_decay: AdamW's.
        geometry_coef: Weight of the auxiliary regression of places and angles.
        grounding_coef: Weight of the auxiliary attention to the patches of what is named.
        seed: Of the initial weights; the states are the same for every seed.
        device: ``cpu`` or ``cuda``.
    """

    steps: int = 8000
    batch: int = 128
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    weight_decay: float = 0.01
    geometry_coef: float = 1.0
    grounding_coef: float = 0.5
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class PretrainProgress:
    """Averages since the last report.

    Attributes:
        step: Steps done.
        token_loss: Cross-entropy, nats per token.
        geometry_loss: Mean squared error of places and angles.
        grounding_loss: Cross-entropy of the attention, nats.
        accuracy: Fraction of action tokens predicted exactly.
    """

    step: int
    token_loss: float
    geometry_loss: float
    grounding_loss: float
    accuracy: float


def pretrain(
    config: PretrainConfig,
    report: Callable[[PretrainProgress], None],
    *,
    report_every: int = 100,
) -> TinyVLA:
    """Train a fresh tiny VLA on primitives and return it with its vision tower frozen again.

    Args:
        config: Sizes and rates.
        report: Called every ``report_every`` steps.
        report_every: Steps between reports.
    """
    torch.manual_seed(config.seed)
    device = torch.device(config.device)
    policy = TinyVLA().to(device)
    policy.unfreeze_vision()
    a = policy.architecture
    probe = nn.Sequential(nn.Linear(a.queries * a.width, 128), nn.GELU(), nn.Linear(128, 12))
    probe.to(device)
    parameters = [*policy.policy_parameters(), *probe.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.98)
    )
    sampler = PrimitiveSampler(config.batch, device)
    totals = torch.zeros(4, device=device)
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config)
        batch = sampler.sample(step)
        vision = policy.vision(batch.image)
        observation = Observation(batch.image, policy.tokenize(batch.prompts), vision)
        token_loss, accuracy = _token_loss(policy, observation, batch)
        visual, attention = policy.ground(observation)
        error = (probe(visual.flatten(1)) - batch.geometry).square()
        geometry_loss = (error * batch.named).sum() / batch.named.sum()
        grounding_loss = _grounding_loss(attention, batch, a.patch, a.image_size // a.patch)
        optimizer.zero_grad(set_to_none=True)
        auxiliary = config.geometry_coef * geometry_loss + config.grounding_coef * grounding_loss
        (token_loss + auxiliary).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses = torch.stack([token_loss, geometry_loss, grounding_loss, accuracy])
        totals += losses.detach()
        if (step + 1) % report_every == 0:
            report(PretrainProgress(step + 1, *(totals / report_every).tolist()))
            totals.zero_()
    policy.freeze_vision()
    return policy


def _schedule(step: int, config: PretrainConfig) -> float:
    """Linear warm-up, then a cosine to zero, as a fraction of the peak."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


def _token_loss(
    policy: TinyVLA, observation: Observation, batch: Primitives
) -> tuple[Tensor, Tensor]:
    tokens = policy.encode(batch.action)
    logits, _ = policy.evaluate(observation, tokens)
    loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    return loss, (logits.detach().argmax(-1) == tokens).float().mean()


def _grounding_loss(attention: Tensor, batch: Primitives, patch: int, grid: int) -> Tensor:
    """Teach the first query to look at the named object, the second at the named receptacle."""
    cell = (batch.pixel / patch).long().clamp(0, grid - 1)
    target = cell[..., 0] * grid + cell[..., 1]
    missed = -attention[:, :2].gather(2, target[..., None])[..., 0]
    named = batch.named[:, [0, 3]]
    return (missed * named).sum() / named.sum()
