"""A transition that was never seen, for a process that holds none but has to make passes."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from roadvla.policy.base import Policy
from roadvla.types import Batch, Observation

_INSTRUCTION = "do nothing"


def blank(batch: Batch, policy: Policy) -> Batch:
    """Make one valid transition that is shaped as those of an empty batch.

    Where processes hold a policy together, all of them must make as many passes, also one whose
    episodes were all lost. What comes of this transition counts for nothing.

    Args:
        batch: No transitions.
        policy: Tells what a prompt looks like; one of zeros would be all padding to some.
    """
    device = batch.action_tokens.device
    prompt = policy.tokenize([_INSTRUCTION]).to(device)
    seen = batch.observation
    values: dict[str, Any] = {f.name: _zeros(getattr(batch, f.name)) for f in fields(batch)}
    values["observation"] = Observation(
        image=seen.image.new_zeros(1, *seen.image.shape[1:]),
        prompt=prompt,
        vision=_zeros(seen.vision),
    )
    if batch.hinted_prompt is not None:
        values["hinted_prompt"] = prompt
    return Batch(**values)


def _zeros(value: object) -> Tensor | None:
    return value.new_zeros(1, *value.shape[1:]) if isinstance(value, torch.Tensor) else None
