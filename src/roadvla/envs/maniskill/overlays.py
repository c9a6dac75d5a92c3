"""What RL4VLA does to the rendered frame, on B frames at once and without a renderer.

Everything but the robot and the bodies is replaced by a picture of a table; then a texture may be
blended over what was kept, or over the whole frame. Nothing here is random: a texture moves because
the bounding box of what was kept does. Values are computed in float32 and truncated to bytes.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from roadvla.envs.maniskill.shifts import Shift, TextureShift, WholeImageShift


def kept(segmentation: Int[Tensor, "B H W"], keep: Bool[Tensor, " K"]) -> Bool[Tensor, "B H W"]:
    """Find the pixels of the robot and the bodies.

    Args:
        segmentation: Id of what each pixel shows.
        keep: Of each id, whether its pixels are kept; K is more than the highest id.
    """
    return keep[segmentation.long()]


def green_screen(
    render: UInt8[Tensor, "B H W 3"],
    background: UInt8[Tensor, "B H W 3"],
    mask: Bool[Tensor, "B H W"],
) -> UInt8[Tensor, "B H W 3"]:
    """Keep the rendered pixels where the mask is true and take the background elsewhere."""
    return torch.where(mask[..., None], render, background)


def bounding_boxes(mask: Bool[Tensor, "B H W"]) -> Int[Tensor, "B 4"]:
    """Find the first and last column and row with a true pixel: left, top, right, bottom.

    All four are inclusive, and 0 where there is no such pixel.
    """
    columns, rows = mask.any(dim=1).byte(), mask.any(dim=2).byte()
    left, top = columns.argmax(-1), rows.argmax(-1)
    right = mask.shape[2] - 1 - columns.flip(-1).argmax(-1)
    bottom = mask.shape[1] - 1 - rows.flip(-1).argmax(-1)
    some = columns.any(-1)
    return torch.stack([left, top, right * some, bottom * some], dim=-1)


def opacity(shift: TextureShift | WholeImageShift, texture: Int[Tensor, " B"]) -> Tensor:
    """Share of the texture in each frame, float32 [B]: none for the first texture, training's."""
    return (texture > 0).float() * shift.opacity


def apply_shift(
    shift: Shift | None,
    frame: UInt8[Tensor, "B H W 3"],
    mask: Bool[Tensor, "B H W"],
    textures: UInt8[Tensor, "X _ _ 3"],
    texture: Int[Tensor, " B"],
) -> UInt8[Tensor, "B H W 3"]:
    """Blend what the shift asks for over green-screened frames; other shifts leave them alone.

    Args:
        shift: Of the variant.
        frame: After ``green_screen``.
        mask: Pixels of the robot and the bodies.
        textures: All of them; twice the frame's size (``enlarge``) for a ``WholeImageShift``.
        texture: Which one each frame gets: ``Episodes.extra``.
    """
    if isinstance(shift, TextureShift):
        own = shift.fit == "own"
        return blend_texture(frame, mask, textures, texture, opacity(shift, texture), own_box=own)
    if isinstance(shift, WholeImageShift):
        return blend_whole(frame, mask, textures, texture, opacity(shift, texture))
    return frame


def blend_texture(
    frame: UInt8[Tensor, "B H W 3"],
    mask: Bool[Tensor, "B H W"],
    textures: UInt8[Tensor, "X h w 3"],
    texture: Int[Tensor, " B"],
    alpha: Float[Tensor, " B"],
    *,
    own_box: bool,
) -> UInt8[Tensor, "B H W 3"]:
    """Blend a texture over the masked pixels; its corner lies on that of their bounding box.

    Only masked pixels are computed, about a tenth of a frame.

    Args:
        frame: After ``green_screen``.
        mask: Pixels of the robot and the bodies.
        textures: All of them.
        texture: Which one each frame gets.
        alpha: Share of the texture in [0, 1].
        own_box: Whether the texture is stretched to the frame's own box. Otherwise it is stretched
            to the largest height and the largest width in the batch, and cut to the box.
    """
    left, top, right, bottom = bounding_boxes(mask).unbind(-1)
    size = torch.stack([bottom - top + 1, right - left + 1])
    if not own_box:
        size = size.amax(dim=1, keepdim=True).expand_as(size)
    batch, row, column = mask.nonzero(as_tuple=True)
    first = _stretch(row - top[batch], size[0][batch], textures.shape[1])
    second = _stretch(column - left[batch], size[1][batch], textures.shape[2])
    values = _bilinear(textures, texture[batch], first, second)
    share = alpha[batch, None]
    blended = share * values + (1 - share) * frame[batch, row, column].float()
    out = frame.clone()
    out[batch, row, column] = _bytes(blended)
    return out


