"""Damage done to files, by chance and on purpose, and what a reader makes of it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import TypeCheckError

from roadvla.errors import UserError

ODD: list[Any] = [
    *(None, True, -1, 0, 10**30, 1e308, float("nan"), float("-inf"), 0.5),
    *("", "x" * 5000, "../../etc/passwd", "/etc/passwd", [], [[]], {}, {"a": {}}, [None] * 50),
]


@dataclass(frozen=True)
class Reader:
    """A file, and who reads it."""

    path: str
    read: Callable[[Path], object]


def damage(data: bytes, rng: random.Random) -> bytes:
    """Change a file in one of the ways in which files go wrong, or are made to."""
    kind = rng.choice(["flip", "cut", "grow", "noise", "json", "json", "header", "deep"])
    if kind == "json" and data[:1] in b"{[":
        return _odd_json(data, rng)
    if kind == "header" and data[8:9] == b"{":
        return _odd_header(data, rng)
    if kind == "deep":
        return b"[" * 100_000
    if kind == "cut":
        return data[: rng.randrange(len(data))]
    if kind == "grow":
        return data + rng.randbytes(rng.randrange(1, 100))
    if kind == "noise":
        return rng.randbytes(rng.randrange(200))
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 3])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _odd_json(data: bytes, rng: random.Random) -> bytes:
    """Put something odd somewhere in a JSON document, or leave something out."""
    lines = data.decode().splitlines()
    whole = len(lines) == 1 or not lines[0].endswith("}")
    document = json.loads(data) if whole else json.loads(lines[0])
    node, key = document, None
    while isinstance(node, dict | list) and node:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        parent, key = node, rng.choice(list(keys))
        node = parent[key]
        if rng.random() < 0.4:
            break
    if key is None or rng.random() < 0.1:
        return json.dumps(rng.choice(ODD)).encode()
    if rng.random() < 0.2 and isinstance(parent, dict):
        del parent[key]
    else:
        parent[key] = rng.choice(ODD)
    return json.dumps(document).encode() + (b"" if whole else b"\n" + "\n".join(lines[1:]).encode())


def _odd_header(data: bytes, rng: random.Random) -> bytes:
    """Let a safetensors file promise something absurd."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    entry[rng.choice(["shape", "dtype", "data_offsets"])] = rng.choice(
        [[2**40, 2**40], [-1], [], "F4096", "I8", [0, 2**60], [5, 1], None, {"a": 1}]
    )
    text = json.dumps(header).encode()
    length = rng.choice([len(text), len(text), 2**62, 0])
    return length.to_bytes(8, "little") + text + data[8 + size :]


def outcome(reader: Reader, folder: Path, data: bytes) -> str:
    (folder / reader.path).write_bytes(data)
    try:
        reader.read(folder / reader.path)
    except (UserError, TypeCheckError):  # the tests' type checks come before the package's own
        return "refused"
    return "loaded"


def attack(
    name: str, reader: Reader, sound: Path, folder: Path, cases: int, seed: int = 0
) -> dict[str, int]:
    """Read a file after each of many damages, and count how that ended.

    Args:
        name: Of the reader; damages are drawn from it.
        reader: Who reads which file.
        sound: A folder with the file and all that belongs to it, undamaged.
        folder: Where to work; it must not exist.
        cases: How many.
        seed: The first case's number.

    Raises:
        AssertionError: If a damage ends in anything but a load or the package's own error, or
            makes a file appear anywhere beside.
    """
    found = {"refused": 0, "loaded": 0}
    shutil.copytree(sound, folder)
    before = {path for path in folder.parent.rglob("*") if path.is_file()}
    data = (sound / reader.path).read_bytes()
    assert outcome(reader, folder, data) == "loaded"
    for case in range(seed, seed + cases):
        changed = damage(data, random.Random(f"{name}-{case}"))
        try:
            found[outcome(reader, folder, changed)] += 1
        except Exception as error:
            raise AssertionError(f"{name}, case {case}: {error!r}") from error
    assert {path for path in folder.parent.rglob("*") if path.is_file()} == before
    return found
