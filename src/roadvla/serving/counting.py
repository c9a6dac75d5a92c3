"""How much a message in msgpack would become: counted before any of it is built.

msgpack's own bounds are per list, so lists of lists pass them: 8 MB of empty lists would become
half a gigabyte, and hold up the event loop for seconds.
"""

from __future__ import annotations

MAX_VALUES = 10_000
"""Numbers, texts, lists, maps, keys of all kinds, in a message; a request of 1,000 frames has
1,020."""

_LISTS = {0xDC: 2, 0xDD: 4}
_MAPS = {0xDE: 2, 0xDF: 4}
_BYTES = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
"""Bytes of the length that follows, by the first byte of a value."""
_NUMBERS = {
    0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8,
    0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8,
}  # fmt: skip
"""Bytes that follow: none, booleans, floats, whole numbers."""


def count_values(data: bytes) -> int:
    """Count the values of one message, in time that does not depend on how large it is.

    Args:
        data: In msgpack. What follows the message is not looked at, nor is what the texts hold.

    Raises:
        ValueError: If it is cut off, holds an extension type, or more than ``MAX_VALUES``.
    """
    place, seen, due = 0, 0, 1
    while due:
        seen, due = seen + 1, due - 1
        if place >= len(data):
            raise ValueError("it is cut off")
        first = data[place]
        place += 1
        if first <= 0x7F or first >= 0xE0:  # a small number
            continue
        if first <= 0x8F:
            due += 2 * (first & 0x0F)
        elif first <= 0x9F:
            due += first & 0x0F
        elif first <= 0xBF:
            place += first & 0x1F
        elif first in _NUMBERS:
            place += _NUMBERS[first]
        else:
            size = _BYTES.get(first) or _LISTS.get(first) or _MAPS.get(first)
            if size is None:
                raise ValueError("it holds an extension type")
            length = int.from_bytes(data[place : place + size], "big")
            place += size + (length if first in _BYTES else 0)
            due += 0 if first in _BYTES else length * (2 if first in _MAPS else 1)
        if seen + due > MAX_VALUES:
            raise ValueError(f"it holds more than {MAX_VALUES:,} values")
    return seen
