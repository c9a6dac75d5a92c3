"""The embedded suite: conformance, geometry, reward, grasping, shifts; and it can be solved."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from roadvla.envs import SETTINGS, make_env, setting
from roadvla.envs.conformance import check_env
from roadvla.envs.tabletop import TabletopEnv, expert
from roadvla.envs.tabletop.dynamics import advance, yaw_error
from roadvla.envs.tabletop.noise import choice, uniform
from roadvla.envs.tabletop.scene import COLOURS, SHAPES, sample_scene
from roadvla.errors import UserError

SPLITS = [(alias, split) for alias in SETTINGS for split in ("train", "test")]


def solve(alias: str, split: str, episodes: int, noise: float = 0.1) -> TabletopEnv:
    env = TabletopEnv(alias, split=split, num_envs=episodes)
    env.reset(torch.arange(episodes))
    generator = torch.Generator().manual_seed(0)
    for _ in range(env.horizon):
        env.step(expert.act(env, gain=0.7, noise=noise, generator=generator))
    return env


@pytest.mark.parametrize(("alias", "split"), SPLITS)
def test_every_split_obeys_the_contract(alias: str, split: str) -> None:
    checks = check_env(
        lambda count: make_env(alias, split=split, num_envs=count),
        act=lambda env: expert.act(env, gain=0.7),
    )
    assert len(checks) == 17
    assert not [check for check in checks if check.failure]


@pytest.mark.parametrize(("alias", "split"), SPLITS)
def test_the_expert_solves_every_split(alias: str, split: str) -> None:
    env = solve(alias, split, 128)
    assert env.state.success.float().mean() >= (0.98 if split == "train" else 0.95)


def test_doing_nothing_solves_nothing() -> None:
    env = TabletopEnv("VR-UnseenTable", split="train", num_envs=256)
    env.reset(torch.arange(256))
    for _ in range(env.horizon):
        step = env.step(torch.zeros(256, 7))
    assert not step.info["success_once"].any()
    assert not step.info["grasped"].any()


def test_table_3_names_and_ids() -> None:
    ids = {row.alias: row.rl4vla_id for row in SETTINGS.values()}
    assert ids == {
        "VR-UnseenTable": "PutOnPlateInScene25VisionImage-v1",
        "VR-DynamicTexture": "PutOnPlateInScene25VisionTexture05-v1",
        "VR-DynamicNoise": "PutOnPlateInScene25VisionWhole05-v1",
        "CR-MultiObject": "PutOnPlateInScene25MultiCarrot-v1",
        "CR-MultiReceptacle": "PutOnPlateInScene25MultiPlate-v1",
        "ER-InitPose": "PutOnPlateInScene25EEPose-v1",
        "ER-Repositioning": "PutOnPlateInScene25PositionChangeTo-v1",
    }
    assert setting("PutOnPlateInScene25EEPose-v1").alias == "ER-InitPose"
    with pytest.raises(UserError, match="did you mean 'VR-UnseenTable'"):
        setting("UnseenTable")
    with pytest.raises(UserError, match="known: test, train"):
        make_env("VR-UnseenTable", split="ood", num_envs=1)


def test_four_settings_share_one_training_distribution() -> None:
    base = setting("VR-UnseenTable").train
    for alias in ("VR-DynamicTexture", "VR-DynamicNoise", "ER-InitPose"):
        assert setting(alias).train == base
    assert all(row.train != row.test for row in SETTINGS.values())


def test_20_pairs_are_seen_and_12_are_not() -> None:
    ids = torch.arange(8192)
    counts = []
    for distribution in (setting("CR-MultiObject").train, setting("CR-MultiObject").test):
        scene = sample_scene(ids, distribution)
        counts.append(len((scene.shape[:, 0] * 8 + scene.colour[:, 0]).unique()))
    assert counts == [20, 12]


def test_what_is_unseen_never_appears_in_training() -> None:
    ids = torch.arange(4096)
    for alias, row in SETTINGS.items():
        train, test = sample_scene(ids, row.train), sample_scene(ids, row.test)
        seen = set(
            zip(train.shape.flatten().tolist(), train.colour.flatten().tolist(), strict=True)
        )
        new = set(zip(test.shape[:, 0].tolist(), test.colour[:, 0].tolist(), strict=True))
        plates = set(train.receptacle_colour.flatten().tolist())
        new_plates = set(test.receptacle_colour.flatten().tolist())
        assert bool(seen & new) == (alias != "CR-MultiObject")
        assert bool(plates & new_plates) == (alias != "CR-MultiReceptacle")
        assert bool((test.table >= 16).all()) == (alias == "VR-UnseenTable")
        assert bool((train.table < 16).all())


@pytest.mark.parametrize(("alias", "split"), SPLITS)
def test_things_stand_apart_and_within_reach(alias: str, split: str) -> None:
    scene = sample_scene(torch.arange(4096), setting(alias).distribution(split))
    places = torch.cat([scene.receptacle_xy, scene.object_xy, scene.moved_xy[:, None]], 1)
    assert (places.abs() <= torch.tensor([0.11, 0.14])).all()
    gap = torch.cdist(scene.receptacle_xy[:, :1], scene.object_xy)
    assert (gap >= 0.13 - 1e-6).float().mean() > 0.997
    pairs = torch.cdist(scene.object_xy, scene.object_xy) + torch.eye(scene.object_xy.shape[1])
    assert (pairs >= 0.105 - 1e-6).float().mean() > 0.997


def test_the_instruction_names_slot_0() -> None:
    scene = sample_scene(torch.arange(64), setting("CR-MultiReceptacle").test)
    for i, text in enumerate(scene.instructions()):
        _, colour, shape, _, receptacle, plate = text.split()
        assert COLOURS.index(colour) == scene.colour[i, 0]
        assert SHAPES.index(shape) == scene.shape[i, 0]
        assert COLOURS.index(receptacle) == scene.receptacle_colour[i, 0]
        assert plate == "plate"


def test_named_things_are_unique_in_their_scene() -> None:
    for split in ("train", "test"):
        scene = sample_scene(torch.arange(4096), setting("CR-MultiObject").distribution(split))
        pair = scene.shape * 8 + scene.colour
        assert (pair[:, 0] != pair[:, 1]).all()
    plates = sample_scene(torch.arange(4096), setting("CR-MultiReceptacle").train).receptacle_colour
    assert (plates[:, 0] != plates[:, 1]).all()


def test_lookalikes_have_the_colour_of_the_target_and_another_shape() -> None:
    ids = torch.arange(4096)
    objects = sample_scene(ids, setting("CR-MultiObject").test)
    assert torch.equal(objects.colour[:, 0], objects.colour[:, 1])
    turn = (objects.shape[:, 1] - objects.shape[:, 0]) % 4
    assert torch.bincount(turn, minlength=4)[1:].min() > 1200
    receptacles = sample_scene(ids, setting("CR-MultiReceptacle").test)
    assert torch.equal(receptacles.receptacle_colour[:, 0], receptacles.receptacle_colour[:, 1])
    assert torch.equal(receptacles.receptacle_shape, torch.tensor([[0, 1]]).expand(4096, -1))
    for row in SETTINGS.values():
        assert not sample_scene(ids[:8], row.train).receptacle_shape.any()


# Geometry of one grasp, by hand. The gripper is put 2.9 cm (inside the 3.0 cm radius) or 3.1 cm
# beside a ball, at the ball's height, and closes.
@pytest.mark.parametrize(("offset", "grasps"), [(0.0, True), (0.029, True), (0.031, False)])
def test_grasp_distance(offset: float, grasps: bool) -> None:
    env = placed_above("ball", offset=offset)
    env.step(command(opened=False))
    assert bool(env.state.held[0] == 0) == grasps


@pytest.mark.parametrize(("height", "grasps"), [(0.035, True), (0.045, False)])
def test_grasp_height(height: float, grasps: bool) -> None:
    env = placed_above("ball", height=height)
    env.step(command(opened=False))
    assert bool(env.state.held[0] == 0) == grasps


# An elongated object must be aligned within 0.6 rad modulo π; a ball looks the same from all sides.
@pytest.mark.parametrize(
    ("shape", "yaw", "grasps"),
    [
        ("brick", 0.55, True),
        ("brick", 0.65, False),
        ("brick", math.pi - 0.55, True),
        ("brick", math.pi / 2, False),
        ("ball", math.pi / 2, True),
    ],
)
def test_grasp_alignment(shape: str, yaw: float, grasps: bool) -> None:
    env = placed_above(shape, yaw=yaw)
    env.step(command(opened=False))
    assert bool(env.state.held[0] == 0) == grasps


@pytest.mark.parametrize(("tilt", "grasps"), [(0.55, True), (0.65, False)])
def test_grasp_tilt(tilt: float, grasps: bool) -> None:
    env = placed_above("ball", tilt=tilt)
    env.step(command(opened=False))
    assert bool(env.state.held[0] == 0) == grasps


def test_only_closing_grasps() -> None:
    env = placed_above("ball", offset=0.04)
    env.step(command(opened=False))  # closes on nothing
    env.step(command(dx=-0.04, opened=False))  # arrives already closed
    assert env.state.held[0] == -1


# By hand, with r = Δφ: the grasp gives +0.1, the fifth consecutive step of holding +0.1, release
# within 4.5 cm of the receptacle's centre +1.0, taking the object away again −1.0.
def test_rewards_of_one_episode() -> None:
    env = placed_above("ball")
    rewards = [float(env.step(command(opened=False)).reward[0]) for _ in range(6)]
    assert rewards == pytest.approx([0.1, 0, 0, 0, 0.1, 0])
    over(env, env.scene.receptacle_xy[0, 0] + torch.tensor([0.044, 0.0]))
    assert float(env.step(command(opened=True)).reward[0]) == pytest.approx(1.0)
    assert bool(env.state.success[0])
    assert float(env.step(command(opened=False)).reward[0]) == pytest.approx(-1.0)
    assert not bool(env.state.success[0])
    assert bool(env.state.success_once[0])


def test_success_needs_the_right_place() -> None:
    env = placed_above("ball")
    env.step(command(opened=False))
    over(env, env.scene.receptacle_xy[0, 0] + torch.tensor([0.046, 0.0]))
    env.step(command(opened=True))
    assert not bool(env.state.success_once[0])


def test_released_high_it_lands_elsewhere_and_low_it_does_not() -> None:
    moved = []
    for lift in (0.0, 0.04):
        env = placed_above("ball")
        env.step(command(opened=False))
        env.step(command(dz=lift, opened=False))
        env.step(command(dz=lift, opened=False))
        before = env.state.object_position[0, 0].clone()
        env.step(command(opened=True))
        after = env.state.object_position[0, 0]
        assert float(after[2]) == pytest.approx(0.03)
        moved.append(float((after[:2] - before[:2]).norm()))
    assert moved[0] == 0
    assert 0 < moved[1] < 0.05


def test_repositioning_happens_after_the_fifth_action_only_in_test() -> None:
    for split, moves in (("train", False), ("test", True)):
        env = TabletopEnv("ER-Repositioning", split=split, num_envs=32)
        env.reset(torch.arange(32))
        start = env.state.object_position[:, 0].clone()
        for _ in range(4):
            env.step(torch.zeros(32, 7))
        assert torch.equal(env.state.object_position[:, 0], start)
        env.step(torch.zeros(32, 7))
        distance = (env.state.object_position[:, 0] - start).norm(dim=1)
        assert bool((distance > 0.1).all()) == moves
        for _ in range(25):
            step = env.step(torch.zeros(32, 7))
        assert bool(step.truncated.all())
        assert env.horizon == 30


def test_repositioning_takes_the_object_out_of_the_hand() -> None:
    env = TabletopEnv("ER-Repositioning", split="test", num_envs=64)
    env.reset(torch.arange(64))
    for _ in range(4):
        env.step(expert.act(env, gain=1.0))
    assert bool((env.state.held == 0).any())
    env.step(expert.act(env, gain=1.0))
    assert bool((env.state.held == -1).all())
    assert torch.equal(env.state.object_position[:, 0, :2], env.scene.moved_xy)


@pytest.mark.parametrize(
    ("alias", "whole"), [("VR-DynamicNoise", True), ("VR-DynamicTexture", False)]
)
def test_overlays_change_every_step_where_they_should(alias: str, whole: bool) -> None:
    env = TabletopEnv(alias, split="test", num_envs=8)
    plain = TabletopEnv(alias, split="train", num_envs=8)
    first, reference = env.reset(torch.arange(8)), plain.reset(torch.arange(8))
    changed = (first.int() - reference.int()).abs().amax(-1) > 8
    share = changed.float().mean((1, 2))
    assert bool((share > 0.6).all()) if whole else bool(((share > 0.02) & (share < 0.35)).all())
    still = torch.zeros(8, 7)
    still[:, 6] = 1
    second, third = env.step(still).image, env.step(still).image
    assert bool(((second.int() - third.int()).abs().amax((1, 2, 3)) > 8).all())
    plain.step(still)
    assert torch.equal(plain.step(still).image, reference)


# α = 0.5: a blended pixel is the mean of texture and frame, so it lies within 127.5 of the frame.
def test_overlay_strength_is_one_half() -> None:
    env = TabletopEnv("VR-DynamicNoise", split="test", num_envs=64)
    plain = TabletopEnv("VR-DynamicNoise", split="train", num_envs=64)
    difference = (env.reset(torch.arange(64)).int() - plain.reset(torch.arange(64)).int()).abs()
    assert 100 < int(difference.max()) <= 128


def test_shifted_poses_are_outside_the_usual_ones() -> None:
    ids = torch.arange(2048)
    usual = sample_scene(ids, setting("ER-InitPose").train).gripper
    shifted = sample_scene(ids, setting("ER-InitPose").test).gripper
    assert (usual[:, :2].abs() <= 0.02).all()
    assert (usual[:, 3:] == 0).all()
    outside = (shifted[:, :2].abs() > 0.02).any(1) | (shifted[:, 5].abs() > 0.2)
    assert outside.float().mean() > 0.97


def test_an_ended_episode_is_frozen() -> None:
    env = TabletopEnv("VR-UnseenTable", split="train", num_envs=32, end_on_success=True)
    env.reset(torch.arange(32))
    ended = torch.zeros(32, dtype=torch.bool)
    gripper = env.state.gripper
    for _ in range(env.horizon):
        step = env.step(expert.act(env, gain=0.8))
        assert not step.terminated[ended].any()
        assert (step.reward[ended] == 0).all()
        assert torch.equal(env.state.gripper[ended], gripper[ended])
        assert not (step.truncated & (ended | step.terminated)).any()
        ended |= step.terminated
        gripper = env.state.gripper
    assert ended.all()


def test_yaw_error_is_modulo_pi() -> None:
    yaw = torch.tensor([[0.2, math.pi + 0.2, -math.pi + 0.2, 1.7]])
    error = yaw_error(yaw, torch.tensor([[0.0]]))
    expected = torch.tensor([[0.2, 0.2, 0.2, 1.7 - math.pi]])
    assert torch.allclose(error, expected, atol=1e-6)


# SplitMix64's reference stream from state 0 starts 0xE220A8397B1DCDAF: finalizer(1 * golden).
def test_the_random_numbers_are_splitmix64() -> None:
    from roadvla.envs.tabletop.noise import _GOLDEN, _mix

    assert int(_mix(torch.tensor([_GOLDEN]))[0]) % (1 << 64) == 0xE220A8397B1DCDAF


def test_random_numbers_are_uniform_and_independent() -> None:
    u = uniform(torch.arange(20_000), 3, 4)
    assert ((u >= 0) & (u < 1)).all()
    assert (u.mean(0) - 0.5).abs().max() < 0.01
    assert (u.var(0) - 1 / 12).abs().max() < 0.002
    other = uniform(torch.arange(20_000), 4, 4)
    stacked = torch.cat([u, other], 1).T
    correlation = torch.corrcoef(stacked) - torch.eye(8)
    assert correlation.abs().max() < 0.03
    counts = torch.bincount(choice(torch.arange(20_000), 0, 1, 7)[:, 0], minlength=7)
    assert (counts / 20_000 - 1 / 7).abs().max() < 0.01


def test_a_state_is_bit_identical_in_any_batch() -> None:
    ids = torch.arange(37) * 1_000_003
    whole = TabletopEnv("CR-MultiObject", split="test", num_envs=37)
    whole.reset(ids)
    single = TabletopEnv("CR-MultiObject", split="test", num_envs=1)
    single.reset(ids[20:21])
    for _ in range(24):
        action = expert.act(whole, gain=0.6)
        whole.step(action)
        single.step(action[20:21])
        for field in dataclasses.fields(whole.state):
            a, b = getattr(whole.state, field.name), getattr(single.state, field.name)
            assert a == b if isinstance(a, int) else torch.equal(a[20:21], b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_state_is_bit_identical_on_a_gpu() -> None:
    ids = torch.arange(64)
    envs = [
        TabletopEnv("CR-MultiObject", split="test", num_envs=64, device=d) for d in ("cpu", "cuda")
    ]
    frames = [env.reset(ids.to(env.device)).cpu().int() for env in envs]
    assert (frames[0] - frames[1]).abs().max() <= 1
    for _ in range(24):
        action = expert.act(envs[0], gain=0.6)
        frames = [env.step(action.to(env.device)).image.cpu().int() for env in envs]
        assert (frames[0] - frames[1]).abs().max() <= 1
        assert torch.equal(envs[0].state.object_position, envs[1].state.object_position.cpu())


def placed_above(
    shape: str, *, offset: float = 0.0, height: float = 0.0, yaw: float = 0.0, tilt: float = 0.0
) -> TabletopEnv:
    """One episode with the open gripper at a given place relative to an object of a given shape."""
    ids = torch.arange(200)
    scenes = sample_scene(ids, setting("VR-UnseenTable").train)
    chosen = int(ids[scenes.shape[:, 0] == SHAPES.index(shape)][0])
    env = TabletopEnv("VR-UnseenTable", split="train", num_envs=1)
    env.reset(torch.tensor([chosen]))
    state = env.state
    tip = state.object_position[:, 0] + torch.tensor([[offset, 0.0, height]])
    turn = state.object_yaw[:, :1] + yaw
    gripper = torch.cat([tip, torch.tensor([[tilt, 0.0]]), turn], 1)
    env._state = dataclasses.replace(state, gripper=gripper)
    return env


def over(env: TabletopEnv, xy: torch.Tensor) -> None:
    """Carry the held object to a place, just above the table."""
    gripper = env.state.gripper.clone()
    target = gripper.clone()
    target[0, :2] += xy - env.state.object_position[0, 0, :2]
    position = env.state.object_position.clone()
    position[0, 0, :2] = xy
    env._state = dataclasses.replace(env.state, gripper=target, object_position=position)


def command(dx: float = 0.0, dz: float = 0.0, *, opened: bool) -> torch.Tensor:
    return torch.tensor([[dx, 0.0, dz, 0.0, 0.0, 0.0, float(opened)]])


def test_advance_does_not_change_its_input() -> None:
    env = TabletopEnv("ER-Repositioning", split="test", num_envs=4)
    env.reset(torch.arange(4))
    before = env.state
    copies = {f.name: getattr(before, f.name) for f in dataclasses.fields(before)}
    copies = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in copies.items()}
    advance(before, env.scene, torch.rand(4, 7), torch.arange(4), reposition_step=1)
    for name, value in copies.items():
        now = getattr(before, name)
        assert now == value if isinstance(value, int) else torch.equal(now, value)
