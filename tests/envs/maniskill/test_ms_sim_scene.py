"""Every setting in the simulator, in and out of distribution: state and frames."""

from __future__ import annotations

from functools import cache

import gymnasium
import pytest
import torch
from ms_sim import simulator  # noqa: F401

from roadvla.envs.maniskill.episodes import draw_ids
from roadvla.envs.maniskill.objects import OBJECTS, RECEPTACLES
from roadvla.envs.maniskill.poses import START_QPOS
from roadvla.envs.maniskill.settings import PREFIX, VARIANTS, variant

pytestmark = pytest.mark.sim

SIZE = (96, 128)
STILL = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]])
SHORT = [env_id.removeprefix(PREFIX) for env_id in VARIANTS]


def make(setting, **options):
    from roadvla.envs.maniskill.scene import PutOnPlateScene

    options = {"size": SIZE, "obs_mode": "none", "stand_ins": True, **options}
    return PutOnPlateScene(setting=setting, **options)


def start(scene, split, episode):
    ids = draw_ids(scene.variant, split, torch.tensor([episode]))
    scene.reset(seed=0, options={"obj_set": split, "episode_id": ids})
    return scene


@cache
def seen(setting, split, steps=7):
    """Frames and poses of one episode in which the arm keeps still."""
    scene = start(make(setting), split, 3)
    frames, bodies = [scene.capture()[0].clone()], [scene._body_poses()[0].clone()]
    for _ in range(steps):
        scene.step(STILL)
        frames.append(scene.capture()[0].clone())
        bodies.append(scene._body_poses()[0].clone())
    facts = {
        "instruction": scene.instructions[0],
        "episodes": scene.episodes,
        "qpos": scene.agent.robot.get_qpos()[0].clone(),
        "mask": scene._keep[scene._draw()[1][0].long()].float().mean().item(),
        "progress": scene.progress,
        "teleported": scene.teleported,
        "half": scene.half_sizes[0],
    }
    scene.close()
    return torch.stack(frames), torch.stack(bodies), facts


@pytest.mark.parametrize("split", ["train", "test", "all"])
@pytest.mark.parametrize("setting", SHORT)
def test_every_setting_resets_and_steps(setting, split):
    frames, bodies, facts = seen(setting, split)
    row, episodes = variant(setting), facts["episodes"]
    # The table's top is at 0.8695 m; whatever lies on it lies still and in front of the arm.
    count = 3 if int(episodes.distractor) >= 0 else 2
    resting = bodies[0, :count]
    assert bool(torch.isfinite(resting).all())
    assert bool((resting[:, 2] > 0.865).all())
    assert bool((resting[:, 2] < 0.95).all())
    assert bool(torch.isnan(bodies[0, count:]).all())
    if row.reposition_step(split) == 0:
        assert torch.allclose(bodies[-1, :count, :3], resting[:, :3], atol=2e-3)
    assert OBJECTS[int(episodes.object)].name in facts["instruction"]
    assert RECEPTACLES[int(episodes.receptacle)].name in facts["instruction"]
    assert not bool(facts["progress"].grasped | facts["progress"].success_once)
    assert frames.dtype == torch.uint8
    assert frames.shape[1:] == (*SIZE, 3)
    assert 0.03 < facts["mask"] < 0.3
    assert frames[0].float().std() > 20
    assert bool((facts["half"] > 0).all())


def test_tables_outside_training_are_seen_in_the_test_set_only():
    assert int(seen("VisionImage-v1", "train")[2]["episodes"].table) < 16
    assert int(seen("VisionImage-v1", "test")[2]["episodes"].table) >= 16


