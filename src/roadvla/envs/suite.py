"""Table 3 as data: the seven settings, what is in distribution and what is not, on each simulator.

Four of the seven settings share one training distribution, as they do in RL4VLA: they differ in
the shift of their test split only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from roadvla.errors import unknown_name

Split = Literal["train", "test"]
Tables = Literal["seen", "unseen"]
Overlay = Literal["none", "texture", "noise"]


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """What an episode of one split may contain; the defaults are the suite's base distribution.

    Attributes:
        tables: Which table-top textures: the 16 seen in training or 16 others.
        overlay: Nothing, a texture over object, receptacle and arm, or noise over the whole frame;
            both are cropped and scaled anew at every step.
        overlay_strength: Opacity α of the overlay in [0, 1].
        unseen_objects: Whether the target is a colour-shape pair never trained on.
        distractor_objects: How many further objects stand on the table.
        unseen_receptacles: Whether the target receptacle has a colour never trained on.
        distractor_receptacles: How many further receptacles lie on the table.
        lookalikes: Whether distractors have the target's colour and differ in shape alone.
        shifted_pose: Whether the end effector starts far from its usual pose.
        reposition_step: After how many actions the object is teleported; 0 for never.
        horizon: Steps of an episode on the tabletop.
    """

    tables: Tables = "seen"
    overlay: Overlay = "none"
    overlay_strength: float = 0.5
    unseen_objects: bool = False
    distractor_objects: int = 0
    unseen_receptacles: bool = False
    distractor_receptacles: int = 0
    lookalikes: bool = False
    shifted_pose: bool = False
    reposition_step: int = 0
    horizon: int = 24


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row of Table 3.

    Attributes:
        alias: The paper's name.
        category: Axis of the shift.
        rl4vla_id: Id of the same setting in RL4VLA's ManiSkill suite.
        train: In distribution (ID): where policies are adapted.
        test: Out of distribution (OOD).
    """

    alias: str
    category: str
    rl4vla_id: str
    train: Distribution = field(default_factory=Distribution)
    test: Distribution

    def distribution(self, split: str) -> Distribution:
        """Return the distribution of a split by name.

        Raises:
            UserError: If the split is neither ``train`` nor ``test``.
        """
        if split not in ("train", "test"):
            raise unknown_name("set", split, ("train", "test"))
        return self.train if split == "train" else self.test


_VISUAL = "Visual Robustness"
_COMPOSITIONAL = "Compositional Reasoning"
_EXECUTION = "Execution Robustness"

_ROWS = (
    Setting(
        alias="VR-UnseenTable",
        category=_VISUAL,
        rl4vla_id="PutOnPlateInScene25VisionImage-v1",
        test=Distribution(tables="unseen"),
    ),
    Setting(
        alias="VR-DynamicTexture",
        category=_VISUAL,
        rl4vla_id="PutOnPlateInScene25VisionTexture05-v1",
        test=Distribution(overlay="texture"),
    ),
    Setting(
        alias="VR-DynamicNoise",
        category=_VISUAL,
        rl4vla_id="PutOnPlateInScene25VisionWhole05-v1",
        test=Distribution(overlay="noise"),
    ),
    Setting(
        alias="CR-MultiObject",
        category=_COMPOSITIONAL,
        rl4vla_id="PutOnPlateInScene25MultiCarrot-v1",
        train=Distribution(distractor_objects=1),
        test=Distribution(distractor_objects=1, unseen_objects=True, lookalikes=True),
    ),
    Setting(
        alias="CR-MultiReceptacle",
        category=_COMPOSITIONAL,
        rl4vla_id="PutOnPlateInScene25MultiPlate-v1",
        train=Distribution(distractor_receptacles=1),
        test=Distribution(distractor_receptacles=1, unseen_receptacles=True, lookalikes=True),
    ),
    Setting(
        alias="ER-InitPose",
        category=_EXECUTION,
        rl4vla_id="PutOnPlateInScene25EEPose-v1",
        test=Distribution(shifted_pose=True),
    ),
    Setting(
        alias="ER-Repositioning",
        category=_EXECUTION,
        rl4vla_id="PutOnPlateInScene25PositionChangeTo-v1",
        train=Distribution(horizon=30),
        test=Distribution(reposition_step=5, horizon=30),
    ),
)

SETTINGS: dict[str, Setting] = {row.alias: row for row in _ROWS}


def setting(name: str) -> Setting:
    """Look a setting up by its paper alias or its RL4VLA id.

    Raises:
        UserError: If there is none of that name; the nearest is suggested.
    """
    for row in _ROWS:
        if name in (row.alias, row.rl4vla_id):
            return row
    raise unknown_name("environment", name, SETTINGS)
