"""Green screen, texture and whole-image overlays against one frame at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ms_recorded import ASSETS, arrays, facts, needs_assets, needs_episodes, picture
from torch import Tensor
from torch.nn import functional

from roadvla.envs.maniskill.objects import TABLES, TEXTURES
from roadvla.envs.maniskill.overlays import (
    apply_shift,
    blend_texture,
    bounding_boxes,
    enlarge,
    green_screen,
    kept,
    opacity,
)
from roadvla.envs.maniskill.settings import Fixes, variant
from roadvla.envs.maniskill.shifts import PoseShift, TextureShift, WholeImageShift

H, W = 24, 32
BOXES = [(3, 0, 20, 11), (0, 5, 31, 23), (10, 10, 10, 10), (0, 0, 0, 0)]  # the last one is empty


def noise(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def masks() -> Tensor:
    """Random pixels within boxes whose opposite corners are set."""
    mask = torch.zeros(4, H, W, dtype=torch.bool)
    for b, (left, top, right, bottom) in enumerate(BOXES[:3]):
        region = mask[b, top : bottom + 1, left : right + 1]
        region |= torch.rand(region.shape) < 0.5
        region[0, 0] = region[-1, -1] = True
    return mask


def one_texture(frame: Tensor, mask: Tensor, texture: Tensor, alpha: float, size: Tensor) -> Tensor:
    """RL4VLA's way for one frame: resize, crop, blend where kept."""
    if not mask.any():
        return frame
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    resized = functional.interpolate(
        texture.permute(2, 0, 1)[None].float(), tuple(size.tolist()), mode="bilinear"
    )[0].permute(1, 2, 0)[: bottom - top, : right - left]
    out = frame.float()
    inside = out[top:bottom, left:right]
    blended = alpha * resized + (1 - alpha) * inside
    out[top:bottom, left:right] = torch.where(mask[top:bottom, left:right, None], blended, inside)
    return out.to(torch.uint8)


def sizes(mask: Tensor) -> Tensor:
    boxes = torch.tensor(BOXES)
    return torch.stack([boxes[:, 3] - boxes[:, 1] + 1, boxes[:, 2] - boxes[:, 0] + 1], dim=1)


def test_kept() -> None:
    segmentation = torch.tensor([[[0, 1, 5], [2, 5, 0]]], dtype=torch.int16)
    keep = torch.tensor([False, True, False, False, False, True])
    assert kept(segmentation, keep).tolist() == [[[False, True, True], [False, True, False]]]


def test_bounding_boxes() -> None:
    assert bounding_boxes(masks()).tolist() == [list(box) for box in BOXES]


def test_green_screen() -> None:
    mask, render, background = masks(), noise(4, H, W, 3), noise(4, H, W, 3)
    frame = green_screen(render, background, mask)
    assert frame.dtype == torch.uint8
    assert torch.equal(frame[mask], render[mask])
    assert torch.equal(frame[~mask], background[~mask])


@pytest.mark.parametrize("fit", ["batch", "own"])
def test_texture(fit: str) -> None:
    mask, frame, textures = masks(), noise(4, H, W, 3), noise(5, H, W, 3)
    index = torch.tensor([4, 2, 1, 3])
    shift = TextureShift(opacity=0.5, fit=fit)  # pyright: ignore[reportArgumentType]
    before = frame.clone()
    found = apply_shift(shift, frame, mask, textures, index)
    assert torch.equal(frame, before)
    each = sizes(mask)
    size = each.amax(0).expand_as(each) if fit == "batch" else each
    for b in range(4):
        expected = one_texture(frame[b], mask[b], textures[index[b]], 0.5, size[b])
        assert (found[b].int() - expected.int()).abs().max() <= 1
        assert (found[b] != expected).float().mean() < 0.005
        assert torch.equal(found[b][~mask[b]], frame[b][~mask[b]])
    assert (found[:3] != frame[:3]).any()


def test_a_texture_smaller_than_its_box_is_stretched() -> None:
    mask, frame, textures = masks()[:1], noise(1, H, W, 3), noise(2, 5, 6, 3)
    index, alpha = torch.tensor([1]), torch.tensor([0.5])
    found = blend_texture(frame, mask, textures, index, alpha, own_box=True)
    expected = one_texture(frame[0], mask[0], textures[1], 0.5, sizes(mask)[0])
    assert (found[0].int() - expected.int()).abs().max() <= 1
    assert (found[0] != expected).float().mean() < 0.005


def test_an_episode_alone_has_its_own_box_in_both_fits() -> None:
    mask, frame, textures = masks()[:1], noise(1, H, W, 3), noise(2, H, W, 3)
    index, alpha = torch.tensor([1]), torch.tensor([0.3])
    own = blend_texture(frame, mask, textures, index, alpha, own_box=True)
    batch = blend_texture(frame, mask, textures, index, alpha, own_box=False)
    assert torch.equal(own, batch)
    row = variant("VR-DynamicTexture", Fixes(own_texture_box=True))
    assert row.shift == TextureShift(opacity=0.5, fit="own")
    assert variant("VR-DynamicTexture").shift == TextureShift(opacity=0.5, fit="batch")


