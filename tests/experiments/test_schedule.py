"""The order of a grid: what is ready starts, failures hold back only what needs them."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import pytest

from roadvla.errors import UserError
from roadvla.experiments import schedule
from roadvla.experiments.budgets import SMOKE, base_experiment
from roadvla.experiments.cell import Origin
from roadvla.experiments.executors import DiedError
from roadvla.experiments.grid import Cell, Grid
from roadvla.experiments.schedule import run_grid


class Script:
    """An executor that plays back how cells end, in the order they were started."""

    def __init__(self, slots=2, ends=None):
        self.slots, self.ends = slots, ends or {}
        self.running = deque()
        self.log = []
        self.most = 0
        self.stopped = self.closed = False

    def start(self, name, work, log):
        self.running.append(name)
        self.log.append(f"+{name}")
        self.most = max(self.most, len(self.running))

    def wait(self):
        name = self.running.popleft()
        self.log.append(f"-{name}")
        ends = self.ends.get(name)
        end = ends.pop(0) if ends else None
        if isinstance(end, KeyboardInterrupt):
            self.running.appendleft(name)
            raise end
        return name, end

    def stop(self):
        self.stopped = True

    def close(self):
        self.closed = True


def make_grid(tmp_path, *cells, finished=()):
    base = base_experiment(SMOKE, sim="tabletop", policy="tiny", checkpoint=None, device="cpu")
    made = {
        name: Cell(
            name=name, method=name, seed=0, experiment=None, envs=(), identity=name,
            needs=tuple(needs), alone=name.startswith("alone"),
        )
        for name, needs in cells
    }  # fmt: skip
    return Grid(root=tmp_path, warm_up=None, base=base, budget=SMOKE, cells=made, studies=())


@pytest.fixture
def play(tmp_path):
    def run(executor, *cells, finished=()):
        said = []
        grid = make_grid(tmp_path, *cells)
        try:
            origin = Origin(command="", commit="")
            run_grid(grid, executor, origin, finished=finished, say=said.append)
        finally:
            assert executor.closed
        return said

    return run


def test_cells_wait_for_what_they_need(play):
    executor = Script(slots=3)
    play(executor, ("w", ()), ("a", ("w",)), ("b", ("a",)), ("c", ("w",)))
    assert executor.log == ["+w", "-w", "+a", "+c", "-a", "+b", "-c", "-b"]


def test_no_more_run_at_a_time_than_there_are_slots(play):
    executor = Script(slots=2)
    play(executor, *((str(i), ()) for i in range(5)))
    assert executor.most == 2
    assert sorted(executor.log[0::1])[:5] == ["+0", "+1", "+2", "+3", "+4"]


def test_finished_cells_are_not_run_again(play):
    executor = Script()
    said = play(executor, ("w", ()), ("a", ("w",)), finished=("w",))
    assert executor.log == ["+a", "-a"]
    assert said[0] == "1 of 2 cells are finished already"
    assert said[-1].startswith("2/2")


def test_a_failure_holds_back_only_what_needs_it(play):
    executor = Script(ends={"a": [UserError("no luck")]})
    with pytest.raises(UserError, match=r"2 of 4 cells failed, first a: no luck"):
        play(executor, ("w", ()), ("a", ("w",)), ("b", ("a",)), ("c", ("w",)))
    assert "+b" not in executor.log
    assert "-c" in executor.log


def test_a_killed_cell_is_tried_once_more(play):
    executor = Script(ends={"a": [DiedError("killed")]})
    said = play(executor, ("a", ()), ("b", ("a",)))
    assert executor.log == ["+a", "-a", "+a", "-a", "+b", "-b"]
    assert any("it is tried again" in line for line in said)
    executor = Script(ends={"a": [DiedError("killed"), DiedError("killed")]})
    with pytest.raises(UserError, match="first a: killed"):
        play(executor, ("a", ()))


def test_what_runs_alone_runs_last_and_with_nothing_beside_it(play):
    executor = Script(slots=3)
    play(executor, ("w", ()), ("alone-1", ("w",)), ("a", ("w",)), ("b", ("a",)), ("alone-2", ()))
    assert executor.log[-4:] in (
        ["+alone-1", "-alone-1", "+alone-2", "-alone-2"],
        ["+alone-2", "-alone-2", "+alone-1", "-alone-1"],
    )


def test_a_cell_that_runs_alone_is_not_held_up_by_what_cannot_run(play):
    executor = Script(ends={"a": [UserError("no luck")]})
    with pytest.raises(UserError, match="2 of 3 cells failed"):
        play(executor, ("a", ()), ("b", ("a",)), ("alone", ()))
    assert "-alone" in executor.log


def test_ctrl_c_stops_the_running_cells_and_waits_for_them(play):
    executor = Script(ends={"a": [KeyboardInterrupt()]})
    with pytest.raises(KeyboardInterrupt):
        play(executor, ("a", ()), ("b", ()), ("c", ()))
    assert executor.stopped
    assert "+c" not in executor.log
    assert executor.log[-2:] == ["-a", "-b"]


def test_progress_says_how_long_it_takes(play, monkeypatch):
    clock = iter(range(0, 10_000, 60))
    monkeypatch.setattr(schedule.time, "monotonic", lambda: float(next(clock)))
    said = play(Script(slots=1), ("a", ()), ("b", ()), ("c", ()))
    assert said[0] == "1/3, about 2 min left  a done"
    assert said[-1] == "3/3  c done"


def test_logs_lie_in_the_folder_of_the_grid(tmp_path):
    seen = []

    class Noting(Script):
        def start(self, name, work, log):
            seen.append(log)
            super().start(name, work, log)

    origin, grid = Origin(command="", commit=""), make_grid(tmp_path, ("a", ()))
    run_grid(grid, Noting(), origin, finished=(), say=lambda _: None)
    assert seen == [Path(tmp_path) / "logs" / "a.log"]
