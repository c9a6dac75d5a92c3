"""Processes that are started together: signals that arrive twice, and starts that are repeated."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from meeting import meet
from probe_runs import assert_same_run, run
from torch import distributed, multiprocessing

from roadvla.errors import UserError
from roadvla.train import interrupt
from roadvla.train import trainer as trainers
from roadvla.train.interrupt import Preempted, catch_interrupts, raise_queue_signals
from roadvla.train.resume import agreed_start

LONG = """
    debug --num-envs 8 --total-env-steps 38400 --minibatch 32 --accumulation 2 --epochs 1
    --value-only-iterations 1 --evaluation.every 0 --evaluation.final-episodes 8
    --checkpoint-every 1000
"""


# Signals that arrive more than once.


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch):
    """Be one of two processes, and hear signals afterwards as before."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    former = {number: signal.getsignal(number) for number in interrupt.QUEUE_SIGNALS}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.usefixtures("launched")
def test_a_queue_s_signal_passed_on_is_not_a_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with catch_interrupts() as interrupts:
        for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            send(number)
        assert interrupts.kind == 2
        monkeypatch.setattr(interrupt, "_ECHO_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    send(signal.SIGTERM)  # also while it tidies up


@pytest.mark.usefixtures("launched")
def test_what_is_left_to_do_is_not_interrupted_once_more() -> None:
    def work() -> None:
        try:
            send(signal.SIGTERM)
        finally:
            send(signal.SIGUSR1)

    with raise_queue_signals(), raise_queue_signals(), pytest.raises(Preempted, match="SIGTERM"):
        work()
    send(signal.SIGTERM)


def start(folder: Path, *more: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "roadvla", "train", *LONG.split(), "--output", str(folder)]
    return subprocess.Popen(
        [*command, "--nproc", "2", *map(str, more)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_rows(process: subprocess.Popen[str], folder: Path) -> int:
    deadline = time.monotonic() + 120
    while (count := rows(folder)) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return count


def rows(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def ranks(parent: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], stdout=-1, check=True)
    pids = [int(word) for word in found.stdout.split()]
    ours = {pid: Path(f"/proc/{pid}/environ") for pid in pids}
    numbered = {
        next(v for v in path.read_bytes().split(b"\0") if v.startswith(b"RANK=")): pid
        for pid, path in ours.items()
        if path.exists() and b"\0RANK=" in path.read_bytes()
    }
    return [pid for _, pid in sorted(numbered.items())]


def saved(folder: Path) -> int:
    return json.loads((folder / "checkpoints/latest.json").read_text())["iteration"]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGUSR1, 75), (signal.SIGTERM, 75), (signal.SIGINT, 130)]
)
def test_a_signal_to_launcher_and_processes_saves(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    folder = tmp_path / "run"
    with start(folder) as process:
        count = wait_for_rows(process, folder)
        for pid in (*ranks(process.pid), process.pid):
            os.kill(pid, number)
        _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert saved(folder) == rows(folder) >= count


def test_a_launcher_that_is_told_again_and_again_waits_for_the_save(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with start(folder) as process:
        wait_for_rows(process, folder)
        started = ranks(process.pid)
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            process.send_signal(number)
            time.sleep(0.05)
        process.wait(timeout=120)
        assert not any(Path(f"/proc/{pid}").exists() for pid in started)
        _, err = process.communicate()
    assert process.returncode == 75, err
    assert saved(folder) == rows(folder)


# Starts that are repeated, and those that are not.


def test_a_process_that_was_told_to_stop_is_not_started_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with start(folder, "--max-restarts", 3) as process:
        wait_for_rows(process, folder)
        os.kill(ranks(process.pid)[1], signal.SIGUSR1)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert saved(folder) == rows(folder) < 120
    assert "starting all" not in err


def test_bad_input_is_not_tried_again(tmp_path: Path) -> None:
    with start(tmp_path / "run", "--num-envs", 7, "--max-restarts", 3) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert "7 environments cannot be shared equally by 2 processes" in err
    assert "starting all" not in err


def together(folder: Path, *arguments: object) -> list[list[bool]]:
    """What two processes of one run decide, of which the second has been restarted once."""
    meeting = folder / f"meeting-{time.monotonic_ns()}"
    multiprocessing.spawn(_decide, (meeting, folder, *arguments), nprocs=2)
    return [json.loads(meeting.with_suffix(f".{rank}").read_text()) for rank in (0, 1)]


def _decide(rank: int, meeting: Path, folder: Path, name: str, asked: dict[str, bool]) -> None:
    os.environ |= {"TORCHELASTIC_RESTART_COUNT": str(rank), "TORCHELASTIC_RUN_ID": name}
    world = meet(meeting, rank)
    options = {"resume": False, "if_begun": False, "force": False, **asked}
    # The second host's disk lags: it sees no run.
    seen = folder / "run" if rank == 0 else folder / "elsewhere"
    found = agreed_start(seen, world, **options)
    meeting.with_suffix(f".{rank}").write_text(json.dumps(found))
    distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "recorded", "expected"),
    [
        # Process 0 is on a machine that came later, whose torchrun has restarted nothing yet.
        ("none", None, [True, False]),
        ("job-7", "job-7", [True, False]),
        ("job-7", "job-6", [False, True]),
    ],
)
def test_on_which_run_to_go_on_is_decided_together(
    tmp_path: Path, name: str, recorded: str | None, expected: list[bool]
) -> None:
    (tmp_path / "run").mkdir()
    config = {} if recorded is None else {"launch": recorded}
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    assert together(tmp_path, name, {"force": True}) == [expected, expected]


def test_force_replaces_a_run_once_per_launch(tmp_path: Path, monkeypatch) -> None:
    folder = run(tmp_path / "run")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-7")
    updates = []
    real = trainers.update

    def counted(*arguments, **options):
        updates.append(0)
        if len(updates) == 6:
            raise ZeroDivisionError  # one machine is lost
        return real(*arguments, **options)

    monkeypatch.setattr(trainers, "update", counted)
    with pytest.raises(ZeroDivisionError):
        run(folder, force=True)
    run(folder, force=True)
    assert len(updates) == 6 + (12 - 3)
    monkeypatch.undo()
    assert_same_run(folder, run(tmp_path / "other"))
    with pytest.raises(UserError, match="already holds a run"):
        run(folder)


def test_a_run_that_is_stopped_says_so_though_its_record_is_damaged(tmp_path, monkeypatch) -> None:
    real, folder = trainers.save_checkpoint, tmp_path / "run"

    def damaging(root, *arguments, **options):
        result = real(root, *arguments, **options)
        (root / "latest.json").write_text("{")
        send(signal.SIGTERM)
        return result

    monkeypatch.setattr(trainers, "save_checkpoint", damaging)
    with pytest.raises(Preempted, match=r"^stopped; go on with `"):
        run(folder)
