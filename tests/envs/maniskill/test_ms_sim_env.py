"""The vector environment: contract, expert, ends, and workers that fail, die or hang."""

from __future__ import annotations

import os
import signal
from itertools import pairwise

import pytest
import torch
from ms_recorded import SHARED, needs_assets
from ms_sim import simulator  # noqa: F401

from roadvla import cli, envs
from roadvla.envs.base import Privileged
from roadvla.envs.maniskill import expert
from roadvla.envs.maniskill.env import ManiSkillEnv
from roadvla.envs.maniskill.options import ManiSkillSettings
from roadvla.envs.maniskill.outputs import Recipe
from roadvla.envs.maniskill.workers import WorkerError, Workers
from roadvla.errors import UserError
from roadvla.evaluation.failures import MODES, EventLog
from roadvla.privileged.relspatial import relspatial_hints

pytestmark = pytest.mark.sim

SMALL = ManiSkillSettings(stand_ins=True, image_size=(48, 48))


def make(num_envs, env="Single-v1", split="train", **options):
    return ManiSkillEnv(env, split=split, num_envs=num_envs, settings=SMALL, **options)


def test_it_obeys_the_contract(capsys):
    flags = ["--sim", "maniskill", "--stand-ins", "--image-size", "48", "48"]
    assert cli.main(["check-env", "VR-DynamicTexture", *flags]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) > 15
    assert all(line.startswith("ok ") for line in shown)


def test_the_expert_grasps_places_and_is_paid():
    env = make(2, end_on_success=True)
    env.reset(torch.tensor([0, 1]))
    steps = []
    for _ in range(env.horizon):
        steps.append(env.step(expert.act(env)))
    paid = torch.stack([step.reward for step in steps]).sum(dim=0)
    assert torch.allclose(paid, torch.tensor([1.2, 1.2]))
    for name in ("success", "success_once", "grasped", "consecutive_grasp"):
        assert bool(steps[-1].info[name].all()), name
    ended = torch.stack([step.terminated for step in steps])
    assert ended.sum(dim=0).tolist() == [1, 1]
    assert not bool(steps[-1].truncated.any())
    first = ended.int().argmax(dim=0)
    for before, after in pairwise(range(int(first.max()), env.horizon)):
        assert torch.equal(steps[before].image, steps[after].image)
        assert bool((steps[after].reward == 0).all())
    env.close()


def test_a_snapshot_says_where_things_are_and_how_the_episode_ends():
    env = make(2)
    env.reset(torch.tensor([0, 1]))
    assert isinstance(env, Privileged)
    log = EventLog(env.snapshot())
    idle = EventLog(env.snapshot())
    start = env.snapshot()
    assert start.held.tolist() == [-1, -1]
    assert start.is_open.all()
    assert start.objects.shape == start.receptacles.shape == (2, 1, 3)
    assert bool((start.tip[:, 2] > start.objects[:, 0, 2]).all())
    hints = relspatial_hints(start, env.instructions)
    assert all(" below" in hint.split(" gripper")[0] for hint in hints)
    held = []
    for _ in range(env.horizon):
        step = env.step(expert.act(env))
        log.note(env.snapshot(), step.info["success"])
        held.append(env.snapshot().held)
    assert bool((torch.stack(held) == 0).any(dim=0).all())
    modes, _ = log.outcome(step.info["success"], step.info["success_once"])
    assert [MODES[mode] for mode in modes] == ["success", "success"]
    none = torch.zeros(2, dtype=torch.bool)
    assert [MODES[mode] for mode in idle.outcome(none, none)[0]] == ["no_grasp", "no_grasp"]
    env.close()


def test_episodes_do_not_depend_on_processes():
    ids = torch.tensor([4, 9, 2])
    actions = torch.randn(6, 3, 7, generator=torch.Generator().manual_seed(1)) * 0.01
    seen = []
    for processes in (1, 3):
        settings = ManiSkillSettings(stand_ins=True, image_size=(48, 48), processes=processes)
        env = ManiSkillEnv("CR-MultiObject", split="test", num_envs=3, settings=settings)
        frames = [env.reset(ids)] + [env.step(action).image for action in actions]
        seen.append((torch.stack(frames), env.state.bodies.nan_to_num()))
        env.close()
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])


