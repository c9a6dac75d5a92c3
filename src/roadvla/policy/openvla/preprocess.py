"""Camera frames to the pixels that the vision towers read: OpenVLA's way and RL4VLA's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from roadvla.errors import UserError
from roadvla.files import read_json

PREPROCESSOR_NAME = "preprocessor_config.json"
STRATEGY = "resize-naive"

Channels = tuple[float, float, float]

# openvla-7b's own values. It was exported under bfloat16, which rounded ImageNet's
# (0.485, 0.456, 0.406), (0.229, 0.224, 0.225) to these; the model was published with them.
_DINO: tuple[Channels, Channels] = (
    (0.484375, 0.455078125, 0.40625),
    (0.228515625, 0.2236328125, 0.224609375),
)
_SIGLIP: tuple[Channels, Channels] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_BICUBIC = (3, "3", "bicubic")
_FIX = "use the preprocessor_config.json of openvla/openvla-7b, or the one saved with the weights"


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How frames become pixel values, tower by tower.

    Attributes:
        image_size: Side of the square that each tower reads, pixels; all are equal.
        means: Subtracted from values in [0, 1], per tower and channel.
        stds: What the difference is divided by.
        strategy: Straight to the square, whatever the aspect (``resize-naive``).
    """

    image_size: tuple[int, ...]
    means: tuple[Channels, ...]
    stds: tuple[Channels, ...]
    strategy: str = STRATEGY

    def __post_init__(self) -> None:
        """Refuse what the two paths do not compute."""
        if self.strategy != STRATEGY:
            raise UserError(
                f"image_resize_strategy {self.strategy!r} is not supported; "
                f"OpenVLA's is {STRATEGY!r}"
            )
        if not len(self.image_size) == len(self.means) == len(self.stds) > 0:
            raise UserError(
                f"preprocessing has {len(self.image_size)} sizes, {len(self.means)} means and "
                f"{len(self.stds)} stds; one of each per vision tower is needed"
            )
        if len(set(self.image_size)) != 1 or self.image_size[0] < 1:
            raise UserError(f"image sizes {self.image_size} differ; one common size is needed")
        if min(value for std in self.stds for value in std) <= 0.0:
            raise UserError(f"stds {self.stds} are not all positive")


def default_preprocessing(towers: int, image_size: int) -> Preprocessing:
    """Give openvla-7b's values, for a model without a checkpoint: DINOv2 and SigLIP, or SigLIP.

    Args:
        towers: 1 or 2.
        image_size: Side, pixels.
    """
    values = ((_DINO, _SIGLIP) if towers == 2 else (_SIGLIP,))[:towers]
    return Preprocessing(
        image_size=(image_size,) * towers,
        means=tuple(mean for mean, _ in values),
        stds=tuple(std for _, std in values),
    )


def read_preprocessing(folder: Path | None, towers: int, image_size: int) -> Preprocessing:
    """Read a checkpoint's ``preprocessor_config.json``.

    ``tvf_normalize_params`` go before ``means`` and ``stds``: where they differ, the former are
    those the original processor really uses, rounded to bfloat16 by openvla-7b's export.

    Args:
        folder: Of the checkpoint; ``None`` for openvla-7b's values.
        towers: How many vision towers the weights hold.
        image_size: Side that their position embeddings ask for, pixels.

    Raises:
        UserError: If the file is missing, unreadable, for another model, or asks for a resize that
            is not computed here.
    """
    if folder is None:
        return default_preprocessing(towers, image_size)
    path = Path(folder) / PREPROCESSOR_NAME
    config = _read_config(path)
    _check_resize(config, towers, image_size, path)
    normalize = config.get("tvf_normalize_params")
    if normalize is not None:
        means, stds = _parts(normalize, "mean"), _parts(normalize, "std")
    else:
        means, stds = config.get("means"), config.get("stds")
    return Preprocessing(
        image_size=(image_size,) * towers,
        means=_channels(means, towers, "mean", path),
        stds=_channels(stds, towers, "std", path),
    )


def preprocess_pil(images: Tensor, preprocessing: Preprocessing) -> Float[Tensor, "B C S S"]:
    """Resize with PIL, image after image, as OpenVLA's own processor does: bit for bit its values.

    PIL's bicubic filter is antialiased, and its result is rounded and clipped to bytes.

    Args:
        images: RGB, uint8 [B, H, W, 3], on any device.
        preprocessing: Of the checkpoint.

    Returns:
        float32 on the CPU; three channels per tower, DINOv2's first.

    Raises:
        UserError: If the images have another type or shape.
    """
    _check_images(images)
    side = preprocessing.image_size[0]
    squares = [
        Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
        for image in images.detach().cpu().contiguous().numpy()
    ]
    resized = torch.from_numpy(np.stack([np.asarray(square) for square in squares]))
    return _normalize(resized.permute(0, 3, 1, 2).to(torch.float32), preprocessing)


