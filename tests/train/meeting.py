"""Processes of one test that talk to each other."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from roadvla.world import World

_PATIENCE = timedelta(seconds=60)


def meet(meeting: Path, rank: int, size: int = 2) -> World:
    """Join the others, who name the same file; ``destroy_process_group`` leaves."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=_PATIENCE
    )
    return World.current()
