"""Signals in `warmup` and `eval`: nothing is left half written, and the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from roadvla import cli
from roadvla.evaluation import files
from roadvla.evaluation.files import read_evaluation, read_film
from roadvla.experiments import measure
from roadvla.policy import save_policy
from roadvla.policy.tiny import TinyVLA
from roadvla.train import warmup

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("policy")
    save_policy(TinyVLA(), folder)
    return folder


def sending(number: signal.Signals, real):
    """A function that gets a signal when it is about to return."""

    def call(*args, **options):
        result = real(*args, **options)
        os.kill(os.getpid(), number)
        return result

    return call


def content(folder: Path) -> dict[str, bytes]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def warm_up(policy: Path, folder: Path) -> list[str]:
    few = ["--episodes", "2", "--steps", "2", "--batch", "8"]
    return ["warmup", "--init", str(policy), "--output", str(folder), *few]


@pytest.mark.parametrize(("number", "code"), SIGNALS)
@pytest.mark.parametrize("during", ["collect_demonstrations", "warm_up", "save_demonstrations"])
def test_a_warm_up_is_stopped_and_made_by_the_same_command(
    policy, tmp_path, monkeypatch, capsys, number, code, during
):
    folder = tmp_path / "warmup"
    command = warm_up(policy, folder)
    with monkeypatch.context() as patch:
        patch.setattr(warmup, during, sending(number, getattr(warmup, during)))
        assert cli.main(command) == code
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"roadvla: stopped; go on with the same command: roadvla {' '.join(command)}"
    assert not folder.exists() or content(folder) == {}
    assert cli.main(command) == 0
    assert (folder / "policy.json").exists()


_KILLED = """
import os, signal, sys
from roadvla import cli
def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)
from roadvla.policy import weights
weights.write_whole = kill
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_warm_up_that_was_killed_while_it_was_written_is_made_again(policy, tmp_path, capsys):
    folder = tmp_path / "warmup"
    command = warm_up(policy, folder)
    done = subprocess.run([sys.executable, "-c", _KILLED, *command], check=False)
    assert done.returncode == -signal.SIGKILL
    assert "config.json" in content(folder)
    assert "policy.json" not in content(folder)
    capsys.readouterr()
    assert cli.main([*command, "--seed", "1"]) == 2  # another one: what is there may be wanted
    assert "--force" in capsys.readouterr().err
    assert cli.main(command) == 0
    assert sorted(content(folder)) == [
        *("config.json", "demonstrations.safetensors", "policy.json", "policy.safetensors"),
        "warmup.json",
    ]


def evaluation(policy: Path, folder: Path, *more: str) -> list[str]:
    return [
        *("eval", str(policy), "--env", "VR-UnseenTable", "--episodes", "2", "--record", "1"),
        *("--output", str(folder), *more),
    ]


@pytest.mark.parametrize(("number", "code"), SIGNALS)
@pytest.mark.parametrize("during", ["evaluate", "_save_film"])
def test_an_evaluation_is_stopped_and_made_by_the_same_command(
    policy, tmp_path, monkeypatch, capsys, number, code, during
):
    folder = tmp_path / "results"
    assert cli.main(evaluation(policy, folder, "--force")) == 0
    before = content(folder)
    owner = measure if during == "evaluate" else files
    command = evaluation(policy, folder)
    with monkeypatch.context() as patch:
        patch.setattr(owner, during, sending(number, getattr(owner, during)))
        capsys.readouterr()
        assert cli.main(command) == code
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"roadvla: stopped; go on with the same command: roadvla {' '.join(command)}"
    assert content(folder) == before
    assert cli.main(command) == 0
    assert len(content(folder)) == 2
    assert len(read_evaluation(folder / "VR-UnseenTable_test.json").success) == 2
    assert len(read_film(folder / "VR-UnseenTable_test_frames.npz").episode_ids) == 1


def test_a_signal_s_former_handler_is_back_after_the_command(policy, tmp_path):
    former = signal.getsignal(signal.SIGTERM)
    assert cli.main(evaluation(policy, tmp_path / "results")) == 0
    assert signal.getsignal(signal.SIGTERM) is former
