from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from probes import PARTS, ColourEnv, TablePolicy, load_table, probe_experiment, save_table
from roadvla.errors import UserError
from roadvla.train import warmup as warmups
from roadvla.train.checkpoint import policy_folder
from roadvla.train.demonstrations import load_demonstrations
from roadvla.train.divergence import TrainingDivergedError
from roadvla.train.loop import train
from roadvla.train.warmup import WarmUp, collect_demonstrations, run_warm_up, warm_up

SETTINGS = WarmUp(env="probe", episodes=10, steps=60, batch=32, learning_rate=0.05, levels=8)


def namer(*, late=0):
    """An expert that is right from its ``late``-th step on, except in every fifth episode."""
    gains = []

    def act(env, gain, generator):
        gains.append(gain)
        colour = env.colour().float()
        wrong = (env.ids % 5 == 0) | (env.t < late)
        action = torch.zeros(env.num_envs, 7)
        # grid() rounds the motions to fractions of their limits, so the colour goes in the last
        action[:, 6] = torch.where(wrong, (colour + 1) % 4, colour)
        return action

    act.gains = gains
    return act


class LastDimension(ColourEnv):
    """Reads the last of the seven numbers, which the grid leaves alone."""

    def step(self, action):
        return super().step(action[:, [6, 1, 2, 3, 4, 5, 0]])


WORLD = replace(PARTS, make_env=lambda env, *, num_envs, **_: LastDimension(num_envs))


def collected(settings=SETTINGS, *, act=None, num_envs=8):
    return collect_demonstrations(settings, num_envs=num_envs, act=act or namer(), parts=WORLD)


def test_only_successful_episodes_are_kept_in_order():
    got = collected()
    assert len(got.instructions) == 10
    # 500,000 is a multiple of five: of each five episodes the first fails
    env = LastDimension(1)
    kept = [i for i in range(500_000, 500_020) if i % 5][:10]
    frames = torch.cat([env.reset(torch.tensor([i])) for i in kept])
    first = got.step_index == 0
    assert torch.equal(got.image[first], frames)
    assert got.episode_index[first].tolist() == list(range(10))


def test_episodes_are_cut_some_steps_after_their_first_success():
    assert len(collected(replace(SETTINGS, tail=0)).action) == 10
    assert len(collected(replace(SETTINGS, tail=1)).action) == 20
    assert len(collected(replace(SETTINGS, tail=9)).action) == 40
    late = collected(replace(SETTINGS, tail=1), act=namer(late=2))
    assert late.step_index.tolist() == [0, 1, 2, 3] * 10


def test_success_that_is_lost_again_is_not_kept():
    def act(env, gain, generator):
        action = namer()(env, gain, generator)
        if env.t == env.horizon - 1:
            action[:, 6] += (env.ids % 2).float()
        return action

    env = LastDimension(1)
    kept = [i for i in range(500_000, 500_040) if i % 5 and i % 2 == 0][:10]
    frames = torch.cat([env.reset(torch.tensor([i])) for i in kept])
    got = collected(act=act)
    assert torch.equal(got.image[got.step_index == 0], frames)


def test_the_recorded_actions_are_those_that_were_taken():
    got = collected()
    env = LastDimension(1)
    kept = [i for i in range(500_000, 500_020) if i % 5][:10]
    for number, episode in enumerate(kept):
        env.reset(torch.tensor([episode]))
        for action in got.action[got.episode_index == number]:
            assert bool(env.step(action[None]).info["success"])


def test_motions_are_rounded_to_the_grid():
    def act(env, gain, generator):
        action = namer()(env, gain, generator)
        action[:, 0] = 0.04 * 0.30  # 0.3 of the limit is nearest to 2/8
        action[:, 3] = -0.35 * 0.95  # nearest to -8/8
        return action

    got = collected(act=act)
    assert torch.allclose(got.action[:, 0], torch.tensor(0.01))
    assert torch.allclose(got.action[:, 3], torch.tensor(-0.35))


def test_the_gain_is_drawn_once_per_episode():
    act = namer()
    collected(act=act)
    gains = act.gains
    assert all(torch.equal(gain, gains[0]) for gain in gains[:4])
    drawn = torch.cat([gains[0], gains[4]])
    assert 0.55 <= float(drawn.min()) < float(drawn.max()) <= 0.8
    assert len(drawn.unique()) == 16


