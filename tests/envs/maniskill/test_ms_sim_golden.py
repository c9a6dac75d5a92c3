"""Our scenes against episodes recorded from RL4VLA's own code, through the command."""

from __future__ import annotations

import json

import numpy as np
import pytest
from ms_recorded import EPISODES, needs_episodes
from ms_sim import simulator  # noqa: F401

from roadvla import cli

pytestmark = [pytest.mark.sim, needs_episodes]


def test_recorded_episodes_are_reproduced(capsys):
    assert cli.main(["check-env", "--golden", str(EPISODES), "--every", "5", "--stand-ins"]) == 0
    table = capsys.readouterr().out
    for row in ("settle steps", "images, block", "overlay", "flags at the end", "teleport pose"):
        assert row in table


def test_a_recording_that_says_otherwise_fails(tmp_path, capsys):
    facts = json.loads((EPISODES / "episodes.json").read_text())
    with np.load(EPISODES / "arrays.npz") as stored:
        arrays = dict(stored)
    single = [e for e in facts["episodes"] if e["env_id"].endswith("Single-v1")][:1]
    arrays["qpos"][single[0]["index"], 6, 1] += 0.01
    facts |= {"episodes": single, "grasps": [], "composites": []}
    (tmp_path / "episodes.json").write_text(json.dumps(facts))
    np.savez(tmp_path / "arrays.npz", **arrays)
    flags = ["--golden", str(tmp_path), "--stand-ins", "--no-pictures"]
    assert cli.main(["check-env", "Single-v1", *flags]) == 1
    assert "qpos: 1 of" in capsys.readouterr().err
    assert cli.main(["check-env", "Main-v3", *flags]) == 2
