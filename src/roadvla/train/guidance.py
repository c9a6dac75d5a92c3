"""From a rollout to a batch: advantages, the weight ω, and only the steps that were lived."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from roadvla.objective import (
    gae,
    grpo_advantage,
    mixed_advantage,
    perturbation_weight,
    standardize,
)
from roadvla.train.config import Algorithm
from roadvla.types import Batch, Observation, Rollout
from roadvla.world import World

_OUTCOMES = ("success", "success_once", "grasped", "lost")


@dataclass(frozen=True)
class Judged:
    """What the episodes of all processes earned, and what critics made of them."""

    reward: Float[Tensor, "T B"]
    value: Float[Tensor, "T B"]
    last_value: Float[Tensor, " B"]
    terminated: Bool[Tensor, "T B"]
    truncated: Bool[Tensor, "T B"]
    active: Bool[Tensor, "T B"]
    outcome: dict[str, Tensor]
    reference: tuple[Float[Tensor, "T B"], Float[Tensor, " B"]] | None = None


@dataclass(frozen=True)
class Guidance:
    """What the active steps of a rollout are worth, without gradient.

    Attributes:
        advantage: Â_int, or Eq. 8's mix, in units of return.
        returns: Targets of the value head.
        weight: ω (Eq. 9).
        agree: Where both critics have the same sign (Eq. 8); ``None`` without a reference.
    """

    advantage: Float[Tensor, " N"]
    returns: Float[Tensor, " N"]
    weight: Float[Tensor, " N"]
    agree: Bool[Tensor, " N"] | None


def guide(
    rollout: Rollout,
    algorithm: Algorithm,
    reference: tuple[Tensor, Tensor] | None,
    *,
    generator: torch.Generator | None = None,
    world: World | None = None,
) -> tuple[Batch, dict[str, Tensor]]:
    """Turn a rollout into training data (Algorithm 1, step 2).

    What every step is worth is found from the rewards and values of all processes together, in
    each of them alike: means and deviations (Eq. 7-9) are those of the whole rollout.

    Args:
        rollout: T steps of this process's B episodes.
        algorithm: Settings.
        reference: The reference critic's values [T, B] and last values [B], if it is mixed in.
        generator: Source of the order in which ``control`` shuffles, the same in every process.
        world: The processes whose episodes make the rollout; this one alone unless given.

    Returns:
        This process's active transitions, and metrics of the whole rollout and of its guidance as
        scalars on the device.
    """
    world = world or World()
    judged = _gathered(rollout, reference, world)
    if algorithm.algo == "grpo":
        guidance, surrogate = _outcome_guidance(judged, algorithm)
    else:
        guidance, surrogate = _critic_guidance(judged, algorithm, generator)
    metrics = _guidance_metrics(judged, guidance, has_critic=algorithm.algo != "grpo")
    if rollout.hinted is not None:
        known = world.gather(rollout.hinted, 1)[judged.active]
        metrics["guidance/hinted"] = known.float().mean()
    if world.size > 1:
        guidance, surrogate = _own(guidance, surrogate, judged.active, world)
    where = rollout.active.flatten().nonzero().squeeze(1)
    seen = rollout.observation
    batch = Batch(
        observation=Observation(
            image=_take(seen.image, where),
            prompt=_take(seen.prompt, where),
            vision=None if seen.vision is None else _take(seen.vision, where),
        ),
        action_tokens=_take(rollout.action_tokens, where),
        old_log_probs=_take(rollout.log_probs, where),
        old_value=_take(rollout.value, where),
        advantage=surrogate,
        returns=guidance.returns,
        weight=guidance.weight,
        logits=None if rollout.logits is None else _take(rollout.logits, where),
        hinted_prompt=None
        if rollout.hinted_prompt is None
        else _take(rollout.hinted_prompt, where),
        hinted=None if rollout.hinted is None else _take(rollout.hinted, where),
    )
    return batch, {**rollout_metrics(judged), **metrics}


def time_step_share(weight: Float[Tensor, " N"], active: Bool[Tensor, "T B"]) -> Float[Tensor, ""]:
    """Share of the weight's variance that its mean per time step explains, in [0, 1].

    Args:
        weight: Of the active steps, in the order of ``active`` flattened.
        active: Which steps those are.
    """
    counts = active.sum(1).to(weight.dtype)
    means = _step_means(weight, active)
    between = (counts * (means - weight.mean()).square()).sum()
    total = (weight - weight.mean()).square().sum()
    return torch.where(total > 0, between / total.clamp(min=1e-30), torch.zeros_like(total))


def centre_by_step(values: Float[Tensor, " N"], active: Bool[Tensor, "T B"]) -> Float[Tensor, " N"]:
    """Take each time step's mean out of the values of the active steps.

    Args:
        values: Of the active steps, in the order of ``active`` flattened.
        active: Which steps those are.
    """
    return values - _step_means(values, active)[:, None].expand(active.shape)[active]


def explained_variance(
    value: Float[Tensor, " N"], returns: Float[Tensor, " N"]
) -> Float[Tensor, ""]:
    """Share of the returns' variance that the values explain; 0 where the returns are constant."""
    total = returns.var(correction=0)
    rest = (returns - value).var(correction=0)
    return torch.where(total > 0, 1 - rest / total.clamp(min=1e-30), torch.zeros_like(total))


def rollout_metrics(rollout: Rollout | Judged) -> dict[str, Tensor]:
    """Average the outcomes of the episodes that were not lost, and count those that were."""
    outcome = rollout.outcome
    kept = (~outcome["lost"]).float()
    count = kept.sum()
    return {
        "rollout/success_rate": (outcome["success"] * kept).sum() / count,
        "rollout/success_once": (outcome["success_once"] * kept).sum() / count,
        "rollout/grasp_rate": (outcome["grasped"] * kept).sum() / count,
        "rollout/return": rollout.reward.sum() / count,
        "rollout/lost_episodes": (1 - kept).sum(),
    }