@pytest.mark.parametrize("kind", ["VisionTexture05-v1", "VisionWhole05-v1"])
def test_an_overlay_changes_what_it_should(kind):
    # The episode of another setting with the same contents but the overlay.
    scene, plain = make(kind), make("VisionImage-v1")
    ids = draw_ids(scene.variant, "test", torch.tensor([3]))
    scene.reset(seed=0, options={"obj_set": "test", "episode_id": ids})
    episodes = scene.episodes
    from dataclasses import replace

    from roadvla.envs.maniskill.episodes import encode

    same = replace(episodes, extra=torch.zeros_like(episodes.extra))
    ids = encode(plain.variant, "train", same)
    plain.reset(seed=0, options={"obj_set": "train", "episode_id": ids})
    shifted, frame = scene.capture()[0].int(), plain.capture()[0].int()
    mask = plain._keep[plain._draw()[1][0].long()]
    changed = (shifted - frame).abs().amax(dim=-1) > 3
    assert changed[mask].float().mean() > 0.5
    outside = changed[~mask].float().mean()
    assert outside == 0 if kind.startswith("VisionTexture") else outside > 0.5


def test_the_object_is_lifted_to_its_new_place_after_five_steps():
    _, bodies, facts = seen("PositionChangeTo-v1", "test")
    moved = (bodies[1:, 0, :2] - bodies[:-1, 0, :2]).norm(dim=1)
    assert moved[4] > 0.05
    assert bool((moved[:4] < 2e-3).all())
    assert torch.allclose(bodies[5, 0, :2], facts["teleported"][0, :2], atol=0.02)
    assert seen("PositionChangeTo-v1", "train")[2]["teleported"] is None


def test_the_arm_starts_elsewhere_in_eepose():
    usual = torch.tensor(START_QPOS)
    assert torch.allclose(seen("EEPose-v1", "train")[2]["qpos"][:6], usual[:6], atol=0.02)
    assert (seen("EEPose-v1", "test")[2]["qpos"][:6] - usual[:6]).abs().max() > 0.05


@pytest.mark.parametrize(
    ("setting", "kind"), [("MultiCarrot-v1", OBJECTS), ("MultiPlate-v1", RECEPTACLES)]
)
def test_a_distractor_stands_apart(setting, kind):
    _, bodies, facts = seen(setting, "train")
    assert 0 <= int(facts["episodes"].distractor) < len(kind)
    apart = (bodies[0, 2, :2] - bodies[0, :2, :2]).norm(dim=-1)
    assert bool((apart > 0.04).all())


def test_an_episode_is_the_same_after_others():
    scene = start(make("Main-v3"), "train", 11)
    first, poses = scene.capture().clone(), scene._body_poses().clone()
    start(scene, "test", 5)
    scene.step(STILL)
    start(scene, "train", 11)
    assert torch.equal(scene.capture(), first)
    assert torch.equal(scene._body_poses().nan_to_num(), poses.nan_to_num())
    scene.close()


def test_the_ids_are_registered_under_their_names():
    import roadvla.envs.maniskill.ids  # noqa: F401

    assert set(VARIANTS) <= set(gymnasium.registry)
    options = {"size": SIZE, "stand_ins": True}
    env = gymnasium.make("PutOnPlateInScene25Single-v1", **options)
    ids = torch.tensor([77])
    observation, _ = env.reset(options={"obj_set": "train", "episode_id": ids})
    frame = observation["sensor_data"]["3rd_view_camera"]["rgb"]
    assert frame.shape == (1, *SIZE, 3)
    *_, info = env.step(STILL)
    assert set(info) >= {"is_src_obj_grasped", "consecutive_grasp", "src_on_target", "success"}
    env.close()


def test_a_smaller_frame_shows_the_same():
    large = start(make("Single-v1", size=(480, 640)), "train", 1).capture()[0].float()
    small = start(make("Single-v1", size=(48, 64)), "train", 1).capture()[0].float()
    averaged = large.unflatten(0, (48, 10)).unflatten(2, (64, 10)).mean(dim=(1, 3))
    # Edges differ: one ray a pixel against a hundred.
    assert (averaged - small).abs().mean() < 6
