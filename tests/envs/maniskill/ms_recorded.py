"""The episodes recorded from RL4VLA's own code, and the assets, where this checkout has them."""

from __future__ import annotations

import json
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

SHARED = Path(__file__).parents[3].parent / "shared"
EPISODES = SHARED / "fixtures" / "rl4vla-episodes"
ASSETS = SHARED / "assets" / "data" / "tasks" / "rl4vla"

needs_episodes = pytest.mark.skipif(
    not (EPISODES / "episodes.json").exists(), reason=f"no recorded episodes in {EPISODES}"
)
needs_assets = pytest.mark.skipif(
    not (ASSETS / "more_carrot" / "model_db.json").exists(), reason=f"no assets in {ASSETS}"
)


@cache
def facts() -> dict[str, Any]:
    return json.loads((EPISODES / "episodes.json").read_text(encoding="utf-8"))


@cache
def arrays() -> dict[str, np.ndarray]:
    with np.load(EPISODES / "arrays.npz", allow_pickle=False) as data:
        return {name: data[name] for name in data.files}


def groups() -> list[tuple[str, str, list[dict[str, Any]]]]:
    """Episodes by id and set, so that each group is decoded as one batch."""
    found = defaultdict(list)
    for episode in facts()["episodes"]:
        found[episode["env_id"], episode["obj_set"]].append(episode)
    return [(env_id, obj_set, rows) for (env_id, obj_set), rows in found.items()]


def picture(path: Path) -> Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB")))
