"""What an expert does in a batch of episodes, cut and filtered to what is worth learning from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from roadvla.envs.base import VectorEnv
from roadvla.train.experts import Expert

LEAST_TRANSLATION, LEAST_ROTATION = 0.01, 0.06
"""RL4VLA's small-action filter: motions up to these lengths, metres and radians, are small."""


@dataclass(frozen=True)
class Trajectory:
    """The part of a successful episode that is kept, S steps.

    Attributes:
        episode_id: The episode.
        image: Frame before each action.
        action: Metres, radians, gripper in [0, 1] (1 opens).
        instruction: What was asked for.
    """

    episode_id: int
    image: UInt8[Tensor, "S H W 3"]
    action: Float[Tensor, "S 7"]
    instruction: str


def act_out(
    env: VectorEnv,
    episode_ids: Int[Tensor, " B"],
    act: Expert,
    gain: Float[Tensor, " B"],
    generator: torch.Generator,
    *,
    tail: int,
    drop_small: bool,
) -> tuple[list[int], list[Trajectory]]:
    """Let the expert act in one batch of episodes.

    An episode is cut ``tail`` steps after the first that succeeds with the gripper open: on
    ManiSkill an object can lie on its receptacle while it is still held. One that succeeds but is
    never let go of teaches nothing about the end, and is left out.

    Args:
        env: B environments.
        episode_ids: What to start.
        act: The expert.
        gain: Its gain in each episode.
        generator: Of its noise.
        tail: Steps kept after the first success.
        drop_small: Whether steps that hardly move are left out, see ``keeps``.

    Returns:
        The episodes that had succeeded at their last step, and their trajectories.
    """
    frame, count = env.reset(episode_ids), env.num_envs
    instructions = list(env.instructions)
    frames: list[list[Tensor]] = [[] for _ in range(count)]
    actions: list[list[Tensor]] = [[] for _ in range(count)]
    released = [False] * count
    left = [env.horizon] * count  # steps to record; whole episodes would need twice the memory
    success = torch.zeros(count, dtype=torch.bool)
    for _ in range(env.horizon):
        action = act(env, gain, generator)
        seen, done = frame.cpu(), action.cpu()
        step = env.step(action)
        success = step.info["success"].cpu()
        let_go = (success & (done[:, 6] > 0.5)).tolist()
        for b in range(count):
            if left[b]:
                frames[b].append(seen[b].clone())
                actions[b].append(done[b].clone())
                left[b] -= 1
            if let_go[b] and not released[b]:
                released[b], left[b] = True, tail
        frame = step.image
    succeeded = success.nonzero().flatten().tolist()
    kept: list[Trajectory] = []
    for b in succeeded:
        image, action = torch.stack(frames[b]), torch.stack(actions[b])
        steps = keeps(action) if drop_small else torch.ones(len(action), dtype=torch.bool)
        if released[b] and bool(steps.any()):
            name = int(episode_ids[b])
            kept.append(Trajectory(name, image[steps], action[steps], instructions[b]))
    return [int(episode_ids[b]) for b in succeeded], kept


def keeps(action: Float[Tensor, "S 7"]) -> Bool[Tensor, " S"]:
    """Say which steps of an episode RL4VLA's small-action filter keeps.

    Those that move or turn the hand by more than ``LEAST_TRANSLATION`` or ``LEAST_ROTATION``, and
    those whose gripper value is not that of the step before, whether that one is kept or not.
    """
    moves = action[:, :3].norm(dim=1) > LEAST_TRANSLATION
    turns = action[:, 3:6].norm(dim=1) > LEAST_ROTATION
    grips = torch.zeros_like(moves)
    grips[1:] = action[1:, 6] != action[:-1, 6]
    return moves | turns | grips