def test_collection_is_repeatable_and_seeds_differ():
    assert torch.equal(collected().image, collected().image)
    other = collected(replace(SETTINGS, seed=1))
    assert not torch.equal(other.image[:10], collected().image[:10])


def test_an_expert_that_fails_is_reported():
    def act(env, gain, generator):
        return torch.full((env.num_envs, 7), 9.0)

    with pytest.raises(UserError, match="solved only 0 of 48 episodes"):
        collected(act=act)


def test_supervised_fine_tuning_learns_the_expert():
    env = LastDimension(64)
    env.reset(torch.arange(64))
    got = collected(replace(SETTINGS, episodes=40), num_envs=64)
    policy = TablePolicy()
    before = policy.value_head.clone()
    history = warm_up(policy, got, SETTINGS)
    assert [row["step"] for row in history] == list(range(6, 61, 6))
    assert history[-1]["loss/total"] < 0.5 * history[0]["loss/total"]
    probs = policy.table.detach()[:, 6].softmax(-1).diagonal()
    assert float(probs.min()) > 0.5
    assert torch.equal(policy.value_head, before)


def test_warming_up_is_repeatable():
    first, second = TablePolicy(), TablePolicy()
    assert warm_up(first, collected(), SETTINGS) == warm_up(second, collected(), SETTINGS)
    assert torch.equal(first.table, second.table)


@pytest.mark.parametrize("minibatch", [1, 5, 32, 100])
def test_passes_of_any_size_make_the_same_steps(minibatch):
    whole, parts = TablePolicy(), TablePolicy()
    history = warm_up(whole, collected(), SETTINGS)
    split = warm_up(parts, collected(), replace(SETTINGS, minibatch=minibatch))
    torch.testing.assert_close(parts.table, whole.table, atol=1e-4, rtol=0)
    assert split[-1]["loss/total"] == pytest.approx(history[-1]["loss/total"], abs=1e-4)
    if minibatch >= SETTINGS.batch:
        assert torch.equal(parts.table, whole.table)


def test_no_pass_is_larger_than_the_minibatch(monkeypatch):
    real, sizes = TablePolicy.evaluate, []

    def evaluate(self, observation, action_tokens):
        sizes.append(len(action_tokens))
        return real(self, observation, action_tokens)

    monkeypatch.setattr(TablePolicy, "evaluate", evaluate)
    warm_up(TablePolicy(), collected(), replace(SETTINGS, steps=2, minibatch=12))
    assert sizes == [11, 11, 10] * 2


def test_a_warm_up_that_explodes_is_stopped():
    with pytest.raises(TrainingDivergedError, match="lower --learning-rate"):
        warm_up(TablePolicy(), collected(), replace(SETTINGS, learning_rate=1e38, steps=10))


def test_the_folder_holds_policy_demonstrations_and_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(warmups, "expert_of", lambda sim, noise: namer())
    settings = replace(SETTINGS, output=str(tmp_path / "warm"))
    folder = run_warm_up(settings, parts=WORLD)
    assert len(load_demonstrations(folder / "demonstrations.safetensors").instructions) == 10
    assert not torch.equal(load_table(folder).table, TablePolicy().table)
    config = json.loads((folder / "config.json").read_text())
    assert config["episodes"] == 10
    assert config["name"] == "warm-up"
    assert json.loads((folder / "warmup.json").read_text())[-1]["step"] == 60
    with pytest.raises(UserError, match="already holds a warm-up"):
        run_warm_up(settings, parts=WORLD)
    run_warm_up(settings, force=True, parts=WORLD)
    again = replace(settings, init=str(folder), output=str(tmp_path / "again"), steps=1)
    assert not torch.equal(load_table(run_warm_up(again, parts=WORLD)).table, TablePolicy().table)


@pytest.fixture
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(warmups, "expert_of", lambda sim, noise: namer())
    return replace(SETTINGS, output=str(tmp_path / "folder"), steps=2)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


WARM_UP = [
    "config.json",
    "demonstrations.safetensors",
    "policy.json",
    "policy.safetensors",
    "warmup.json",
]


