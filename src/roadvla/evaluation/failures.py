"""How episodes end: events on the way, and one mode per episode (App. D.1).

An episode has the first of these modes whose condition holds; distances are horizontal.

==================  ==============================================================================
success             The named object lies on the named receptacle at the last step.
lost                It did at some step, but not at the last.
wrong_receptacle    It was held, and lies on another receptacle.
drift               It was held, ends nearer to the usual place of receptacles in training than to
                    the named one, and came more than 3 cm nearer to it, and more than to the named
                    one: carried by habit, wherever it was let go.
held                It is in the gripper at the end, on its way.
drop                It was held, and let go elsewhere.
wrong_object        It was never held, but another object was, or was pushed about.
no_grasp            Nothing was held until time ran out.
==================  ==============================================================================

If the setting moves the object (ER-Repositioning), what was held before does not count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from roadvla.envs.base import Snapshot
from roadvla.world import World

MODES = (
    *("success", "lost", "wrong_receptacle", "drift", "held", "drop"),
    *("wrong_object", "no_grasp"),
)
NEAR = 0.05
"""Distance of tip and object, metres, at which it counts as reached."""
LIFTED = 0.03
"""Rise above where it stood, metres, at which a held object counts as lifted."""
ON_RECEPTACLE = 0.062
"""Distance of centres, metres, at which an object counts as lying on another receptacle."""
PUSHED = 0.03
"""Distance from where it stood, metres, at which another object counts as moved."""
DRIFTED = 0.03
"""How much nearer, metres, a carried object comes to the usual place if it drifts there."""
TELEPORTED = 0.05
"""Change of place in one step, metres, that no gripper explains."""
_AROUND = 1
"""Steps before or after which the setting may move an object: simulators count them differently."""

EVENTS = (
    *("reach", "grasp", "other", "lift", "release", "place"),
    *("grasps", "closest_mm", "goal_mm", "usual_mm"),
)
"""Number of the step after which the object was first reached, held, another moved, the object
lifted, let go, placed (0: never); how often it was grasped; least distance to the tip, and final
distances to receptacle and usual place, in millimetres."""


class EventLog:
    """Watches B episodes, all on the device.

    Args:
        start: Before the first action.
        repositioned: After how many actions the setting moves the object; 0 for never.
    """

    def __init__(self, start: Snapshot, repositioned: int = 0) -> None:
        self._before = start
        self._repositioned = repositioned
        self._steps = 0
        none = torch.zeros_like(start.held)
        self._first = {name: none.clone() for name in EVENTS[:6]}
        self._grasps = none.clone()
        self._held_since = torch.zeros_like(start.is_open)
        self._closest = (start.objects[:, 0] - start.tip).norm(dim=1)
        self._rest = start.objects.clone()

    def note(self, now: Snapshot, success: Bool[Tensor, " B"]) -> None:
        """Look at the state after an action."""
        before, self._before = self._before, now
        self._steps += 1
        thing = now.objects[:, 0]
        holding, held_before = now.held == 0, before.held == 0
        # At other times an object that goes far in a step was thrown, not moved by the setting.
        around = abs(self._steps - self._repositioned) <= _AROUND
        jumped = _jumped(now, before) & bool(self._repositioned and around)
        # A new place, not a fall: what came before says nothing about it.
        self._held_since = (self._held_since & ~jumped) | holding
        self._rest[:, 0] = torch.where(jumped[:, None], thing, self._rest[:, 0])
        distance = (thing - now.tip).norm(dim=1)
        self._closest = torch.minimum(self._closest, distance)
        self._grasps += holding & ~held_before
        moved = _flat(now.objects - self._rest) > PUSHED
        self._mark("reach", distance < NEAR)
        self._mark("grasp", holding)
        self._mark("other", (now.held > 0) | moved[:, 1:].any(dim=1))
        self._mark("lift", holding & (thing[:, 2] - self._rest[:, 0, 2] > LIFTED))
        self._mark("release", held_before & ~holding & ~jumped)
        self._mark("place", success)

    def outcome(
        self, success: Bool[Tensor, " B"], success_once: Bool[Tensor, " B"]
    ) -> tuple[Int[Tensor, " B"], dict[str, Int[Tensor, " B"]]]:
        """Judge the episodes at their end.

        Args:
            success: At the last step.
            success_once: At any step.

        Returns:
            The modes, as indices into ``MODES``, and the events.
        """
        end = self._before
        thing = end.objects[:, 0]
        goal = _flat(thing - end.receptacles[:, 0])
        usual = (thing[:, :2] - end.usual_place).norm(dim=1)
        rest = self._rest[:, 0]
        to_usual = (rest[:, :2] - end.usual_place).norm(dim=1) - usual
        to_goal = _flat(rest - end.receptacles[:, 0]) - goal
        drifted = (usual < goal) & (to_usual > DRIFTED) & (to_usual > to_goal)
        others = _flat(thing[:, None] - end.receptacles[:, 1:]) < ON_RECEPTACLE
        held_now = end.held == 0
        carried = self._held_since
        conditions = (
            success,
            success_once,
            carried & ~held_now & others.any(dim=1),
            carried & drifted,
            held_now,
            carried,
            self._first["other"] > 0,
            torch.ones_like(success),
        )
        mode = torch.stack(conditions).int().argmax(dim=0)
        millimetres = {"closest_mm": self._closest, "goal_mm": goal, "usual_mm": usual}
        events = {
            **self._first,
            "grasps": self._grasps,
            **{name: (1000 * metres).round().long() for name, metres in millimetres.items()},
        }
        return mode, events

    def _mark(self, name: str, now: Tensor) -> None:
        first = self._first[name]
        self._first[name] = torch.where((first == 0) & now, self._steps, first)


def mode_counts(modes: Sequence[int]) -> dict[str, int]:
    """Count the episodes of each mode.

    Args:
        modes: Indices into ``MODES``.
    """
    counts = np.bincount(np.asarray(modes, dtype=np.int64), minlength=len(MODES))
    return dict(zip(MODES, counts.tolist(), strict=True))


def confusion(ours: Sequence[int], theirs: Sequence[int]) -> Int[np.ndarray, "M M"]:
    """Count how the same episodes ended under two policies.

    Args:
        ours: Modes under one, the rows of the table.
        theirs: Modes of the same episodes under another, its columns.

    Raises:
        ValueError: If they are not as many.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} and {len(theirs)} episodes cannot be paired")
    table = np.zeros((len(MODES), len(MODES)), dtype=np.int64)
    np.add.at(table, (np.asarray(ours, dtype=int), np.asarray(theirs, dtype=int)), 1)
    return table


