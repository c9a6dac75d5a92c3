"""Scenes in processes of their own: PhysX on a processor simulates one scene at a time.

Frames, flags, states and actions lie in shared memory; pipes carry orders and complaints only. A
worker that dies or hangs loses its episodes, and another takes its place at the next reset; one
that fails by an exception ends the others, and the error says what it said last.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
import traceback
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor

from roadvla.envs.maniskill.outputs import Outputs, Recipe
from roadvla.errors import UserError, WorkerError

TIMEOUT = 300.0
"""Seconds that a worker may take for one order, and some more for each of its scenes."""
_SECONDS_PER_SCENE = 2.0
_LAST_WORDS = 4000
_GRACE = 5.0
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that a terminal or a queue sends to a whole group: a worker ends when its pipe does."""
_LOSSES = 3
"""Times in a row that the workers of the same scenes may be lost."""


@dataclass(eq=False)
class _Worker:
    process: BaseProcess
    pipe: Connection
    log: Path
    start: int
    stop: int
    losses: int = 0
    lost: str = ""


class Workers:
    """B scenes of one episode each, spread over processes.

    Args:
        recipe: What each scene is made from.
        count: B.
        processes: How many; never more than B.
        timeout: Seconds that an order may take.

    Attributes:
        outputs: What the episodes show; of a lost one, what they showed last.
        lost: Which of the running episodes are lost.

    Raises:
        UserError: If the scenes cannot be made: an asset is missing, say.
        WorkerError: If a worker does not come up.
    """

    def __init__(
        self, recipe: Recipe, count: int, *, processes: int, timeout: float = TIMEOUT
    ) -> None:
        cpu = torch.device("cpu")
        self.outputs = Outputs.empty(count, recipe.settings.size, cpu).share()
        self.lost = torch.zeros(count, dtype=torch.bool)
        self._recipe = recipe
        self._actions = torch.zeros(count, 7).share_memory_()
        self._timeout = timeout + _SECONDS_PER_SCENE * -(-count // min(processes, count))
        self._folder = tempfile.TemporaryDirectory(prefix="roadvla-workers-")
        processes = min(processes, count)
        edges = [count * index // processes for index in range(processes + 1)]
        self._workers = [self._start(*rows) for rows in pairwise(edges)]
        self._finalizer = weakref.finalize(self, _stop, self._workers, self._folder)
        # At the end of the program multiprocessing would send SIGTERM and wait: it goes first.
        Finalize(self, self._finalizer, exitpriority=1)
        try:
            self._wait(self._workers, replaceable=False)
        except BaseException:
            self.close()
            raise

    def _start(self, start: int, stop: int) -> _Worker:
        recipe = self._recipe
        context = torch.multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        log = Path(self._folder.name) / f"{start}.log"
        process = context.Process(
            target=_work,
            args=(theirs, recipe, self.outputs.rows(start, stop), self._actions[start:stop], log),
            name=f"roadvla-scenes-{start}-{stop - 1}",
            daemon=True,
        )
        with _undisturbed():
            process.start()
        theirs.close()
        return _Worker(process, ours, log, start, stop)

    def reset(self, episode_ids: Int[Tensor, " B"]) -> None:
        """Start the episodes with these RL4VLA ids, with new workers for those that were lost.

        Raises:
            UserError: If a worker finds an asset missing.
            WorkerError: If a worker fails, none is left, or the same scenes are lost again and
                again.
        """
        self._replace()
        ids = episode_ids.tolist()
        self._order("reset", {worker: ids[worker.start : worker.stop] for worker in self._workers})

    def step(self, action: Float[Tensor, "B 7"]) -> None:
        """Apply one action of the controller's in every scene.

        Raises:
            WorkerError: If a worker fails or none is left.
        """
        self._actions.copy_(action)
        self._order("step", dict.fromkeys(self._workers))

    def close(self) -> None:
        """End the processes; doing it twice is harmless."""
        self._finalizer()

    def _replace(self) -> None:
        """Start workers in place of those that were lost."""
        self.lost.zero_()
        new: list[_Worker] = []
        for index, worker in enumerate(self._workers):
            if not worker.lost:
                worker.losses = 0
            elif worker.losses >= _LOSSES:
                self._fail(worker, f"was the {worker.losses}rd in a row: it {worker.lost}")
            else:
                self._workers[index] = self._start(worker.start, worker.stop)
                self._workers[index].losses = worker.losses
                new.append(self._workers[index])
        if new:
            self._wait(new, replaceable=False)

    def _order(self, order: str, arguments: Mapping[_Worker, Any]) -> None:
        if not self._finalizer.alive:
            raise WorkerError("the workers have been ended: make the environment again")
        try:
            asked = [worker for worker in arguments if not worker.lost]
            for worker in asked:
                try:
                    worker.pipe.send((order, arguments[worker]))
                except OSError:
                    self._lose(worker, "died")
            self._wait([worker for worker in asked if not worker.lost])
            if all(worker.lost for worker in self._workers):
                self._fail(self._workers[0], f"{self._workers[0].lost}, as did all others")
        except BaseException:
            self.close()  # or an answer would be taken for that to the next order
            raise

    def _wait(self, asked: Sequence[_Worker], *, replaceable: bool = True) -> None:
        """Collect one answer of each worker that was asked."""
        waiting = {worker.pipe: worker for worker in asked}
        give_up = self._lose if replaceable else self._fail
        deadline = time.monotonic() + self._timeout
        while waiting:
            ready = connection.wait(list(waiting), timeout=deadline - time.monotonic())
            if not ready:
                for slow in waiting.values():
                    give_up(slow, f"gave no answer for {self._timeout:g} s")
                return
            for pipe in ready:
                worker = waiting.pop(pipe)  # type: ignore[arg-type]
                try:
                    answer, words = worker.pipe.recv()
                except (EOFError, OSError):
                    give_up(worker, "died")
                    continue
                if answer == "refused":
                    self.close()
                    raise UserError(words)
                if answer == "failed":
                    self._fail(worker, "failed", words)

    def _lose(self, worker: _Worker, what: str) -> None:
        """Give up a worker's episodes and say so."""
        worker.process.kill()
        worker.process.join(timeout=_GRACE)
        worker.pipe.close()
        worker.lost, worker.losses = what, worker.losses + 1
        self.lost[worker.start : worker.stop] = True
        print(
            f"roadvla: warning: worker {worker.process.name} {what}: its "
            f"{worker.stop - worker.start} episodes are left out",
            file=sys.stderr,
        )

    def _fail(self, worker: _Worker, what: str, words: str = "") -> NoReturn:
        worker.process.join(timeout=_GRACE if what == "died" else 0)
        code = worker.process.exitcode
        words = words or _last_words(worker.log)
        name = worker.process.name
        self.close()
        ended = "" if code is None else f" (exit code {code})"
        raise WorkerError(f"worker {name} {what}{ended}; it said last:\n{words}")


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold back signals from a new process until it ignores them: what is held back is inherited.

    This process gets at the end what came meanwhile.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
    try:
        # The first start of all also starts a helper, and lets signals through again after that.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore_signals() -> None:
    """Leave to the parent what becomes of the run: signals may reach the whole group."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED)


def _stop(workers: list[_Worker], folder: tempfile.TemporaryDirectory[str]) -> None:
    for worker in workers:
        worker.pipe.close()  # which tells it to leave
    deadline = time.monotonic() + _GRACE
    for worker in workers:
        worker.process.join(timeout=max(0.0, deadline - time.monotonic()))
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join(timeout=_GRACE)
    folder.cleanup()


def _last_words(log: Path) -> str:
    try:
        return log.read_text(encoding="utf-8", errors="replace")[-_LAST_WORDS:].strip()
    except OSError:
        return ""


def _work(pipe: Connection, recipe: Recipe, outputs: Outputs, actions: Tensor, log: Path) -> None:
    """Run the scenes of one process until the pipe closes."""
    _ignore_signals()
    _write_into(log)
    torch.set_num_threads(1)
    from roadvla.envs.maniskill.simulation import Simulation

    scenes: list[Simulation] = []

    def make(_: None) -> None:
        scenes.extend(Simulation(recipe, outputs.rows(row, row + 1)) for row in range(len(actions)))

    def reset(ids: list[int]) -> None:
        for scene, episode_id in zip(scenes, ids, strict=True):
            scene.reset(torch.tensor([episode_id], dtype=torch.int64))

    def step(_: None) -> None:
        for scene, action in zip(scenes, actions, strict=True):
            scene.step(action[None].clone())

    orders = {"make": make, "reset": reset, "step": step}
    order, argument = "make", None
    while True:
        answer: tuple[Literal["done", "refused", "failed"], str] = ("done", "")
        try:
            orders[order](argument)
        except UserError as error:
            answer = ("refused", str(error))
        except Exception:
            answer = ("failed", traceback.format_exc())
        try:
            pipe.send(answer)
            order, argument = pipe.recv()
        except (EOFError, OSError):
            return  # the parent is gone or has ended this


def _write_into(log: Path) -> None:
    """Keep what drivers and libraries print off the terminal, and for the last words."""
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
