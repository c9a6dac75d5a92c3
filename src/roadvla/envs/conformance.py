"""One conformance test for every vector environment, the suite's and users' own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from roadvla.envs.base import Step, VectorEnv

MakeEnv = Callable[[int], VectorEnv]
"""Builds the environment under test with this many episodes."""

Act = Callable[[VectorEnv], Tensor]
"""Chooses the next action, [B, 7], in an environment that runs."""

_INFO = ("success", "success_once", "grasped", "consecutive_grasp")
_STICKY = ("success_once", "grasped", "consecutive_grasp")
_NUM_ENVS = 4
_FIRST_ID = 5_000_000_000  # beyond 32 bits: some settings have that many episodes


@dataclass(frozen=True)
class Check:
    """Outcome of one requirement.

    Attributes:
        name: What is required.
        failure: What was seen instead, empty if it holds.
    """

    name: str
    failure: str = ""


@dataclass
class _Episode:
    """A recorded batch of episodes under fixed actions."""

    first: Tensor
    instructions: list[str]
    steps: list[Step] = field(default_factory=list)


def check_env(make: MakeEnv, *, act: Act | None = None) -> list[Check]:
    """Put an environment through every requirement of the contract in ``roadvla.envs.base``.

    Random motions seldom grasp anything, and an episode without a grasp says little about rewards
    and info: pass ``act`` if there is something that solves the task.

    Args:
        make: Builds the environment with a given number of episodes.
        act: Plays the episodes that are compared; random motions unless given.

    Returns:
        One entry per requirement; those with a ``failure`` are broken.
    """
    ids = torch.arange(_FIRST_ID, _FIRST_ID + _NUM_ENVS)
    env = make(_NUM_ENVS)
    actions = _actions(env.horizon)
    checks = [Check("refuses a step before reset", _refuses(lambda: env.step(actions[0])))]
    if act is not None:
        actions = _chosen(env, ids, act)
    run = _play(env, ids, actions)
    again = _play(env, ids, actions)
    order = torch.tensor([2, 0, 3, 1])
    permuted = _play(env, ids[order], actions[:, order])
    alone = _play(make(1), ids[1:2], actions[:, 1:2])
    late = _refuses(lambda: env.step(actions[0]))
    checks += [
        Check("gives frames of the announced shape, uint8", _frames(env, run)),
        Check("gives one instruction per episode", _instructions(run)),
        Check("gives rewards, ends and info of the right shape and type", _types(run)),
    ]
    if any(check.failure for check in checks):
        return checks  # the rest would compare apples with pears
    checks += [
        Check("ends every episode at the horizon and not before", _ends(run)),
        Check("rewards the difference of the potential", _potential(run)),
        Check("keeps sticky facts once they are true", _sticky(run)),
        Check("plays the same ids and actions the same again", _same(run, again)),
        Check("plays an episode the same anywhere in a batch", _same(_pick(run, order), permuted)),
        Check("plays an episode the same alone", _same(_pick(run, torch.tensor([1])), alone)),
        Check("gives different episodes for different ids", _different(run)),
        Check("refuses a step after the horizon", late),
        Check("refuses the wrong number of ids", _refuses(lambda: env.reset(ids[:-1]))),
        Check("refuses negative ids", _refuses(lambda: env.reset(ids - 2 * _FIRST_ID))),
    ]
    env.reset(ids)
    checks += [
        Check("refuses actions of another shape", _refuses(lambda: env.step(actions[0, :, :6]))),
        Check("refuses actions that are not finite", _refuses(lambda: env.step(actions[0] / 0))),
        Check("clips actions beyond its limits", _clips(make, ids)),
    ]
    return checks


def _actions(horizon: int) -> Tensor:
    """Random motions, mostly downwards first, with fingers that open and close."""
    generator = torch.Generator().manual_seed(0)
    motion = torch.rand(horizon, _NUM_ENVS, 7, generator=generator) - 0.5
    motion[..., :3] *= 0.06
    motion[: horizon // 2, :, 2] -= 0.02
    motion[..., 6] += 0.5
    return motion


def _chosen(env: VectorEnv, ids: Tensor, act: Act) -> Tensor:
    """What ``act`` does in these episodes, [T, B, 7]."""
    env.reset(ids)
    actions = []
    for _ in range(env.horizon):
        actions.append(act(env).clone())
        env.step(actions[-1])
    return torch.stack(actions)


def _play(env: VectorEnv, ids: Tensor, actions: Tensor) -> _Episode:
    first = env.reset(ids).clone()
    episode = _Episode(first, list(env.instructions))
    for action in actions:
        episode.steps.append(env.step(action.to(env.device)))
    return episode


def _pick(episode: _Episode, index: Tensor) -> _Episode:
    """Select some of a batch's episodes."""
    steps = [
        Step(
            image=step.image[index],
            reward=step.reward[index],
            terminated=step.terminated[index],
            truncated=step.truncated[index],
            info={name: value[index] for name, value in step.info.items()},
        )
        for step in episode.steps
    ]
    return _Episode(episode.first[index], [episode.instructions[i] for i in index], steps)


