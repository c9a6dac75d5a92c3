"""Image shifts: overlays that are cropped and scaled anew at every step."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from roadvla.envs.suite import Distribution
from roadvla.envs.tabletop.camera import SIZE
from roadvla.envs.tabletop.noise import uniform
from roadvla.envs.tabletop.render import Frame
from roadvla.envs.tabletop.textures import OVERLAY_SIZE

_STREAM = 5000


def crop_overlays(
    textures: Float[Tensor, "X S S 3"],
    index: Int[Tensor, " B"],
    u: Float[Tensor, "B 3"],
    scales: tuple[float, float] = (0.5, 1.5),
) -> Float[Tensor, "B P 3"]:
    """Cut a random rectangle out of a wrapping texture and scale it to the frame.

    Args:
        textures: Square textures, 0 to 1.
        index: Which one each frame gets.
        u: Uniform numbers for scale, row and column.
        scales: Range of the texels per pixel.
    """
    scale = scales[0] + (scales[1] - scales[0]) * u[:, 0]
    axis = torch.arange(SIZE, device=u.device)
    rows = (u[:, 1, None] * OVERLAY_SIZE + axis * scale[:, None]).long() % OVERLAY_SIZE
    columns = (u[:, 2, None] * OVERLAY_SIZE + axis * scale[:, None]).long() % OVERLAY_SIZE
    pixels = rows[:, :, None] * OVERLAY_SIZE + columns[:, None, :]
    flat = textures.view(-1, 3)
    return flat[pixels.view(len(u), -1) + index[:, None] * OVERLAY_SIZE**2]


def apply_overlay(
    frame: Frame,
    textures: Float[Tensor, "X S S 3"],
    index: Int[Tensor, " B"],
    key: Int[Tensor, " B"],
    distribution: Distribution,
    elapsed: int,
) -> Float[Tensor, "B P 3"]:
    """Blend the split's overlay, if it has one, over a frame: α·texture + (1 − α)·frame.

    Args:
        frame: Colours and foreground mask.
        textures: All overlay textures.
        index: Texture of each episode.
        key: Episode ids; with ``elapsed`` they decide the crop.
        distribution: Names the overlay and its opacity.
        elapsed: Actions so far.
    """
    if distribution.overlay == "none":
        return frame.colour
    texture = crop_overlays(textures, index, uniform(key, _STREAM + elapsed, 3))
    blended = torch.lerp(frame.colour, texture, distribution.overlay_strength)
    if distribution.overlay == "noise":
        return blended
    return torch.where(frame.foreground[..., None], blended, frame.colour)
