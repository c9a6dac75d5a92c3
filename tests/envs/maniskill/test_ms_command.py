"""From a policy's action to the controller's: limits of the motion, and a gripper of two states."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from roadvla.envs.maniskill.env import MAX_ROTATION, MAX_TRANSLATION, _command


def command(*actions: list[float]) -> list[list[float]]:
    found = _command(torch.tensor(actions))
    assert found.dtype == torch.float32
    return found.tolist()


def test_limits() -> None:
    assert (MAX_TRANSLATION, MAX_ROTATION) == (0.1, 0.5)  # metres, radians


def test_small_motions_pass() -> None:
    motion = [0.01, -0.02, 0.03, 0.1, -0.2, 0.3]
    (found,) = command([*motion, 1.0])
    assert found == pytest.approx([*motion, 1.0])
    assert command([0.0] * 7) == [[0.0] * 6 + [-1.0]]


def test_large_motions_are_clipped_each_for_itself() -> None:
    found = command(
        [0.5, -0.5, 0.02, 2.0, -2.0, 0.4, 0.0],
        [-9.0, 0.05, 9.0, 0.49, 9.0, -9.0, 0.0],
    )
    assert found[0] == pytest.approx([0.1, -0.1, 0.02, 0.5, -0.5, 0.4, -1])
    assert found[1] == pytest.approx([-0.1, 0.05, 0.1, 0.49, 0.5, -0.5, -1])


@pytest.mark.parametrize("index", range(6))
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_each_limit(index: int, sign: float) -> None:
    limit = MAX_TRANSLATION if index < 3 else MAX_ROTATION
    for value, expected in ((0.999 * limit, 0.999 * limit), (limit, limit), (1.001 * limit, limit)):
        action = [0.0] * 7
        action[index] = sign * value
        (found,) = command(action)
        assert found[index] == pytest.approx(sign * expected)
        assert sum(abs(part) for part in found[:6]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("grip", "expected"),
    [
        (-3.0, -1.0),
        (0.0, -1.0),
        (0.49, -1.0),
        (0.5, -1.0),
        (math.nextafter(0.5, 1) + 1e-7, 1.0),
        (0.51, 1.0),
        (1.0, 1.0),
        (3.0, 1.0),
    ],
)
def test_the_gripper_opens_above_a_half(grip: float, expected: float) -> None:
    assert command([0.0] * 6 + [grip])[0][6] == expected


numbers = st.floats(-2, 2, width=32)
actions = st.lists(st.lists(numbers, min_size=7, max_size=7), min_size=1, max_size=6)


@given(actions)
def test_against_plain_python(rows: list[list[float]]) -> None:
    limits = [0.1] * 3 + [0.5] * 3
    expected = [
        [min(max(v, -most), most) for v, most in zip(row[:6], limits, strict=True)]
        + [1.0 if row[6] > 0.5 else -1.0]
        for row in rows
    ]
    for found, one in zip(command(*rows), expected, strict=True):
        assert found == pytest.approx(one, rel=1e-6)


def test_the_action_stays_as_it_was() -> None:
    action = torch.full((2, 7), 3.0)
    _command(action)
    assert bool((action == 3).all())
