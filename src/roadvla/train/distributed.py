"""A run on several processes: how they are started, find each other, and end together.

``torchrun`` starts them and sets ``RANK``, ``WORLD_SIZE`` and their address; ``launch`` is torchrun
on this machine, with one line instead of a traceback when a process fails.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed
from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous

from roadvla.errors import LostContactError, UserError
from roadvla.train.interrupt import PREEMPTED, QUEUE_SIGNALS
from roadvla.world import World

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = timedelta(minutes=30)
"""Longest wait for another process: longer than an iteration, an evaluation or a save takes."""
_SHUTDOWN_SECONDS = 600
_OURS = (signal.SIGINT, *QUEUE_SIGNALS)
_SIGNALS = "SIGHUP,SIGQUIT,SIGUSR2"
"""Those that torchrun itself passes on; it would take the second as a reason to leave at once."""
_FINAL = (PREEMPTED, 128 + signal.SIGINT, 2)
"""Codes of a process that was told to stop, or was told nonsense: starting again mends neither."""
_LAST_LINES = 5


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Join the run's other processes, if torchrun started any, for the time of the block.

    On GPUs each process takes the one of its ``LOCAL_RANK``, which ``cuda`` then means.

    Args:
        device: Of the run.

    Raises:
        UserError: If the variables contradict each other, or there are more processes on this
            machine than GPUs.
        LostContactError: If the others cannot be reached.
    """
    if World.current().size > 1 or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World.current()
        return
    if missing := [name for name in _VARIABLES if not os.environ.get(name)]:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but {missing[0]} is not set: start with "
            f"torchrun, or with --nproc"
        )
    if torch.device(device).type == "cuda":
        _take_gpu(device)
    try:
        store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # On one machine torchrun keeps the store when it starts the processes again, and in it
            # the addresses of those that are gone.
            count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = PrefixStore(f"attempt-{count}", store)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=PATIENCE
        )
    except (RuntimeError, ValueError) as error:
        raise LostContactError(
            f"process {os.environ['RANK']} does not reach the others at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({error})"
        ) from error
    try:
        yield World.current()
    finally:
        distributed.destroy_process_group()


def launch(processes: int, arguments: Sequence[str], *, max_restarts: int = 0) -> int:
    """Run ``roadvla`` in several processes of this machine and wait for them.

    Signals are passed on to them. What all but the first print is kept, and shown if one fails.

    Args:
        processes: How many, at least 1.
        arguments: Of each, after ``roadvla``.
        max_restarts: How often all are started again after one failed; not after one that was
            stopped by a signal that it heeds (75, 130) or had bad input (2).

    Returns:
        Exit code of the first that failed; 0 if none did in the last attempt.

    Raises:
        UserError: If a number is out of range.
    """
    if processes < 1 or max_restarts < 0:
        raise UserError(
            f"nproc is {processes} and max_restarts {max_restarts}: expected at least 1 and 0"
        )
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # we say it ourselves
    # More threads than cores wait for each other actively, which is slower than any of them alone.
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    name, rank, code, words = f"roadvla-{uuid.uuid4()}", 0, 0, ""
    from torch.distributed.elastic.multiprocessing import SignalException

    with _heard_once():
        try:
            for left in range(max_restarts, -1, -1):
                rank, code, words = _attempt(processes, arguments, name)
                if code in (0, *_FINAL) or not left:
                    break
                print(
                    f"roadvla: process {rank} ended with {code}: starting all {processes} again",
                    file=sys.stderr,
                    flush=True,
                )
        except SignalException as error:
            number = error.sigval
            return PREEMPTED if number in QUEUE_SIGNALS else 128 + int(number)
    if words:
        print(words, file=sys.stderr)
    return code if code >= 0 else 1


def _attempt(processes: int, arguments: Sequence[str], name: str) -> tuple[int, int, str]:
    """Run all processes once.

    Torchrun itself would start all again whatever one ended with, so it is not asked to.

    Returns:
        The process that failed first, or one that should not be started again; its exit code,
        negative for a signal, and its last words if they have not been seen; 0, 0 and none if all
        went well.

    Raises:
        SignalException: If this process got a signal; the others have it and have left.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="roadvla-ranks-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            max_restarts=0,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            run_id=name,
            logs_specs=DefaultLogsSpecs(
                log_dir=folder,
                redirects=dict.fromkeys(range(1, processes), Std.ALL),
            ),
            signals_to_handle=_SIGNALS,
            shutdown_timeout=_SHUTDOWN_SECONDS,
        )
        try:
            elastic_launch(config, sys.executable)("-m", "roadvla", *arguments)
        except ChildFailedError as error:
            first, _ = error.get_first_failure()
            codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            rank = next((rank for rank, code in codes.items() if code in _FINAL), first)
            return rank, codes[rank], "" if rank == 0 else _last_words(Path(folder), rank)
    return 0, 0, ""


@contextmanager
def _heard_once() -> Iterator[None]:
    """Pass a queue's first signal on, and ignore what follows until the processes have left."""
    from torch.distributed.elastic.multiprocessing import SignalException

    def pass_on(number: int, _: object) -> None:
        for other in QUEUE_SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        name = signal.Signals(number)
        raise SignalException(f"the launcher got {name.name}", sigval=name)

    former = {number: signal.signal(number, pass_on) for number in _OURS}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _take_gpu(device: str) -> None:
    rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if torch.device(device).index is not None:
        raise UserError(f"device {device!r} names one GPU for all processes: pass --device cuda")
    if rank >= count:
        raise UserError(
            f"process {rank} of this machine has no GPU, there are {count}: start no more "
            f"processes than GPUs"
        )
    torch.cuda.set_device(rank)


def _last_words(folder: Path, rank: int) -> str:
    logs = sorted(folder.rglob(f"{rank}/stderr.log"), key=lambda path: path.stat().st_mtime)
    if not logs:
        return f"roadvla: process {rank} failed and left no word"
    lines = logs[-1].read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"process {rank}: {line}" for line in lines[-_LAST_LINES:])
