"""Episode ids: totals, digits, their inverse, distractors, and RL4VLA's oddities among them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from roadvla.envs.maniskill.episodes import Episodes, decode, draw_ids, encode, total
from roadvla.envs.maniskill.settings import PREFIX, SETS, VARIANTS, Fixes, variant
from roadvla.errors import UserError

# From the table of sets: objects · tables · … · positions · yaws, multiplied out by hand.
TOTALS = {
    "Main-v3": (802_816, 141_120, 1_646_400),
    "Single-v1": (3_136, 3_136, 3_136),
    "MainCarrot-v3": (50_176, 28_224, 78_400),
    "MainImage-v3": (50_176, 15_680, 65_856),
    "VisionImage-v1": (802_816, 250_880, 1_053_696),
    "VisionTexture03-v1": (802_816, 12_845_056, 13_647_872),
    "VisionTexture05-v1": (802_816, 12_845_056, 13_647_872),
    "VisionWhole03-v1": (802_816, 12_845_056, 13_647_872),
    "VisionWhole05-v1": (802_816, 12_845_056, 13_647_872),
    "Carrot-v1": (802_816, 451_584, 1_254_400),
    "Instruct-v1": (802_816, 12_845_056, 13_647_872),
    "Plate-v1": (802_816, 12_845_056, 13_647_872),
    "MultiCarrot-v1": (32_317_440, 9_695_232, 80_793_600),
    "MultiPlate-v1": (45_244_416, 678_666_240, 769_155_072),
    "Position-v1": (802_816, 643_072, 2_891_776),
    "EEPose-v1": (802_816, 11_540_480_000, 11_541_282_816),
    "PositionChangeTo-v1": (2_154_496, 2_154_496, 2_154_496),
}

# First and last episode of each test set: object, receptacle, table, extra, position, yaw, other.
ENDS = {
    "Main-v3": ((16, 0, 16, 0, 0, 0, -1), (24, 0, 20, 0, 783, 3, -1)),
    "Single-v1": ((0, 0, 0, 0, 0, 0, -1), (0, 0, 0, 0, 783, 3, -1)),
    "MainCarrot-v3": ((16, 0, 0, 0, 0, 0, -1), (24, 0, 0, 0, 783, 3, -1)),
    "MainImage-v3": ((0, 0, 16, 0, 0, 0, -1), (0, 0, 20, 0, 783, 3, -1)),
    "VisionImage-v1": ((0, 0, 16, 0, 0, 0, -1), (15, 0, 20, 0, 783, 3, -1)),
    "VisionTexture03-v1": ((0, 0, 0, 1, 0, 0, -1), (15, 0, 15, 16, 783, 3, -1)),
    "VisionTexture05-v1": ((0, 0, 0, 1, 0, 0, -1), (15, 0, 15, 16, 783, 3, -1)),
    "VisionWhole03-v1": ((0, 0, 0, 1, 0, 0, -1), (15, 0, 15, 16, 783, 3, -1)),
    "VisionWhole05-v1": ((0, 0, 0, 1, 0, 0, -1), (15, 0, 15, 16, 783, 3, -1)),
    "Carrot-v1": ((16, 0, 0, 0, 0, 0, -1), (24, 0, 15, 0, 783, 3, -1)),
    "Instruct-v1": ((0, 0, 0, 1, 0, 0, -1), (15, 0, 15, 16, 783, 3, -1)),
    "Plate-v1": ((0, 1, 0, 0, 0, 0, -1), (15, 16, 15, 0, 783, 3, -1)),
    "MultiCarrot-v1": ((16, 0, 0, 0, 0, 0, 24), (24, 0, 15, 7, 2103, 3, 21)),
    "MultiPlate-v1": ((0, 1, 0, 0, 0, 0, 2), (15, 16, 20, 14, 2103, 3, 15)),
    "Position-v1": ((0, 0, 0, 0, 784, 4, -1), (15, 0, 15, 0, 1411, 7, -1)),
    "EEPose-v1": ((0, 0, 0, 1, 0, 0, -1), (15, 0, 15, 14375, 783, 3, -1)),
    "PositionChangeTo-v1": ((0, 0, 0, 0, 0, 0, -1), (15, 0, 15, 0, 2103, 3, -1)),
}

CASES = [(env_id, obj_set) for env_id in VARIANTS for obj_set in SETS]


def rows(episodes: Episodes) -> list[tuple[int, ...]]:
    columns = (
        episodes.object,
        episodes.receptacle,
        episodes.table,
        episodes.extra,
        episodes.position,
        episodes.yaw,
        episodes.distractor,
    )
    assert all(column.dtype == torch.int64 for column in columns)
    return [tuple(row) for row in torch.stack(columns, dim=1).tolist()]


def decoded(env_id: str, obj_set: str, *ids: int) -> list[tuple[int, ...]]:
    return rows(decode(VARIANTS[PREFIX + env_id], obj_set, torch.tensor(ids)))


def spread(env_id: str, obj_set: str, count: int = 20_000) -> Episodes:
    row = VARIANTS[PREFIX + env_id]
    return decode(row, obj_set, draw_ids(row, obj_set, torch.arange(count)))


def test_every_id_has_totals() -> None:
    assert [env_id.removeprefix(PREFIX) for env_id in VARIANTS] == list(TOTALS) == list(ENDS)


@pytest.mark.parametrize("env_id", TOTALS)
def test_totals(env_id: str) -> None:
    assert tuple(total(VARIANTS[PREFIX + env_id], name) for name in SETS) == TOTALS[env_id]


@pytest.mark.parametrize("env_id", ENDS)
def test_first_and_last_test_episode(env_id: str) -> None:
    count = TOTALS[env_id][1]
    assert decoded(env_id, "test", 0, count - 1) == list(ENDS[env_id])
    assert decoded(env_id, "test", count, 2 * count - 1) == list(ENDS[env_id])


def test_digits_worked_out_by_hand() -> None:
    # Main, test: 50939 = ((3·5 + 1)·784 + 190)·4 + 3 with 3 + 16 the object and 1 + 16 the table.
    assert decoded("Main-v3", "test", 50_939) == [(19, 0, 17, 0, 190, 3, -1)]
    # MultiCarrot, train: (((7·15 + 4)·16 + 5)·2104 + 1000)·4 + 2; other: (7 + 4 + 1) mod 16.
    number = (((7 * 15 + 4) * 16 + 5) * 2104 + 1000) * 4 + 2
    assert decoded("MultiCarrot-v1", "train", number) == [(7, 0, 5, 4, 1000, 2, 12)]
    # MultiPlate, test, with the receptacle before the extra digit: (3 + 14 + 1) mod 16 = 2, plus 1.
    number = ((((2 * 16 + 3) * 15 + 14) * 21 + 20) * 2104 + 9) * 4 + 1
    assert decoded("MultiPlate-v1", "test", number) == [(2, 4, 20, 14, 9, 1, 3)]
    # EEPose, test, far beyond 32 bits.
    number = (((13 * 14375 + 9999) * 16 + 8) * 784 + 77) * 4 + 3
    assert number > 2**33
    assert decoded("EEPose-v1", "test", number) == [(13, 0, 8, 10_000, 77, 3, -1)]


@given(st.sampled_from(CASES), st.lists(st.integers(0, 2**40), min_size=1, max_size=8))
def test_encode_undoes_decode(case: tuple[str, str], numbers: list[int]) -> None:
    row, obj_set = VARIANTS[case[0]], case[1]
    ids = torch.tensor(numbers)
    episodes = decode(row, obj_set, ids)
    assert torch.equal(encode(row, obj_set, episodes), ids % total(row, obj_set))


@pytest.mark.parametrize("case", CASES)
def test_every_index_of_its_range_occurs(case: tuple[str, str]) -> None:
    row, obj_set = VARIANTS[case[0]], case[1]
    episodes = spread(case[0].removeprefix(PREFIX), obj_set, 200_000)
    for name in ("object", "receptacle", "table", "extra", "position", "yaw"):
        plural = name if name == "extra" else f"{name}s"
        indices = getattr(row, plural).of(obj_set)
        found = getattr(episodes, name).unique()
        assert (found[0], found[-1], len(found)) == (indices[0], indices[-1], len(indices)), name


@pytest.mark.parametrize(
    "env_id",
    [
        "VisionImage-v1",
        "VisionTexture03-v1",
        "VisionTexture05-v1",
        "VisionWhole03-v1",
        "VisionWhole05-v1",
        "Carrot-v1",
        "Instruct-v1",
        "Plate-v1",
        "Position-v1",
        "EEPose-v1",
    ],
)
def test_most_ids_share_their_training_episodes(env_id: str) -> None:
    ids = torch.arange(0, 802_816, 97).tolist()
    assert decoded(env_id, "train", *ids) == decoded("Main-v3", "train", *ids)


@pytest.mark.parametrize(("obj_set", "share"), [("train", 0), ("test", 1 / 8), ("all", 0)])
def test_multi_carrot_distractors(obj_set: str, share: float) -> None:
    row = VARIANTS[PREFIX + "MultiCarrot-v1"]
    episodes = spread("MultiCarrot-v1", obj_set)
    indices = row.objects.of(obj_set)
    assert (episodes.distractor >= indices.start).all()
    assert (episodes.distractor < indices.stop).all()
    same = (episodes.distractor == episodes.object).float().mean().item()
    assert same == pytest.approx(share, abs=0.01)
    if share:
        assert ((episodes.distractor == episodes.object) == (episodes.extra == 1)).all()


def test_multi_carrot_fixed() -> None:
    row = variant("CR-MultiObject", Fixes(distinct_distractors=True))
    for obj_set in SETS:
        episodes = decode(row, obj_set, draw_ids(row, obj_set, torch.arange(20_000)))
        assert (episodes.distractor != episodes.object).all()
        pairs = torch.stack([episodes.object, episodes.distractor]).unique(dim=1).shape[1]
        assert pairs == len(row.objects.of(obj_set)) * (len(row.objects.of(obj_set)) - 1)
    plain = VARIANTS[row.env_id]
    ids = torch.arange(0, 32_317_440, 9_999)
    assert rows(decode(row, "train", ids)) == rows(decode(plain, "train", ids))


def test_multi_plate_distractors() -> None:
    for obj_set, receptacles, others in (
        ("train", {0}, set(range(1, 17))),
        ("test", set(range(1, 17)), set(range(1, 17))),
        ("all", set(range(17)), set(range(17))),
    ):
        episodes = spread("MultiPlate-v1", obj_set)
        assert set(episodes.receptacle.tolist()) == receptacles
        assert set(episodes.distractor.tolist()) == others
        assert (episodes.distractor != episodes.receptacle).all()


def test_multi_plate_fixed() -> None:
    row = variant("CR-MultiReceptacle", Fixes(seen_tables=True))
    assert [row.tables.of(name) for name in SETS] == [range(16)] * 3
    assert total(row, "test") == 678_666_240 // 21 * 16
    assert variant("VR-UnseenTable", Fixes(seen_tables=True)) == variant("VR-UnseenTable")


def test_drawn_ids_depend_on_the_key_alone_and_are_uniform() -> None:
    row = variant("ER-InitPose")
    keys = torch.arange(50_000)
    ids = draw_ids(row, "test", keys)
    assert torch.equal(draw_ids(row, "test", keys.flip(0)[:7]), ids.flip(0)[:7])
    count = total(row, "test")
    assert (ids >= 0).all()
    assert (ids < count).all()
    assert ids.unique().numel() > 49_990
    share = torch.bincount(ids // (count // 16), minlength=16) / len(ids)
    assert (share - 1 / 16).abs().max() < 0.006
    yaw = torch.bincount(ids % 4, minlength=4) / len(ids)
    assert (yaw - 1 / 4).abs().max() < 0.01


def test_bad_ids(unchecked: None) -> None:
    row = variant("VR-UnseenTable")
    with pytest.raises(ValueError, match="negative"):
        decode(row, "train", torch.tensor([3, -1]))
    with pytest.raises(ValueError, match="int64"):
        decode(row, "train", torch.tensor([3], dtype=torch.int32))
    with pytest.raises(ValueError, match="negative"):
        draw_ids(row, "train", torch.tensor([-1]))
    with pytest.raises(UserError, match="did you mean 'train'"):
        decode(row, "trian", torch.tensor([3]))
    with pytest.raises(ValueError, match=r"table must be in \[16, 21\)"):
        encode(row, "test", decode(row, "train", torch.tensor([3])))
    with pytest.raises(ValueError, match=r"table must be in \[0, 16\)"):
        encode(row, "train", decode(row, "test", torch.tensor([3])))
