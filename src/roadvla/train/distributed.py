"""A run on several processes: how they are started, find each other, and end together.

``torchrun`` starts them and sets ``RANK``, ``WORLD_SIZE`` and their address; ``launch`` is torchrun
on this machine, with one line instead of a traceback when a process fails.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
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
_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
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


def is_launched() -> bool:
    """Whether torchrun, or ``launch``, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def was_restarted() -> bool:
    """Whether torchrun has started the processes of this run again after one failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def speaks() -> bool:
    """Whether this process is the one that prints results."""
    return os.environ.get("RANK", "0") == "0"


def launch(processes: int, arguments: Sequence[str], *, max_restarts: int = 0) -> int:
    """Run ``roadvla`` in several processes of this machine and wait for them.

    Signals are passed on to them. What all but the first print is kept, and shown if one fails.

    Args:
        processes: How many, at least 1.
        arguments: Of each, after ``roadvla``.
        max_restarts: How often all are started again after one failed.

    Returns:
        Exit code of the first that failed; 0 if none did.

    Raises:
        UserError: If a number is out of range.
    """
    if processes < 1 or max_restarts < 0:
        raise UserError(
            f"nproc is {processes} and max_restarts {max_restarts}: expected at least 1 and 0"
        )
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # we say it ourselves
    # More threads than cores wait for each other actively, which is slower than any of them alone.
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    with tempfile.TemporaryDirectory(prefix="roadvla-ranks-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            max_restarts=max_restarts,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            run_id="roadvla",
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
            rank, failure = error.get_first_failure()
            if rank != 0:
                print(_last_words(Path(folder), rank), file=sys.stderr)
            return failure.exitcode if failure.exitcode > 0 else 1
        except SignalException as error:
            return PREEMPTED if error.sigval in QUEUE_SIGNALS else 128 + int(error.sigval)
    return 0


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
