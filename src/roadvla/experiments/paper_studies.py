"""The paper's tables and figures, and our own questions, as declared grids."""

from __future__ import annotations

from dataclasses import dataclass

from roadvla.envs.suite import SETTINGS
from roadvla.experiments.methods import (
    ADD_SUM,
    CENTRED,
    CONTROLS,
    DIVERGENCES,
    EPOCHS,
    GRPO,
    KL_MATCHED,
    MIX_CONTINUED,
    PPO,
    PPO_DOUBLE,
    PPO_MIX,
    PPO_TIMED,
    RATES,
    ROAD,
    ROAD_ALPHA_0,
    ROAD_ALPHA_1,
    ROAD_CONTINUED,
    ROAD_EARLIER,
    ROAD_JSD,
    ROAD_MCTS,
    ROAD_PLAN,
    ROAD_POSITIVE,
    ROAD_RELSPATIAL,
    ROAD_TIMED,
    ROAD_UNGATED,
    VARIANTS,
    Method,
)

_ALL = tuple(SETTINGS)
_VISUAL = tuple(alias for alias, row in SETTINGS.items() if row.category == "Visual Robustness")
_TABLE = ("VR-UnseenTable",)


@dataclass(frozen=True, kw_only=True)
class Study:
    """A grid of methods × settings × seeds, and what it is for.

    Attributes:
        name: On the command line.
        title: What it shows.
        methods: In the order of the table; the first is what the others are compared with.
        settings: By paper alias.
        paper: Where the paper shows it; ``""`` for nowhere.
        claim: What the paper says it found, in our words.
    """

    name: str
    title: str
    methods: tuple[Method, ...]
    settings: tuple[str, ...]
    paper: str = ""
    claim: str = ""


_STUDIES = (
    Study(
        name="table1",
        title="PPO and ROAD, in and out of distribution, over the seven settings",
        methods=(PPO, ROAD),
        settings=_ALL,
        paper="Table 1, Fig. 2",
        claim="ROAD reaches 88 % in and 73 % out of distribution, PPO 85 % and 69 %; it converges "
        "faster and varies less late in training.",
    ),
    Study(
        name="table2",
        title="What guides the teacher: advantages or text, divergence, gate",
        methods=(
            *(PPO, ROAD_RELSPATIAL, ROAD_PLAN, ROAD_MCTS),
            *(ROAD_JSD, ROAD_UNGATED, ROAD),
        ),
        settings=_TABLE,
        paper="Table 2",
        claim="Text-guided teachers collapse (5 % to 76 %) while PPO has 87 %; ROAD has 92 %, 86 % "
        "with the JSD and 90 % without the gate.",
    ),
    Study(
        name="table5",
        title="Whether below-average actions teach anything: the sign gate",
        methods=(PPO, ROAD_POSITIVE, ROAD),
        settings=("CR-MultiObject",),
        paper="Table 5",
        claim="Keeping positive weights only costs 13 points in and 6 points out of distribution.",
    ),
    Study(
        name="alpha",
        title="How much the reference critic counts: α",
        methods=(PPO, ROAD_ALPHA_0, ROAD, ROAD_ALPHA_1),
        settings=(*_TABLE, "ER-Repositioning"),
        paper="Fig. 7",
        claim="α = 1 gains fastest and stalls, α = 0 is slow and steady, α = 0.5 ends best.",
    ),
    Study(
        name="reference",
        title="When the reference critic is frozen",
        methods=(PPO, *ROAD_EARLIER, ROAD),
        settings=(*_TABLE, "ER-Repositioning"),
        paper="Fig. 8",
        claim="ROAD is fairly robust to the choice; later critics serve a little better.",
    ),
    Study(
        name="dynamics",
        title="Inside the training: entropy, mean weight, agreement of the critics",
        methods=(PPO, ROAD),
        settings=_ALL,
        paper="Fig. 3",
        claim="ROAD keeps more entropy than PPO, its mean weight rises to a little above 0, and "
        "the critics' agreement falls from about 0.9 to 0.73.",
    ),
    Study(
        name="grasp",
        title="How often the right object is grasped under visual shifts",
        methods=(PPO, ROAD),
        settings=_VISUAL,
        paper="Fig. 5, 6",
        claim="ROAD reaches its best grasp rate earlier and stays ahead.",
    ),
    Study(
        name="failures",
        title="How episodes fail",
        methods=(PPO, ROAD),
        settings=_ALL,
        paper="App. D.1, Fig. 4",
        claim="Under repositioning PPO grasps and drifts to where the plate used to be; under "
        "dynamic textures it often does not grasp at all. ROAD does both less often.",
    ),
    Study(
        name="cost",
        title="What an iteration costs",
        methods=(PPO_TIMED, ROAD_TIMED),
        settings=("VR-DynamicNoise",),
        paper="App. D.5",
        claim="ROAD takes about 1.6 times as long as PPO.",
    ),
    Study(
        name="readings",
        title="Every reading of the method, and what it is worth against a tuned PPO",
        methods=(
            *(PPO, ROAD, PPO_MIX, ADD_SUM),
            *(variant for variant in VARIANTS if variant != ADD_SUM),
            *EPOCHS,
            *RATES,
            *(PPO_DOUBLE, ROAD_CONTINUED, MIX_CONTINUED),
            *KL_MATCHED,
            *CENTRED,
            *DIVERGENCES,
            GRPO,
            *CONTROLS,
        ),
        settings=_TABLE,
    ),
)

STUDIES: dict[str, Study] = {study.name: study for study in _STUDIES}
"""By name, in the order of the page."""
