"""The conformance test finds what it is meant to find: each broken environment fails one check."""

from __future__ import annotations

import dataclasses
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env as gymnasium_check

import roadvla.envs.gym  # noqa: F401  (registers the suite)
from roadvla.envs.conformance import check_env
from roadvla.envs.tabletop import TabletopEnv, expert


class Broken(TabletopEnv):
    """A tabletop whose steps are spoiled by ``spoil``."""

    spoil: Any = staticmethod(lambda env, step: step)

    def step(self, action: torch.Tensor) -> Any:
        return type(self).spoil(self, super().step(action))


def failures(spoil: Any, act: Any = None) -> set[str]:
    kind = type("Spoiled", (Broken,), {"spoil": staticmethod(spoil)})
    checks = check_env(
        lambda count: kind("ER-Repositioning", split="test", num_envs=count), act=act
    )
    return {check.name for check in checks if check.failure}


def solve(env: Any) -> torch.Tensor:
    return expert.act(env, gain=0.7, noise=0.0)


@pytest.mark.parametrize("act", [None, solve], ids=["random", "expert"])
def test_the_unspoiled_one_passes(act: Any) -> None:
    assert failures(lambda env, step: step, act) == set()


def pay_late(env: Any, step: Any) -> Any:
    """Pay a step later than earned, the last two together: the sum over the episode is right."""
    owed = getattr(env, "owed", 0.0)
    last = bool(step.truncated.all())
    env.owed = 0.0 if last else step.reward
    return dataclasses.replace(step, reward=owed + step.reward * last)


def test_late_rewards_fail_where_there_are_some() -> None:
    # Only the expert earns any: without it there is nothing to be late.
    assert failures(pay_late, solve) == {"rewards the difference of the potential"}
    assert failures(pay_late) == set()


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (
            lambda env, step: dataclasses.replace(step, reward=step.reward + 0.01),
            "rewards the difference of the potential",
        ),
        (
            lambda env, step: dataclasses.replace(step, image=step.image.float()),
            "gives frames of the announced shape, uint8",
        ),
        (
            lambda env, step: dataclasses.replace(step, truncated=torch.zeros_like(step.truncated)),
            "ends every episode at the horizon and not before",
        ),
        (
            lambda env, step: dataclasses.replace(step, info={**step.info, "success": step.reward}),
            "gives rewards, ends and info of the right shape and type",
        ),
        (
            lambda env, step: dataclasses.replace(
                step, info={**step.info, "noise": torch.rand(env.num_envs) > 0.5}
            ),
            "plays the same ids and actions the same again",
        ),
        (
            lambda env, step: dataclasses.replace(
                step, info={**step.info, "slot": torch.arange(env.num_envs) > 1}
            ),
            "plays an episode the same anywhere in a batch",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")  # the shape checks would object before the check does
def test_spoiled_ones_fail(spoil: Any, name: str) -> None:
    assert name in failures(spoil)


def test_gymnasium_accepts_the_suite() -> None:
    env = gymnasium.make("roadvla/CR-MultiObject-v0", split="test", render_mode="rgb_array")
    gymnasium_check(env.unwrapped)


def test_gymnasium_episodes_are_those_of_the_vector_env() -> None:
    env = gymnasium.make("roadvla/VR-UnseenTable-v0")
    observation, info = env.reset(options={"episode_id": 7})
    vector = TabletopEnv("VR-UnseenTable", split="train", num_envs=1)
    frame = vector.reset(torch.tensor([7]))[0]
    assert info["episode_id"] == 7
    assert np.array_equal(observation["image"], frame.numpy())
    assert observation["instruction"] == vector.instructions[0]
