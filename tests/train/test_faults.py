"""Numbers that are none, and episodes that are lost: left out, counted, and not for ever."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from probes import PARTS, ColourEnv, TablePolicy, probe_experiment
from roadvla.train.config import Optimizer
from roadvla.train.divergence import TrainingDivergedError
from roadvla.train.loop import train
from roadvla.train.metrics import read_metrics
from roadvla.train.rollout import collect, training_episode_ids

OPTIMIZER = Optimizer(learning_rate=0.1, value_learning_rate=0.05, minibatch=32)


class Faulty(TablePolicy):
    """Its teacher-forced passes of these numbers end in NaN."""

    faults: frozenset[int] = frozenset()

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def evaluate(self, observation, action_tokens):
        logits, value = super().evaluate(observation, action_tokens)
        if torch.is_grad_enabled():
            self.passes += 1
            if self.passes in self.faults:
                logits = logits * float("nan")
        return logits, value


def faulty(*passes: int):
    class Chosen(Faulty):
        faults = frozenset(passes)

    return replace(PARTS, load_backbone=lambda _: Chosen())


def test_a_step_with_a_gradient_that_is_no_number_changes_nothing(tmp_path: Path) -> None:
    plain = train(probe_experiment(tmp_path / "plain", optimizer=OPTIMIZER), parts=faulty())
    run = train(probe_experiment(tmp_path / "run", optimizer=OPTIMIZER), parts=faulty(2, 7))
    rows, expected = read_metrics(run), read_metrics(plain)
    # Two epochs of 64 steps in minibatches of 32: four passes an iteration.
    assert [row["loss/skipped_steps"] for row in rows[1:]] == [1, 1, *[0] * 10]
    assert [row["loss/skipped_steps"] for row in expected[1:]] == [0] * 12
    assert rows[1]["rollout/return"] == expected[1]["rollout/return"]
    assert rows[1]["policy/kl"] != expected[1]["policy/kl"]
    assert rows[12]["rollout/success_rate"] > 0.5


def test_a_skipped_step_leaves_weights_and_moments() -> None:
    from roadvla.train.update import _step, make_optimizer

    policy = TablePolicy()
    optimizer = make_optimizer(policy, OPTIMIZER)
    for value, skips in ((1.0, 0), (float("inf"), 1), (float("nan"), 1), (1.0, 0)):
        before = [p.detach().clone() for p in policy.parameters()]
        moments = [s["exp_avg"].clone() for s in optimizer.state.values()]
        steps = [float(s["step"]) for s in optimizer.state.values()]
        for parameter in policy.parameters():
            parameter.grad = torch.full_like(parameter, 0.1)
        policy.table.grad[0] = value
        norm, skipped = _step(optimizer, OPTIMIZER)
        assert float(skipped) == skips
        assert bool(torch.isfinite(norm)) != bool(skips)
        kept = [torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True)]
        assert all(kept) if skips else not any(kept)
        if skips:
            states = optimizer.state.values()
            assert all(torch.equal(a, s["exp_avg"]) for a, s in zip(moments, states, strict=True))
            assert steps == [float(s["step"]) for s in states]


def test_too_many_of_them_stop_the_run_and_leave_a_diagnosis(tmp_path: Path) -> None:
    settings = replace(OPTIMIZER, max_skipped=2)
    experiment = probe_experiment(tmp_path / "run", optimizer=settings)
    with pytest.raises(
        TrainingDivergedError,
        match=r"3 optimiser steps had gradients.*iteration 5.*iteration_000003.*iteration_000005",
    ):
        train(experiment, parts=faulty(17, 18, 20))
    found = json.loads((tmp_path / "run/diagnosis/iteration_000005.json").read_text())
    assert found["iteration"] == 5
    assert found["parameters"]["table"]["nan"] == 0
    assert found["gradients"]["table"]["nan"] > 0
    assert found["batch"]["advantage"]["shape"] == [64]
    assert found["about"]["machine"]
    assert len(read_metrics(tmp_path / "run")) == 5


class Broken(ColourEnv):
    """Some of its episodes are lost on the way, or pay what is no number."""

    lost: tuple[int, ...] = ()
    unpaid: tuple[int, ...] = ()

    def step(self, action):
        step = super().step(action)
        info = {**step.info, "lost": torch.zeros(self.num_envs, dtype=torch.bool)}
        reward = step.reward.clone()
        if self.t > 1:
            info["lost"][list(self.lost)] = True
            reward[list(self.unpaid)] = float("nan")
        return replace(step, info=info, reward=reward)


def broken(lost: tuple[int, ...], unpaid: tuple[int, ...] = ()):
    def make(env, *, split, num_envs, sim="probe", device="cpu", end_on_success=False):
        world = Broken(num_envs, end_on_success=end_on_success)
        world.lost, world.unpaid = lost, unpaid
        return world

    return replace(PARTS, make_env=make)


def test_lost_episodes_are_left_out_and_counted(tmp_path: Path) -> None:
    experiment = probe_experiment(tmp_path / "run", optimizer=OPTIMIZER)
    quiet = replace(experiment.evaluation, every=0, final_episodes=0)
    run = train(replace(experiment, evaluation=quiet), parts=broken((3, 4), (7,)))
    rows = read_metrics(run)
    assert [row["rollout/lost_episodes"] for row in rows] == [3] * 12
    assert rows[-1]["rollout/success_rate"] > 0.5
    assert all(0 <= row["rollout/return"] <= 1 for row in rows)


def test_no_step_of_a_lost_episode_is_learned_from() -> None:
    """Not even those before it was lost: what came of them is not known."""
    env = Broken(16)
    env.lost, env.unpaid = (3, 4), (7,)
    got = collect(TablePolicy(), env, training_episode_ids(0, 0, 16), temperature=1.0)
    lost = torch.zeros(16, dtype=torch.bool)
    lost[[3, 4, 7]] = True
    assert torch.equal(got.outcome["lost"], lost)
    assert torch.equal(got.active, ~lost.expand(4, 16))
    assert bool(torch.isfinite(got.reward).all())
    assert not got.reward[:, lost].any()
    assert got.reward[:, ~lost].any()


def test_more_than_half_lost_stop_the_run(tmp_path: Path) -> None:
    experiment = probe_experiment(tmp_path / "run", optimizer=OPTIMIZER)
    quiet = replace(experiment.evaluation, every=0, final_episodes=0)
    with pytest.raises(TrainingDivergedError, match="9 of 16 episodes were lost in iteration 1"):
        train(replace(experiment, evaluation=quiet), parts=broken(tuple(range(9))))
    with pytest.raises(TrainingDivergedError, match="16 of 16 episodes were lost in iteration 1"):
        train(
            replace(experiment, evaluation=quiet, output=str(tmp_path / "all")),
            parts=broken(tuple(range(16))),
        )
