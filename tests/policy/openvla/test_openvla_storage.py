"""Safetensors written and read tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from roadvla.errors import UserError
from roadvla.policy.openvla.storage import Stored, read_header, read_tensor, write_safetensors

TENSORS = {
    "odd": torch.arange(3).bfloat16(),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.zeros(0, 4),
    "strided": torch.arange(6.0).reshape(2, 3).T,
    "half": torch.ones(5, dtype=torch.float16),
}
LAYOUT = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, LAYOUT, TENSORS.__getitem__)
    back = load_file(path)
    assert back.keys() == TENSORS.keys()
    assert all(torch.equal(back[name], TENSORS[name]) for name in TENSORS)


def test_reads_back_itself(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, LAYOUT, TENSORS.__getitem__)
    header = read_header(path)
    assert {name: (s.dtype, s.shape) for name, s in header.items()} == LAYOUT
    for name, stored in header.items():
        assert torch.equal(read_tensor(path, stored), TENSORS[name])
        # Aligned, so that a reader may map the file.
        assert stored.start % stored.dtype.itemsize == 0


def test_a_tensor_unlike_the_layout_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"odd is torch\.float32"):
        write_safetensors(tmp_path / "x", {"odd": (torch.bfloat16, (3,))}, lambda _: torch.zeros(3))


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"12345")
    stored = Stored(dtype=torch.float32, shape=(2,), start=0, size=8)
    with pytest.raises(UserError, match=r"damaged or cut short \(5 of 8 bytes\)"):
        read_tensor(path, stored)
    with pytest.raises(UserError, match="No such file"):
        read_tensor(tmp_path / "none", stored)
