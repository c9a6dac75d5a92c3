"""Positions, yaws, heights, joint offsets: counts and geometry of what episodes start from."""

from __future__ import annotations

import math

import pytest
import torch

from roadvla.envs.maniskill.episodes import Episodes, decode, draw_ids
from roadvla.envs.maniskill.poses import (
    START_QPOS,
    YAWS,
    joint_offsets,
    object_poses,
    receptacle_poses,
    spawn_poses,
    start_qpos,
    teleport_poses,
)
from roadvla.envs.maniskill.positions import positions
from roadvla.envs.maniskill.settings import PREFIX, SETS, VARIANTS, Variant

UPRIGHT = [1.0, 0.0, 0.0, 0.0]


def sample(env_id: str, obj_set: str, count: int = 512) -> tuple[Variant, Episodes]:
    row = VARIANTS[PREFIX + env_id]
    return row, decode(row, obj_set, draw_ids(row, obj_set, torch.arange(count)))


def cells(x: tuple[float, float], y: tuple[float, float]) -> set[tuple[float, float]]:
    """A grid of 3 cm, in whole millimetres to be exact."""
    return {
        (i / 1000, j / 1000)
        for i in range(round(1000 * x[0]), round(1000 * x[1]) + 1, 30)
        for j in range(round(1000 * y[0]), round(1000 * y[1]) + 1, 30)
    }


def rounded(places: torch.Tensor) -> set[tuple[float, float]]:
    return {(round(x, 6) + 0.0, round(y, 6) + 0.0) for x, y in places.tolist()}


INNER = cells((-0.235, -0.085), (-0.075, 0.075))
RING = cells((-0.265, -0.055), (-0.105, 0.105)) - INNER


def test_pairs() -> None:
    table = positions("pairs")
    assert table.shape == (784, 3, 2)
    assert rounded(table[:, 0]) == rounded(table[:, 1]) == INNER
    assert table[:, 2].isnan().all()
    gap = (table[:, 0] - table[:, 1]).norm(dim=-1)
    assert gap.min() > 0.08  # 9 cm along one axis or 8.5 cm across: 6 cm and 6.7 cm are too near
    torch.testing.assert_close(positions("pairs_and_ring")[:784], table, equal_nan=True)
    assert len({tuple(row) for row in table[:, :2].flatten(1).tolist()}) == 784


def test_order_of_pairs() -> None:
    table = positions("pairs")
    # The first object is in the corner; of its column the first receptacle far enough is at +9 cm.
    assert table[0, :2].tolist() == [
        pytest.approx([-0.235, -0.075]),
        pytest.approx([-0.235, 0.015]),
    ]
    assert table[-1, :2].tolist() == [
        pytest.approx([-0.085, 0.075]),
        pytest.approx([-0.085, -0.015]),
    ]
    keys = (table[:, :2] * 1000).round().long().flatten(1).tolist()
    assert keys == sorted(keys)


def test_ring() -> None:
    table = positions("pairs_and_ring")
    assert table.shape == (1412, 3, 2)
    ring = table[784:]
    assert len(RING) == 28
    assert rounded(ring[:, 0]) == rounded(ring[:, 1]) == RING
    assert (ring[:, 0] - ring[:, 1]).norm(dim=-1).min() > 0.07
    keys = (ring[:, :2] * 1000).round().long().flatten(1).tolist()
    assert keys == sorted(keys)
    assert len({tuple(key) for key in keys}) == 628


