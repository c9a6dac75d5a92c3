"""Where the cells of a grid run: processes of this machine, or a Ray cluster.

An executor starts cells and says which ended, and how. It never decides what to start.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from roadvla.errors import UserError

Work = Callable[[], None]
"""What a cell does: picklable, and silent but for what it writes to its log."""


class DiedError(Exception):
    """A cell's process ended without saying why."""


@runtime_checkable
class Executor(Protocol):
    """Runs up to ``slots`` cells at a time."""

    slots: int

    def start(self, name: str, work: Work, log: Path) -> None:
        """Begin a cell; its output goes to the log."""
        ...

    def wait(self) -> tuple[str, Exception | None]:
        """Block until a cell ends; return its name and what went wrong.

        ``UserError`` is the cell's own complaint; ``DiedError`` that it was killed.
        """
        ...

    def stop(self) -> None:
        """Ask the running cells to save and end."""
        ...

    def close(self) -> None:
        """End what still runs."""
        ...


class LocalProcesses:
    """One process per cell on this machine, so that one that dies takes nothing with it.

    Args:
        slots: Cells at a time.
        threads: Torch's threads in each.
    """

    def __init__(self, slots: int, *, threads: int = 1) -> None:
        self.slots, self._threads = slots, threads
        self._context = multiprocessing.get_context("forkserver")
        # The modules are imported once, by the server that the processes are forked from.
        self._context.set_forkserver_preload(["roadvla.experiments.cell"])
        self._running: dict[str, tuple[BaseProcess, Connection]] = {}

    def start(self, name: str, work: Work, log: Path) -> None:
        """Begin a cell in a process of its own."""
        receiver, sender = self._context.Pipe(duplex=False)
        # No daemon, for those may have no children, and ManiSkill's scenes are spread over some.
        # It follows its parent all the same (``_follow_parent``).
        process = self._context.Process(
            target=_run, args=(work, log, sender, self._threads), name=name, daemon=False
        )
        process.start()
        sender.close()
        self._running[name] = process, receiver

    def wait(self) -> tuple[str, Exception | None]:
        """Block until one ends."""
        sentinels = {process.sentinel: name for name, (process, _) in self._running.items()}
        name = sentinels[wait(list(sentinels))[0]]  # type: ignore[index]
        process, receiver = self._running.pop(name)
        process.join()
        said: str | None = None
        with contextlib.suppress(EOFError, OSError):
            if receiver.poll():
                said = receiver.recv()
        receiver.close()
        if said is None:
            code = process.exitcode
            how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            return name, DiedError(f"its process died ({how}), perhaps for want of memory")
        return name, UserError(said) if said else None

    def stop(self) -> None:
        """Send each what Ctrl-C would, once."""
        for process, _ in self._running.values():
            if process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGINT)

    def close(self) -> None:
        """Kill what still runs; its work up to the last checkpoint is kept."""
        for process, receiver in self._running.values():
            process.kill()
            process.join()
            receiver.close()
        self._running.clear()


def _run(work: Work, log: Path, sender: Connection, threads: int) -> None:
    """In the cell's process: work, with everything printed in the log; send what went wrong."""
    # Ctrl-C in a terminal goes to a whole group; the parent passes it on, so that it comes once.
    os.setpgid(0, 0)
    # A job that a shell put into the background is born deaf to it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_follow_parent, daemon=True).start()
    torch.set_num_threads(threads)
    sender.send(said(work, log))
    sender.close()


def _follow_parent() -> None:
    """End with the process that asked for the work, however it ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def said(work: Work, log: Path) -> str:
    """Do the work with its output in a log, and return what went wrong: ``""`` if nothing."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("a", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        try:
            work()
        except (UserError, OSError) as error:
            print(f"roadvla: error: {error}", flush=True)
            return f"{error} (see {log})"
        except KeyboardInterrupt as interrupt:
            return str(interrupt) or "stopped"
        except Exception as error:  # a defect: the grid goes on, the log tells where it is
            traceback.print_exc(file=file)
            return f"{type(error).__name__}: {error} (see {log})"
    return ""


class RayCluster:
    """Tasks of a Ray cluster; all its machines see the grid's folder under the same path.

    Args:
        slots: Tasks at a time; ``None`` for as many as the cluster has processors.
        gpus: GPUs that each takes.

    Raises:
        UserError: If Ray is not installed, or no cluster answers.
    """

    def __init__(self, slots: int | None = None, *, gpus: float = 0.0) -> None:
        try:
            import ray
        except ImportError as error:
            raise UserError(
                "executor 'ray' needs a package that is missing: pip install 'roadvla[ray]'"
            ) from error
        self._ray: Any = ray
        if not ray.is_initialized():
            # Joins the cluster that RAY_ADDRESS names, or starts one of this machine's cores.
            ray.init(log_to_driver=False, include_dashboard=False)
        self.slots = slots or max(1, int(ray.cluster_resources().get("CPU", 1)))
        # The grid decides about second tries, as it does locally.
        self._remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(_ray_task)
        self._running: dict[Any, str] = {}

    def start(self, name: str, work: Work, log: Path) -> None:
        """Begin a cell as a task."""
        self._running[self._remote.remote(work, log)] = name

    def wait(self) -> tuple[str, Exception | None]:
        """Block until one ends."""
        (ended, *_), _ = self._ray.wait(list(self._running), num_returns=1)
        name = self._running.pop(ended)
        try:
            text = self._ray.get(ended)
        except self._ray.exceptions.RayError as error:
            return name, DiedError(f"its task was lost ({type(error).__name__})")
        return name, UserError(text) if text else None

    def stop(self) -> None:
        """Interrupt each."""
        for task in self._running:
            self._ray.cancel(task)

    def close(self) -> None:
        """End what still runs, and leave the cluster."""
        for task in self._running:
            self._ray.cancel(task, force=True)
        self._running.clear()
        self._ray.shutdown()


def _ray_task(work: Work, log: Path) -> str:
    torch.set_num_threads(1)
    return said(work, log)
