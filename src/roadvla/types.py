"""What the parts hand to each other: frozen dataclasses of tensors.

Shape legend, the same everywhere:

    T  steps of a rollout            K  action tokens per action (7)
    B  environments                  V  action bins (256)
    N  transitions, T·B flattened    L  prompt tokens
    H, W  image size in pixels       P, D  patches and channels of the vision features

Log-probabilities are in nats and float32; ``action_tokens`` are bin indices in [0, V), ascending
in action value; ``terminated`` and ``truncated`` are Gymnasium's words.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor


@dataclass(frozen=True)
class Observation:
    """What a policy sees.

    Attributes:
        image: RGB frame, 0 to 255.
        prompt: Token ids of the instruction (and hint), padded on the right; the policy that made
            them knows its own pad id.
        vision: Features of a frozen vision tower for ``image``, when they are already known: they
            spare the tower's pass in updates and in the reference critic. ``None``: compute them.
    """

    image: UInt8[Tensor, "*N H W 3"]
    prompt: Int[Tensor, "*N L"]
    vision: Float[Tensor, "*N P D"] | None = None


@dataclass(frozen=True)
class PolicyOutput:
    """What a policy answers when it acts; nothing in it carries gradient.

    Attributes:
        action_tokens: Sampled bins.
        log_probs: Log-probability of each sampled token under the distribution sampled from.
        value: Critic's estimate of the return from here, in units of return.
        logits: Raw (temperature 1) logits over the action bins, when asked for.
        vision: The frozen vision tower's features, for reuse; ``None`` if the tower is trained.
    """

    action_tokens: Int[Tensor, "N K"]
    log_probs: Float[Tensor, "N K"]
    value: Float[Tensor, " N"]
    logits: Float[Tensor, "N K V"] | None = None
    vision: Float[Tensor, "N P D"] | None = None


@dataclass(frozen=True)
class Rollout:
    """T steps of B episodes, all started together.

    Attributes:
        observation: Observations *before* each action, [T, B, ...].
        active: False where the episode had already ended; such steps carry no learning signal.
        last_value: Critic's value of the observation after the last step.
        logits: Behaviour policy's raw logits, kept for rollout-time teachers only.
        outcome: Info of each episode at its last active step, e.g. ``"success"``, each [B].
        last_observation: What followed the last action, kept only when values bootstrap from it.
        hinted_prompt: Prompts with hints, for text-guided teachers only.
        hinted: Where those hold a hint.
    """

    observation: Observation
    action_tokens: Int[Tensor, "T B K"]
    log_probs: Float[Tensor, "T B K"]
    value: Float[Tensor, "T B"]
    reward: Float[Tensor, "T B"]
    terminated: Bool[Tensor, "T B"]
    truncated: Bool[Tensor, "T B"]
    active: Bool[Tensor, "T B"]
    last_value: Float[Tensor, " B"]
    outcome: dict[str, Tensor]
    logits: Float[Tensor, "T B K V"] | None = None
    last_observation: Observation | None = None
    hinted_prompt: Int[Tensor, "T B L2"] | None = None
    hinted: Bool[Tensor, "T B"] | None = None


@dataclass(frozen=True)
class Batch:
    """N active transitions with everything the losses need; no gradient anywhere.

    Attributes:
        advantage: The advantage that the PPO surrogate uses, standardized over the rollout.
        weight: ω of the advantage-guided teacher (Eq. 9), in [-c, c].
        logits: Behaviour policy's raw logits, for rollout-time teachers only.
        hinted_prompt: Prompts with hints, for text-guided teachers only.
        hinted: Where those hold a hint.
    """

    observation: Observation
    action_tokens: Int[Tensor, "N K"]
    old_log_probs: Float[Tensor, "N K"]
    old_value: Float[Tensor, " N"]
    advantage: Float[Tensor, " N"]
    returns: Float[Tensor, " N"]
    weight: Float[Tensor, " N"]
    logits: Float[Tensor, "N K V"] | None = None
    hinted_prompt: Int[Tensor, "N L2"] | None = None
    hinted: Bool[Tensor, " N"] | None = None
