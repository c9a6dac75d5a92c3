"""Our scenes against a folder of recorded episodes, quantity by quantity.

The folder holds ``episodes.json`` and ``arrays.npz``: resets, fixed actions, scripted grasps and
overlay cases of RL4VLA's own environments. A README in such a folder says what each entry means.
"""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from roadvla.errors import UserError
from roadvla.files import read_json

_DAMAGE = (
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    RecursionError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What reading damaged JSON and npz may end in."""


@dataclass
class Quantity:
    """One row of the comparison.

    Attributes:
        name: What is compared.
        tolerance: Most it may deviate, in ``unit``.
        unit: Of the deviation.
        compared: How many values were.
        worst: Largest deviation seen.
        where: Which episode that was.
        failed: How many values deviate by more than the tolerance.
    """

    name: str
    tolerance: float
    unit: str
    compared: int = 0
    worst: float = 0.0
    where: str = ""
    failed: int = 0

    def add(self, deviation: np.ndarray | float, where: str) -> None:
        """Take deviations in; NaN counts as infinite."""
        values = np.nan_to_num(
            np.abs(np.asarray(deviation, dtype=np.float64)), nan=np.inf, posinf=np.inf
        )
        if values.size == 0:
            return
        self.compared += values.size
        self.failed += int((values > self.tolerance).sum())
        if float(values.max()) > self.worst or not self.where:
            self.worst, self.where = float(values.max()), where


@dataclass
class Comparison:
    """All rows, by name."""

    rows: dict[str, Quantity] = field(default_factory=dict)

    def row(self, name: str, tolerance: float = 0.0, unit: str = "differences") -> Quantity:
        """Return a row, made if need be."""
        return self.rows.setdefault(name, Quantity(name, tolerance, unit))

    def same(self, name: str, found: object, expected: object, where: str) -> None:
        """Compare two values that must be equal."""
        self.row(name).add(float(found != expected), where)

    def merge(self, other: Comparison) -> None:
        """Take another comparison's rows in."""
        for name, row in other.rows.items():
            own = self.row(name, row.tolerance, row.unit)
            own.compared += row.compared
            own.failed += row.failed
            if row.worst > own.worst or not own.where:
                own.worst, own.where = row.worst, row.where

    @property
    def passed(self) -> bool:
        """Whether nothing deviates too far and there was something to compare."""
        compared = any(row.compared for row in self.rows.values())
        return compared and not any(row.failed for row in self.rows.values())


@dataclass(frozen=True)
class Recording:
    """A folder of recorded episodes.

    Attributes:
        facts: ``episodes.json``.
        arrays: ``arrays.npz``.
    """

    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]


def read_recording(folder: Path) -> Recording:
    """Read a folder of recorded episodes; nothing is unpickled.

    Raises:
        UserError: If it is missing, damaged, or of another layout.
    """
    folder = Path(folder)
    try:
        facts = read_json(folder / "episodes.json")
        with np.load(folder / "arrays.npz", allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        if not isinstance(facts, dict):
            raise ValueError("episodes.json is no object")
        if missing := {"episodes", "actions", "image_steps"} - set(facts):
            raise ValueError(f"no {sorted(missing)}")
    except OSError as error:
        raise UserError(
            f"cannot read {folder} ({error.strerror or error}): a folder with episodes.json and "
            f"arrays.npz is needed"
        ) from error
    except _DAMAGE as error:
        raise UserError(f"{folder} holds no recorded episodes in this layout ({error})") from error
    return Recording(facts, arrays)
