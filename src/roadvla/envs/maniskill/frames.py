"""From what the renderer draws to what the policy sees: tables, textures, and where they go."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from PIL import Image
from torch import Tensor

from roadvla.envs.maniskill.assets import AssetFolders, require
from roadvla.envs.maniskill.episodes import Episodes
from roadvla.envs.maniskill.objects import TABLES, TEXTURES
from roadvla.envs.maniskill.overlays import apply_shift, enlarge, green_screen, kept
from roadvla.envs.maniskill.settings import Variant
from roadvla.envs.maniskill.shifts import TextureShift, WholeImageShift


class Frames:
    """Composes the frames of B episodes.

    Args:
        variant: Which id of the suite.
        folders: Where the pictures lie.
        size: Height and width of the frames.
        device: Where they are composed.
    """

    def __init__(
        self, variant: Variant, folders: AssetFolders, size: tuple[int, int], device: torch.device
    ) -> None:
        self._variant, self._folders, self._size, self._device = variant, folders, size, device
        self._background = torch.empty(0)
        self._texture = torch.empty(0)
        self._textures = torch.empty((0, 1, 1, 3), dtype=torch.uint8)
        if isinstance(variant.shift, TextureShift | WholeImageShift):
            whole = isinstance(variant.shift, WholeImageShift)
            names = TEXTURES[: variant.extra.all.stop]
            self._textures = _read_all(folders.textures, names, size, whole).to(device)

    def start(self, episodes: Episodes) -> None:
        """Choose the pictures of new episodes."""
        self.choose(episodes.table, episodes.extra)

    def choose(self, table: Int[Tensor, " B"], texture: Int[Tensor, " B"]) -> None:
        """Choose tables and textures by index."""
        names = [TABLES[index] for index in table.tolist()]
        pictures = [_read(self._folders.tables, name, self._size) for name in names]
        self._background = torch.stack(pictures).to(self._device)
        self._texture = texture.to(self._device)

    def compose(
        self,
        render: UInt8[Tensor, "B H W 3"],
        segmentation: Int[Tensor, "B H W"],
        keep: Bool[Tensor, " K"],
    ) -> UInt8[Tensor, "B H W 3"]:
        """Green-screen a render and blend what the variant's shift asks for over it."""
        mask = kept(segmentation, keep)
        frame = green_screen(render, self._background, mask)
        return apply_shift(self._variant.shift, frame, mask, self._textures, self._texture)


@lru_cache(maxsize=64)
def _read(folder: Path, name: str, size: tuple[int, int]) -> UInt8[Tensor, "H W 3"]:
    with Image.open(require(folder / name)) as picture:
        colours = picture.convert("RGB")
        if colours.size != (size[1], size[0]):
            colours = colours.resize((size[1], size[0]), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(colours))


@lru_cache(maxsize=4)
def _read_all(
    folder: Path, names: Sequence[str], size: tuple[int, int], whole: bool
) -> UInt8[Tensor, "X H W 3"]:
    pictures = torch.stack([_read(folder, name, size) for name in names])
    return enlarge(pictures) if whole else pictures
