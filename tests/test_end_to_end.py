"""The whole path on the real policy and simulator, as small as it can be."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from roadvla import cli
from roadvla.evaluation.files import read_evaluation
from roadvla.train.metrics import read_metrics

# Three iterations of 8 × 24 steps in minibatches of 64, one pass each.
SMALL = "--epochs 1 --value-only-iterations 1 --evaluation.every 0 --evaluation.final-episodes 4"
STEPS = 8 * 24
LAST = "checkpoints/iteration_000003"


def roadvla(*arguments: object) -> None:
    assert cli.main([str(argument) for argument in arguments]) == 0


def rows(run: Path) -> list[dict[str, Any]]:
    """The course of a run without what depends on the machine."""
    measured = ("time/", "memory/")
    return [
        {name: value for name, value in row.items() if not name.startswith(measured)}
        for row in read_metrics(run)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warm-up, a PPO run and a ROAD run from it with the PPO run's critic."""
    folder = tmp_path_factory.mktemp("path")
    warm, ppo, road = folder / "warmup", folder / "ppo", folder / "road"
    roadvla("warmup", "--output", warm, "--episodes", 4, "--steps", 3, "--batch", 32)
    start = ("train", "debug", "--init", warm, *SMALL.split())
    roadvla(*start, "--output", ppo)
    critic = ("--algo", "road", "--reference-critic", ppo)
    roadvla(*start, "--name", "road", "--output", road, *critic)
    return folder


def test_the_warm_up_leaves_a_policy_and_demonstrations(folder: Path) -> None:
    warm = folder / "warmup"
    assert {"policy.json", "policy.safetensors", "demonstrations.safetensors", "config.json"} <= {
        path.name for path in warm.iterdir()
    }
    history = json.loads((warm / "warmup.json").read_text())
    assert [entry["step"] for entry in history] == [1, 2, 3]
    assert all(0 < entry["loss/total"] < 5.55 for entry in history)  # guessing: ln 256 = 5.545


@pytest.mark.parametrize("name", ["ppo", "road"])
def test_a_run_leaves_what_it_should(folder: Path, name: str) -> None:
    run = folder / name
    assert [row["iteration"] for row in rows(run)] == [1, 2, 3]
    assert [row["env_steps"] for row in rows(run)] == [STEPS, 2 * STEPS, 3 * STEPS]
    config = json.loads((run / "config.json").read_text())
    assert config["algorithm"]["algo"] == name
    assert {path.name for path in (run / LAST).iterdir()} == {
        "policy.json",
        "policy.safetensors",
        "optimizer.safetensors",
        "state.json",
        "manifest.json",
    }
    state = json.loads((run / LAST / "state.json").read_text())
    assert (state["iteration"], state["env_steps"], state["episodes"]) == (3, 3 * STEPS, 24)
    assert any((run / "tensorboard").iterdir())
    for split in ("train", "test"):
        result = read_evaluation(run / f"evaluation/VR-UnseenTable_{split}.json")
        assert (result.iteration, result.env_steps, result.checkpoint) == (3, 3 * STEPS, LAST)
        assert result.success_rate == rows(run)[-1][f"eval/{split}/success_rate"]


def test_only_road_consults_the_reference_critic(folder: Path) -> None:
    ppo, road = rows(folder / "ppo"), rows(folder / "road")
    assert not any("guidance/agreement" in row or "loss/agd" in row for row in ppo)
    assert all(0 < row["guidance/agreement"] < 1 for row in road)
    # The first iteration trains the value head alone.
    assert all(row["loss/agd"] > 0 for row in road[1:])
    assert all("time/reference" in row for row in read_metrics(folder / "road"))
    # Both start from the same policy and seed: the first rollout is the same, the last is not.
    assert road[0]["rollout/return"] == ppo[0]["rollout/return"]
    weights = [
        (folder / name / LAST / "policy.safetensors").read_bytes() for name in ("ppo", "road")
    ]
    assert weights[0] != weights[1]


def test_a_run_is_evaluated_from_the_shell(folder: Path, tmp_path: Path) -> None:
    flags = ["--env", "ER-Repositioning", "--set", "test", "--episodes", 4, "--output", tmp_path]
    roadvla("eval", folder / "road", *flags)
    result = json.loads((tmp_path / "ER-Repositioning_test.json").read_text())
    assert (result["env"], result["split"], result["sim"]) == (
        "ER-Repositioning",
        "test",
        "tabletop",
    )
    assert (result["episodes"], result["horizon"], result["temperature"]) == (4, 30, 0.6)
    assert (result["iteration"], result["env_steps"]) == (3, 3 * STEPS)
    assert result["checkpoint"] == str(folder / "road" / LAST)
    assert result["per_episode"]["episode_ids"] == [0, 1, 2, 3]
    assert 0 <= result["success_low"] <= result["success_rate"] <= result["success_high"] <= 1


# Killed in the middle of its second iteration, after acting and before learning.
_KILLED = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
import torch
torch.set_num_threads(1)
from roadvla.train import loop, trainer
from roadvla.train.run_folder import load_experiment
real, calls = trainer.update, []
def update(*args, **options):
    calls.append(0)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **options)
trainer.update = update
loop.train(replace(load_experiment(Path(sys.argv[1])), output=sys.argv[2]))
"""


def test_a_killed_run_goes_on_as_if_nothing_had_happened(folder: Path, tmp_path: Path) -> None:
    whole, killed = folder / "road", tmp_path / "road"
    command = [sys.executable, "-c", _KILLED, str(whole), str(killed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [row["iteration"] for row in rows(killed)] == [1]
    assert not (killed / "evaluation").exists()

    roadvla("train", "--resume", killed)
    for name in ("policy.safetensors", "optimizer.safetensors", "policy.json", "manifest.json"):
        assert (killed / LAST / name).read_bytes() == (whole / LAST / name).read_bytes(), name
    assert rows(killed) == rows(whole)
    assert [row["iteration"] for row in rows(killed)] == [1, 2, 3]
    for split in ("train", "test"):
        name = f"evaluation/VR-UnseenTable_{split}.json"
        assert read_evaluation(killed / name).success == read_evaluation(whole / name).success
