"""Processes that hold nothing of a batch, or nothing of a group of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from meeting import meet
from safetensors.torch import load_file
from torch import distributed, multiprocessing

from probes import BINS, PARTS, TOKENS, ColourEnv, TablePolicy, probe_experiment
from roadvla.train.blank import blank
from roadvla.train.config import Algorithm, EvaluationConfig, Optimizer, RolloutConfig
from roadvla.train.loop import train
from roadvla.train.means import Means
from roadvla.train.metrics import read_metrics
from roadvla.train.share import Share
from roadvla.train.update import losses, make_optimizer, select, update
from roadvla.types import Batch, Observation
from roadvla.world import World

OPTIMIZER = Optimizer(learning_rate=0.1, value_learning_rate=0.05, minibatch=8, accumulation=2)
SETTINGS = {
    "optimizer": OPTIMIZER,
    "rollout": RolloutConfig(num_envs=16, total_env_steps=3 * 64),
    "evaluation": EvaluationConfig(every=0, final_episodes=0),
}


class Losing(ColourEnv):
    """Loses the second half of all episodes, which is what the second of two processes has."""

    def step(self, action):
        step = super().step(action)
        upper = self.ids % 16 >= 8
        return replace(step, info={**step.info, "lost": upper & (self.t > 1)})


def make_losing(env, *, split, num_envs, sim="probe", device="cpu", end_on_success=False):
    return Losing(num_envs, end_on_success=end_on_success)


def lost(folder: Path) -> Path:
    return train(
        probe_experiment(folder / "run", **SETTINGS), parts=replace(PARTS, make_env=make_losing)
    )


def stopped_by_kl(folder: Path) -> Path:
    """Every group is one transition, which one of two processes does not have."""
    algorithm = Algorithm(epochs=2, entropy_coef=0.0, kl_stop=1e-12)
    optimizer = replace(OPTIMIZER, minibatch=1, accumulation=1)
    experiment = probe_experiment(folder / "run", **{**SETTINGS, "optimizer": optimizer})
    return train(replace(experiment, algorithm=algorithm), parts=PARTS)


def together(work: Callable[..., object], folder: Path) -> None:
    folder.mkdir()
    multiprocessing.spawn(_join, (folder, work), nprocs=2)


def _join(rank: int, folder: Path, work: Callable[..., object]) -> None:
    meet(folder / "meeting", rank)
    work(folder)
    distributed.destroy_process_group()


@pytest.mark.parametrize("work", [lost, stopped_by_kl])
def test_a_process_with_nothing_says_as_much_as_the_others(
    tmp_path: Path, work: Callable[[Path], Path]
) -> None:
    mine = work(tmp_path / "alone")
    together(work, tmp_path / "two")
    theirs = tmp_path / "two/run"
    for row, other in zip(read_metrics(mine), read_metrics(theirs), strict=True):
        assert row.keys() == other.keys()
        for key, value in row.items():
            if not key.startswith(("time/", "memory/")):
                assert other[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
    file = "checkpoints/iteration_000003/policy.safetensors"
    expected, found = load_file(mine / file), load_file(theirs / file)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=2e-4, atol=2e-5)


def test_metrics_that_others_would_not_know_are_refused() -> None:
    with pytest.raises(KeyError, match="loss/new"):
        Means(torch.device("cpu")).add("loss/new", torch.ones(()), 1)


# Policies that processes hold together: each must make as many passes as the others.


def noise(count: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    image = torch.zeros(count, 4, 4, 3, dtype=torch.uint8)
    tokens = torch.randint(0, BINS, (count, TOKENS), generator=generator)
    values = torch.randn(4, count, generator=generator)
    seen = Observation(image, torch.ones(count, 2, dtype=torch.int64))
    return Batch(seen, tokens, torch.full((count, TOKENS), -1.4), *values)


class Fragile(TablePolicy):
    """Where it has to make up a pass, that pass ends in infinity, and its gradient in NaN."""

    def tokenize(self, instructions):
        return 3 * super().tokenize(instructions)

    def evaluate(self, observation, action_tokens):
        logits, value = super().evaluate(observation, action_tokens)
        made_up = (observation.prompt == 3).all(1)
        return logits + torch.where(made_up, torch.inf, 0.0)[:, None, None] * logits, value


def learn_in_step(folder: Path) -> None:
    """The second process holds nothing."""
    world, whole = World.current(), noise(8)
    batch = whole if world.is_first else select(whole, torch.arange(0))
    owner, place = torch.zeros(8, dtype=torch.int64), torch.arange(8)
    policy = Fragile()
    optimizer = make_optimizer(policy, OPTIMIZER)
    metrics = update(
        policy,
        optimizer,
        batch,
        Algorithm(epochs=2),
        OPTIMIZER,
        temperature=1.0,
        generator=torch.Generator().manual_seed(1),
        share=Share(world, owner, place, in_step=True),
    )
    torch.save((policy.state_dict(), metrics), folder / f"learned-{world.rank}.pt")


def test_what_a_process_makes_up_counts_for_nothing_even_if_it_is_no_number(
    tmp_path: Path,
) -> None:
    together(learn_in_step, tmp_path / "two")
    policy = TablePolicy()
    expected = update(
        policy,
        make_optimizer(policy, OPTIMIZER),
        noise(8),
        Algorithm(epochs=2),
        OPTIMIZER,
        temperature=1.0,
        generator=torch.Generator().manual_seed(1),
    )
    for rank in (0, 1):
        weights, metrics = torch.load(tmp_path / f"two/learned-{rank}.pt")
        for name, value in policy.state_dict().items():
            torch.testing.assert_close(weights[name], value)
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            assert float(metrics[name]) == pytest.approx(float(value), abs=1e-5), name


def test_a_made_up_transition_has_whatever_the_losses_look_at() -> None:
    policy, empty = TablePolicy(), select(noise(4), torch.arange(0))
    empty = replace(
        empty,
        observation=replace(empty.observation, vision=torch.zeros(0, 1, 4)),
        logits=torch.zeros(0, TOKENS, BINS),
        hinted_prompt=torch.ones(0, 5, dtype=torch.int64),
        hinted=torch.zeros(0, dtype=torch.bool),
    )
    algorithm = Algorithm(algo="road", distill_coef=1.0)
    total, _ = losses(policy, blank(empty, policy), algorithm, temperature=1.0, value_only=False)
    assert torch.isfinite(total)