def _critic_guidance(
    rollout: Judged, algorithm: Algorithm, generator: torch.Generator | None
) -> tuple[Guidance, Float[Tensor, " N"]]:
    """Eq. 7-9 over the active steps, and the standardized advantage of the PPO surrogate."""
    active = rollout.active
    advantages, returns = _gae(rollout, algorithm, rollout.value, rollout.last_value)
    mixed, agree = advantages[active], None
    if rollout.reference is not None:
        advantages_ref, _ = _gae(rollout, algorithm, *rollout.reference)
        mixed, agree = mixed_advantage(
            mixed,
            advantages_ref[active],
            alpha=algorithm.alpha,
            eps=algorithm.eps,
            gate=algorithm.gate,
        )
    chosen = mixed if algorithm.surrogate_advantage == "mix" else advantages[active]
    centred = algorithm.control == "time_centred"
    weight = perturbation_weight(
        centre_by_step(mixed, active) if centred else mixed,
        clip=algorithm.clip,
        eps=algorithm.eps,
        positive_only=algorithm.positive_only,
    )
    if centred and algorithm.algo == "ppo":
        chosen = centre_by_step(chosen, active)
    surrogate = standardize(chosen, eps=algorithm.eps)
    if algorithm.algo == "ppo":
        surrogate = _controlled(surrogate, algorithm, generator)
    else:
        weight = _controlled(weight, algorithm, generator)
    return Guidance(mixed, returns[active], weight, agree), surrogate


def _controlled(values: Tensor, algorithm: Algorithm, generator: torch.Generator | None) -> Tensor:
    """Take from the values what they say about each step, if a control asks for it."""
    if algorithm.control == "uniform":
        return torch.ones_like(values)
    if algorithm.control == "shuffled":
        return values[torch.randperm(len(values), generator=generator, device=values.device)]
    return values


def _outcome_guidance(
    rollout: Judged, algorithm: Algorithm
) -> tuple[Guidance, Float[Tensor, " N"]]:
    """GRPO's advantage, standardized already, as surrogate and as weight; no critic learns."""
    grouped = algorithm.grpo_form == "group"
    advantage = grpo_advantage(
        rollout.reward,
        form=algorithm.grpo_form,
        group_size=algorithm.group_size if grouped else None,
        eps=algorithm.eps,
    )[rollout.active]
    weight = advantage.clamp(-algorithm.clip, algorithm.clip)
    return Guidance(advantage, torch.zeros_like(advantage), weight, None), advantage


def _step_means(values: Float[Tensor, " N"], active: Bool[Tensor, "T B"]) -> Float[Tensor, " T"]:
    """Average over the active episodes at each time step; 0 where there is none."""
    full = values.new_zeros(active.shape)
    full[active] = values
    return full.sum(1) / active.sum(1).clamp(min=1)


def _gae(
    rollout: Judged, algorithm: Algorithm, values: Tensor, last_value: Tensor
) -> tuple[Tensor, Tensor]:
    return gae(
        rollout.reward,
        values,
        last_value,
        rollout.terminated,
        rollout.truncated,
        gamma=algorithm.gamma,
        lam=algorithm.lam,
        bootstrap_truncated=algorithm.bootstrap_truncated,
    )


def _guidance_metrics(
    rollout: Judged, guidance: Guidance, *, has_critic: bool
) -> dict[str, Tensor]:
    weight = guidance.weight
    metrics = {
        "guidance/weight_mean": weight.mean(),
        "guidance/weight_positive": (weight > 0).float().mean(),
        "guidance/time_step_share": time_step_share(weight, rollout.active),
    }
    if has_critic:
        value = rollout.value[rollout.active]
        metrics["critic/explained_variance"] = explained_variance(value, guidance.returns)
        metrics["critic/value_mean"] = value.mean()
    if guidance.agree is not None:
        metrics["guidance/agreement"] = guidance.agree.float().mean()
    return metrics


def _gathered(rollout: Rollout, reference: tuple[Tensor, Tensor] | None, world: World) -> Judged:
    """Bring together what every process's episodes earned and were thought to be worth."""
    return Judged(
        reward=world.gather(rollout.reward, 1),
        value=world.gather(rollout.value, 1),
        last_value=world.gather(rollout.last_value),
        terminated=world.gather(rollout.terminated, 1),
        truncated=world.gather(rollout.truncated, 1),
        active=world.gather(rollout.active, 1),
        outcome={name: world.gather(rollout.outcome[name]) for name in _OUTCOMES},
        reference=None
        if reference is None
        else (world.gather(reference[0], 1), world.gather(reference[1])),
    )


def _own(
    guidance: Guidance, surrogate: Tensor, active: Tensor, world: World
) -> tuple[Guidance, Tensor]:
    """Keep what belongs to this process's episodes."""
    columns = torch.zeros_like(active)
    columns[:, world.rows(active.shape[1])] = True
    mine = columns[active]
    agree = None if guidance.agree is None else guidance.agree[mine]
    own = Guidance(guidance.advantage[mine], guidance.returns[mine], guidance.weight[mine], agree)
    return own, surrogate[mine]


def _take(tensor: Tensor, where: Tensor) -> Tensor:
    """Select transitions from [T, B, ...]; all of them without a copy of what is contiguous."""
    flat = tensor.flatten(0, 1)
    return flat if len(where) == len(flat) else flat[where]