def check_modes(modes: Sequence[int], success: Sequence[bool], success_once: Sequence[bool]) -> str:
    """Say what is wrong with modes that were read from a file: ``""`` if nothing.

    Args:
        modes: Indices into ``MODES``.
        success: Success at the last step of the same episodes.
        success_once: Success at any step.
    """
    if not all(0 <= mode < len(MODES) for mode in modes):
        return "there is a mode that does not exist"
    for mode, last, once in zip(modes, success, success_once, strict=True):
        if (MODES[mode] == "success") != last:
            return "a mode contradicts the outcome"
        if (MODES[mode] == "lost") != (once and not last):
            return "a mode contradicts the outcome"
    return ""


def as_lists(events: Mapping[str, Tensor], ranks: World | None = None) -> dict[str, list[int]]:
    """Bring events to the CPU, in one transfer; those of several processes one after the other."""
    names = list(events)
    table = torch.stack([events[name].long() for name in names])
    whole = (ranks or World()).gather(table, 1).cpu().tolist()
    return dict(zip(names, whole, strict=True))


def _jumped(now: Snapshot, before: Snapshot) -> Bool[Tensor, " B"]:
    """Where the named object changed its place and no gripper took it there."""
    shift = now.objects[:, 0] - before.objects[:, 0]
    carried = (before.held == 0)[:, None] * (now.tip - before.tip)
    return _flat(shift - carried) > TELEPORTED


def _flat(offset: Tensor) -> Tensor:
    """Horizontal length of offsets [..., 3]; NaN, of what is not there, stays NaN."""
    return offset[..., :2].norm(dim=-1)
