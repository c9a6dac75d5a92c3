"""From a batch to a better policy: losses, minibatches, optimiser steps, metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from roadvla.objective import (
    agd_loss,
    agd_loss_sampled,
    entropy,
    inverse_prob_weight,
    ppo_loss,
    self_distillation_loss,
    sft_loss,
    token_log_probs,
    value_loss,
)
from roadvla.policy.base import Policy
from roadvla.train.blank import blank
from roadvla.train.config import Algorithm, Optimizer
from roadvla.train.gradients import Gradients, exchanged
from roadvla.train.means import Means
from roadvla.train.share import Share
from roadvla.types import Batch, Observation

_PROBE = 128


def make_optimizer(policy: Policy, settings: Optimizer) -> torch.optim.AdamW:
    """Build AdamW with two groups: the policy's parameters and the value head's."""
    groups = [
        {"params": list(policy.policy_parameters()), "lr": settings.learning_rate},
        {"params": list(policy.value_parameters()), "lr": settings.value_learning_rate},
    ]
    return torch.optim.AdamW(
        groups, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )


def schedule_factor(settings: Optimizer, iteration: int, iterations: int, *, warmup: int) -> float:
    """Fraction of the peak learning rate in one iteration: a function of its number alone.

        (i + 1)/w                            while i < w
        ½ (1 + cos(π (i − w)/(n − w)))       after, or 1 if the schedule is constant

    Args:
        settings: The schedule.
        iteration: i, from 0.
        iterations: n.
        warmup: w.
    """
    if iteration < warmup:
        return (iteration + 1) / warmup
    if settings.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (iteration - warmup) / max(1, iterations - warmup)))


def set_learning_rates(
    optimizer: torch.optim.Optimizer, settings: Optimizer, iteration: int, iterations: int
) -> float:
    """Set both groups' rates for an iteration and return the policy's."""
    warmup = settings.warmup_iterations
    policy = schedule_factor(settings, iteration, iterations, warmup=warmup)
    value = schedule_factor(settings, iteration, iterations, warmup=0)
    optimizer.param_groups[0]["lr"] = settings.learning_rate * policy
    optimizer.param_groups[1]["lr"] = settings.value_learning_rate * value
    return optimizer.param_groups[0]["lr"]


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    algorithm: Algorithm,
    settings: Optimizer,
    *,
    temperature: float,
    generator: torch.Generator | None = None,
    value_only: bool = False,
    share: Share | None = None,
) -> dict[str, Tensor]:
    """Improve the policy on one batch, in place: epochs of minibatches (Algorithm 1, step 4).

    Every transition is used exactly once per epoch. Minibatches have nearly equal sizes, never
    above the configured one; an optimiser step follows the mean over all its transitions, however
    they are split into passes and over processes.

    Args:
        policy: Trained here.
        optimizer: Made by ``make_optimizer``.
        batch: N transitions, or this process's part of them.
        algorithm: The loss.
        settings: Minibatches and gradient clip.
        temperature: Of the behaviour policy; log-probabilities are taken at the same.
        generator: Source of the minibatches' order, on the batch's device; alike in all processes.
        value_only: Whether only the value head learns.
        share: Which part of the whole batch ``batch`` is; all of it unless given.

    Returns:
        Means over all minibatches as scalars on the device, and the exact KL(old‖new) in nats per
        action over a random part of the batch.
    """
    device = batch.action_tokens.device
    share = share or Share.alone(len(batch.action_tokens))
    if share.in_step and not len(batch.action_tokens):
        batch = blank(batch, policy)
    learning = _Learning(policy, optimizer, batch, share, algorithm, settings, temperature)
    probe = torch.randperm(len(share), generator=generator, device=device)[:_PROBE].cpu()
    if value_only:
        with _frozen(policy):
            metrics = learning.run(generator, value_only=True)
        return {**metrics, "policy/kl": torch.zeros((), device=device)}
    before = learning.log_probs(probe)
    metrics = learning.run(generator, value_only=False)
    after = learning.log_probs(probe)
    moved = (before.exp() * (before - after)).sum()
    return {**metrics, "policy/kl": share.world.total(moved) / len(probe)}


def losses(
    policy: Policy, batch: Batch, algorithm: Algorithm, *, temperature: float, value_only: bool
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Compute the loss of one minibatch from a single teacher-forced pass, and its parts.

    Log-probabilities, teacher and entropy are those of the tempered logits z / temperature, the
    distribution the actions were sampled from. ``policy/kl_estimate`` is E[r − 1 − log r] over the
    sampled actions.

    Returns:
        The loss with gradient, and its parts without.
    """
    logits, value = policy.evaluate(batch.observation, batch.action_tokens)
    logits = logits / temperature
    if batch.logits is not None:
        batch = replace(batch, logits=batch.logits / temperature)
    parts: dict[str, Tensor] = {}
    total = logits.new_zeros(())
    log_probs = token_log_probs(logits, batch.action_tokens)
    if algorithm.algo == "sft":
        total = parts["loss/policy"] = sft_loss(logits, batch.action_tokens)
        parts["policy/accuracy"] = (logits.argmax(-1) == batch.action_tokens).float().mean()
    elif not value_only:
        told = _told_logits(policy, batch, temperature)
        total = _policy_loss(logits, log_probs, batch, algorithm, parts, told)
    if algorithm.algo in ("ppo", "road"):
        parts["loss/value"] = value_loss(
            value,
            batch.old_value,
            batch.returns,
            clip_eps=algorithm.value_clip_eps,
            huber=algorithm.huber,
        )
        total = total + algorithm.value_coef * parts["loss/value"]
    parts["loss/total"] = total
    log_ratio = (log_probs - batch.old_log_probs).sum(-1).detach()
    parts["policy/kl_estimate"] = (log_ratio.exp() - 1 - log_ratio).mean()
    if "policy/entropy" not in parts:
        parts["policy/entropy"] = entropy(logits.detach()).mean()
    return total, {name: part.detach() for name, part in parts.items()}


