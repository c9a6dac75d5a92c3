"""Running a grid: what is ready starts, what fails holds back only what needs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial

from rich.console import Console

from roadvla.errors import UserError
from roadvla.experiments.cell import Origin, run_cell
from roadvla.experiments.executors import DiedError, Executor
from roadvla.experiments.grid import Cell, Grid

_TRIES = 2


@dataclass
class _State:
    """How far a grid is."""

    todo: dict[str, Cell]
    finished: set[str]
    running: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    tries: dict[str, int] = field(default_factory=dict)
    took: list[float] = field(default_factory=list)


def run_grid(
    grid: Grid,
    executor: Executor,
    origin: Origin,
    *,
    finished: Collection[str],
    say: Callable[[str], None] | None = None,
) -> None:
    """Finish every cell of a grid.

    A cell whose process is killed is tried once more; it goes on from its last checkpoint.

    Args:
        grid: What there is to do.
        executor: Where cells run; closed here.
        origin: Noted in the records.
        finished: Names of cells that are left alone.
        say: Shows a line of progress; on standard error unless given.

    Raises:
        UserError: If cells failed; the others are finished first.
        KeyboardInterrupt: After Ctrl-C; the running cells save first. A second one does not wait.
    """
    say = say or _to_stderr
    todo = {name: cell for name, cell in grid.cells.items() if name not in finished}
    state = _State(todo=todo, finished=set(finished))
    if finished:
        say(f"{len(finished)} of {len(grid.cells)} cells are finished already")
    try:
        while state.todo or state.running:
            _start_ready(state, grid, executor, origin)
            if not state.running:
                _skip_unreachable(state)
                continue
            _take_one(state, grid, executor, say)
    except KeyboardInterrupt:
        say("stopping: the running cells save first; Ctrl-C again stops them at once")
        executor.stop()
        while state.running:
            name, _ = executor.wait()
            del state.running[name]
        raise
    finally:
        executor.close()
    if state.failed:
        first, why = next(iter(state.failed.items()))
        raise UserError(
            f"{len(state.failed)} of {len(grid.cells)} cells failed, first {first}: {why}; the "
            f"same command tries them again"
        )


def _start_ready(state: _State, grid: Grid, executor: Executor, origin: Origin) -> None:
    """Fill the slots, in the grid's order; a cell that runs alone waits until nothing else does."""
    for name, cell in list(state.todo.items()):
        if len(state.running) >= executor.slots:
            return
        if not all(need in state.finished for need in cell.needs):
            continue
        if cell.alone and (state.running or _ordinary_left(state)):
            continue
        del state.todo[name]
        state.running[name] = time.monotonic()
        state.tries[name] = state.tries.get(name, 0) + 1
        work = partial(run_cell, cell, grid, origin)
        executor.start(name, work, grid.root / "logs" / f"{name}.log")


def _ordinary_left(state: _State) -> bool:
    """Whether a cell that need not be alone could still run."""
    return any(
        not cell.alone and not any(need in state.failed for need in cell.needs)
        for cell in state.todo.values()
    )


def _skip_unreachable(state: _State) -> None:
    """Give up the cells that wait for one that failed."""
    for name, cell in list(state.todo.items()):
        lost = [need for need in cell.needs if need in state.failed]
        if lost:
            del state.todo[name]
            state.failed[name] = f"it needs {lost[0]}, which failed"


def _take_one(state: _State, grid: Grid, executor: Executor, say: Callable[[str], None]) -> None:
    name, failure = executor.wait()
    begun = state.running.pop(name)
    if isinstance(failure, DiedError) and state.tries[name] < _TRIES:
        say(f"{name}: {failure}; it is tried again")
        state.todo = {name: grid.cells[name], **state.todo}
        return
    if failure is None:
        state.finished.add(name)
        state.took.append(time.monotonic() - begun)
    else:
        state.failed[name] = str(failure)
    how = "done" if failure is None else f"FAILED: {failure}"
    left = len(state.todo) + len(state.running)
    say(f"{len(state.finished)}/{len(grid.cells)}{_eta(state, left, executor.slots)}  {name} {how}")


def _eta(state: _State, left: int, slots: int) -> str:
    if not state.took or not left:
        return ""
    seconds = sum(state.took) / len(state.took) * left / min(slots, left)
    return f", about {max(1, round(seconds / 60))} min left"


def _to_stderr(text: str) -> None:
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)