@pytest.mark.parametrize(("layout", "near"), [("objects_apart", 0), ("receptacles_apart", 1)])
def test_triples(layout: str, near: int) -> None:
    table = positions(layout)  # pyright: ignore[reportArgumentType]
    assert table.shape == (2104, 3, 2)
    gaps = [(table[:, i] - table[:, j]).norm(dim=-1) for i, j in ((0, 1), (1, 2), (0, 2))]
    assert gaps[0].min() > 0.07
    far = gaps[2] if near == 0 else gaps[1]
    assert far.min() > 0.15  # in float64, as they were chosen: 20 of the pairs at 15 cm
    assert (gaps[1] if near == 0 else gaps[2]).min() > 0.07
    # Bodies that are 15 cm apart stand on the 26 outer cells only; together 568 pairs occur.
    apart = (table[:, near], table[:, 2])
    assert len(rounded(apart[0])) == len(rounded(apart[1])) == 26
    first = {tuple(row) for row in (table[:, :2] * 1000).round().flatten(1).tolist()}
    assert len(first) == 568
    keys = (table * 1000).round().long().flatten(1).tolist()
    assert keys == sorted(keys)


def test_triples_keep_the_same_of_those_at_15_cm_as_plain_floats_do() -> None:
    axes = [
        [(2 * u - 1) * 0.075 + centre for u in (0, 0.2, 0.4, 0.6, 0.8, 1)]
        for centre in (-0.16, 0.0)
    ]
    grid = [(x, y) for x in axes[0] for y in axes[1]]

    def gap(a: tuple[float, float], b: tuple[float, float]) -> float:
        return math.sqrt((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2)

    # On the 3 cm grid: 5 cells along an axis, or 3 and 4.
    exactly = [
        (a, b)
        for i, a in enumerate(grid)
        for j, b in enumerate(grid)
        if (abs(i // 6 - j // 6), abs(i % 6 - j % 6)) in ((0, 5), (5, 0), (3, 4), (4, 3))
    ]
    assert len(exactly) == 72
    kept = {(a, b) for a, b in exactly if gap(a, b) > 0.15}
    assert len(kept) == 20
    table = positions("objects_apart").tolist()
    found = {(tuple(obj), tuple(third)) for obj, _, third in table}
    assert found & set(exactly) == kept


def test_yaws() -> None:
    assert [math.degrees(yaw) for yaw in YAWS] == pytest.approx(
        [0, 45, 90, 135, -22.5, -67.5, -112.5, -157.5]
    )


@pytest.mark.parametrize(
    ("env_id", "heights"),
    [
        ("Main-v3", (0.95, 0.95, math.nan)),
        ("Position-v1", (0.95, 0.95, math.nan)),
        ("EEPose-v1", (0.95, 0.95, math.nan)),
        ("MultiCarrot-v1", (0.95, 0.92, 1.00)),
        ("MultiPlate-v1", (1.00, 0.92, 0.96)),
        ("PositionChangeTo-v1", (0.95, 0.92, math.nan)),
    ],
)
def test_spawn_poses(env_id: str, heights: tuple[float, float, float]) -> None:
    row, episodes = sample(env_id, "train")
    poses = spawn_poses(row, episodes)
    assert poses.dtype == torch.float32
    table = positions(row.layout)[episodes.position].float()
    yaw = torch.tensor(YAWS)[episodes.yaw]
    for slot, height in enumerate(heights):
        if math.isnan(height):
            assert poses[:, slot].isnan().all()
            continue
        torch.testing.assert_close(poses[:, slot, :2], table[:, slot])
        torch.testing.assert_close(poses[:, slot, 2], torch.full_like(yaw, height))
        turned = slot == 0 or (slot == 2 and env_id == "MultiCarrot-v1")
        angle = 2 * torch.atan2(poses[:, slot, 6], poses[:, slot, 3])
        torch.testing.assert_close(angle, yaw if turned else torch.zeros_like(yaw))
        torch.testing.assert_close(poses[:, slot, 3:].norm(dim=-1), torch.ones_like(yaw))
        assert (poses[:, slot, 4:6] == 0).all()


def test_a_distractor_that_is_the_target_lies_alone_at_its_own_place() -> None:
    row, episodes = sample("MultiCarrot-v1", "test")
    same = episodes.distractor == episodes.object
    assert 0 < same.sum() < len(same)
    poses = spawn_poses(row, episodes)
    assert torch.equal(poses[same, 0], poses[same, 2])
    assert ((poses[~same, 0] - poses[~same, 2])[:, :2].norm(dim=-1) > 0.149).all()
    everything = object_poses(row, episodes)
    on_table = (everything[..., 0] < 0).sum(-1)
    assert torch.equal(on_table, 2 - same.long())


def test_teleport_poses() -> None:
    for obj_set in SETS:
        row, episodes = sample("PositionChangeTo-v1", obj_set)
        before, after = spawn_poses(row, episodes)[:, 0], teleport_poses(row, episodes)
        assert ((before - after)[:, :2].norm(dim=-1) > 0.1499).all()
        assert (after[:, 2] == 1.0).all()
        assert torch.equal(before[:, 3:], after[:, 3:])
        moved = object_poses(row, episodes, teleported=True)
        unmoved = object_poses(row, episodes)
        batch = torch.arange(len(before))
        assert torch.equal(moved[batch, episodes.object], after)
        assert ((moved != unmoved).any(-1).sum(-1) == 1).all()
    with pytest.raises(ValueError, match="does not reposition"):
        teleport_poses(*sample("Main-v3", "test"))


@pytest.mark.parametrize("env_id", ["Single-v1", "Main-v3", "Plate-v1", "MultiPlate-v1"])
def test_bodies_that_are_not_chosen_are_parked(env_id: str) -> None:
    row, episodes = sample(env_id, "test", 64)
    poses = spawn_poses(row, episodes)
    objects, receptacles = object_poses(row, episodes), receptacle_poses(row, episodes)
    assert objects.shape == (64, row.built_objects, 7)
    assert receptacles.shape == (64, row.built_receptacles, 7)
    for b in range(64):
        chosen = {int(episodes.receptacle[b]): poses[b, 1]}
        if env_id == "MultiPlate-v1":
            chosen[int(episodes.distractor[b])] = poses[b, 2]
        for r in range(row.built_receptacles):
            parked = torch.tensor([2.0, 0.3 * r, 1.0, *UPRIGHT])
            torch.testing.assert_close(receptacles[b, r], chosen.get(r, parked))
        for o in range(row.built_objects):
            parked = torch.tensor([1.0, 0.3 * o, 1.0, *UPRIGHT])
            expected = poses[b, 0] if o == episodes.object[b] else parked
            torch.testing.assert_close(objects[b, o], expected)


def test_joint_offsets() -> None:
    offsets = joint_offsets()
    assert offsets.shape == (14_376, 6)
    assert (offsets[0] == 0).all()
    assert (offsets[1:] == 0).all(-1).sum() == 1
    assert offsets[1].tolist() == pytest.approx([-0.15, -0.15, -0.08, -0.15, -0.15, -0.6])
    assert offsets[2].tolist() == pytest.approx([-0.15, -0.15, -0.08, -0.15, -0.15, -0.3])
    assert offsets[-1].tolist() == pytest.approx([0.15, 0.15, 0.08, 0.15, 0.15, 0.6])
    assert (offsets[:, 1] + offsets[:, 2]).abs().max() < 0.24
    for joint, values in enumerate(
        [[-0.15, -0.08, 0, 0.08, 0.15]] * 5 + [[-0.6, -0.3, 0, 0.3, 0.6]]
    ):
        assert offsets[:, joint].unique().tolist() == pytest.approx(values)
    assert len(offsets[1:].unique(dim=0)) == 14_375
    keys = (offsets[1:] * 100).round().long().tolist()
    assert keys == sorted(keys)


def test_start_qpos() -> None:
    row, episodes = sample("EEPose-v1", "test")
    start = start_qpos(row, episodes)
    torch.testing.assert_close(
        start[:, :6], torch.tensor(START_QPOS)[:6] + joint_offsets()[episodes.extra]
    )
    assert (start[:, 6:] == torch.tensor(0.037)).all()
    row, episodes = sample("VisionTexture05-v1", "test", 8)
    assert torch.equal(start_qpos(row, episodes), torch.tensor(START_QPOS).expand(8, -1))
