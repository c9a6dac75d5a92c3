"""The launch scripts, with a stand-in for the cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = """
    debug --num-envs 4 --total-env-steps 192 --minibatch 32 --epochs 1 --evaluation.every 0
    --evaluation.final-episodes 0 --checkpoint-every 1
"""
SRUN = """#!{python}
import os, subprocess, sys
command = [word for word in sys.argv[1:] if not word.startswith("--kill")]
tasks = [
    subprocess.Popen(command, env={{**os.environ, "SLURM_PROCID": n, "SLURM_LOCALID": n}})
    for n in ("0", "1")
]
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/bin/bash
if [ "$1" = requeue ]; then touch "$REQUEUED"; else echo 127.0.0.1; fi
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """Variables of a job of two tasks on a cluster that is this machine."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "REQUEUED": str(tmp_path / "requeued"),
        "SLURM_JOB_NODELIST": "here",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_NTASKS": "2",
        "DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
    }


def submit(cluster: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "launch/slurm.sbatch"), *arguments]
    return subprocess.run(
        command, env=cluster, capture_output=True, text=True, timeout=200, check=False
    )


def test_a_slurm_job_begins_and_a_second_one_finds_it_finished(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for _ in range(2):
        done = submit(cluster, *SMALL.split(), "--output", str(run))
        assert done.returncode == 0, done.stderr
    state = json.loads((run / "checkpoints/iteration_000002/state.json").read_text())
    assert state["env_steps"] == 192
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert not Path(cluster["REQUEUED"]).exists()


@pytest.mark.parametrize(
    ("code", "earlier", "requeued"),
    [
        *((75, 0, True), (75, 99, True), (0, 0, False), (2, 0, False), (130, 0, False)),
        *((code, 19, True) for code in (1, 134, 137, 139, 143)),  # failed, or ended by a signal
        *((code, 20, False) for code in (1, 137)),
    ],
)
def test_only_what_waiting_mends_is_requeued(
    cluster: dict[str, str], tmp_path: Path, code: int, earlier: int, requeued: bool
) -> None:
    (tmp_path / "bin/srun").write_text(f"#!/bin/bash\nexit {code}\n")
    cluster["SLURM_RESTART_COUNT"] = str(earlier)
    assert submit(cluster).returncode == code
    assert Path(cluster["REQUEUED"]).exists() == requeued


@pytest.mark.slow
def test_a_run_on_ray(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    run = tmp_path / "run"
    command = [sys.executable, str(ROOT / "launch/ray_train.py"), "--processes", "2"]
    command += ["--gpus-per-process", "0", "--", *SMALL.split(), "--output", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
