"""Queues' signals, locks, folders that cannot be written, clocks that jump."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from datetime import datetime

import numpy as np
import pytest
import torch
from probe_runs import assert_same_run, rows, run, shown

from probes import ColourEnv, probe_experiment
from roadvla import cli
from roadvla.errors import UserError
from roadvla.evaluation import evaluate
from roadvla.evaluation.files import read_evaluation
from roadvla.train import checkpoint, loop, notes, run_folder
from roadvla.train import trainer as trainers
from roadvla.train.checkpoint import latest_checkpoint
from roadvla.train.interrupt import Interrupted, Preempted
from roadvla.train.lock import LOCK, check_free, locked
from roadvla.train.metrics import MetricsWriter, read_metrics

# Signals.


def _send(monkeypatch, number, owner, name, call):
    """Send a signal to this process during one call of a function."""
    real, count = getattr(owner, name), []

    def sending(*args, **options):
        count.append(0)
        if len(count) == call:
            os.kill(os.getpid(), number)
        return real(*args, **options)

    monkeypatch.setattr(owner, name, sending)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_queue_s_signal_saves_and_asks_to_be_run_again(finished, tmp_path, monkeypatch, number):
    folder, former = tmp_path / "run", signal.getsignal(number)
    _send(monkeypatch, number, trainers, "update", 5)
    with pytest.raises(
        Preempted, match=r"saved at iteration_000005; go on with `.*--resume"
    ) as said:
        run(folder)
    monkeypatch.undo()
    assert said.value.code == 75
    assert signal.getsignal(number) is former
    assert len(read_metrics(folder)) == 6
    run(folder, resume=True)
    assert_same_run(folder, finished)


@pytest.mark.parametrize(("call", "saved"), [(1, "before the first"), (7, "at iteration_000012")])
def test_in_an_evaluation_a_queue_s_signal_is_obeyed_at_once(tmp_path, monkeypatch, call, saved):
    _send(monkeypatch, signal.SIGTERM, trainers, "evaluate", call)
    with pytest.raises(Preempted, match=saved):
        run(tmp_path / "run")


def test_a_second_signal_stops_at_once(tmp_path, monkeypatch):
    _send(monkeypatch, signal.SIGUSR1, trainers, "collect", 5)
    _send(monkeypatch, signal.SIGTERM, trainers, "update", 5)
    with pytest.raises(Preempted, match="saved at iteration_000003"):
        run(tmp_path / "run")
    assert len(read_metrics(tmp_path / "run")) == 5  # 0 to 4: the fifth was abandoned


@pytest.mark.parametrize(("error", "code"), [(Preempted, 75), (Interrupted, 130)])
def test_the_exit_code_says_who_stopped_it(monkeypatch, capsys, error, code):
    def command(_):
        raise error("stopped, saved at iteration_000005")

    monkeypatch.setitem(cli._CONFIGURED, "train", command)
    assert cli.main(["train"]) == code
    assert capsys.readouterr().err == "roadvla: stopped, saved at iteration_000005\n"


# Locks.

_HOLD = """
import sys
from pathlib import Path
from roadvla.train.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def _held_by_another(folder):
    command = [sys.executable, "-c", _HOLD, str(folder)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_folder_in_use_is_refused_and_left_as_it_is(finished, tmp_path):
    folder = run(tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with _held_by_another(folder) as process:
        says = rf"is in use by another process \(process {process.pid} on .*\): wait for it"
        for options in ({"resume": True}, {"force": True}, {}):
            with pytest.raises(UserError, match=says):
                run(folder, **options)
        before[folder / LOCK] = (folder / LOCK).stat().st_mtime_ns

        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    run(folder, resume=True)  # it was killed: nothing has to be cleaned up
    assert_same_run(folder, finished)


def test_of_two_that_begin_at_once_the_second_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    with _held_by_another(folder):
        monkeypatch.setattr(loop, "check_free", lambda _: None)  # it passed before the other
        with pytest.raises(UserError, match="in use"):
            run(folder)
        assert [path.name for path in folder.iterdir()] == [LOCK]
    run(folder)  # it was killed: nothing has to be cleaned up
    assert not (folder / LOCK).exists()


def test_the_lock_is_held_from_the_first_write_to_the_last(tmp_path, monkeypatch):
    folder, seen = tmp_path / "run", []

    def watched(owner, name):
        real = getattr(owner, name)

        def call(*args, **options):
            with pytest.raises(UserError, match="in use"):
                check_free(folder)
            seen.append(name)
            return real(*args, **options)

        monkeypatch.setattr(owner, name, call)

    for owner, name in (
        (loop, "create_run_folder"),
        (trainers, "save_checkpoint"),
        (loop, "write_evaluation"),
    ):
        watched(owner, name)
    run(folder)
    assert set(seen) == {"create_run_folder", "save_checkpoint", "write_evaluation"}
    check_free(folder)


def test_a_lock_whose_holder_just_left_is_taken_anew(tmp_path, monkeypatch):
    """Between opening the file and locking it, its holder removed it and a third one came."""
    real, opened = os.open, []

    def late(path, *args, **options):
        descriptor = real(path, *args, **options)
        if os.fspath(path).endswith(LOCK):
            opened.append(descriptor)
            if len(opened) == 1:
                os.unlink(path)
        return descriptor

    monkeypatch.setattr(os, "open", late)
    with locked(tmp_path):
        assert len(opened) == 2
        with pytest.raises(UserError, match="in use"):
            check_free(tmp_path)


def test_a_lock_is_free_again_after_an_error(tmp_path):
    def fail():
        with locked(tmp_path):
            raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            fail()


# Folders.


@contextlib.contextmanager
def _without_privileges():
    """Root writes everywhere; nobody does not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("resume", [False, True])
def test_a_read_only_folder_is_refused_before_any_work(tmp_path, monkeypatch, resume):
    folder = tmp_path / "run"
    if resume:
        run(folder)
    else:
        folder.mkdir()
    for path in (tmp_path, *tmp_path.parents):  # so that nobody can see it at all
        if path.stat().st_mode & 0o777 == 0o700:
            path.chmod(0o755)
    folder.chmod(0o555)
    work = []
    monkeypatch.setattr(loop, "Trainer", lambda *_: work.append(0))
    with _without_privileges(), pytest.raises(UserError, match=r"^cannot write .*--output$"):
        run(folder, resume=resume)
    folder.chmod(0o755)
    assert work == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 kB, where the tests may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        done = False
    if not done:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("left", [1, 2, 4, 6, 8, 10])
def test_a_disk_that_fills_up_costs_nothing_that_was_saved(finished, small_disk, monkeypatch, left):
    folder = small_disk / "run"
    _send(monkeypatch, signal.SIGTERM, trainers, "update", 4)
    with pytest.raises(Preempted):
        run(folder)
    monkeypatch.undo()
    filler = small_disk / "filler"
    free = os.statvfs(small_disk)
    filler.write_bytes(b"x" * (free.f_bavail * free.f_frsize - left * 4096))
    with pytest.raises(UserError, match=r"cannot write .*No space left on device.*--resume"):
        run(folder, resume=True)
    assert latest_checkpoint(folder / "checkpoints") is not None
    filler.unlink()
    run(folder, resume=True)
    assert_same_run(folder, finished)


# Fallback.


def test_a_damaged_newest_checkpoint_is_told_and_costs_only_its_work(finished, tmp_path, capsys):
    folder = run(tmp_path / "run")
    path = folder / "checkpoints/iteration_000012/policy.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    capsys.readouterr()
    run(folder, resume=True)
    said = "going on from iteration 9, the last good one: "
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(lines) == 1
    assert said in lines[0]
    assert "iteration_000012/policy.safetensors is damaged" in lines[0]
    (note,) = (json.loads(line) for line in (folder / "notes.jsonl").read_text().splitlines())
    assert note["iteration"] == 9
    assert note["note"].startswith(said)
    assert_same_run(folder, finished)


def test_killed_before_it_dropped_the_older_ones_a_run_drops_them_when_it_goes_on(
    finished, tmp_path, monkeypatch
):
    folder, saves = tmp_path / "run", []
    real = checkpoint.retire_checkpoints

    def crash(*args, **options):
        saves.append(0)
        if len(saves) == 4:  # the last save
            raise ZeroDivisionError
        return real(*args, **options)

    monkeypatch.setattr(checkpoint, "retire_checkpoints", crash)
    with pytest.raises(ZeroDivisionError):
        run(folder)
    monkeypatch.undo()
    there = sorted(path.name for path in (folder / "checkpoints").glob("iteration_*"))
    assert there == [f"iteration_{number:06d}" for number in (6, 9, 12)]
    run(folder, resume=True)
    there = sorted(path.name for path in (folder / "checkpoints").glob("iteration_*"))
    assert there == [f"iteration_{number:06d}" for number in (9, 12)]
    assert_same_run(folder, finished)


# TensorBoard and clocks.


@pytest.mark.parametrize(
    ("name", "call"), [("write", 4), ("write", 6), ("hide", 1), ("hide", 2), ("write", 14)]
)
def test_tensorboard_has_no_gap_and_no_double(finished, tmp_path, monkeypatch, name, call):
    from roadvla.train.board import Board

    real, count = getattr(Board, name), []

    def crash(*args, **options):
        count.append(0)
        if len(count) == call:
            raise ZeroDivisionError
        return real(*args, **options)

    monkeypatch.setattr(Board, name, crash)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "run")
    monkeypatch.undo()
    run(tmp_path / "run", resume=True)
    assert shown(tmp_path / "run") == shown(finished)


def test_the_final_evaluation_is_shown_once_however_often_it_was_made(
    finished, tmp_path, monkeypatch
):
    def crash(*_):
        raise ZeroDivisionError

    for resume in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(loop, "write_evaluation", crash)
            with pytest.raises(ZeroDivisionError):
                run(tmp_path / "run", resume=resume)
    run(tmp_path / "run", resume=True)
    assert shown(tmp_path / "run") == shown(finished)
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.parametrize("cut", [1, 9, 40])
def test_an_event_cut_off_in_writing_hides_nothing_after_it(finished, tmp_path, monkeypatch, cut):
    _send(monkeypatch, signal.SIGTERM, trainers, "update", 6)
    with pytest.raises(Preempted):
        run(tmp_path / "run")
    monkeypatch.undo()
    (path,) = (tmp_path / "run/tensorboard").iterdir()
    path.write_bytes(path.read_bytes()[:-cut])
    run(tmp_path / "run", resume=True)
    assert shown(tmp_path / "run") == shown(finished)


def test_a_clock_that_jumps_changes_nothing(finished, tmp_path, monkeypatch):
    jumps = random.Random(0)

    def jumped(scale=1):
        return lambda: int(scale * 1e9 * jumps.random()) if scale > 1 else 1e9 * jumps.random()

    class Jumping(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.fromtimestamp(1e9 * jumps.random(), tz)

    monkeypatch.setattr(time, "time", jumped())
    monkeypatch.setattr(time, "time_ns", jumped(int(1e9)))
    dated = (evaluate, notes, run_folder)
    for module in dated:
        monkeypatch.setattr(module, "datetime", Jumping)
    folder = tmp_path / "run"
    for call in (4, 3, 5):  # the files of TensorBoard are named by the clock
        with monkeypatch.context() as patch:
            _send(patch, signal.SIGTERM, trainers, "update", call)
            with contextlib.suppress(Preempted):
                run(folder, resume=folder.exists())
    run(folder, resume=True)
    assert_same_run(folder, finished)
    assert len(list((folder / "tensorboard").iterdir())) == 4
    durations = [v for row in read_metrics(folder) for k, v in row.items() if k[:5] == "time/"]
    assert all(value > 0 for value in durations)
    assert max(row.get("time/iteration", 0) for row in read_metrics(folder)) < 60
    measured = [read_evaluation(path) for path in sorted((folder / "evaluation").glob("*.json"))]
    assert len(measured) == 2
    assert all(0 <= result.seconds < 60 and result.date < "2002" for result in measured)


# Global randomness.


def test_nobody_draws_from_the_global_generators(finished, tmp_path, monkeypatch):
    real, stirred = trainers.Trainer.iterate, []

    def iterate(self):
        seed = 1000 + len(stirred)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        states = np.random.get_state()[1].tolist(), torch.get_rng_state()
        result = real(self)
        # Python's own is used by the type checks that tests run under.
        assert np.random.get_state()[1].tolist() == states[0]
        assert torch.equal(torch.get_rng_state(), states[1])
        stirred.append(0)
        return result

    monkeypatch.setattr(trainers.Trainer, "iterate", iterate)
    run(tmp_path / "run")
    assert len(stirred) == 12
    assert_same_run(tmp_path / "run", finished)


def test_a_row_is_written_before_the_checkpoint_that_counts_on_it(tmp_path, monkeypatch):
    order = []
    for owner, name in ((MetricsWriter, "write"), (trainers.Trainer, "save"), (ColourEnv, "reset")):
        real = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *a, r=real, n=name, **k: (order.append(n), r(*a, **k))[1]
        )
    run(tmp_path / "run")
    told = [name for name in order if name != "reset"]
    assert told[:5] == ["write"] * 4 + ["save"]  # iterations 0 to 3
    assert probe_experiment(tmp_path).checkpoint_every == 3
    assert len(rows(tmp_path / "run")) == 13
