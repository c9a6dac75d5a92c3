"""Success, grasps and potential: by hand at every threshold, and against plain Python."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from ms_recorded import arrays, facts, needs_episodes
from torch import Tensor

from roadvla.envs.maniskill.judge import Progress, on_receptacle, potential

CPU = torch.device("cpu")
# A carrot-sized object on a plate-sized receptacle, half extents in metres.
OBJECT, PLATE = (0.06, 0.016, 0.02), (0.055, 0.055, 0.003)
ABOVE = 0.023  # touching: 3 mm and 20 mm
PRESSED = (0.0, 0.0, 1.0)


def row(values: tuple[float, ...]) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def lies(
    offset: tuple[float, float, float],
    *,
    force: tuple[float, float, float] = PRESSED,
    half: tuple[float, float, float] = OBJECT,
    plate: tuple[float, float, float] = PLATE,
    at: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> bool:
    moved = tuple(a + b for a, b in zip(offset, at, strict=True))
    return bool(on_receptacle(row(moved), row(at), row(half), row(plate), row(force)))


def nudged(value: float, up: bool) -> float:
    return math.nextafter(value, math.inf if up else -math.inf)


def test_an_object_that_rests_on_its_receptacle() -> None:
    assert lies((0, 0, ABOVE))
    assert lies((0.02, -0.03, ABOVE), at=(-0.16, 0.05, 0.87))


@pytest.mark.parametrize("direction", [(1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.6, -0.8)])
def test_margin(direction: tuple[float, float]) -> None:
    # 55 mm and 1 cm: 65 mm in any direction.
    x, y = direction
    assert lies((0.0649 * x, 0.0649 * y, ABOVE))
    assert not lies((0.0651 * x, 0.0651 * y, ABOVE))


def test_margin_is_part_of_it() -> None:
    edge = PLATE[0] + 0.01
    assert lies((edge, 0, ABOVE))
    assert not lies((nudged(edge, up=True), 0, ABOVE))


def test_margin_counts_from_the_largest_half_extent_of_the_receptacle() -> None:
    for plate in itertools.permutations((0.01, 0.02, 0.08)):
        height = plate[2] + OBJECT[2]
        assert lies((0, 0.0899, height), plate=plate)
        assert not lies((0, 0.0901, height), plate=plate)
    # The object's own size does not matter.
    assert not lies((0.0651, 0, ABOVE), half=(0.5, 0.5, OBJECT[2]))


def test_gap() -> None:
    # 3 mm of plate, 20 mm of object and 5 cm: 73 mm.
    assert lies((0, 0, 0.0729))
    assert not lies((0, 0, 0.0731))
    flat = (0.055, 0.055, 0.0)
    assert lies((0, 0, 0.05), half=(0.06, 0.016, 0.0), plate=flat)
    assert not lies((0, 0, nudged(0.05, up=True)), half=(0.06, 0.016, 0.0), plate=flat)


def test_gap_counts_vertical_half_extents_only() -> None:
    assert lies((0, 0, 0.1699), half=(0.01, 0.02, 0.1), plate=(0.3, 0.4, 0.02))  # 2 + 10 + 5 cm
    assert not lies((0, 0, 0.1701), half=(0.01, 0.02, 0.1), plate=(0.3, 0.4, 0.02))


def test_height() -> None:
    assert lies((0, 0, 1e-9))  # deep within the receptacle is high enough
    assert not lies((0, 0, 0))
    assert not lies((0, 0, -1e-9))
    # It is the height above the receptacle, wherever that is.
    assert not lies((0, 0, -0.01), at=(0, 0, 0.87))


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_force(axis: int, sign: float) -> None:
    def along(newtons: float) -> tuple[float, float, float]:
        x, y, z = (sign * newtons * (axis == k) for k in range(3))
        return x, y, z

    assert lies((0, 0, ABOVE), force=along(nudged(0.03, up=True)))
    assert not lies((0, 0, ABOVE), force=along(0.03))
    assert not lies((0, 0, ABOVE), force=along(0.0))


def test_force_is_its_length() -> None:
    # (2, 3, 6) is 7 long.
    assert lies((0, 0, ABOVE), force=tuple(0.0301 / 7 * n for n in (2, -3, 6)))  # type: ignore[arg-type]
    assert not lies((0, 0, ABOVE), force=tuple(0.0299 / 7 * n for n in (2, -3, 6)))  # type: ignore[arg-type]


def test_what_is_not_a_number_is_no_success() -> None:
    assert not lies((math.nan, 0, ABOVE))
    assert not lies((0, 0, math.nan))
    assert not lies((0, 0, ABOVE), force=(math.nan, 0, 1))
    assert not lies((0, 0, ABOVE), half=(0.06, 0.016, math.nan))


# Tenths of millimetres and hundredths of newtons, so that plain integers say what is right.
lengths = st.integers(-1500, 1500)
halves = st.integers(1, 700)
newtons = st.integers(-4, 4)
cases = st.tuples(
    st.tuples(lengths, lengths, lengths),
    st.tuples(halves, halves, halves),
    st.tuples(halves, halves, halves),
    st.tuples(newtons, newtons, newtons),
)
batches = st.lists(cases, min_size=1, max_size=8)


def judged(rows: list[tuple[tuple[int, ...], ...]]) -> list[bool]:
    offset, half, plate, force = (
        torch.tensor([case[k] for case in rows], dtype=torch.float64) for k in range(4)
    )
    place = torch.tensor([[-0.16, 0.03, 0.87]], dtype=torch.float64).expand_as(offset)
    scaled = (offset / 10_000 + place, place, half / 10_000, plate / 10_000, force / 100)
    return on_receptacle(*scaled).tolist()


def expected(case: tuple[tuple[int, ...], ...]) -> bool | None:
    """The rule in integers; ``None`` for a tie, which rounding decides."""
    (x, y, z), half, plate, force = case
    far = x * x + y * y - (max(plate) + 100) ** 2
    gap, pressed = z - plate[2] - half[2] - 500, sum(f * f for f in force) - 9
    if 0 in (far, z, gap, pressed):
        return None
    return far < 0 < z and gap < 0 < pressed


@given(batches)
def test_success_against_plain_python(rows: list[tuple[tuple[int, ...], ...]]) -> None:
    rows = [case for case in rows if expected(case) is not None]
    assume(rows)
    assert judged(rows) == [expected(case) for case in rows]


def test_the_plain_rule_says_both_on_a_grid() -> None:
    steps = (-651, -300, 1, 400, 649, 651)
    heights = (-1, 1, 230, 729, 731)
    rows = [
        ((x, y, z), (600, 160, 200), (550, 550, 30), (0, 0, f))
        for x, y, z, f in itertools.product(steps, steps, heights, (2, 4))
    ]
    found = judged(rows)
    assert found == [expected(case) for case in rows]
    # Within 65 mm: all pairs of 0.1, 30 and 40 mm, and 64.9 mm beside 0.1 mm. Three heights do.
    near = [(x, y) for x, y in itertools.product(steps, steps) if x * x + y * y < 650**2]
    assert len(near) == 9 + 2
    assert sum(found) == 3 * len(near)


@given(batches, st.randoms(use_true_random=False))
def test_rows_are_independent(rows: list[tuple[tuple[int, ...], ...]], random) -> None:
    together = judged(rows)
    assert together == [judged([case])[0] for case in rows]
    order = list(range(len(rows)))
    random.shuffle(order)
    assert judged([rows[k] for k in order]) == [together[k] for k in order]


# Progress


def flags(*columns: list[int]) -> list[Tensor]:
    return [torch.tensor(column, dtype=torch.bool) for column in columns]


def play(grasps: list[list[int]], successes: list[list[int]]) -> list[Progress]:
    """All states of B episodes, from [T][B] zeros and ones."""
    states = [Progress.start(len(grasps[0]), CPU)]
    for grasp, success in zip(grasps, successes, strict=True):
        states.append(states[-1].after(*flags(grasp, success)))
    return states


def one(grasps: list[int], successes: list[int] | None = None) -> list[Progress]:
    successes = successes or [0] * len(grasps)
    return play([[grasp] for grasp in grasps], [[success] for success in successes])


def test_nothing_is_achieved_at_the_start() -> None:
    start = Progress.start(3, CPU)
    assert start.grasp_count.tolist() == [0, 0, 0]
    for name in ("grasped", "consecutive_grasp", "success", "success_once"):
        assert getattr(start, name).tolist() == [False, False, False]


def test_a_grasp_lasts_at_five_steps() -> None:
    states = one([1, 1, 1, 1, 1, 1])
    assert [int(state.grasp_count) for state in states] == [0, 1, 2, 3, 4, 5, 6]
    assert [bool(state.grasped) for state in states] == [False] + [True] * 6
    assert [bool(state.consecutive_grasp) for state in states] == [False] * 5 + [True] * 2


def test_a_broken_grasp_starts_again() -> None:
    states = one([1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0])
    assert [int(state.grasp_count) for state in states] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 0]
    assert [bool(state.consecutive_grasp) for state in states] == [False] * 10 + [True] * 2
    assert [bool(state.grasped) for state in states] == [False] + [True] * 11


def test_success_is_of_the_moment_and_success_once_is_not() -> None:
    states = one([0] * 5, [0, 1, 0, 1, 0])
    assert [bool(state.success) for state in states] == [False, False, True, False, True, False]
    assert [bool(state.success_once) for state in states] == [False, False] + [True] * 4
    assert not any(bool(state.grasped | state.consecutive_grasp) for state in states)


def test_earlier_states_stay_as_they_were() -> None:
    before = Progress.start(2, CPU)
    before.after(*flags([1, 0], [0, 1]))
    assert before.grasp_count.tolist() == [0, 0]
    assert not bool((before.grasped | before.success | before.success_once).any())


steps = st.integers(1, 16).flatmap(
    lambda count: st.lists(
        st.lists(st.tuples(st.booleans(), st.booleans()), min_size=count, max_size=count),
        min_size=1,
        max_size=4,
    )
)


@given(steps)
def test_progress_against_plain_python(episodes: list[list[tuple[bool, bool]]]) -> None:
    by_step = list(zip(*episodes, strict=True))
    states = play(
        [[int(grasp) for grasp, _ in step] for step in by_step],
        [[int(success) for _, success in step] for step in by_step],
    )
    for b, episode in enumerate(episodes):
        count, grasped, lasted, once = 0, False, False, False
        for (grasp, success), state in zip(episode, states[1:], strict=True):
            count = count + 1 if grasp else 0
            grasped, lasted, once = grasped or grasp, lasted or count >= 5, once or success
            found = [
                getattr(state, name)[b].item()
                for name in (
                    "grasp_count",
                    "grasped",
                    "consecutive_grasp",
                    "success",
                    "success_once",
                )
            ]
            assert found == [count, grasped, lasted, success, once]


# Potential


def test_potential() -> None:
    rows = {  # grasped, consecutive, success
        (0, 0, 0): 0.0,
        (0, 0, 1): 0.0,  # pushed there: no success for the reward
        (1, 0, 0): 0.1,
        (1, 1, 0): 0.2,
        (1, 0, 1): 1.1,
        (1, 1, 1): 1.2,
    }
    columns = [list(column) for column in zip(*rows, strict=True)]
    found = potential(*flags(*columns))
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(list(rows.values()))


def test_rewards_add_up_to_the_last_potential() -> None:
    states = one([0, 1, 1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 0, 1])
    values = [
        float(potential(state.grasped, state.consecutive_grasp, state.success)) for state in states
    ]
    rewards = [after - before for before, after in itertools.pairwise(values)]
    assert rewards == pytest.approx([0, 0.1, 0, 0, 1, 0.1, 0, -1, 1])
    assert sum(rewards) == pytest.approx(1.2)


# Recorded grasps


@needs_episodes
def test_flags_of_recorded_grasps() -> None:
    for grasp in facts()["grasps"]:
        recorded, counts = (
            torch.from_numpy(arrays()[f"grasp_{grasp['k']}_{name}"])
            for name in ("flags", "grasp_count")
        )
        states = one((counts[1:] > 0).int().tolist(), recorded[1:, 2].int().tolist())
        found = [
            [state.grasped, state.consecutive_grasp, state.success, state.success]
            for state in states
        ]
        assert torch.equal(torch.tensor(found), recorded.bool())
        assert [int(state.grasp_count) for state in states] == counts.tolist()


@needs_episodes
def test_places_of_recorded_successes() -> None:
    for grasp in facts()["grasps"]:
        prefix = f"grasp_{grasp['k']}_"
        poses = torch.from_numpy(arrays()[prefix + "body_poses"])
        target, goal = poses[:, 0, :3], poses[:, 1, :3]
        half, plate = torch.from_numpy(arrays()[prefix + "obj_rec_half_sizes"])
        count = len(poses)
        force = torch.tensor([[0.0, 0.0, 1.0]]).expand(count, 3)
        found = on_receptacle(target, goal, half.expand(count, 3), plate.expand(count, 3), force)
        recorded = torch.from_numpy(arrays()[prefix + "flags"])[:, 2].bool()
        # Forces were not recorded: an object that is carried over the plate is near, too.
        assert found[recorded].all()
        assert not found[0]
