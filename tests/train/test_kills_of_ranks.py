"""Runs of two processes, of which one or all are killed with SIGKILL, end as if nothing had been.

make test-slow ARGS="tests/train/test_kills_of_ranks.py -rP"
"""

from __future__ import annotations

import collections
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_kills import SIZES, STEPS, assert_identical, command
from test_kills import finish as finish_alone
from test_kills import start as start_alone

KILLS = 12
VICTIMS = ("rank 0", "rank 1", "all")


def start(*arguments: object) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "roadvla", *map(str, arguments), "--nproc", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> int:
    _, told = process.communicate(timeout=300)
    assert "Traceback" not in told, told
    assert "warning" not in told, told  # no checkpoint was ever damaged
    return process.returncode


def ranks(launcher: int) -> dict[str, int]:
    """Process ids of a launcher's workers."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        for rank in (0, 1):
            if int(parent) == launcher and f"RANK={rank}".encode() in variables:
                found[f"rank {rank}"] = int(folder.name)
    return found


def boards(folder: Path) -> int:
    """Each life of a run has an event file of its own, once it has loaded everything."""
    return len(list((folder / "tensorboard").glob("*")))


def kill(process: subprocess.Popen[str], folder: Path, victim: str, draw: random.Random) -> None:
    """Wait until the run goes on, then for a random while; now and then for that alone."""
    before = boards(folder)
    if draw.random() < 0.85:
        while process.poll() is None and boards(folder) == before:
            time.sleep(0.005)
    time.sleep(draw.random() * 3.0)
    workers = ranks(process.pid)
    chosen = [*workers.values(), process.pid] if victim == "all" else [workers.get(victim)]
    draw.shuffle(chosen)
    for one in chosen:
        if one is not None and process.poll() is None:
            os.kill(one, signal.SIGKILL)


@pytest.mark.slow
def test_kills_of_one_process_or_all_leave_no_trace(tmp_path: Path, record_property) -> None:
    warmup = tmp_path / "warmup"
    few = ["--episodes", 16, "--steps", 40, "--batch", 64]
    finish_alone(start_alone(tmp_path / "sheet", "warmup", "--output", warmup, *few))
    begin = [*command(warmup, 8, []), "--checkpoint-every", "1"]
    assert finish(start(*begin, "--output", tmp_path / "whole")) == 0
    draw, hit, runs = random.Random(0), collections.Counter(), 0
    while hit.total() < KILLS or len(hit) < len(VICTIMS):
        runs += 1
        folder = tmp_path / f"killed{runs}"
        code, lives = 1, 0
        while code:
            lives += 1
            assert lives < 40, "it makes no headway"
            begun = (folder / "config.json").exists()
            told = ["train", "--resume", folder] if begun else [*begin, "--output", folder]
            process = start(*told)
            victim = draw.choice(VICTIMS)
            kill(process, folder, victim, draw)
            code = finish(process)
            assert code in (0, 1, -signal.SIGKILL)
            assert (code == -signal.SIGKILL) <= (victim == "all")
            hit[victim] += code != 0
        assert_identical(folder, tmp_path / "whole")
    summary = f"{hit.total()} kills in {runs} runs; {dict(hit)}"
    record_property("kills", summary)
    print(f"two processes: {summary}")


@pytest.mark.slow
def test_processes_whose_launcher_is_killed_end_the_run_and_hold_it_until_then(tmp_path) -> None:
    budget = ["--total-env-steps", str(25 * STEPS), "--checkpoint-every", "1"]
    folder = tmp_path / "run"
    process = start("train", "debug", *SIZES, *budget, "--output", folder)
    while process.poll() is None and not boards(folder):
        time.sleep(0.02)
    workers = ranks(process.pid)
    process.kill()
    resume = [sys.executable, "-m", "roadvla", "train", "--resume", str(folder)]
    done = subprocess.run(resume, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"in use by another process (process {workers['rank 0']} on " in done.stderr
    deadline = time.monotonic() + 200
    while any(Path(f"/proc/{worker}").exists() for worker in workers.values()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    before = (folder / "metrics.jsonl").read_bytes()
    assert before.count(b"\n") == 26
    assert subprocess.run(resume, capture_output=True, check=False).returncode == 0
    assert (folder / "metrics.jsonl").read_bytes() == before
