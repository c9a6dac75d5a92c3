"""Experience: B episodes, all started together, acted out to the horizon."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from jaxtyping import Int
from torch import Tensor

from roadvla.envs.base import VectorEnv
from roadvla.policy.base import Critic, Policy
from roadvla.policy.sampling import draw_uniform
from roadvla.types import Observation, PolicyOutput, Rollout
from roadvla.world import World

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
    env: VectorEnv | Sequence[VectorEnv],
    episode_ids: Int[Tensor, " B"],
    *,
    temperature: float,
    generator: torch.Generator | None = None,
    keep_logits: bool = False,
    bootstrap: bool = False,
    observe: Callable[[], None] | None = None,
    world: World | None = None,
) -> Rollout:
    """Act out B episodes; nothing is read from the device on the way.

    Args:
        policy: On the environments' device.
        env: Reset here. Of several, which share the B episodes, one is stepped in a thread of its
            own while the policy acts in another; the result is the same as one after the other.
        episode_ids: Which episodes.
        temperature: Of the action sampling.
        generator: Source of the action sampling, the same in every process of ``world``.
        keep_logits: Whether to keep the behaviour policy's logits, for rollout-time teachers.
        bootstrap: Whether to keep the observation after the last step and its value.
        observe: Called before every action, for those who watch the one environment.
        world: The processes whose episodes follow each other; this one alone unless given.
    """
    envs = [env] if isinstance(env, VectorEnv) else list(env)
    noise = _Noise(policy, generator, len(episode_ids), world or World(), split=len(envs) > 1)
    buffer = _Buffer(envs[0].horizon, len(episode_ids))
    with _stepping(len(envs)) as start:
        edges = [0, *itertools.accumulate(one.num_envs for one in envs)]
        parts = [
            _Part(one, buffer, slice(*rows))
            for one, rows in zip(envs, itertools.pairwise(edges), strict=True)
        ]
        waiting = [start(part.reset, episode_ids[part.rows]) for part in parts]
        for ready in waiting:
            ready()
        prompt = policy.tokenize([text for one in envs for text in one.instructions])
        for t in range(envs[0].horizon):
            if observe is not None:
                observe()
            uniform = noise.draw()
            for index, part in enumerate(parts):
                waiting[index]()
                output = policy.act(
                    Observation(image=part.image, prompt=prompt[part.rows]),
                    temperature=temperature,
                    generator=generator,
                    uniform=None if uniform is None else uniform[part.rows],
                    keep_logits=keep_logits,
                )
                action = policy.decode(output.action_tokens)
                waiting[index] = start(part.step, t, action, output)
        for ready in waiting:
            ready()
    info = {name: torch.cat([part.info[name] for part in parts]) for name in parts[0].info}
    info["lost"] = _discard(buffer.tensors, info.get("lost"))
    image = torch.cat([part.image for part in parts])
    last = Observation(image=image, prompt=prompt) if bootstrap else None
    return _rollout(policy, buffer.tensors, prompt, info, last)


def _discard(tensors: dict[str, Tensor], lost: Tensor | None) -> Tensor:
    """Leave out, as never lived, episodes that were lost or paid what is no number; say which."""
    reward = tensors["reward"]
    broken = ~torch.isfinite(reward).all(0)
    lost = broken if lost is None else broken | lost
    tensors["reward"] = reward.masked_fill(lost, 0.0)
    tensors["active"] = tensors["active"] & ~lost
    return lost


def _rollout(
    policy: Policy,
    tensors: dict[str, Tensor],
    prompt: Tensor,
    info: dict[str, Tensor],
    last: Observation | None,
) -> Rollout:
    return Rollout(
        observation=Observation(
            image=tensors["image"],
            prompt=prompt.expand(len(tensors["image"]), *prompt.shape),
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
        outcome=info,
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


class _Part:
    """One environment, and where its episodes stand among the B."""

    def __init__(self, env: VectorEnv, buffer: _Buffer, rows: slice) -> None:
        self.env, self.rows = env, rows
        self._buffer = buffer
        self.info: dict[str, Tensor] = {}

    def reset(self, episode_ids: Tensor) -> None:
        self.image = self.env.reset(episode_ids)
        shape = (self.env.num_envs,)
        self._active = torch.ones(shape, dtype=torch.bool, device=self.env.device)

    def step(self, t: int, action: Tensor, output: PolicyOutput) -> None:
        before = self.image
        step = self.env.step(action)
        self._buffer.write(
            t,
            self.rows,
            image=before,
            active=self._active,
            terminated=step.terminated,
            truncated=step.truncated,
            reward=step.reward,
            action_tokens=output.action_tokens,
            log_probs=output.log_probs,
            value=output.value,
            logits=output.logits,
            vision=output.vision,
        )
        self._active = self._active & ~(step.terminated | step.truncated)
        self.image, self.info = step.image, dict(step.info)


class _Noise:
    """The numbers that decide the sampling, drawn for the episodes of all processes and cut."""

    def __init__(
        self,
        policy: Policy,
        generator: torch.Generator | None,
        count: int,
        world: World,
        *,
        split: bool,
    ) -> None:
        self._all, self._tokens, self._generator = count * world.size, policy.num_tokens, generator
        self._rows = world.rows(self._all)
        self._alone = world.size == 1 and not split

    def draw(self) -> Tensor | None:
        """Those of one step; ``None`` where the policy can draw them itself."""
        if self._alone:
            return None
        return draw_uniform(self._all, self._tokens, self._generator)[self._rows]


@contextmanager
def _stepping(count: int) -> Iterator[Callable[..., Callable[[], object]]]:
    """Start work at once and give what waits for it; with several parts, in threads."""

    def at_once(work: Callable[..., object], *arguments: object) -> Callable[[], object]:
        work(*arguments)
        return lambda: None

    if count == 1:
        yield at_once
        return
    with ThreadPoolExecutor(count, thread_name_prefix="roadvla-simulation") as pool:
        yield lambda work, *arguments: pool.submit(work, *arguments).result


class _Buffer:
    """Tensors [T, B, ...], allocated when the first step shows their shapes."""

    def __init__(self, steps: int, count: int) -> None:
        self._steps, self._count = steps, count
        self._allocating = threading.Lock()
        self.tensors: dict[str, Tensor] = {}

    def write(self, t: int, rows: slice, **values: Tensor | None) -> None:
        for name, value in values.items():
            if value is None:
                continue
            if t == 0:
                self._allocate(name, value)
            self.tensors[name][t, rows] = value

    def _allocate(self, name: str, like: Tensor) -> None:
        with self._allocating:
            if name not in self.tensors:
                shape = (self._steps, self._count, *like.shape[1:])
                self.tensors[name] = like.new_empty(shape)