@pytest.fixture
def workers():
    recipe = Recipe(
        setting="PutOnPlateInScene25Single-v1",
        obj_set="train",
        settings=SMALL,
        shader="one_pass",
        build="chosen",
        device="cpu",
    )
    running = Workers(recipe, 2, processes=2, timeout=60.0)
    yield running
    running.close()


def frames(workers):
    return workers.outputs.image.clone()


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_or_hangs_loses_its_episodes_and_is_replaced(workers, fault, capsys):
    workers.reset(torch.tensor([1, 2]))
    workers.step(torch.zeros(2, 7))
    expected = frames(workers)
    workers.reset(torch.tensor([1, 2]))
    first, second = (worker.process for worker in workers._workers)
    os.kill(first.pid, fault)
    patience, workers._timeout = workers._timeout, 3.0
    workers.step(torch.zeros(2, 7))
    assert workers.lost.tolist() == [True, False]
    assert not first.is_alive()
    assert second.is_alive()
    assert "worker roadvla-scenes-0-0" in capsys.readouterr().err
    assert torch.equal(frames(workers)[1], expected[1])
    workers._timeout = patience
    workers.reset(torch.tensor([1, 2]))
    workers.step(torch.zeros(2, 7))
    assert workers.lost.tolist() == [False, False]
    assert torch.equal(frames(workers), expected)


def test_when_all_workers_die_there_is_nothing_to_go_on_with(workers):
    workers.reset(torch.tensor([1, 2]))
    processes = [worker.process for worker in workers._workers]
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"roadvla-scenes-0-0 died, as did all others"):
        workers.step(torch.zeros(2, 7))
    with pytest.raises(WorkerError, match="ended"):
        workers.step(torch.zeros(2, 7))


def test_scenes_that_are_lost_again_and_again_end_it(workers):
    for _ in range(3):
        workers.reset(torch.tensor([1, 2]))
        os.kill(workers._workers[0].process.pid, signal.SIGKILL)
        workers.step(torch.zeros(2, 7))
    with pytest.raises(WorkerError, match="was the 3rd in a row: it died"):
        workers.reset(torch.tensor([1, 2]))


def test_a_worker_that_fails_is_reported_with_its_traceback(workers):
    with pytest.raises(WorkerError, match=r"(?s)roadvla-scenes-0-0 failed.*Traceback.*ValueError"):
        workers._order("reset", dict(zip(workers._workers, ([1, 2], [3]), strict=True)))


def test_a_missing_asset_is_refused_with_the_command_that_fetches_it(tmp_path, monkeypatch):
    monkeypatch.setenv("ROADVLA_ASSETS", str(tmp_path))
    with pytest.raises(UserError, match=r"model_db\.json"):
        make(1)


@needs_assets
def test_a_missing_mesh_is_no_silent_substitute(tmp_path, monkeypatch):
    (tmp_path / "data" / "tasks").mkdir(parents=True)
    for name in ("robots", "tasks/rl4vla"):
        (tmp_path / "data" / name).symlink_to(SHARED / "assets" / "data" / name)
    monkeypatch.setenv("MS_ASSET_DIR", str(tmp_path))  # the stage is missing
    strict = ManiSkillSettings(image_size=(48, 48))
    with pytest.raises(UserError, match=r"bridge_table_1_v1\.glb.*roadvla assets fetch"):
        ManiSkillEnv("Single-v1", split="train", num_envs=1, settings=strict)
    env = make(1)
    frame = env.reset(torch.tensor([0]))
    assert env.facts["stand_ins"]
    assert frame.float().std() > 20
    env.close()


def test_make_env_builds_it_from_a_paper_alias():
    env = envs.make_env("ER-InitPose", split="test", num_envs=1, sim="maniskill", maniskill=SMALL)
    assert isinstance(env, envs.VectorEnv)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(torch.zeros(1, 7))
    envs.close(env)
    envs.close(env)
