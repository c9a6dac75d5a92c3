"""Warm-up, PPO, kill and resume, ROAD and evaluation on ManiSkill, through the real command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from ms_sim import simulator  # noqa: F401
from safetensors.torch import load_file

from roadvla import cli

pytestmark = pytest.mark.sim

SIM = ["--env", "VR-UnseenTable", "--sim", "maniskill", "--stand-ins"]
TRAIN = [
    "--num-envs",
    "4",
    "--total-env-steps",
    "640",
    "--minibatch",
    "64",
    "--checkpoint-every",
    "1",
]
NO_EVALUATION = ["--evaluation.every", "0", "--evaluation.final-episodes", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("maniskill")


@pytest.fixture(scope="module")
def warm(folder):
    flags = ["--episodes", "4", "--steps", "4", "--output", str(folder / "warm")]
    assert cli.main(["warmup", *SIM, *flags]) == 0
    return folder / "warm"


def ppo(warm, output):
    flags = [*SIM, *TRAIN, *NO_EVALUATION, "--init", str(warm), "--output", str(output)]
    return ["train", "tabletop-ppo", *flags]


@pytest.fixture(scope="module")
def critic(folder, warm):
    assert cli.main(ppo(warm, folder / "ppo")) == 0
    return folder / "ppo"


def test_the_warm_up_records_the_stand_ins(warm):
    config = json.loads((warm / "config.json").read_text())
    assert config["maniskill"]["stand_ins"] is True
    assert (warm / "demonstrations.safetensors").exists()


def test_a_killed_run_goes_on_as_if_it_had_not_been(folder, warm, critic):
    run = folder / "killed"
    command = [sys.executable, "-m", "roadvla", *ppo(warm, run)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (run / "checkpoints" / "latest.json").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert cli.main(["train", "--resume", str(run)]) == 0
    assert weights_of(run) == weights_of(critic)


def weights_of(run):
    found = sorted((run / "checkpoints").glob("iteration_*/**/*.safetensors"))
    assert found
    return {
        f"{file.name} {name}": tensor.flatten().tolist()
        for file in found
        for name, tensor in load_file(file).items()
    }


def test_road_learns_from_that_critic_and_is_evaluated(folder, warm, critic):
    run = folder / "road"
    flags = [*SIM, *TRAIN, "--init", str(warm), "--reference-critic", str(critic)]
    flags += ["--evaluation.every", "0", "--evaluation.final-episodes", "4"]
    assert cli.main(["train", "tabletop-road", *flags, "--output", str(run)]) == 0
    for split in ("train", "test"):
        result = json.loads((run / "evaluation" / f"VR-UnseenTable_{split}.json").read_text())
        assert result["sim"] == "maniskill"
        assert result["simulator"]["stand_ins"] is True
        assert result["horizon"] == 80
    flags = ["--episodes", "4", "--output", str(folder / "again"), "--set", "test"]
    assert cli.main(["eval", str(run), *SIM, *flags]) == 0
    again = json.loads((folder / "again" / "VR-UnseenTable_test.json").read_text())
    assert again["per_episode"] == result["per_episode"]
    assert cli.main(["report", str(run), "--output", str(folder / "report")]) == 0
    assert "maniskill" in (folder / "report" / "report.md").read_text()
