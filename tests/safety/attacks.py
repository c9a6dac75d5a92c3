"""Damage done to files, by chance and on purpose, and what a reader makes of it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jaxtyping
import torch
from safetensors.torch import load, save
from torch import Tensor

from roadvla.errors import UserError

ODD: list[Any] = [
    *(None, True, -1, 0, 10**30, 1e308, float("nan"), float("-inf"), 0.5),
    *("", "x" * 5000, "../../etc/passwd", "/etc/passwd", [], [[]], {}, {"a": {}}, [None] * 50),
]


@dataclass(frozen=True)
class Reader:
    """A file, and who reads it.

    Attributes:
        path: Of the file.
        read: Reads it.
        seal: Makes the checksums anew that cover the file, as whoever means harm can; without it
            they tell of every damage.
    """

    path: str
    read: Callable[[Path], object]
    seal: Callable[[Path], object] | None = None


def damage(data: bytes, rng: random.Random) -> bytes:
    """Change a file in one of the ways in which files go wrong, or are made to."""
    kind = rng.choice(
        ["flip", "cut", "grow", "noise", "json", "json", "header", "tensor", "tensor", "deep"]
    )
    if kind == "tensor" and data[8:9] == b"{":
        return _odd_tensor(data, rng)
    if kind == "tensor" and data[:1] in b"{[":
        kind = "json"
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


def _odd_tensor(data: bytes, rng: random.Random) -> bytes:
    """Put another tensor in a tensor's place: a sound file with odd content."""
    tensors = load(data)
    name = rng.choice(sorted(tensors))
    found = tensors.pop(name)
    changes: dict[str, Callable[[], Tensor]] = {
        "value": lambda: torch.full_like(found, rng.choice([0, 1, 127])),
        "nan": lambda: torch.full(found.shape, float("nan")),
        "negative": lambda: -found if found.dtype.is_floating_point else found.flip(0),
        "kind": lambda: found.to(
            rng.choice([torch.float64, torch.int8, torch.bool, torch.bfloat16])
        ),
        "flat": lambda: found.reshape(1, -1),
        "cut": lambda: found.flatten()[: rng.randrange(6)],
        "empty": lambda: found.new_zeros(0, 3),
        "scalar": lambda: found.new_ones(()),
        "longer": lambda: torch.cat([found.flatten(), found.flatten()]),
    }
    kind = rng.choice(["gone", "renamed", "doubled", *changes])
    if kind in ("renamed", "doubled"):
        other = rng.choice(
            [f"{name}.zzz", name.rpartition(".")[0], "", "x.exp_avg", "\x00", "é" * 99]
        )
        tensors |= {other: found, **({name: found.clone()} if kind == "doubled" else {})}
    elif kind != "gone":
        tensors[name] = changes[kind]().contiguous()
    return save(tensors)


def outcome(reader: Reader, folder: Path, data: bytes) -> str:
    path = folder / reader.path
    path.write_bytes(data)
    if reader.seal is not None:
        with suppress(ValueError, RecursionError):  # what cannot be read cannot be sealed
            reader.seal(path)
    jaxtyping.config.update("jaxtyping_disable", True)  # users run without the tests' type checks
    try:
        reader.read(path)
    except UserError as error:
        message = str(error)
    else:
        return "loaded"
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    assert message.isprintable(), message
    return "refused"


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
    covered = (
        {
            path: path.read_bytes()
            for path in (folder / reader.path).parent.iterdir()
            if path.is_file()
        }
        if reader.seal
        else {}
    )
    assert outcome(reader, folder, data) == "loaded"
    for case in range(seed, seed + cases):
        changed = damage(data, random.Random(f"{name}-{case}"))
        for path, content in covered.items():  # a seal changes the files beside it
            path.write_bytes(content)
        try:
            found[outcome(reader, folder, changed)] += 1
        except Exception as error:
            raise AssertionError(f"{name}, case {case}: {error!r}") from error
    assert {path for path in folder.parent.rglob("*") if path.is_file()} == before
    return found
