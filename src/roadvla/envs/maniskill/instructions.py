"""What the robot is asked to do, in RL4VLA's wordings."""

from __future__ import annotations

from roadvla.envs.maniskill.episodes import Episodes
from roadvla.envs.maniskill.objects import OBJECTS, RECEPTACLES
from roadvla.envs.maniskill.settings import Variant
from roadvla.envs.maniskill.shifts import InstructionShift

TEMPLATES = (
    "put {o} on {r}",
    "Place the {o} on the {r}",
    "set {o} on {r}",
    "move the {o} to the {r}",
    "Take the {o} and put it on the {r}",
    "pick up {o} and set it down on {r}",
    "please put the {o} on the {r}",
    "Put {o} onto {r}.",
    "place the {o} onto the {r} surface",
    "Make sure {o} is on {r}.",
    "on the {r}, put the {o}",
    "put the {o} where the {r} is",
    "Move the {o} from the table to the {r}",
    "Move {o} so it’s on {r}.",
    "Can you put {o} on {r}?",
    "{o} on the {r}, please.",
    "the {o} should be placed on the {r}.",
)
"""The first is used everywhere but in Instruct's test set, which has the others. RL4VLA lists four
more that no set reaches."""


def instructions(variant: Variant, episodes: Episodes) -> list[str]:
    """Word the B instructions; they name the target and its receptacle only."""
    worded = isinstance(variant.shift, InstructionShift)
    rows = zip(
        episodes.object.tolist(),
        episodes.receptacle.tolist(),
        (episodes.extra if worded else episodes.extra * 0).tolist(),
        strict=True,
    )
    return [
        TEMPLATES[template].format(o=OBJECTS[target].name, r=RECEPTACLES[receptacle].name)
        for target, receptacle, template in rows
    ]
