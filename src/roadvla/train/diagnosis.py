"""What is kept of a run that had to stop, for whoever looks for the cause."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from roadvla.files import write_whole
from roadvla.types import Batch

FOLDER = "diagnosis"


def write_diagnosis(
    run: Path,
    *,
    iteration: int,
    reason: str,
    metrics: Mapping[str, float],
    parameters: Mapping[str, nn.Parameter],
    batch: Batch | None,
    about: Mapping[str, Any],
) -> Path:
    """Describe every tensor of a failed iteration: range, mean, and how much of it is not finite.

    Nothing else is stored, so the bundle is small and can be sent to others.

    Args:
        run: Run folder.
        iteration: Number of the iteration that failed, from 1.
        reason: Why the run stopped.
        metrics: Of the iteration.
        parameters: The policy's by name, with the last gradients.
        batch: What was learned from.
        about: Machine, versions, settings.

    Returns:
        The file; where it cannot be written, the place where it should have been.
    """
    path = run / FOLDER / f"iteration_{iteration:06d}.json"
    columns = {} if batch is None else _columns(batch)
    data = {
        "reason": reason,
        "iteration": iteration,
        "metrics": {name: repr(value) for name, value in metrics.items()},
        "parameters": {name: _describe(value.detach()) for name, value in parameters.items()},
        "gradients": {
            name: _describe(value.grad)
            for name, value in parameters.items()
            if value.grad is not None
        },
        "batch": {name: _describe(value) for name, value in columns.items()},
        "about": dict(about),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, (json.dumps(data, indent=1, default=str) + "\n").encode())
    except OSError:
        pass  # what stopped the run matters more, and is told
    return path


def _columns(batch: Batch) -> dict[str, Tensor]:
    values = {item.name: getattr(batch, item.name) for item in fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _describe(tensor: Tensor) -> dict[str, Any]:
    values = tensor.detach().double()
    finite = values[torch.isfinite(values)]
    described: dict[str, Any] = {
        "shape": list(tensor.shape),
        "nan": int(torch.isnan(values).sum()),
        "infinite": int(torch.isinf(values).sum()),
    }
    if len(finite):
        described |= {
            "least": float(finite.min()),
            "most": float(finite.max()),
            "mean": float(finite.mean()),
        }
    return described
