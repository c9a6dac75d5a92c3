"""Numbers of a run as they come: one JSON line per iteration, and the same for TensorBoard.

Every name is explained in ``docs/metrics.md``.
"""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from roadvla.errors import UserError
from roadvla.evaluation.evaluate import Evaluation
from roadvla.files import MAX_METRICS, parse_json, read_bytes, sync_folder
from roadvla.train.board import Board

FILE = "metrics.jsonl"
_COUNTERS = ("iteration", "env_steps")


class Stopwatch:
    """Adds up wall time by phase, waiting for the device where it works on its own.

    Args:
        device: Where the measured work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begun = self._now()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the block and add its time to ``time/{name}``."""
        begun = self._now()
        yield
        key = f"time/{name}"
        self.seconds[key] = self.seconds.get(key, 0.0) + self._now() - begun

    def total(self) -> float:
        """Seconds since the watch was made."""
        return self._now() - self._begun

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def to_floats(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Read scalars from the device, all at once."""
    if not metrics:
        return {}
    values = torch.stack([value.detach().double().reshape(()) for value in metrics.values()])
    return dict(zip(metrics, values.tolist(), strict=True))


def peak_memory(device: torch.device) -> float:
    """Most memory ever in use, in MB: the GPU's allocator, or this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


class MetricsWriter:
    """Appends rows to ``metrics.jsonl`` and to TensorBoard's event file.

    Args:
        folder: Of the run.
        iteration: Where the run stands. Rows beyond it, from work that was lost, are dropped.
        env_steps: The same in environment steps, TensorBoard's horizontal axis.

    Raises:
        UserError: If the folder cannot be written.
    """

    def __init__(self, folder: Path, *, iteration: int, env_steps: int) -> None:
        self._path = folder / FILE
        rows = [row for row in read_metrics(folder) if row["iteration"] <= iteration]
        if iteration == 0:
            rows = []
        with _explained(self._path):
            self._rewrite(rows)
        board = folder / "tensorboard"
        with _explained(board):
            self._board = Board(board, start=env_steps)
        # The last row once more: a process that was killed may have been about to write it.
        for row in rows[-1:]:
            self._to_board(row)

    def write(self, iteration: int, env_steps: int, metrics: Mapping[str, float]) -> None:
        """Append one row; it is on disk when this returns.

        Raises:
            UserError: If the disk is full.
        """
        row = {"iteration": iteration, "env_steps": env_steps, **metrics}
        with _explained(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(_line(row))
            file.flush()
            os.fsync(file.fileno())
        self._to_board(row)

    def amend(self, metrics: Mapping[str, float]) -> None:
        """Add metrics to the last row, e.g. those of the final evaluation.

        Raises:
            UserError: If the disk is full.
        """
        *rows, last = read_metrics(self._path.parent)
        row = {**last, **metrics}
        with _explained(self._path):
            self._rewrite([*rows, row])
        # They may be there already, from a process that was killed before its work was done.
        with _explained(self._path.parent / "tensorboard"):
            self._board.hide(row["env_steps"])
        self._to_board(row)

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        temporary = self._path.with_suffix(".partial")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(_line(row) for row in rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._path)
        sync_folder(self._path.parent)

    def _to_board(self, row: Mapping[str, Any]) -> None:
        scalars = {name: row[name] for name in row if name not in _COUNTERS}
        with _explained(self._path.parent / "tensorboard"):
            self._board.write(int(row["env_steps"]), scalars)


def evaluation_metrics(results: Iterable[Evaluation]) -> dict[str, float]:
    """Name an evaluation's numbers as they are logged, by split."""
    metrics: dict[str, float] = {}
    for result in results:
        numbers = {
            "success_rate": result.success_rate,
            "success_once": result.success_once_rate,
            "grasp_rate": result.grasp_rate,
            "low": result.success_low,
            "high": result.success_high,
            "episodes": float(result.episodes),
        }
        metrics |= {f"eval/{result.split}/{name}": value for name, value in numbers.items()}
    return metrics


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read a run's rows; a last line that was cut off while it was written is left out.

    Raises:
        UserError: If an earlier line is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return []
    try:
        lines = read_bytes(path, limit=MAX_METRICS).splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line.decode())
            rows.append({"iteration": int(row["iteration"]), **row})
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            if number == len(lines):
                break
            raise UserError(
                f"{path}, line {number} is damaged: remove the line and try again"
            ) from error
    return rows


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space, then go on with --resume"
        ) from error
