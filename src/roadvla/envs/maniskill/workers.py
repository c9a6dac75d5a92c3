"""Scenes in processes of their own: PhysX on a processor simulates one scene at a time.

Frames, flags, states and actions lie in shared memory; pipes carry orders and complaints only. A
worker that fails, dies or hangs ends the others, and the error says what it said last.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
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


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    pipe: Connection
    log: Path


class Workers:
    """B scenes of one episode each, spread over processes.

    Args:
        recipe: What each scene is made from.
        count: B.
        processes: How many; never more than B.
        timeout: Seconds that an order may take.

    Raises:
        UserError: If the scenes cannot be made: an asset is missing, say.
        WorkerError: If a worker does not come up.
    """

    def __init__(
        self, recipe: Recipe, count: int, *, processes: int, timeout: float = TIMEOUT
    ) -> None:
        cpu = torch.device("cpu")
        self.outputs = Outputs.empty(count, recipe.settings.size, cpu).share()
        self._actions = torch.zeros(count, 7).share_memory_()
        self._timeout = timeout + _SECONDS_PER_SCENE * -(-count // min(processes, count))
        self._folder = tempfile.TemporaryDirectory(prefix="roadvla-workers-")
        processes = min(processes, count)
        edges = [count * index // processes for index in range(processes + 1)]
        self._rows = list(pairwise(edges))
        self._workers = [self._start(recipe, *rows) for rows in self._rows]
        self._finalizer = weakref.finalize(self, _stop, list(self._workers), self._folder)
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _start(self, recipe: Recipe, start: int, stop: int) -> _Worker:
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
        return _Worker(process, ours, log)

    def reset(self, episode_ids: Int[Tensor, " B"]) -> None:
        """Start the episodes with these RL4VLA ids.

        Raises:
            UserError: If a worker finds an asset missing.
            WorkerError: If a worker fails, dies or hangs.
        """
        ids = episode_ids.tolist()
        self._order("reset", [ids[start:stop] for start, stop in self._rows])

    def step(self, action: Float[Tensor, "B 7"]) -> None:
        """Apply one action of the controller's in every scene.

        Raises:
            WorkerError: If a worker fails, dies or hangs.
        """
        self._actions.copy_(action)
        self._order("step", [None] * len(self._rows))

    def close(self) -> None:
        """End the processes; doing it twice is harmless."""
        self._finalizer()

    def _order(self, order: str, arguments: Sequence[Any]) -> None:
        if not self._finalizer.alive:
            raise WorkerError("the workers have been ended: make the environment again")
        try:
            for worker, argument in zip(self._workers, arguments, strict=True):
                try:
                    worker.pipe.send((order, argument))
                except OSError:
                    self._fail(worker, "died")
            self._wait()
        except BaseException:
            self.close()  # or an answer would be taken for that to the next order
            raise

    def _wait(self) -> None:
        """Collect one answer of each worker."""
        waiting = {worker.pipe: worker for worker in self._workers}
        deadline = time.monotonic() + self._timeout
        while waiting:
            ready = connection.wait(list(waiting), timeout=deadline - time.monotonic())
            if not ready:
                slow = next(iter(waiting.values()))
                self._fail(slow, f"gave no answer for {self._timeout:g} s")
            for pipe in ready:
                worker = waiting.pop(pipe)  # type: ignore[arg-type]
                try:
                    answer, words = worker.pipe.recv()
                except (EOFError, OSError):
                    self._fail(worker, "died")
                if answer == "refused":
                    self.close()
                    raise UserError(words)
                if answer == "failed":
                    self._fail(worker, "failed", words)

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
    """Let a new process ignore Ctrl-C from its first moment: it inherits what is ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _stop(workers: list[_Worker], folder: tempfile.TemporaryDirectory[str]) -> None:
    for worker in workers:
        worker.pipe.close()
        worker.process.terminate()
    for worker in workers:
        worker.process.join(timeout=_GRACE)
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
    # Ctrl-C reaches the whole group: what becomes of the run is for the parent to decide.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
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