def test_a_warm_up_spares_a_run_unless_forced(quick):
    def forbidden(device):
        raise AssertionError("refused before any work")

    folder = train(probe_experiment(quick.output), parts=PARTS)
    (folder / "notes.txt").write_text("mine")
    before = (folder / "config.json").read_text()
    with pytest.raises(UserError, match=r"already holds a run.*--force"):
        run_warm_up(quick, parts=replace(WORLD, load_backbone=forbidden))
    assert (folder / "config.json").read_text() == before
    run_warm_up(quick, force=True, parts=WORLD)
    assert names(folder) == sorted([*WARM_UP, "notes.txt"])


def test_a_forced_run_leaves_no_warm_up_that_would_shadow_it(quick):
    folder = run_warm_up(quick, parts=WORLD)
    assert names(folder) == WARM_UP
    experiment = probe_experiment(folder)
    with pytest.raises(UserError, match=r"already holds a warm-up.*--force"):
        train(experiment, parts=PARTS)
    assert names(folder) == WARM_UP
    train(experiment, force=True, parts=PARTS)
    assert names(folder) == [
        "checkpoints",
        "config.json",
        "evaluation",
        "metrics.jsonl",
        "tensorboard",
    ]
    assert policy_folder(folder).name == "iteration_000012"


def test_a_bare_policy_is_not_overwritten_either(quick):
    save_table(TablePolicy(), Path(quick.output))
    with pytest.raises(UserError, match="holds a warm-up or another policy"):
        run_warm_up(quick, parts=WORLD)
    with pytest.raises(UserError, match="holds a warm-up or another policy"):
        train(probe_experiment(quick.output), parts=PARTS)


def test_force_does_not_remove_the_warm_up_s_own_start(quick):
    folder = run_warm_up(quick, parts=WORLD)
    with pytest.raises(UserError, match="would remove"):
        run_warm_up(replace(quick, init=str(folder)), force=True, parts=WORLD)
    assert names(folder) == WARM_UP


def test_a_warm_up_that_fails_replaces_nothing(quick):
    folder = run_warm_up(quick, parts=WORLD)
    before = (folder / "policy.safetensors").read_bytes()
    with pytest.raises(TrainingDivergedError):
        run_warm_up(replace(quick, learning_rate=1e38, steps=10), force=True, parts=WORLD)
    assert names(folder) == WARM_UP
    assert (folder / "policy.safetensors").read_bytes() == before


def test_the_policy_comes_last_and_a_full_disk_leaves_nothing_half_done(quick):
    seen = []

    def full(policy, folder):
        seen.extend(names(folder))
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="No space left on device"):
        run_warm_up(quick, parts=replace(WORLD, save_policy=full))
    assert seen == ["config.json", "demonstrations.safetensors", "run.lock", "warmup.json"]
    assert names(Path(quick.output)) == []
    run_warm_up(quick, parts=WORLD)


@pytest.mark.parametrize(
    "changes",
    [
        {"episodes": 0},
        {"steps": 0},
        {"batch": 0},
        {"minibatch": 0},
        {"levels": 0},
        {"seed": -1},
        {"tail": -1},
        {"gain": (0.0, 0.5)},
        {"gain": (0.8, 0.5)},
        {"gain": (0.8, 1.5)},
        {"noise": -0.1},
        {"noise": float("nan")},
        {"learning_rate": 0.0},
    ],
)
def test_values_out_of_range_are_refused(changes):
    with pytest.raises(UserError, match=r"^[^\n]*$"):
        replace(SETTINGS, **changes)


def test_the_tabletop_s_expert_gives_demonstrations():
    settings = WarmUp(episodes=3, tail=2)
    got = collect_demonstrations(settings, num_envs=8)
    assert got.image.shape[1:] == (48, 48, 3)
    lengths = torch.bincount(got.episode_index)
    assert int(lengths.min()) > 5
    assert all(text.startswith("put ") for text in got.instructions)
    limits = torch.tensor([0.04] * 3 + [0.35] * 3)
    steps = got.action[:, :6] / limits * 8
    assert torch.allclose(steps, steps.round(), atol=1e-4)
