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
    """How the shipped backbone is made: to see and act first, then to read hints as well.

    Attributes:
        steps: Optimizer steps of the first part.
        batch: States per step.
        learning_rate: Peak of its cosine schedule.
        warmup_steps: Linear warm-up at the start of each part.
        weight_decay: AdamW's.
        geometry_coef: Weight of the auxiliary regression of places and angles.
        grounding_coef: Weight of the auxiliary attention to the patches of what is named.
        hint_steps: Optimizer steps of the second part, in which about half of the batches have
            hints; 0 to leave it out.
        hint_learning_rate: Peak of its cosine schedule.
        seed: Of the initial weights; the states are the same for every seed.
        device: ``cpu`` or ``cuda``.
    """

    steps: int = 6000
    batch: int = 128
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    weight_decay: float = 0.01
    geometry_coef: float = 1.0
    grounding_coef: float = 0.5
    hint_steps: int = 1000
    hint_learning_rate: float = 6e-4
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
    policy = TinyVLA().to(torch.device(config.device))
    policy.unfreeze_vision()
    _learn(policy, config, _Part(config.steps, config.learning_rate), report, report_every)
    if config.hint_steps:
        read_hints(policy, config, report, report_every=report_every)
    policy.freeze_vision()
    return policy


def read_hints(
    policy: TinyVLA,
    config: PretrainConfig,
    report: Callable[[PretrainProgress], None],
    *,
    report_every: int = 100,
) -> None:
    """Teach a policy that sees and acts to read hints too, in place; its vision tower is trained.

    Args:
        policy: After the first part.
        config: Sizes and rates.
        report: Called every ``report_every`` steps; steps count on from the first part's.
        report_every: Steps between reports.
    """
    torch.manual_seed(config.seed + 1)
    policy.unfreeze_vision()
    part = _Part(config.hint_steps, config.hint_learning_rate, first=config.steps, hinted=True)
    _learn(policy, config, part, report, report_every)
    policy.freeze_vision()


@dataclass(frozen=True)
class _Part:
    """One cosine: ``first`` counts the steps before it."""

    steps: int
    learning_rate: float
    first: int = 0
    hinted: bool = False


def _learn(
    policy: TinyVLA,
    config: PretrainConfig,
    part: _Part,
    report: Callable[[PretrainProgress], None],
    report_every: int,
) -> None:
    device = policy.device
    a = policy.architecture
    probe = nn.Sequential(nn.Linear(a.queries * a.width, 128), nn.GELU(), nn.Linear(128, 12))
    probe.to(device)
    parameters = [*policy.policy_parameters(), *probe.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=part.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.98)
    )
    sampler = PrimitiveSampler(config.batch, device)
    totals = torch.zeros(4, device=device)
    for step in range(part.steps):
        for group in optimizer.param_groups:
            group["lr"] = part.learning_rate * _schedule(step, part.steps, config.warmup_steps)
        batch = sampler.sample(part.first + step, hinted=part.hinted)
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
            progress = PretrainProgress(part.first + step + 1, *(totals / report_every).tolist())
            report(progress)
            totals.zero_()


def _schedule(step: int, steps: int, warmup_steps: int) -> float:
    """Linear warm-up, then a cosine to zero, as a fraction of the peak."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
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
