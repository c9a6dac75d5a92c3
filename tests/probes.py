"""An environment whose best action is known, and a policy small enough to see through.

Each frame shows one of four colours. The right first action token is the colour's number; every
right action earns 1/T. The policy is a table: logits and value are linear in the colour.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from roadvla.envs.base import Step
from roadvla.policy.base import Policy
from roadvla.policy.sampling import draw_uniform, sample_tokens
from roadvla.train.config import (
    Algorithm,
    EvaluationConfig,
    Experiment,
    Optimizer,
    RolloutConfig,
)
from roadvla.train.parts import Parts
from roadvla.types import Batch, Observation, PolicyOutput

COLOURS = 4
TOKENS = 7
BINS = 4


class ColourEnv:
    """Four steps of naming colours."""

    image_shape = (4, 4, 3)
    horizon = 4

    def __init__(self, num_envs: int, *, end_on_success: bool = False) -> None:
        self.num_envs, self.end_on_success = num_envs, end_on_success
        self.device = torch.device("cpu")
        self.instructions = ["name the colour"] * num_envs

    def reset(self, episode_ids: torch.Tensor) -> torch.Tensor:
        self.ids, self.t = episode_ids, 0
        self.once = torch.zeros(self.num_envs, dtype=torch.bool)
        self.ended = self.once.clone()
        return self._image()

    def step(self, action: torch.Tensor) -> Step:
        hit = (action[:, 0].round().long() == self.colour()) & ~self.ended
        self.once = self.once | hit
        terminated = hit & self.end_on_success
        self.ended = self.ended | terminated
        self.t += 1
        last = torch.full_like(hit, self.t == self.horizon)
        info = dict.fromkeys(("grasped", "success_once", "consecutive_grasp"), self.once)
        return Step(
            image=self._image(),
            reward=hit.float() / self.horizon,
            terminated=terminated,
            truncated=last & ~self.ended,
            info={"success": hit | self.ended, **info},
        )

    def colour(self) -> torch.Tensor:
        return (((self.ids * 7919 + self.t * 104729) * 2654435761) >> 9) % COLOURS

    def _image(self) -> torch.Tensor:
        colour = self.colour()
        image = torch.zeros(self.num_envs, 4, 4, 3, dtype=torch.uint8)
        image[..., 0] = (colour * 60)[:, None, None].to(torch.uint8)
        return image


def make_colour_env(env, *, split, num_envs, sim="probe", device="cpu", end_on_success=False):
    return ColourEnv(num_envs, end_on_success=end_on_success)


class TablePolicy(nn.Module):
    """Logits [K, V] and a value per colour, times the gain of each bin."""

    num_tokens, num_bins = TOKENS, BINS

    def __init__(self, *, keeps_vision: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.table = nn.Parameter(0.5 * torch.randn(COLOURS, TOKENS, BINS, generator=generator))
        self.value_head = nn.Parameter(torch.zeros(COLOURS))
        self.keeps_vision = keeps_vision
        self.looks = 0

    def tokenize(self, instructions):
        return torch.ones(len(instructions), 2, dtype=torch.int64)

    def _colour(self, observation: Observation) -> torch.Tensor:
        if observation.vision is not None:
            return observation.vision[:, 0]
        self.looks += len(observation.image)
        number = observation.image[:, 0, 0, 0].long() // 60
        return nn.functional.one_hot(number, COLOURS).float()

    @torch.no_grad()
    def act(self, observation, *, temperature, generator=None, uniform=None, keep_logits=False):
        colour = self._colour(observation)
        logits = torch.einsum("nc,ckv->nkv", colour, self.table)
        if uniform is None:
            uniform = draw_uniform(len(colour), TOKENS, generator)
        scaled = (logits / max(temperature, 1e-6)).flatten(0, 1)
        tokens, log_probs = sample_tokens(scaled, uniform.flatten())
        return PolicyOutput(
            action_tokens=tokens.unflatten(0, (-1, TOKENS)),
            log_probs=log_probs.unflatten(0, (-1, TOKENS)),
            value=colour @ self.value_head,
            logits=logits if keep_logits else None,
            vision=colour[:, None] if self.keeps_vision else None,
        )

    def evaluate(self, observation, action_tokens):
        colour = self._colour(observation)
        return torch.einsum("nc,ckv->nkv", colour, self.table), colour @ self.value_head

    def value(self, observation):
        return self._colour(observation) @ self.value_head

    def decode(self, action_tokens):
        return action_tokens.float()

    def encode(self, action):
        return action.round().long().clamp(0, BINS - 1)

    def shares_vision(self, other: object) -> bool:
        return isinstance(other, TablePolicy)

    def policy_parameters(self):
        return [self.table]

    def value_parameters(self):
        return [self.value_head]

    def hit_rate(self) -> float:
        """How often the right first token would be drawn."""
        probs = self.table[:, 0].softmax(-1)
        return float(probs.diagonal().mean().detach())


def save_table(policy: TablePolicy, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(policy.state_dict(), folder / "policy.safetensors")
    (folder / "policy.json").write_text(json.dumps({"kind": "table"}))


def load_table(folder: Path, device="cpu") -> TablePolicy:
    policy = TablePolicy()
    policy.load_state_dict(load_file(folder / "policy.safetensors"))
    return policy


def load_fresh(device="cpu") -> Policy:
    return TablePolicy()


PARTS = Parts(
    make_env=make_colour_env,
    load_policy=load_table,
    load_backbone=load_fresh,
    save_policy=save_table,
)


def probe_experiment(output: Path | str, *, algorithm: Algorithm | None = None, **changes):
    """Twelve iterations of 16 episodes of 4 steps."""
    settings = {
        "optimizer": Optimizer(learning_rate=0.1, value_learning_rate=0.05, minibatch=32),
        "rollout": RolloutConfig(num_envs=16, total_env_steps=12 * 64),
        "evaluation": EvaluationConfig(every=4, episodes=16, final_episodes=16),
        "checkpoint_every": 3,
        **changes,
    }
    return Experiment(
        name="probe",
        output=str(output),
        algorithm=algorithm or Algorithm(epochs=2, entropy_coef=0.0),
        **settings,
    )


def prompt_batch(policy: Policy, count: int) -> Batch:
    """A batch of noise for the small VLA."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (count, 48, 48, 3), generator=generator, dtype=torch.uint8)
    observation = Observation(image, policy.tokenize(["put carrot on plate"] * count))
    tokens = torch.randint(0, policy.num_bins, (count, 7), generator=generator)
    with torch.no_grad():
        logits, value = policy.evaluate(observation, tokens)
    log_probs = logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    advantage, returns = torch.randn(2, count, generator=generator)
    return Batch(observation, tokens, log_probs, value, advantage, returns, advantage.clamp(-2, 2))
