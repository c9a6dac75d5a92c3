"""Where cells run: a process that dies takes nothing with it and is named."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from roadvla.errors import UserError
from roadvla.experiments.executors import DiedError, LocalProcesses, RayCluster


def write(path: Path) -> None:
    print("at work", flush=True)
    path.write_text(str(os.getpid()))


def complain() -> None:
    raise UserError("no such thing")


def fill_the_disk() -> None:
    raise OSError(28, "No space left on device")


def stumble() -> None:
    raise ZeroDivisionError("a defect")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def work_until_stopped(path: Path) -> None:
    path.write_text("begun")
    time.sleep(60)


def have_a_child() -> None:
    child = multiprocessing.get_context("spawn").Process(target=int, daemon=True)
    child.start()
    child.join()


@pytest.fixture
def local():
    executor = LocalProcesses(2)
    yield executor
    executor.close()


def test_cells_run_in_processes_of_their_own_and_print_to_their_logs(local, tmp_path):
    for name in ("a", "b"):
        local.start(name, partial(write, tmp_path / name), tmp_path / "logs" / f"{name}.log")
    ended = dict(local.wait() for _ in range(2))
    assert ended == {"a": None, "b": None}
    pids = {(tmp_path / name).read_text() for name in ("a", "b")}
    assert len(pids | {str(os.getpid())}) == 3
    assert (tmp_path / "logs" / "a.log").read_text() == "at work\n"


def test_a_cell_may_have_processes_of_its_own(local, tmp_path):
    local.start("a", have_a_child, tmp_path / "a.log")
    assert local.wait() == ("a", None)


@pytest.mark.parametrize(
    ("work", "kind", "says"),
    [
        (complain, UserError, "no such thing (see"),
        (fill_the_disk, UserError, "No space left on device (see"),
        (stumble, UserError, "ZeroDivisionError: a defect (see"),
        (die, DiedError, "its process died (signal 9)"),
    ],
)
def test_how_a_cell_failed_is_said(local, tmp_path, work, kind, says):
    local.start("a", work, tmp_path / "a.log")
    name, failure = local.wait()
    assert name == "a"
    assert type(failure) is kind
    assert says in str(failure)


def test_a_cell_that_dies_leaves_the_others_alone(local, tmp_path):
    local.start("a", die, tmp_path / "a.log")
    local.start("b", partial(write, tmp_path / "b"), tmp_path / "b.log")
    ended = dict(local.wait() for _ in range(2))
    assert isinstance(ended["a"], DiedError)
    assert ended["b"] is None


def test_stopping_interrupts_each_once(local, tmp_path):
    local.start("a", partial(work_until_stopped, tmp_path / "a"), tmp_path / "a.log")
    deadline = time.monotonic() + 30
    while not (tmp_path / "a").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    local.stop()
    name, failure = local.wait()
    assert (name, str(failure)) == ("a", "stopped")


def test_ray_runs_cells_and_says_how_they_failed(tmp_path):
    ray = pytest.importorskip("ray")
    # Workers cannot import this file; what the package itself sends them they can.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    executor = RayCluster(2)
    try:
        executor.start("a", partial(write, tmp_path / "a"), tmp_path / "a.log")
        executor.start("b", complain, tmp_path / "b.log")
        executor.start("c", die, tmp_path / "c.log")
        ended = dict(executor.wait() for _ in range(3))
    finally:
        executor.close()
    assert ended["a"] is None
    assert (tmp_path / "a").exists()
    assert "no such thing" in str(ended["b"])
    assert isinstance(ended["c"], DiedError)


def test_without_ray_the_extra_is_named(monkeypatch):
    import builtins

    real = builtins.__import__

    def refuse(name, *rest, **more):
        if name == "ray":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=r"pip install \'roadvla\[ray\]\'"):
        RayCluster(1)
