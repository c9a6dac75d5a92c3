"""Runs killed with SIGKILL, over and over, end as if nobody had touched them.

make test-slow ARGS="tests/train/test_kills.py -rP"
"""

from __future__ import annotations

import collections
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from probe_runs import rows, shown
from test_openvla_training import LORA
from test_openvla_training import SIZES as TINY
from watched_cli import PHASES

from roadvla.policy.openvla.tiny_checkpoint import write_tiny_checkpoint

CLI = Path(__file__).with_name("watched_cli.py")
SIZES = [
    *("--epochs", "1", "--value-only-iterations", "1", "--num-envs", "4", "--minibatch", "32"),
    *("--evaluation.episodes", "4", "--evaluation.final-episodes", "4", "--evaluation.every", "2"),
]
STEPS = 4 * 24
KINDS = {
    "ppo": [],
    "road": ["--algo", "road", "--reference-critic", "{critic}"],
    "mcts": ["--algo", "road", "--hints", "mcts"],
}
ITS_OWN = {"ppo": set(), "road": {"reference"}, "mcts": {"hints"}, "openvla": set()}
KILLS = {"ppo": 25, "road": 30, "mcts": 25, "openvla": 12}


def start(sheet: Path, *arguments: object, kill: str | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, str(CLI), str(sheet), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("KILL", None)
    if kill is not None:
        environment["KILL"] = kill
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> str:
    _, told = process.communicate(timeout=300)
    assert process.returncode in (0, -signal.SIGKILL), told
    assert "Traceback" not in told
    assert "warning" not in told or "text-guided" in told, told  # no checkpoint was ever damaged
    return told


class Killer:
    """Lives of one run, each but the last cut short, half of them in a phase chosen beforehand."""

    def __init__(
        self, folder: Path, begin: list[str], took: dict[str, float], hit: collections.Counter[str]
    ) -> None:
        self.folder, self._begin, self._took, self.hit = folder, begin, took, hit
        self._sheet = folder.with_suffix(".sheet")
        self._random = random.Random(hit.total())

    def live(self) -> bool:
        """Begin or go on, and kill; whether the run came to its end all the same."""
        told = ["train", "--resume", str(self.folder)]
        if not (self.folder / "config.json").exists():
            told = [*self._begin, "--output", str(self.folder)]
        aimed = self._random.random() < 0.6
        self._sheet.unlink(missing_ok=True)
        process = start(self._sheet, *told, kill=self._aim() if aimed else None)
        if not aimed:
            self._kill_at_random(process)
        finish(process)
        if process.returncode == 0:
            return True
        self.hit[self._now()] += 1
        return False

    def _aim(self) -> str:
        """Draw a phase of those hit least, which of its occurrences, and how long after it."""
        phases = sorted(set(self._took) - {"load"})
        fewest = min(self.hit[phase] for phase in phases)
        phase = self._random.choice([phase for phase in phases if self.hit[phase] <= fewest])
        after = self._random.choice([0.0, self._took[phase] * self._random.random()])
        return f"{phase} {self._random.choice([1, 1, 2])} {after:.6f}"

    def _kill_at_random(self, process: subprocess.Popen[str]) -> None:
        """Wait until there is a run, then for a random while; now and then for that alone."""
        if self._random.random() < 0.9:
            while process.poll() is None and self._now() in ("start", "load"):
                time.sleep(0.005)
        time.sleep(self._random.random() * 2.0)
        process.kill()

    def _now(self) -> str:
        sheet = self._sheet.read_bytes() if self._sheet.exists() else b""
        return PHASES[sheet[0]] if sheet else "start"


def assert_identical(killed: Path, whole: Path) -> None:
    names = [
        sorted(
            path.relative_to(run).as_posix()
            for path in run.rglob("*")
            if path.parent.name != "tensorboard"
        )
        for run in (killed, whole)
    ]
    assert names[0] == names[1]
    for name in names[0]:
        if name.startswith("checkpoints/") and (whole / name).is_file():
            assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    assert rows(killed) == rows(whole)
    assert shown(killed) == shown(whole)
    for split in ("train", "test"):
        path = f"evaluation/VR-UnseenTable_{split}"
        mine, theirs = (json.loads((run / f"{path}.json").read_text()) for run in (killed, whole))
        for measured in ("date", "seconds"):
            del mine[measured], theirs[measured]
        assert mine == theirs
        a, b = (np.load(run / f"{path}_frames.npz") for run in (killed, whole))
        assert sorted(a) == sorted(b)
        assert all(np.array_equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def start_from(tmp_path_factory):
    """A policy that succeeds now and then, so that there is something to learn and to remember."""
    folder = tmp_path_factory.mktemp("start") / "warmup"
    told = ["warmup", "--output", folder, "--episodes", 16, "--steps", 40, "--batch", 64]
    finish(start(folder.with_suffix(".sheet"), *told))
    return folder


def uninterrupted(folder: Path, begin: list[str]) -> dict[str, float]:
    """Run to the end, and return what each phase took on average."""
    sheet = folder.with_suffix(".sheet")
    process = start(sheet, *begin, "--output", folder)
    told = finish(process)
    assert process.returncode == 0, told
    return json.loads(Path(f"{sheet}.json").read_text())


def command(start_from: Path, iterations: int, more: list[str]) -> list[str]:
    budget = ["--total-env-steps", str(iterations * STEPS)]
    return ["train", "debug", "--init", str(start_from), *SIZES, *budget, *more]


def kill_again_and_again(folder: Path, begin: list[str], kind: str) -> str:
    """Compare runs that are killed with one that is not, until there were enough kills."""
    took = uninterrupted(folder / "whole", begin)
    always = set(PHASES) - {"start", "between", "hints", "reference"}
    assert set(took) == always | ITS_OWN[kind]  # else something is watched in the wrong place
    hit: collections.Counter[str] = collections.Counter()
    campaign = 0
    while hit.total() < KILLS[kind] or not set(took) - {"load"} <= hit.keys():
        campaign += 1
        killer = Killer(folder / f"killed{campaign}", begin, took, hit)
        lives = 0
        while not killer.live():
            lives += 1
            assert lives < 60, "it makes no headway"
        assert_identical(killer.folder, folder / "whole")
    return f"{hit.total()} kills in {campaign} runs; " + ", ".join(
        f"{phase} {hit[phase]}" for phase in PHASES if hit[phase]
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_kills_at_random_moments_leave_no_trace(start_from, tmp_path, kind, record_property):
    critic = tmp_path / "critic"
    more = [word.format(critic=critic) for word in KINDS[kind]]
    if kind == "road":
        uninterrupted(critic, command(start_from, 2, []))
    summary = kill_again_and_again(tmp_path, command(start_from, 8, more), kind)
    record_property("kills", summary)
    print(f"{kind}: {summary}")


@pytest.mark.slow
def test_kills_of_an_openvla_leave_no_trace(tmp_path, record_property):
    base = write_tiny_checkpoint(tmp_path / "base", sizes=TINY)
    policy = ["--policy", "openvla", "--checkpoint", str(base), *map(str, LORA)]
    warmup = ["warmup", *policy, "--output", str(tmp_path / "warmup"), "--episodes", "4"]
    few = ["--steps", "4", "--batch", "8", "--minibatch", "4", "--learning-rate", "1e-2"]
    finish(start(tmp_path / "warmup.sheet", *warmup, *few))
    begin = [*command(tmp_path / "warmup", 5, policy), "--learning-rate", "1e-3"]
    summary = kill_again_and_again(tmp_path, begin, "openvla")
    record_property("kills", summary)
    print(f"openvla: {summary}")


def test_three_kills_leave_no_trace(tmp_path):
    begin = ["train", "debug", *SIZES, "--total-env-steps", str(3 * STEPS)]
    uninterrupted(tmp_path / "whole", begin)
    folder = tmp_path / "killed"
    told = [*begin, "--output", folder]
    for kill in ("update 2 0", "manifest 1 0", "final files 2 0"):
        process = start(tmp_path / "sheet", *told, kill=kill)
        finish(process)
        assert process.returncode == -signal.SIGKILL
        told = ["train", "--resume", folder]
    finish(start(tmp_path / "sheet", *told))
    assert_identical(folder, tmp_path / "whole")
