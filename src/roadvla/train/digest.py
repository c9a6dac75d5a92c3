"""One number for the bits of many tensors, found on the device they are on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

_CHUNK = 1 << 22
_FACTOR, _OTHER = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9


def digest(tensors: Sequence[Tensor]) -> int:
    """Number the bits of tensors, and where they are, below 2⁶³.

    Args:
        tensors: Of one device, in an order that matters.
    """
    on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
    return hashed(tensors) if on_cpu else summed(tensors)


def hashed(tensors: Sequence[Tensor]) -> int:
    """SHA-256, cut: the fastest on a processor."""
    found = hashlib.sha256()
    for tensor in tensors:
        words = _words(tensor)
        found.update(len(words).to_bytes(8, "little"))
        found.update(words.view(torch.uint8).numpy().data)
    return int.from_bytes(found.digest()[:8], "little") >> 1


def summed(tensors: Sequence[Tensor]) -> int:
    """Sum up all words, each times an odd number of its own that depends on where it is.

    This stays on the device. A single word that differs always changes the sum (of 64 bits, which
    wrap around); so do words in another order, but for a chance of about 2⁻⁶⁰. Whole numbers add
    up to the same in any order, so the result depends on nothing but the bits.
    """
    total, start = torch.zeros((), dtype=torch.int64, device=tensors[0].device), 0
    for tensor in tensors:
        for words in _words(tensor).split(_CHUNK):
            part = (words.long() * _weights(start, len(words), words.device)).sum()
            total += part.to(total.device)
            start += len(words)
        start += 1  # where one tensor ends and the next begins counts too
    return int(total)


def _words(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().flatten()
    return flat.view(torch.int32 if flat.element_size() % 4 == 0 else torch.uint8)


def _weights(start: int, count: int, device: torch.device) -> Tensor:
    """Odd numbers that look like noise: a multiplicative hash of the place."""
    place = torch.arange(start + 1, start + count + 1, device=device)
    mixed = place * _FACTOR
    mixed = (mixed ^ (mixed >> 29)) * _OTHER
    return (mixed ^ (mixed >> 32)) | 1
