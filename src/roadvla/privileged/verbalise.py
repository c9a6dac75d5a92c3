"""MCTS PI's words for an action that succeeded before (Sec. 4.2.1)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from roadvla.envs.tabletop.dynamics import OPEN_THRESHOLD


def action_hints(action: Float[Tensor, "N 7"], q: Float[Tensor, " N"]) -> list[str]:
    """Spell actions out: metres and radians with three decimals (reading R42).

    Args:
        action: Δx Δy Δz (m), Δroll Δpitch Δyaw (rad), gripper (above 0.5 opens).
        q: Value of each, in units of return.
    """
    table = torch.cat([action.double(), q.double()[:, None]], dim=1).tolist()
    return [
        f"Hint (q={_number(value, 2)}): move ({_numbers(motion[:3])}), "
        f"rotate ({_numbers(motion[3:6])}), gripper {'open' if opens else 'closed'}."
        for *motion, value in table
        for opens in [motion[6] > OPEN_THRESHOLD]
    ]


def _numbers(values: list[float]) -> str:
    return ", ".join(_signed(value) for value in values)


def _signed(value: float) -> str:
    return f"{round(value, 3) + 0.0:+.3f}"  # + 0.0: no minus before zero


def _number(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}"
