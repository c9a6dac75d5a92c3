"""What the paper reports, to stand beside what was measured here: percent, mean and deviation.

Source: ROAD-VLA, arXiv:2606.25800, Tables 1, 2 and 5; OpenVLA-7B on ManiSkill, three seeds.
"""

from __future__ import annotations

Cell = tuple[float | int, float | int]

TABLE_1: dict[str, dict[str, dict[str, Cell]]] = {
    "VR-UnseenTable": {
        "ppo": {"train": (88, 3), "test": (87, 4)},
        "road": {"train": (93, 2), "test": (92, 1)},
    },
    "VR-DynamicTexture": {
        "ppo": {"train": (87, 1), "test": (65, 5)},
        "road": {"train": (88, 1), "test": (69, 5)},
    },
    "VR-DynamicNoise": {
        "ppo": {"train": (85, 4), "test": (66, 3)},
        "road": {"train": (90, 2), "test": (70, 2)},
    },
    "CR-MultiObject": {
        "ppo": {"train": (78, 6), "test": (61, 6)},
        "road": {"train": (80, 6), "test": (63, 4)},
    },
    "CR-MultiReceptacle": {
        "ppo": {"train": (84, 3), "test": (57, 1)},
        "road": {"train": (84, 3), "test": (62, 2)},
    },
    "ER-InitPose": {
        "ppo": {"train": (87, 0), "test": (75, 8)},
        "road": {"train": (91, 1), "test": (79, 7)},
    },
    "ER-Repositioning": {
        "ppo": {"train": (89, 3), "test": (73, 3)},
        "road": {"train": (88, 0), "test": (77, 5)},
    },
}

TABLE_2: dict[str, dict[str, dict[str, Cell]]] = {
    "VR-UnseenTable": {
        "ppo": {"test": (87.2, 3.6)},
        "road-relspatial": {"test": (4.68, 0.0)},
        "road-plan": {"test": (4.68, 0.0)},
        "road-mcts": {"test": (75.8, 2.0)},
        "road-jsd": {"test": (85.9, 1.5)},
        "road-ungated": {"test": (89.8, 0.1)},
        "road": {"test": (91.5, 1.2)},
    }
}

TABLE_5: dict[str, dict[str, dict[str, Cell]]] = {
    "CR-MultiObject": {
        "road-positive": {"train": (67, 8), "test": (57, 7)},
        "road": {"train": (80, 6), "test": (63, 4)},
    }
}

PRINTED = {"table1": TABLE_1, "table2": TABLE_2, "table5": TABLE_5}
"""By study."""
