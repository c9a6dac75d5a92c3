"""The means of an update's metrics, over minibatches and over processes."""

from __future__ import annotations

import torch
from torch import Tensor

from roadvla.world import World

_NAMES = (
    *("loss/policy", "loss/self_distillation", "loss/agd", "loss/value", "loss/total"),
    *("loss/grad_norm", "policy/accuracy", "policy/clip_fraction", "policy/entropy"),
)
"""All there can be. Processes exchange every one of them: which of them a process has seen depends
on what it holds, and messages of different sizes abort the run."""


class Means:
    """Weighted means of what is finite; everything stays on the device.

    Args:
        device: Of the values.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor, weight: int) -> None:
        """Note one minibatch's value.

        Args:
            name: One of those that every process knows.
            value: Left out if it is not finite.
            weight: How many transitions it is the mean of.

        Raises:
            KeyError: If other processes would not know the name.
        """
        if name not in _NAMES:
            raise KeyError(f"{name} is not among the metrics that processes exchange")
        finite = torch.isfinite(value)
        kept = torch.where(finite, value, 0.0) * weight
        self._sums[name] = self._sums.get(name, 0.0) + kept
        self._weights[name] = self._weights.get(name, 0.0) + finite.to(value.dtype) * weight

    def count(self, name: str, value: Tensor) -> None:
        """Add up what every process counts alike."""
        self._counts[name] = self._counts.get(name, 0.0) + value

    def means(self, world: World) -> dict[str, Tensor]:
        """Over the minibatches of all processes; NaN where nothing was finite.

        Raises:
            LostContactError: If another process does not take part.
        """
        sums, weights = self._sums, self._weights
        if world.size > 1:
            found = world.total(self._table())
            seen = [n for n, count in zip(_NAMES, found[:, 2].tolist(), strict=True) if count]
            rows = {name: found[_NAMES.index(name)] for name in seen}
            sums = {name: row[0] for name, row in rows.items()}
            weights = {name: row[1] for name, row in rows.items()}
        return {name: sums[name] / weights[name] for name in sums} | self._counts

    def _table(self) -> Tensor:
        """Sum, weight and whether it was seen, of every name there can be."""
        table = torch.zeros(len(_NAMES), 3, dtype=torch.float64, device=self._device)
        for row, name in zip(table, _NAMES, strict=True):
            if name in self._sums:
                row[0], row[1], row[2] = self._sums[name], self._weights[name], 1
        return table
