"""What distinguishes one id from another, beyond the ranges it draws from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TextureShift:
    """A picture blended over robot and bodies, stretched to their bounding box at every step.

    Attributes:
        opacity: Share of the picture in [0, 1].
        fit: The box it is stretched to: the largest height and width in the batch, as RL4VLA does,
            or the episode's own. Alone in its batch an episode looks the same in both.
    """

    opacity: float
    fit: Literal["batch", "own"] = "batch"


@dataclass(frozen=True, kw_only=True)
class WholeImageShift:
    """A picture of twice the size blended over the frame, cut where the robot and bodies are.

    Attributes:
        opacity: Share of the picture in [0, 1].
    """

    opacity: float


@dataclass(frozen=True, kw_only=True)
class InstructionShift:
    """Another wording of the instruction."""


@dataclass(frozen=True, kw_only=True)
class PoseShift:
    """Offsets on the joints in which the arm starts."""


@dataclass(frozen=True, kw_only=True)
class DistractorObject:
    """A second object on the table.

    Attributes:
        distinct: Whether it is always another than the target. In RL4VLA's test set one episode
            in eight chooses the target itself, which then lies alone at the distractor's place.
    """

    distinct: bool = False


@dataclass(frozen=True, kw_only=True)
class DistractorReceptacle:
    """A second receptacle on the table."""


@dataclass(frozen=True, kw_only=True)
class Reposition:
    """The object is lifted to another place, in the sets test and all.

    Attributes:
        step: After how many actions.
    """

    step: int = 5


Shift = (
    TextureShift
    | WholeImageShift
    | InstructionShift
    | PoseShift
    | DistractorObject
    | DistractorReceptacle
    | Reposition
)