def _refuses(call: Callable[[], object]) -> str:
    try:
        call()
    except (ValueError, RuntimeError, TypeError):
        return ""
    return "it was accepted"


def _frames(env: VectorEnv, run: _Episode) -> str:
    shape = (_NUM_ENVS, *env.image_shape)
    for image in [run.first, *(step.image for step in run.steps)]:
        if image.shape != shape or image.dtype != torch.uint8:
            return f"{tuple(image.shape)} {image.dtype}, expected {shape} torch.uint8"
    return ""


def _instructions(run: _Episode) -> str:
    if len(run.instructions) != _NUM_ENVS or not all(run.instructions):
        return f"{run.instructions}, expected {_NUM_ENVS} sentences"
    return ""


def _types(run: _Episode) -> str:
    for step in run.steps:
        named = {"terminated": step.terminated, "truncated": step.truncated}
        for name in _INFO:
            if name not in step.info:
                return f"info lacks {name!r}"
            named[name] = step.info[name]
        for name, value in named.items():
            if value.shape != (_NUM_ENVS,) or value.dtype != torch.bool:
                return f"{name} is {tuple(value.shape)} {value.dtype}, expected bool [B]"
        if step.reward.shape != (_NUM_ENVS,) or step.reward.dtype != torch.float32:
            return f"reward is {tuple(step.reward.shape)} {step.reward.dtype}, expected float32 [B]"
        if not bool(torch.isfinite(step.reward).all()):
            return "a reward is not finite"
    return ""


def _ends(run: _Episode) -> str:
    over = torch.zeros_like(run.steps[0].truncated)
    for index, step in enumerate(run.steps):
        last = index == len(run.steps) - 1
        if bool((step.truncated & ~over).any()) != last and not bool(over.all()):
            return f"truncated is {step.truncated.tolist()} at step {index + 1} of {len(run.steps)}"
        over |= step.terminated
    return ""


def _potential(run: _Episode) -> str:
    """Compare the rewards so far with the potential, after every step: none may come late."""
    total = torch.zeros_like(run.steps[0].reward)
    for index, step in enumerate(run.steps):
        total = total + step.reward
        info = step.info
        expected = (
            0.1 * info["grasped"].float()
            + 0.1 * info["consecutive_grasp"].float()
            + (info["success"] & info["grasped"]).float()
        )
        if not torch.allclose(total, expected, atol=1e-5):
            return (
                f"after step {index + 1} the rewards add up to {total.tolist()}, the potential is "
                f"{expected.tolist()}"
            )
    return ""


def _sticky(run: _Episode) -> str:
    for before, after in zip(run.steps, run.steps[1:], strict=False):
        for name in _STICKY:
            if bool((before.info[name] & ~after.info[name]).any()):
                return f"{name} became false again"
    return ""


def _same(first: _Episode, second: _Episode) -> str:
    """Compare: everything bit-identical but frames, which may differ by one level."""
    if first.instructions != second.instructions:
        return f"instructions {first.instructions} and {second.instructions}"
    if _far(first.first, second.first):
        return "the first frames differ by more than 1/255"
    for index, (a, b) in enumerate(zip(first.steps, second.steps, strict=True)):
        pairs = [(a.reward, b.reward), (a.terminated, b.terminated), (a.truncated, b.truncated)]
        pairs += [(a.info[name], b.info[name]) for name in a.info]
        if not all(torch.equal(x, y) for x, y in pairs):
            return f"outcomes differ at step {index + 1}"
        if _far(a.image, b.image):
            return f"frames differ by more than 1/255 at step {index + 1}"
    return ""


def _far(a: Tensor, b: Tensor) -> bool:
    return bool((a.int() - b.int()).abs().max() > 1)


def _different(run: _Episode) -> str:
    if all(torch.equal(run.first[0], image) for image in run.first[1:]):
        return "all first frames are equal"
    return ""


def _clips(make: MakeEnv, ids: Tensor) -> str:
    """A thousand times too far must do what a hundred times too far does."""
    frames = []
    for factor in (1e2, 1e3):
        env = make(_NUM_ENVS)
        env.reset(ids)
        action = torch.full((_NUM_ENVS, 7), factor, device=env.device)
        action[:, 1:6] *= -1
        action[:, 6] = 1.0
        frames.append(env.step(action).image.clone())
    return "" if torch.equal(*frames) else "larger actions still move farther"
