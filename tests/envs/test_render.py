"""The renderer against geometry: projection, hidden surfaces, and a slow ray caster as oracle."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from roadvla.envs import setting
from roadvla.envs.tabletop.camera import SIZE, make_camera
from roadvla.envs.tabletop.dynamics import initial_state
from roadvla.envs.tabletop.render import Renderer, quantize
from roadvla.envs.tabletop.scene import HALF_EXTENTS, SHAPES, sample_scene
from roadvla.envs.tabletop.shifts import crop_overlays
from roadvla.envs.tabletop.textures import OVERLAY_SIZE, overlays, table_colours

CPU = torch.device("cpu")


def test_projecting_a_point_on_a_ray_gives_back_its_pixel() -> None:
    camera = make_camera(CPU)
    for pixel in (0, 47, 1000, SIZE * SIZE - 1):
        for distance in (0.2, 0.6, 1.0):
            point = camera.origin + distance * camera.rays[pixel]
            row, column = camera.project(point[None])[0].tolist()
            assert row == pytest.approx(pixel // SIZE, abs=1e-3)
            assert column == pytest.approx(pixel % SIZE, abs=1e-3)


def test_rays_meet_the_table_where_they_say() -> None:
    camera = make_camera(CPU)
    point = torch.cat([camera.ground, torch.zeros(len(camera.ground), 1)], 1)
    offset = point - camera.origin
    cosine = torch.nn.functional.cosine_similarity(offset, camera.rays, dim=1)
    assert (cosine > 1 - 1e-5).all()


def test_the_axes_are_orthonormal_and_right_is_right() -> None:
    axes = make_camera(CPU).axes
    assert torch.allclose(axes @ axes.T, torch.eye(3), atol=1e-6)
    # The camera stands at +x and looks towards -x: +y is to its right.
    assert axes[0].tolist() == pytest.approx([0.0, 1.0, 0.0], abs=1e-6)


def cast_slowly(shape: int, centre: torch.Tensor, yaw: float) -> set[int]:
    """Pixels whose ray comes inside the object, by marching along it in steps of half a mm."""
    camera = make_camera(CPU)
    half = HALF_EXTENTS[shape]
    t = torch.arange(0.3, 0.9, 0.0005)
    rays = camera.rays
    points = camera.origin + t[:, None, None] * rays
    local = points - centre
    x = local[..., 0] * math.cos(yaw) + local[..., 1] * math.sin(yaw)
    y = local[..., 1] * math.cos(yaw) - local[..., 0] * math.sin(yaw)
    scaled = torch.stack([x, y, local[..., 2]], -1) / half
    if SHAPES[shape] in ("ball", "carrot"):
        inside = scaled.square().sum(-1) < 1
    else:
        inside = scaled.abs().amax(-1) < 1
    return set(inside.any(0).nonzero().flatten().tolist())


@pytest.mark.parametrize("shape", range(4))
def test_objects_cover_the_pixels_that_a_slow_caster_says(shape: int) -> None:
    scene = sample_scene(torch.arange(300), setting("VR-UnseenTable").train)
    index = int((scene.shape[:, 0] == shape).nonzero()[0])
    scene = dataclasses.replace(
        scene,
        **{
            field.name: getattr(scene, field.name)[index : index + 1]
            for field in dataclasses.fields(scene)
        },
    )
    state = initial_state(scene)
    away = state.gripper.clone()
    away[:, :3] = torch.tensor([-0.17, -0.21, 0.2])
    state = dataclasses.replace(state, gripper=away)
    renderer = Renderer(CPU)
    renderer.bake(scene)
    without = dataclasses.replace(
        state, object_position=state.object_position + torch.tensor([0.0, 0.0, 5.0])
    )
    seen = renderer.render(state, scene).colour[0]
    bare = renderer.render(without, scene).colour[0] * renderer._shade(state)[0, :, None]
    bare = bare / renderer._shade(without)[0, :, None]
    changed = set(((seen - bare).abs().amax(1) > 0.02).nonzero().flatten().tolist())
    centre, yaw = state.object_position[0, 0], float(state.object_yaw[0, 0])
    expected = cast_slowly(shape, centre, yaw)
    assert len(expected) > 20
    assert len(changed ^ expected) <= 0.1 * len(expected)


def test_the_gripper_hides_what_is_behind_it() -> None:
    scene = sample_scene(torch.arange(8), setting("VR-UnseenTable").train)
    state = initial_state(scene)
    camera = make_camera(CPU)
    towards = camera.origin - state.object_position[:, 0]
    gripper = state.gripper.clone()
    gripper[:, :3] = state.object_position[:, 0] + 0.25 * towards - torch.tensor([0, 0, 0.058])
    renderer = Renderer(CPU)
    renderer.bake(scene)
    hidden = renderer.render(dataclasses.replace(state, gripper=gripper), scene).colour
    row, column = camera.project(state.object_position[:, 0]).round().long().unbind(1)
    centre = hidden[torch.arange(8), row * SIZE + column]
    assert (centre.amax(1) < 0.45).all()  # palm and column are dark grey
    assert ((centre.amax(1) - centre.amin(1)) < 0.1).all()


def test_the_gripper_is_hidden_by_what_is_before_it() -> None:
    scene = sample_scene(torch.arange(8), setting("VR-UnseenTable").train)
    state = initial_state(scene)
    camera = make_camera(CPU)
    position = state.object_position.clone()
    position[:, 0, 2] = 0.15
    away = position[:, 0] - camera.origin
    gripper = state.gripper.clone()
    gripper[:, :3] = position[:, 0] + 0.12 * away - torch.tensor([0, 0, 0.058])
    far = state.gripper.clone()
    far[:, :3] = torch.tensor([-0.17, -0.21, 0.2])
    renderer = Renderer(CPU)
    renderer.bake(scene)
    behind = dataclasses.replace(state, object_position=position, gripper=gripper)
    row, column = camera.project(position[:, 0]).round().long().unbind(1)
    centre = (torch.arange(8), row * SIZE + column)
    seen = renderer.render(behind, scene).colour[centre]
    alone = renderer.render(dataclasses.replace(behind, gripper=far), scene).colour[centre]
    assert torch.allclose(seen, alone, atol=0.01)


def test_the_foreground_is_what_stands_on_the_table() -> None:
    scene = sample_scene(torch.arange(16), setting("CR-MultiReceptacle").test)
    renderer = Renderer(CPU)
    renderer.bake(scene)
    frame = renderer.render(initial_state(scene), scene)
    share = frame.foreground.float().mean(1)
    assert ((share > 0.08) & (share < 0.4)).all()
    row, column = (
        renderer.camera.project(torch.cat([scene.object_xy, torch.full((16, 1, 1), 0.02)], -1))
        .round()
        .long()[:, 0]
        .unbind(1)
    )
    assert frame.foreground[torch.arange(16), row * SIZE + column].all()


def test_colours_become_bytes_by_rounding() -> None:
    image = quantize(torch.full((1, SIZE * SIZE, 3), 0.5))
    assert image.shape == (1, SIZE, SIZE, 3)
    assert (image == 128).all()  # 127.5 rounds to even
    assert (quantize(torch.full((1, SIZE * SIZE, 3), 1.7)) == 255).all()


def test_textures_are_32_different_tables_and_16_overlays() -> None:
    tables = table_colours(make_camera(CPU).ground)
    assert tables.shape == (32, SIZE * SIZE, 3)
    distance = torch.cdist(tables.flatten(1), tables.flatten(1)) + 1e3 * torch.eye(32)
    assert distance.min() > 1
    saturation = (tables.amax(-1) - tables.amin(-1)).mean(1)
    assert saturation[:16].max() < saturation[16:].median()
    assert overlays().shape == (16, OVERLAY_SIZE, OVERLAY_SIZE, 3)
    assert not torch.equal(overlays(), overlays(70))


# Texture i is constant i, so a crop of it is constant; scale 1 and offset 0 give the corner itself.
def test_crops_come_from_the_right_texture_and_place() -> None:
    flat = torch.arange(16.0)[:, None, None, None].expand(16, OVERLAY_SIZE, OVERLAY_SIZE, 3)
    index = torch.tensor([3, 11])
    crop = crop_overlays(flat.contiguous(), index, torch.rand(2, 3))
    assert (crop == index[:, None, None]).all()
    ramp = torch.arange(OVERLAY_SIZE**2).view(1, OVERLAY_SIZE, OVERLAY_SIZE, 1).float()
    u = torch.tensor([[0.5, 0.0, 0.25]])
    crop = crop_overlays(ramp.expand(-1, -1, -1, 3).contiguous(), torch.tensor([0]), u)
    corner = crop.view(SIZE, SIZE, 3)
    assert corner[0, 0, 0] == OVERLAY_SIZE // 4
    assert corner[1, 2, 0] == OVERLAY_SIZE + OVERLAY_SIZE // 4 + 2