def preprocess_tensor(images: Tensor, preprocessing: Preprocessing) -> Float[Tensor, "B C S S"]:
    """Resize all images at once on their device, as RL4VLA does while it collects rollouts.

    The same filter without rounding and clipping, in float32: near edges values overshoot the
    range of bytes, and differ from PIL's by up to 0.3 after normalization. RL4VLA computes it in
    bfloat16 on top of that.

    Args:
        images: RGB, uint8 [B, H, W, 3].
        preprocessing: Of the checkpoint.

    Returns:
        float32 on the images' device; three channels per tower, DINOv2's first.

    Raises:
        UserError: If the images have another type or shape.
    """
    _check_images(images)
    pixels = images.permute(0, 3, 1, 2).contiguous().to(torch.float32)
    resized = F.interpolate(
        pixels,
        size=(preprocessing.image_size[0],) * 2,
        mode="bicubic",
        antialias=True,
        align_corners=False,
    )
    return _normalize(resized, preprocessing)


def _normalize(
    pixels: Float[Tensor, "B 3 S S"], preprocessing: Preprocessing
) -> Float[Tensor, "B C S S"]:
    """(x/255 - mean)/std per tower, in this order, which decides the last bit."""
    values = pixels / 255.0
    mean, std = (
        torch.tensor(rows, dtype=torch.float32, device=pixels.device).reshape(-1, 1, 3, 1, 1)
        for rows in (preprocessing.means, preprocessing.stds)
    )
    return torch.cat([(values - m) / s for m, s in zip(mean, std, strict=True)], dim=1)


def _check_images(images: Tensor) -> None:
    shape = tuple(images.shape)
    if images.dtype != torch.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
        raise UserError(
            f"images are {str(images.dtype).removeprefix('torch.')} {list(shape)}; expected RGB "
            f"frames as uint8 [batch, height, width, 3]"
        )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = read_json(path)
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing: the model's pixel statistics are unknown; {_FIX}"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): {_FIX}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a JSON object: {_FIX}")
    return config


def _check_resize(config: Mapping[str, Any], towers: int, image_size: int, path: Path) -> None:
    """Refuse any other resize than bicubic, straight to the square that the towers read."""
    strategy = config.get("image_resize_strategy", STRATEGY)
    if strategy != STRATEGY or config.get("tvf_do_letterbox"):
        shown = strategy if strategy != STRATEGY else "letterbox"
        raise UserError(
            f"{path}: image_resize_strategy {shown!r} is not supported; OpenVLA's is {STRATEGY!r}"
        )
    kinds = config.get("interpolations") or ["bicubic"] * towers
    sizes = config.get("input_sizes") or []
    if not isinstance(kinds, list) or not isinstance(sizes, list):
        raise UserError(f"{path}: interpolations and input_sizes are no lists: {_FIX}")
    resizes = config.get("tvf_resize_params") or []
    for kind in [*kinds, *_parts(resizes, "interpolation")]:
        if not isinstance(kind, str | int) or kind not in _BICUBIC:
            raise UserError(
                f"{path}: interpolation {kind!r} is not supported; OpenVLA's is bicubic"
            )
    sides = [size[-2:] if isinstance(size, list) else size for size in sizes]
    for size in [*sides, *_parts(resizes, "size")]:
        if size != [image_size, image_size]:
            raise UserError(
                f"{path}: images are resized to {size}, but the weights read "
                f"{image_size}x{image_size} pixels: {_FIX}"
            )


def _parts(entries: Any, name: str) -> list[Any]:
    listed = entries if isinstance(entries, list) else []
    return [entry.get(name) for entry in listed if isinstance(entry, dict)]


def _channels(rows: Any, towers: int, name: str, path: Path) -> tuple[Channels, ...]:
    try:
        values = tuple(tuple(float(value) for value in row) for row in rows)
    except (TypeError, ValueError):
        values = ()
    if len(values) != towers or any(len(row) != 3 for row in values):
        raise UserError(
            f"{path}: {name} is {rows!r}; expected three numbers for each of the {towers} vision "
            f"towers: {_FIX}"
        )
    return tuple((row[0], row[1], row[2]) for row in values)