def test_own_boxes_do_not_depend_on_the_batch_and_batch_boxes_do() -> None:
    mask, frame, textures = masks(), noise(4, H, W, 3), noise(4, H, W, 3)
    index, alpha = torch.arange(4), torch.full((4,), 0.5)
    for own_box in (True, False):
        together = blend_texture(frame, mask, textures, index, alpha, own_box=own_box)
        alone = blend_texture(frame[:1], mask[:1], textures, index[:1], alpha[:1], own_box=own_box)
        assert torch.equal(together[:1], alone) == own_box


def test_whole() -> None:
    mask, frame = masks(), noise(4, H, W, 3)
    textures = enlarge(noise(5, H, W, 3))
    assert textures.shape == (5, 2 * H, 2 * W, 3)
    index = torch.tensor([4, 2, 1, 3])
    found = apply_shift(WholeImageShift(opacity=0.3), frame, mask, textures, index)
    # Centres, rounded down: (23 / 2, 11 / 2), (31 / 2, 28 / 2), (10, 10), (0, 0) moved to (1, 1).
    for b, (x, y) in enumerate([(11, 5), (15, 14), (10, 10), (1, 1)]):
        cut = textures[index[b], y : y + H, x : x + W].float()
        share = torch.tensor(0.3)
        expected = ((1 - share) * frame[b].float() + share * cut).to(torch.uint8)
        assert torch.equal(found[b], expected)


def test_whole_keeps_the_cut_inside_the_texture() -> None:
    mask = torch.zeros(1, H, W, dtype=torch.bool)
    mask[0, -1, -1] = True
    textures = noise(2, 2 * H, 2 * W, 3)
    frame = torch.zeros(1, H, W, 3, dtype=torch.uint8)
    found = apply_shift(WholeImageShift(opacity=1.0), frame, mask, textures, torch.tensor([1]))
    assert torch.equal(found[0], textures[1, H - 1 : 2 * H - 1, W - 1 : 2 * W - 1])


def test_training_and_other_shifts_leave_frames_alone() -> None:
    mask, frame, textures = masks(), noise(4, H, W, 3), noise(2, H, W, 3)
    first = torch.zeros(4, dtype=torch.int64)
    texture = apply_shift(TextureShift(opacity=0.5), frame, mask, textures, first)
    whole = apply_shift(WholeImageShift(opacity=0.5), frame, mask, enlarge(textures), first)
    assert torch.equal(texture, frame)
    assert torch.equal(whole, frame)
    for shift in (None, PoseShift()):
        assert torch.equal(apply_shift(shift, frame, mask, textures, first + 1), frame)


def test_opacity() -> None:
    texture = torch.tensor([0, 1, 16])
    assert opacity(TextureShift(opacity=0.3), texture).tolist() == pytest.approx([0, 0.3, 0.3])
    assert opacity(WholeImageShift(opacity=0.5), texture).tolist() == [0, 0.5, 0.5]


def test_enlarge() -> None:
    row = torch.tensor([0, 16, 64], dtype=torch.uint8)
    line = enlarge(row[None, None, :, None].expand(1, 1, 3, 3))
    # Weights 3/4 and 1/4, edges repeated: 0, 4, 12, 28, 52, 64.
    assert line.shape == (1, 2, 6, 3)
    assert line[0, 0, :, 0].tolist() == [0, 4, 12, 28, 52, 64]
    picture = noise(1, 9, 7, 3)
    exact = functional.interpolate(
        picture.permute(0, 3, 1, 2).double(), scale_factor=2, mode="bilinear"
    ).permute(0, 2, 3, 1)
    assert (enlarge(picture).double() - exact).abs().max() < 1


@needs_episodes
@needs_assets
def test_recorded_composites() -> None:
    for case in facts()["composites"]:
        k = case["k"]
        render = torch.from_numpy(arrays()[f"composite_{k}_rgb"])[None]
        bits = np.unpackbits(arrays()[f"composite_{k}_mask"], axis=1)
        mask = torch.from_numpy(bits).bool()[None]
        background = picture(ASSETS / "more_table" / "imgs" / TABLES[case["table_index"]])[None]
        frame = green_screen(render, background, mask)
        row = variant(case["env_id"])
        whole = isinstance(row.shift, WholeImageShift)
        index = torch.tensor([case["texture_index"] or 0])
        textures = torch.zeros(21, 480, 640, 3, dtype=torch.uint8)
        textures[index] = picture(ASSETS / "more_table" / "textures" / TEXTURES[int(index)])
        if isinstance(row.shift, TextureShift | WholeImageShift):
            assert opacity(row.shift, index).item() == pytest.approx(case["texture_mix"], abs=1e-6)
        found = apply_shift(row.shift, frame, mask, enlarge(textures) if whole else textures, index)
        recorded = torch.from_numpy(arrays()[f"composite_{k}_out"]).int()
        off = (found[0, ::2, ::2].int() - recorded).abs()
        assert off.max() <= 1, case
        assert (off.amax(-1) > 0).sum() <= 5, case
