from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from evaluation_fakes import CountingEnv, RandomPolicy

from probes import TablePolicy, make_colour_env
from roadvla.errors import UserError, WorkerError
from roadvla.evaluation.evaluate import evaluate
from roadvla.evaluation.machine import describe_machine
from roadvla.world import World


class Worlds(list):
    """Builds environments and keeps them, with the arguments they were asked for with."""

    def __call__(self, env, **asked):
        self.append(CountingEnv(asked["num_envs"]))
        self.asked = {"env": env, **asked}
        return self[-1]


def run(worlds, policy=None, **changes):
    settings = {"env": "E", "split": "test", "episodes": 10, "num_envs": 4, **changes}
    return evaluate(policy or RandomPolicy(), make_env=worlds, **settings)


def test_outcomes_are_read_at_the_last_step_in_the_order_of_the_ids():
    result = run(Worlds())
    assert result.episode_ids == tuple(range(10))
    assert result.success == tuple(i % 3 == 0 for i in range(10))
    assert result.success_once == tuple(i % 3 != 2 for i in range(10))
    assert result.grasped == tuple(i % 3 != 2 or i % 2 == 1 for i in range(10))
    # ids 0 3 6 9 / all but 2 5 8 / all but 2 8
    assert (result.success_rate, result.success_once_rate, result.grasp_rate) == (0.4, 0.7, 0.8)
    # Wilson at 4 of 10: (0.4 + z²/20 ± z sqrt(0.024 + z²/400)) / (1 + z²/10), z = 1.959964
    assert result.success_low == pytest.approx(0.168180, abs=1e-6)
    assert result.success_high == pytest.approx(0.687326, abs=1e-6)
    assert (result.horizon, result.episodes) == (4, 10)


def test_one_environment_of_whole_batches_serves_all_episodes():
    worlds = Worlds()
    run(worlds, sim="other", device="cpu")
    assert worlds.asked == {
        "env": "E",
        "split": "test",
        "num_envs": 4,
        "sim": "other",
        "device": "cpu",
    }
    assert [world.resets for world in worlds] == [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]]


def test_fewer_episodes_than_environments_make_a_small_batch():
    worlds = Worlds()
    assert run(worlds, episodes=3, num_envs=64).episodes == 3
    assert worlds[0].resets == [[0, 1, 2]]


def test_sampling_depends_on_seed_and_batch_only():
    def actions(**changes):
        worlds = Worlds()
        run(worlds, **changes)
        return torch.stack(worlds[0].actions)

    first = actions(seed=1)
    torch.manual_seed(99)
    torch.rand(5)
    assert torch.equal(actions(seed=1), first)
    assert torch.equal(actions(seed=1, episodes=12), first)
    assert torch.equal(actions(seed=1, episodes=4), first[:4])
    assert not torch.equal(actions(seed=2), first)
    assert not torch.equal(first[:4], first[4:8])


def test_policy_is_told_the_instructions_of_each_batch_and_the_temperature():
    policy = RandomPolicy()
    run(Worlds(), policy, episodes=6, num_envs=3, temperature=0.25)
    assert policy.prompts == [["do 0", "do 1", "do 2"], ["do 3", "do 4", "do 5"]]
    assert policy.temperatures == {0.25}


@pytest.mark.parametrize("record", [1, 4, 6, 10])
def test_film_holds_every_frame_of_the_first_episodes(record):
    film = run(Worlds(), record=record).film
    assert film is not None
    assert film.frames.shape == (record, 5, 2, 2, 3)
    for episode in range(record):
        expected = [10 * episode + step for step in range(5)]
        assert film.frames[episode, :, 0, 0, 0].tolist() == expected
    assert film.success.tolist() == [i % 3 == 0 for i in range(record)]
    assert film.instructions == tuple(f"do {i}" for i in range(record))
    assert film.episode_ids == tuple(range(record))


def test_nothing_is_filmed_unless_asked():
    assert run(Worlds()).film is None


def test_progress_counts_finished_episodes_without_the_filling():
    seen = []
    run(Worlds(), on_progress=lambda done, successes: seen.append((done, successes)))
    assert seen == [(4, 2), (8, 3), (10, 4)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "ood"}, "'ood'"),
        ({"episodes": 0}, "episodes is 0"),
        ({"num_envs": 0}, "num_envs is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": 1e-300}, "temperature is 1e-300: expected 0 (greedy) or 0.001 or more"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"record": 11}, "record is 11"),
    ],
)
def test_numbers_out_of_range_are_named(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        run(Worlds(), **changes)


def test_machine_is_one_line_with_cores_and_torch():
    line = describe_machine()
    assert "\n" not in line
    assert re.search(r", \d+ cores, torch " + re.escape(torch.__version__), line)


class LosingWorlds(Worlds):
    """Its environments lose an episode in each of the first batches that are run."""

    def __init__(self, times):
        super().__init__()
        self.times = times

    def __call__(self, env, **asked):
        world = super().__call__(env, **asked)
        step = world.step

        def losing(action):
            result = step(action)
            lost = torch.zeros(world.num_envs, dtype=torch.bool)
            lost[1] = len(world.resets) <= self.times
            return replace(result, info={**result.info, "lost": lost})

        world.step = losing
        return world


def test_a_batch_in_which_an_episode_is_lost_is_run_again():
    worlds = LosingWorlds(2)
    result = run(worlds)
    assert result.success == run(Worlds()).success
    assert worlds[0].resets == [[0, 1, 2, 3]] * 3 + [[4, 5, 6, 7], [8, 9, 10, 11]]
    with pytest.raises(WorkerError, match="episodes 0 to 3 were lost 3 times"):
        run(LosingWorlds(3))


@pytest.mark.parametrize("episodes", [3, 6, 10, 16, 20])
@pytest.mark.parametrize("processes", [2, 4])
def test_what_is_drawn_does_not_depend_on_the_number_of_processes(monkeypatch, episodes, processes):
    """Each process in turn, without the others: what it finds is then its own part."""
    options = {"env": "E", "split": "test", "episodes": episodes, "num_envs": 16}
    alone = evaluate(TablePolicy(), make_env=make_colour_env, **options)
    monkeypatch.setattr(World, "gather", lambda _, tensor, dim=0: tensor)
    first = min(episodes, 16)
    found = []
    for rank in range(processes):
        part = evaluate(
            TablePolicy(), make_env=make_colour_env, ranks=World(rank, processes), **options
        )
        own = -(-first // processes)
        found += part.success[:own]
    assert tuple(found[:first]) == alone.success[:first]
