"""The packed simulator state taken apart."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from roadvla.envs.maniskill.outputs import FLAGS, Outputs
from roadvla.envs.maniskill.state import WIDTH, State, unpack_state


def pack(state: State) -> Tensor:
    """As a scene writes it: hand, aim, fingers, held, bodies."""
    columns = [state.hand, state.aim, state.fingers[:, None], state.held[:, None]]
    return torch.cat([*columns, state.bodies.flatten(1)], dim=1)


def made(count: int) -> State:
    return State(
        hand=torch.randn(count, 7),
        aim=torch.randn(count, 7),
        fingers=torch.rand(count),
        held=torch.randint(0, 9, (count,)).float(),
        bodies=torch.randn(count, 3, 7),
    )


@given(st.integers(1, 5))
def test_unpacking_undoes_packing(count: int) -> None:
    state = made(count)
    state.bodies[:, 2] = torch.nan  # no distractor
    packed = pack(state)
    assert packed.shape == (count, WIDTH)
    found = unpack_state(packed)
    for name in ("hand", "aim", "fingers", "held", "bodies"):
        expected = getattr(state, name)
        torch.testing.assert_close(
            getattr(found, name), expected, rtol=0, atol=0, equal_nan=True, msg=name
        )


def test_where_each_number_lies() -> None:
    # 7 + 7 + 1 + 1 + 21 numbers per episode, counted through.
    assert WIDTH == 37
    packed = torch.arange(2 * WIDTH, dtype=torch.float32).view(2, WIDTH)
    state = unpack_state(packed)
    assert state.hand[0].tolist() == list(range(7))
    assert state.aim[0].tolist() == list(range(7, 14))
    assert state.fingers.tolist() == [14, 14 + WIDTH]
    assert state.held.tolist() == [15, 15 + WIDTH]
    assert state.bodies[0].tolist() == [list(range(16 + 7 * k, 23 + 7 * k)) for k in range(3)]
    assert state.bodies[1, 2, 6] == 2 * WIDTH - 1


@pytest.mark.parametrize("width", [WIDTH - 1, WIDTH + 1])
def test_another_width_is_refused(width: int) -> None:
    with pytest.raises(RuntimeError, match="split"):
        unpack_state(torch.zeros(2, width))


def test_outputs_have_room_for_it() -> None:
    outputs = Outputs.empty(4, (6, 8), torch.device("cpu"))
    assert outputs.state.shape == (4, WIDTH)
    assert outputs.flags.shape == (4, len(FLAGS))
    assert outputs.image.shape == (4, 6, 8, 3)
    assert not outputs.image.any()
    assert not outputs.flags.any()


def test_rows_of_outputs_are_windows_into_the_whole() -> None:
    outputs = Outputs.empty(5, (2, 3), torch.device("cpu")).share()
    assert all(part.is_shared() for part in (outputs.image, outputs.flags, outputs.state))
    part = outputs.rows(1, 3)
    part.state.copy_(pack(made(2)))
    part.flags.fill_(True)
    part.image.fill_(7)
    changed = torch.tensor([False, True, True, False, False])
    assert torch.equal((outputs.state != 0).any(1), changed)
    assert torch.equal(outputs.flags.all(1), changed)
    assert torch.equal((outputs.image == 7).flatten(1).all(1), changed)
    torch.testing.assert_close(unpack_state(outputs.state).hand[1:3], part.state[:, :7])
