"""Pixels against the original processor's, and what goes wrong with files and images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from roadvla.errors import UserError
from roadvla.policy.openvla.preprocess import (
    Preprocessing,
    default_preprocessing,
    preprocess_pil,
    preprocess_tensor,
    read_preprocessing,
)
from roadvla.policy.openvla.tiny_checkpoint import TinySizes, write_tiny_checkpoint

Path2Pixels = Callable[[Tensor, Preprocessing], Tensor]

ROUNDED = ((0.484375, 0.455078125, 0.40625), (0.228515625, 0.2236328125, 0.224609375))
HALF = (0.5, 0.5, 0.5)

both_paths = pytest.mark.parametrize("path", [preprocess_pil, preprocess_tensor])


@pytest.fixture
def recorded(openvla_fixture: Path) -> dict[str, Tensor]:
    with np.load(openvla_fixture / "inputs.npz") as arrays:
        names = ("images", "pixel_values", "pixel_values_rl0")
        return {name: torch.from_numpy(arrays[name]) for name in names}


@pytest.fixture
def processing() -> Preprocessing:
    return default_preprocessing(2, 224)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_checkpoint(tmp_path / "tiny", sizes=TinySizes(image_size=56))


def _edit(folder: Path, **changes: Any) -> None:
    file = folder / "preprocessor_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in config.items() if value != "gone"}))


# Golden.


def test_pil_pixels_are_the_original_processors_bit_for_bit(
    recorded: dict[str, Tensor], openvla_fixture: Path
) -> None:
    pixels = preprocess_pil(recorded["images"], read_preprocessing(openvla_fixture, 2, 224))
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, recorded["pixel_values"])


def test_tensor_pixels_are_rl4vlas(recorded: dict[str, Tensor], openvla_fixture: Path) -> None:
    pixels = preprocess_tensor(recorded["images"], read_preprocessing(openvla_fixture, 2, 224))
    torch.testing.assert_close(pixels[:1], recorded["pixel_values_rl0"], atol=3e-5, rtol=0.0)


def test_the_paths_differ_as_noted(recorded: dict[str, Tensor], processing: Preprocessing) -> None:
    """0.28 at most, at hard edges: openvla.md, section 3."""
    images = recorded["images"]
    gap = (preprocess_tensor(images, processing) - preprocess_pil(images, processing)).abs().max()
    assert 0.1 < gap < 0.3


@both_paths
def test_one_colour_stays_one_colour(path: Path2Pixels, processing: Preprocessing) -> None:
    """Colour (51, 102, 255) is (0.2, 0.4, 1); DINOv2's channels first, then SigLIP's 2x - 1."""
    images = torch.tensor([51, 102, 255], dtype=torch.uint8).expand(1, 30, 40, 3)
    pixels = path(images, processing)
    assert pixels.shape == (1, 6, 224, 224)
    dino = [(c - m) / s for c, m, s in zip((0.2, 0.4, 1.0), *ROUNDED, strict=True)]
    expected = torch.tensor([*dino, -0.6, -0.2, 1.0]).reshape(1, 6, 1, 1).expand_as(pixels)
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0.0)


@both_paths
def test_frames_of_the_right_size_are_only_normalized(
    path: Path2Pixels, processing: Preprocessing
) -> None:
    images = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8)
    siglip = path(images, processing)[:, 3:]
    expected = images.permute(0, 3, 1, 2).float() / 127.5 - 1.0
    torch.testing.assert_close(siglip, expected, atol=1e-5, rtol=0.0)


@both_paths
def test_rows_do_not_depend_on_their_batch(path: Path2Pixels, processing: Preprocessing) -> None:
    images = torch.randint(0, 256, (3, 48, 64, 3), dtype=torch.uint8)
    together = path(images, processing)
    for index in range(3):
        assert torch.equal(path(images[index : index + 1], processing)[0], together[index])


@both_paths
def test_any_memory_layout_will_do(path: Path2Pixels, processing: Preprocessing) -> None:
    images = torch.randint(0, 256, (2, 48, 64, 3), dtype=torch.uint8)
    mirrored = images.flip(2)[:, ::2]
    views = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(path(views, processing), path(images, processing))
    assert torch.equal(path(mirrored, processing), path(mirrored.clone(), processing))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_gives_the_same_pixels(processing: Preprocessing) -> None:
    images = torch.randint(0, 256, (4, 480, 640, 3), dtype=torch.uint8)
    pixels = preprocess_tensor(images.cuda(), processing)
    assert pixels.is_cuda
    torch.testing.assert_close(
        pixels.cpu(), preprocess_tensor(images, processing), atol=3e-5, rtol=0.0
    )


# Files.


def test_rounded_statistics_go_before_exact_ones(folder: Path) -> None:
    found = read_preprocessing(folder, 2, 56)
    assert (found.means, found.stds) == ((ROUNDED[0], HALF), (ROUNDED[1], HALF))
    assert found == default_preprocessing(2, 56)
    _edit(folder, tvf_normalize_params="gone")
    exact = read_preprocessing(folder, 2, 56)
    assert exact.means == ((0.485, 0.456, 0.406), HALF)
    assert exact.stds == ((0.229, 0.224, 0.225), HALF)


def test_a_model_without_a_folder_gets_the_published_values() -> None:
    assert read_preprocessing(None, 2, 224) == default_preprocessing(2, 224)
    assert read_preprocessing(None, 1, 224).means == (HALF,)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"image_resize_strategy": "letterbox"}, "'letterbox' is not supported"),
        ({"image_resize_strategy": "resize-crop"}, "'resize-crop' is not supported"),
        ({"tvf_do_letterbox": True}, "'letterbox' is not supported"),
        ({"interpolations": ["bilinear", "bicubic"]}, "interpolation 'bilinear'"),
        ({"tvf_resize_params": [{"interpolation": 2, "size": [56, 56]}]}, "interpolation 2"),
        ({"tvf_resize_params": [{"interpolation": 3, "size": 56}]}, "resized to 56, but"),
        ({"input_sizes": [[3, 224, 224]] * 2}, r"resized to \[224, 224\], but .* 56x56"),
        ({"tvf_normalize_params": [{"mean": [0.5] * 3, "std": [0.5] * 3}]}, "each of the 2 vision"),
        ({"tvf_normalize_params": "gone", "means": [[0.5], [0.5]]}, "mean is .* three numbers"),
        ({"tvf_normalize_params": "gone", "stds": "gone"}, "std is None"),
        ({"tvf_normalize_params": "gone", "stds": [[0.0] * 3] * 2}, "positive"),
    ],
)
def test_a_processor_that_is_not_openvlas(folder: Path, changes: dict, says: str) -> None:
    _edit(folder, **changes)
    with pytest.raises(UserError, match=says):
        read_preprocessing(folder, 2, 56)


def test_a_missing_or_damaged_file(folder: Path) -> None:
    file = folder / "preprocessor_config.json"
    for text, says in (("{", "cannot be read as JSON"), ("[]", "not a JSON object")):
        file.write_text(text)
        with pytest.raises(UserError, match=says):
            read_preprocessing(folder, 2, 56)
    file.unlink()
    with pytest.raises(UserError, match=r"preprocessor_config\.json is missing.*openvla-7b"):
        read_preprocessing(folder, 2, 56)


def test_preprocessing_that_cannot_be() -> None:
    for changes in ({"strategy": "letterbox"}, {"image_size": (224, 384)}, {"means": (HALF,)}):
        with pytest.raises(UserError):
            Preprocessing(
                **{"image_size": (224, 224), "means": (HALF, HALF), "stds": (HALF, HALF)} | changes
            )


# Images.


@both_paths
@pytest.mark.parametrize(
    ("images", "says"),
    [
        (torch.zeros(2, 48, 48, 3), r"float32 \[2, 48, 48, 3\]; expected RGB"),
        (torch.zeros(2, 3, 48, 48, dtype=torch.uint8), r"uint8 \[2, 3, 48, 48\]"),
        (torch.zeros(48, 48, 3, dtype=torch.uint8), r"uint8 \[48, 48, 3\]"),
        (torch.zeros(2, 48, 48, 4, dtype=torch.uint8), r"uint8 \[2, 48, 48, 4\]"),
        (torch.zeros(0, 48, 48, 3, dtype=torch.uint8), r"uint8 \[0, 48, 48, 3\]"),
    ],
)
def test_images_of_another_type_or_shape(
    path: Path2Pixels, processing: Preprocessing, images: Tensor, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        path(images, processing)
