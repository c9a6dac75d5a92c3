"""What every function here asks of its tensors: one shape, and enough precision."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """Raise half-precision values to float32 and leave the others as they are; gradient flows."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def require_same_shape(names: str, *tensors: Tensor) -> None:
    """Refuse tensors that would broadcast against each other in silence.

    Raises:
        ValueError: If the shapes are not all equal; ``names`` says which tensors were meant.
    """
    if any(tensor.shape != tensors[0].shape for tensor in tensors):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise ValueError(f"{names} must have one shape, got {shapes}")


def require_token_shape(action_tokens: Tensor, weight: Tensor) -> None:
    """Refuse a per-action weight [...] that does not fit per-token values [..., K].

    Raises:
        ValueError: If the leading shapes differ.
    """
    if action_tokens.shape[:-1] != weight.shape:
        raise ValueError(
            f"per-token values of shape {tuple(action_tokens.shape)} need one value per action, "
            f"shape {tuple(action_tokens.shape[:-1])}, got {tuple(weight.shape)}"
        )
