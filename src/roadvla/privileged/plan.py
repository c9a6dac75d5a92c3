"""Plan + RelSpatial: the steps of the task, and where things are now (Sec. 4.2.1)."""

from __future__ import annotations

from collections.abc import Sequence

from roadvla.envs.base import Snapshot
from roadvla.privileged.relspatial import relspatial_hints

_STEPS = (
    "Approach the object.",
    "Align for grasping.",
    "Grasp and lift.",
    "Move toward the target.",
    "Align for placement.",
    "Place and retract.",
)
_PLAN = " ".join(f"{number}. {step}" for number, step in enumerate(_STEPS, start=1))


def plan_hints(snapshot: Snapshot, instructions: Sequence[str]) -> list[str]:
    """Give each episode the plan, which is the same for all, and its current state.

    Args:
        snapshot: Of B episodes.
        instructions: What the B episodes ask for.
    """
    states = relspatial_hints(snapshot, instructions)
    return [
        f"Reference plan for “{instruction.rstrip(' .?!')}”: {_PLAN} Current state: {state}"
        for instruction, state in zip(instructions, states, strict=True)
    ]
