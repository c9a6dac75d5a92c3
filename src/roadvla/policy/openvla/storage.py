"""Files of a checkpoint: safetensors read and written tensor by tensor, JSON, atomic writes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from roadvla.errors import UserError
from roadvla.files import parse_json, read_json

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Number formats of safetensors that are read; integers and 8-bit floats mean quantization."""

_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Where a tensor lies in its safetensors file.

    Attributes:
        dtype: As stored.
        shape: As stored.
        start: First byte, from the start of the file.
        size: Bytes.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


def read_header(path: Path) -> dict[str, Stored]:
    """Read where the tensors of a safetensors file lie, by name.

    Raises:
        UserError: If the file is unreadable, damaged, cut short, or holds quantized weights.
    """
    try:
        with safe_open(path, framework="pt"):  # checks that header and file agree
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = parse_json(file.read(length))
    except (OSError, ValueError, SafetensorError) as error:
        raise damaged(path, error) from error
    header.pop("__metadata__", None)
    stored = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise UserError(
                f"{path}: {name} is stored as {entry['dtype']}, but only {', '.join(DTYPES)} are "
                f"read: use a checkpoint that is not quantized"
            )
        begin, end = entry["data_offsets"]
        stored[name] = Stored(
            dtype=DTYPES[entry["dtype"]],
            shape=tuple(entry["shape"]),
            start=8 + length + begin,
            size=end - begin,
        )
    return stored


def read_tensor(path: Path, stored: Stored) -> Tensor:
    """Read one tensor into memory of its own, byte for byte.

    Raises:
        UserError: If the file is unreadable or has become shorter.
    """
    tensor = torch.empty(stored.shape, dtype=stored.dtype)
    try:
        with path.open("rb") as file:
            file.seek(stored.start)
            count = file.readinto(_bytes(tensor))
    except OSError as error:
        raise damaged(path, error) from error
    if count != stored.size:
        raise damaged(path, EOFError(f"{count} of {stored.size} bytes"))
    return tensor


def write_safetensors(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    produce: Callable[[str], Tensor],
) -> None:
    """Write a safetensors file with one tensor in memory at a time; not atomic.

    Args:
        path: Of the file.
        layout: Number format and shape of every tensor, by name.
        produce: Makes the tensor of a name; called once per name.

    Raises:
        ValueError: If a tensor is not what the layout says.
    """
    names = sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name in names:
        dtype, shape = layout[name]
        end = begin + byte_size(dtype, shape)
        header[name] = {
            "dtype": _CODES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # keeps the data aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = produce(name)
            if (tensor.dtype, tuple(tensor.shape)) != layout[name]:
                raise ValueError(f"{name} is {tensor.dtype} {tensor.shape}, not {layout[name]}")
            file.write(_bytes(tensor))
        file.flush()
        os.fsync(file.fileno())


def byte_size(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor takes."""
    return torch.Size(shape).numel() * dtype.itemsize


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: If the file is unreadable or holds something else.
    """
    try:
        data = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON ({error}): copy it again") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no JSON object: copy it again")
    return data


def to_json(data: Mapping[str, Any]) -> bytes:
    """Write an object as indented JSON."""
    return (json.dumps(data, indent=2) + "\n").encode()


def damaged(path: Path, error: Exception) -> UserError:
    """Build the error for a safetensors file that cannot be read."""
    try:
        with path.open("rb") as file:
            pointer = file.read(40).startswith(b"version https://git-lfs")
    except OSError:
        pointer = False
    if pointer:
        return UserError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull` there")
    return UserError(
        f"{path} is damaged or cut short ({first_line(error)}): download or copy it again"
    )


def first_line(error: Exception) -> str:
    """Say in one line what went wrong."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _bytes(tensor: Tensor) -> memoryview:
    """View a tensor's memory, or that of a copy if it is not contiguous."""
    return tensor.flatten().view(torch.uint8).numpy().data
