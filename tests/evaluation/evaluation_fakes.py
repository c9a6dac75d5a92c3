"""A policy and an environment of a few lines, whose outcomes can be worked out by hand."""

from __future__ import annotations

import torch

from roadvla.envs.base import Step
from roadvla.types import PolicyOutput


class CountingEnv:
    """Succeeds while the gripper commands so far say so; records which ids it was given.

    An episode whose id is divisible by 3 succeeds at every step from the first on. One with
    remainder 1 succeeds in the middle only; one with remainder 2 never does, but grasps when odd.
    """

    def __init__(self, num_envs, *, horizon=4):
        self.num_envs, self.horizon = num_envs, horizon
        self.image_shape, self.device = (2, 2, 3), torch.device("cpu")
        self.ids, self.resets, self.actions = torch.zeros(0), [], []

    @property
    def instructions(self):
        return [f"do {i}" for i in self.ids.tolist()]

    def reset(self, episode_ids):
        assert episode_ids.dtype == torch.int64
        assert len(episode_ids) == self.num_envs
        self.ids, self.step_count = episode_ids, 0
        self.resets.append(episode_ids.tolist())
        self.once = torch.zeros(self.num_envs, dtype=torch.bool)
        self.frame = torch.zeros(self.num_envs, 2, 2, 3, dtype=torch.uint8)
        self.frame += (10 * episode_ids % 250).to(torch.uint8)[:, None, None, None]
        return self.frame

    def step(self, action):
        self.step_count += 1
        self.actions.append(action.clone())
        success = self.ids % 3 == 0
        if self.step_count == 2:
            success = success | (self.ids % 3 == 1)
        self.once = self.once | success
        self.frame += 1  # in place: whoever keeps a frame has to copy it
        grasped = self.once | (self.ids % 2 == 1)
        last = torch.full((self.num_envs,), self.step_count == self.horizon)
        info = {
            "success": success,
            "success_once": self.once.clone(),
            "grasped": grasped,
            "consecutive_grasp": grasped,
        }
        return Step(self.frame, torch.zeros(self.num_envs), torch.zeros_like(last), last, info)


class RandomPolicy:
    """Samples every token uniformly from the generator it is given."""

    num_tokens, num_bins = 7, 256

    def __init__(self):
        self.prompts, self.temperatures = [], set()

    def tokenize(self, instructions):
        self.prompts.append(list(instructions))
        return torch.zeros(len(instructions), 3, dtype=torch.int64)

    def act(self, observation, *, temperature, generator=None, uniform=None, keep_logits=False):
        self.temperatures.add(temperature)
        count = len(observation.image)
        tokens = torch.randint(0, 256, (count, 7), generator=generator)
        return PolicyOutput(tokens, torch.zeros(count, 7), torch.zeros(count))

    def decode(self, action_tokens):
        return action_tokens / 255

    def _unused(self, *_):
        raise AssertionError("an evaluation needs no such thing")

    evaluate = value = encode = shares_vision = policy_parameters = value_parameters = _unused