def blend_whole(
    frame: UInt8[Tensor, "B H W 3"],
    mask: Bool[Tensor, "B H W"],
    textures: UInt8[Tensor, "X h w 3"],
    texture: Int[Tensor, " B"],
    alpha: Float[Tensor, " B"],
) -> UInt8[Tensor, "B H W 3"]:
    """Blend a cut of a large texture over whole frames; its corner is the bounding box's centre.

    The centre is rounded down, and never in the first row or column.

    Args:
        frame: After ``green_screen``.
        mask: Pixels of the robot and the bodies.
        textures: All of them, of twice the frame's height and width.
        texture: Which one each frame gets.
        alpha: Share of the texture in [0, 1].
    """
    height, width = mask.shape[1:]
    left, top, right, bottom = bounding_boxes(mask).unbind(-1)
    across = ((left + right) // 2).clamp(min=1)
    down = ((top + bottom) // 2).clamp(min=1)
    rows = down[:, None] + torch.arange(height, device=mask.device)
    columns = across[:, None] + torch.arange(width, device=mask.device)
    cut = textures[texture[:, None, None], rows[:, :, None], columns[:, None, :]]
    share = alpha[:, None, None, None]
    return _bytes((1 - share) * frame.float() + share * cut.float())


def enlarge(pictures: UInt8[Tensor, "X h w 3"]) -> UInt8[Tensor, "X h2 w2 3"]:
    """Double height and width, bilinearly, with the roundings of OpenCV's resize of bytes.

    New pixels lie a quarter of an old one off its centre, so weights are 1/4 and 3/4, which
    OpenCV holds in units of 1/2048. Rows keep all bits but four; columns are truncated.
    """
    return torch.stack([_enlarged(picture.int()) for picture in pictures])


def _enlarged(picture: Int[Tensor, "h w 3"]) -> UInt8[Tensor, "h2 w2 3"]:
    near, far = _neighbours(picture, 1)
    near, far = _neighbours(32 * (3 * near + far), 0)
    return ((((1536 * near) >> 16) + ((512 * far) >> 16) + 2) >> 2).to(torch.uint8)


def _neighbours(picture: Int[Tensor, "h w 3"], dim: int) -> tuple[Tensor, Tensor]:
    """The old pixel that each new one lies in, and the nearest other; edges repeat."""
    count = picture.shape[dim]
    new = torch.arange(2 * count, device=picture.device)
    other = (new // 2 + 2 * (new % 2) - 1).clamp(0, count - 1)
    return picture.index_select(dim, new // 2), picture.index_select(dim, other)


def _stretch(
    pixel: Int[Tensor, " N"], size: Int[Tensor, " N"], source: int
) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"], Float[Tensor, " N"]]:
    """Where a pixel of a stretched picture comes from, along one axis: two texels and a weight.

    Pixel centres are aligned, not corners, and texels are not averaged when shrinking.

    Args:
        pixel: Of the stretched picture.
        size: Length of the stretched picture.
        source: Length of the original.
    """
    at = ((pixel + 0.5) * (source / size) - 0.5).clamp(min=0)
    low = at.long().clamp(max=source - 1)
    return low, (low + 1).clamp(max=source - 1), at - low


def _bilinear(
    textures: UInt8[Tensor, "X h w 3"],
    texture: Int[Tensor, " N"],
    rows: tuple[Tensor, Tensor, Tensor],
    columns: tuple[Tensor, Tensor, Tensor],
) -> Float[Tensor, "N 3"]:
    """Interpolate N texels, columns first."""
    low, high, weight = columns
    across = weight[:, None]
    lines = []
    for row in rows[:2]:
        left, right = (textures[texture, row, column].float() for column in (low, high))
        lines.append((1 - across) * left + across * right)
    down = rows[2][:, None]
    return (1 - down) * lines[0] + down * lines[1]


def _bytes(value: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    return value.clamp(0, 255).to(torch.uint8)