def select(batch: Batch, index: Int[Tensor, " n"]) -> Batch:
    """Take some transitions of a batch."""
    seen = batch.observation
    observation = Observation(
        image=seen.image[index],
        prompt=seen.prompt[index],
        vision=None if seen.vision is None else seen.vision[index],
    )
    return replace(
        batch,
        observation=observation,
        action_tokens=batch.action_tokens[index],
        old_log_probs=batch.old_log_probs[index],
        old_value=batch.old_value[index],
        advantage=batch.advantage[index],
        returns=batch.returns[index],
        weight=batch.weight[index],
        logits=None if batch.logits is None else batch.logits[index],
        hinted_prompt=None if batch.hinted_prompt is None else batch.hinted_prompt[index],
        hinted=None if batch.hinted is None else batch.hinted[index],
    )


@contextmanager
def _frozen(policy: Policy) -> Iterator[None]:
    """Let only the value head learn, so that nothing is kept for a backward pass of the rest."""
    parameters = list(policy.policy_parameters())
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@torch.no_grad()
def _told_logits(policy: Policy, batch: Batch, temperature: float) -> Tensor | None:
    """Ask the same policy again with the hints in its prompt, on the student's own prefixes."""
    if batch.hinted_prompt is None:
        return None
    observation = replace(batch.observation, prompt=batch.hinted_prompt)
    return policy.evaluate(observation, batch.action_tokens)[0] / temperature


def _policy_loss(
    logits: Tensor,
    log_probs: Tensor,
    batch: Batch,
    algorithm: Algorithm,
    parts: dict[str, Tensor],
    told: Tensor | None,
) -> Tensor:
    """Surrogate, AGD or both, less the entropy bonus; notes each in ``parts``."""
    total = logits.new_zeros(())
    if algorithm.combine == "add":
        parts["loss/policy"], parts["policy/clip_fraction"] = ppo_loss(
            log_probs,
            batch.old_log_probs,
            batch.advantage,
            clip_eps=algorithm.clip_eps,
            ratio=algorithm.ratio,
        )
        total = parts["loss/policy"]
    if told is not None:
        parts["loss/self_distillation"] = self_distillation_loss(
            told, logits, kind=algorithm.divergence, mask=batch.hinted
        )
        total = total + algorithm.distill_coef * parts["loss/self_distillation"]
    elif algorithm.algo == "road":
        parts["loss/agd"] = _agd(logits, log_probs, batch, algorithm)
        total = total + algorithm.distill_coef * parts["loss/agd"]
    parts["policy/entropy"] = entropy(logits).mean()
    return total - algorithm.entropy_coef * parts["policy/entropy"]


