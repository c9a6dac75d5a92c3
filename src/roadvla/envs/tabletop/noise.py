"""Counter-based random numbers: a value depends on its key alone, on every device, in any batch."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def _signed(value: int) -> int:
    """Reinterpret an unsigned 64-bit constant as the int64 with the same bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64; torch's own is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer: a bijection of 64-bit words; int64 products wrap as it needs."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def uniform(key: Int[Tensor, " B"], stream: int, count: int) -> Float[Tensor, "B count"]:
    """Draw ``count`` numbers in [0, 1) per key, multiples of 2⁻²⁴ and hence exact in float32.

    Args:
        key: What the numbers belong to, e.g. an episode id (int64).
        stream: Which purpose they serve; different streams are independent.
        count: How many per key.
    """
    counter = torch.arange(1, count + 1, device=key.device, dtype=torch.int64)
    word = _mix(_mix(key.long() + (stream + 1) * 0x632BE5AB)[:, None] + counter * _GOLDEN)
    return _shift_right(word, 40).float() * 2.0**-24


def choice(key: Int[Tensor, " B"], stream: int, count: int, options: int) -> Int[Tensor, "B count"]:
    """Draw ``count`` integers in [0, options) per key."""
    return (uniform(key, stream, count) * options).long().clamp_(max=options - 1)
