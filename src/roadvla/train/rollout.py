"""Experience: B episodes, all started together, acted out to the horizon."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from roadvla.envs.base import VectorEnv
from roadvla.policy.base import Critic, Policy
from roadvla.types import Observation, PolicyOutput, Rollout

_EPISODES_PER_SEED = 1_000_000


def training_episode_ids(
    seed: int, first: int, count: int, *, repeats: int = 1, device: torch.device | str = "cpu"
) -> Int[Tensor, " B"]:
    """Number the next training episodes; evaluation's, which count from 0, are never among them.

    Args:
        seed: Of the run; each seed has a million episodes of its own.
        first: Episodes already used.
        count: B.
        repeats: Consecutive environments that share one episode (GRPO's group).
        device: Of the result.
    """
    start = _EPISODES_PER_SEED * (seed + 1) + first
    return start + torch.arange(count, device=device) // repeats


def collect(
    policy: Policy,
    env: VectorEnv,
    episode_ids: Int[Tensor, " B"],
    *,
    temperature: float,
    generator: torch.Generator | None = None,
    keep_logits: bool = False,
    bootstrap: bool = False,
    observe: Callable[[], None] | None = None,
) -> Rollout:
    """Act out B episodes; nothing is read from the device on the way.

    Args:
        policy: On the environment's device.
        env: Reset here.
        episode_ids: Which episodes.
        temperature: Of the action sampling.
        generator: Source of the action sampling.
        keep_logits: Whether to keep the behaviour policy's logits, for rollout-time teachers.
        bootstrap: Whether to keep the observation after the last step and its value.
        observe: Called before every action, for those who watch the environment.
    """
    image = env.reset(episode_ids)
    prompt = policy.tokenize(env.instructions)
    buffer = _Buffer(env, image)
    active = torch.ones(env.num_envs, dtype=torch.bool, device=env.device)
    info: dict[str, Tensor] = {}
    for t in range(env.horizon):
        if observe is not None:
            observe()
        output = policy.act(
            Observation(image=image, prompt=prompt),
            temperature=temperature,
            generator=generator,
            keep_logits=keep_logits,
        )
        step = env.step(policy.decode(output.action_tokens))
        buffer.write(t, image=image, active=active, terminated=step.terminated)
        buffer.write(t, truncated=step.truncated, reward=step.reward)
        buffer.write_output(t, output)
        active = active & ~(step.terminated | step.truncated)
        image, info = step.image, step.info
    last = Observation(image=image, prompt=prompt) if bootstrap else None
    tensors = buffer.tensors
    return Rollout(
        observation=Observation(
            image=tensors["image"],
            prompt=prompt.expand(env.horizon, *prompt.shape),
            vision=tensors.get("vision"),
        ),
        action_tokens=tensors["action_tokens"],
        log_probs=tensors["log_probs"],
        value=tensors["value"],
        reward=tensors["reward"],
        terminated=tensors["terminated"],
        truncated=tensors["truncated"],
        active=tensors["active"],
        last_value=torch.zeros_like(tensors["value"][0]) if last is None else _value(policy, last),
        outcome=dict(info),
        logits=tensors.get("logits"),
        last_observation=last,
    )


@torch.no_grad()
def reference_values(
    critic: Critic, rollout: Rollout, *, share_vision: bool
) -> tuple[Tensor, Tensor]:
    """Let another critic judge a rollout, one time step of B observations at once.

    Args:
        critic: Frozen.
        rollout: What the live policy did.
        share_vision: Whether the rollout's vision features are those the critic would compute.

    Returns:
        Its values, [T, B], and those of the observation after the last step, [B] (zero unless the
        rollout kept that observation).
    """
    seen = rollout.observation
    vision = seen.vision if share_vision else None
    values = torch.empty_like(rollout.value)
    for t in range(len(values)):
        values[t] = critic.value(
            Observation(
                image=seen.image[t],
                prompt=seen.prompt[t],
                vision=None if vision is None else vision[t],
            )
        )
    if rollout.last_observation is None:
        return values, torch.zeros_like(rollout.last_value)
    return values, critic.value(rollout.last_observation)


@torch.no_grad()
def _value(policy: Policy, observation: Observation) -> Tensor:
    return policy.value(observation)


class _Buffer:
    """Tensors [T, B, ...], allocated when the first step shows their shapes."""

    def __init__(self, env: VectorEnv, image: Tensor) -> None:
        self._steps = env.horizon
        self.tensors: dict[str, Tensor] = {}
        self._allocate("image", image)

    def write(self, t: int, **values: Tensor) -> None:
        for name, value in values.items():
            if t == 0:
                self._allocate(name, value)
            self.tensors[name][t] = value

    def write_output(self, t: int, output: PolicyOutput) -> None:
        for name in ("action_tokens", "log_probs", "value", "logits", "vision"):
            value = getattr(output, name)
            if value is not None:
                self.write(t, **{name: value})

    def _allocate(self, name: str, like: Tensor) -> None:
        self.tensors[name] = like.new_empty((self._steps, *like.shape))