def _agd(logits: Tensor, log_probs: Tensor, batch: Batch, algorithm: Algorithm) -> Tensor:
    """Distil the advantage-guided teacher (Eq. 12); in closed form where there is one."""
    token_weight = None
    if algorithm.token_weighting == "inverse_prob":
        token_weight = inverse_prob_weight(batch.old_log_probs, delta=algorithm.delta)
    if algorithm.teacher_logits == "live" and algorithm.divergence == "forward_kl":
        return agd_loss_sampled(
            log_probs,
            batch.weight,
            eta=algorithm.eta,
            reduction=algorithm.distill_reduction,
            teacher=algorithm.teacher,
            token_weight=token_weight,
        )
    return agd_loss(
        logits,
        batch.action_tokens,
        batch.weight,
        eta=algorithm.eta,
        kind=algorithm.divergence,
        reduction=algorithm.distill_reduction,
        teacher=algorithm.teacher,
        behaviour_logits=batch.logits,
        token_weight=token_weight,
    )


@dataclass(frozen=True)
class _Learning:
    """One batch, and what is done with it."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    batch: Batch
    share: Share
    algorithm: Algorithm
    settings: Optimizer
    temperature: float

    def run(self, generator: torch.Generator | None, *, value_only: bool) -> dict[str, Tensor]:
        """Take the optimiser's steps, epoch after epoch, and return the means over minibatches."""
        settings, limit = self.settings, self.algorithm.kl_stop
        device, size = self.batch.action_tokens.device, settings.minibatch * settings.accumulation
        totals = Means(device)
        with exchanged(self.optimizer, self.share.world) as gradients:
            for _ in range(self.algorithm.epochs):
                for group in self.share.groups(size, generator=generator, device=device):
                    kl = self._accumulate(group, value_only, totals, gradients)
                    if limit is not None and float(self.share.world.total(kl)) > limit:
                        return totals.means(self.share.world)
                    norm, skipped = _step(self.optimizer, settings)
                    totals.add("loss/grad_norm", norm, 1)
                    totals.count("loss/skipped_steps", skipped)
        return totals.means(self.share.world)

    @torch.no_grad()
    def log_probs(self, index: Int[Tensor, " n"]) -> Float[Tensor, "m K V"]:
        """Evaluate this process's part of some transitions, in passes as large as the update's."""
        policy, temperature = self.policy, self.temperature
        device = self.batch.action_tokens.device
        logits = [torch.zeros(0, policy.num_tokens, policy.num_bins, device=device)]
        for place, portion in self.share.passes(index, self.settings.minibatch, device):
            part = select(self.batch, place)
            found, _ = policy.evaluate(part.observation, part.action_tokens)
            logits.append(found if portion else found[:0])
        return (torch.cat(logits) / temperature).log_softmax(-1)

    def _accumulate(
        self,
        group: Int[Tensor, " n"],
        value_only: bool,
        totals: Means,
        gradients: Gradients | None,
    ) -> Tensor:
        """Add up the gradient of the mean loss over a group; returns this process's share of KL."""
        device = self.batch.action_tokens.device
        kl = torch.zeros((), device=device)
        self.optimizer.zero_grad(set_to_none=True)
        if gradients is not None:
            gradients.open()
        passes = self.share.passes(group, self.settings.minibatch, device)
        for number, (place, portion) in enumerate(passes, start=1):
            total, parts = losses(
                self.policy,
                select(self.batch, place),
                self.algorithm,
                temperature=self.temperature,
                value_only=value_only,
            )
            if gradients is not None:
                gradients.expect(last=number == len(passes), counts=portion > 0)
            (total * portion).backward()
            estimate = parts.pop("policy/kl_estimate")
            # What counts for nothing may be NaN, and NaN times nothing is NaN.
            kl = kl + estimate * portion if portion else kl
            for name, value in parts.items():
                totals.add(name, value, len(place) if portion else 0)
        if gradients is not None:
            gradients.close()
        return kl


def _step(optimizer: torch.optim.Optimizer, settings: Optimizer) -> tuple[Tensor, Tensor]:
    """Clip and step, but change nothing if the gradient is not finite; its norm, and if so."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, settings.grad_clip).detach()
    skipped = (~torch.isfinite(norm)).float()
    # The fused optimiser reads this on the device, as it does for torch's gradient scaler: the
    # processor need not wait to know.
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
    optimizer.step()
    return norm, skipped
