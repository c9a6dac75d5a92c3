"""Batched ray casting of the tabletop: each thing is cast only inside its own window of pixels.

The table and the receptacles are baked once per episode. Per frame remain soft shadows, an
ellipsoid or box per object and the gripper's four boxes, each cast against the rays of a window
around its projection and composited by depth. Ordinary tensor operations, no compiler.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from roadvla.envs.tabletop.camera import SIZE, make_camera
from roadvla.envs.tabletop.dynamics import State
from roadvla.envs.tabletop.scene import HALF_EXTENTS, RECEPTACLE_RADIUS, Scene
from roadvla.envs.tabletop.textures import table_colours

_PALETTE = torch.tensor(
    [
        [0.85, 0.10, 0.10],
        [0.10, 0.65, 0.15],
        [0.12, 0.25, 0.85],
        [0.95, 0.85, 0.10],
        [0.55, 0.15, 0.65],
        [0.98, 0.50, 0.05],
        [0.10, 0.80, 0.85],
        [0.95, 0.95, 0.95],
    ]
)
# Gripper boxes in its own frame, metres from the tip: two fingers, palm, column.
_BOX_CENTRE = torch.tensor(
    [[0.0, 0.034, 0.02], [0.0, -0.034, 0.02], [0.0, 0.0, 0.058], [0.0, 0.0, 0.105]]
)
_BOX_HALF = torch.tensor(
    [[0.009, 0.006, 0.026], [0.009, 0.006, 0.026], [0.016, 0.044, 0.014], [0.014, 0.014, 0.035]]
)
_BOX_COLOUR = torch.tensor(
    [[0.15, 0.15, 0.17], [0.15, 0.15, 0.17], [0.25, 0.25, 0.28], [0.42, 0.42, 0.46]]
)
_CLOSED_SHIFT = 0.016
_TRAY_HALF = 0.043
_FACE_LIGHT = torch.tensor([0.82, 0.66, 1.0])
_LIGHT = torch.tensor([0.35, 0.25, 0.90])
_OBJECT_WINDOW = (20, 20)
_GRIPPER_WINDOW = (30, 24)
_GRIPPER_MIDDLE = 0.06
_FAR = 1e6


@dataclass(frozen=True)
class Frame:
    """A rendered batch.

    Attributes:
        colour: RGB, 0 to 1.
        foreground: Whether the pixel shows an object, a receptacle or the arm.
    """

    colour: Float[Tensor, "B P 3"]
    foreground: Bool[Tensor, "B P"]


class Renderer:
    """Renders states of one batch of scenes; ``bake`` first, then ``render`` per step."""

    def __init__(self, device: torch.device) -> None:
        self.camera = make_camera(device)
        self._tables = table_colours(self.camera.ground.cpu()).to(device)
        self._palette = _PALETTE.to(device)
        self._extents = HALF_EXTENTS.to(device)
        self._boxes = (_BOX_CENTRE.to(device), _BOX_HALF.to(device), _BOX_COLOUR.to(device))
        self._face_light = _FACE_LIGHT.to(device)
        self._light = torch.nn.functional.normalize(_LIGHT, dim=0).to(device)
        self._object_window = _window(*_OBJECT_WINDOW, device)
        self._gripper_window = _window(*_GRIPPER_WINDOW, device)
        self._ground = self._receptacles = torch.empty(0, device=device)

    def bake(self, scene: Scene) -> None:
        """Draw table and receptacles, which stay for the whole episode."""
        colour = self._tables[scene.table]
        covered = torch.zeros(colour.shape[:2], dtype=torch.bool, device=colour.device)
        for slot in range(scene.receptacle_xy.shape[1]):
            offset = self.camera.ground - scene.receptacle_xy[:, slot, None]
            radius = offset.square().sum(-1).sqrt() / RECEPTACLE_RADIUS
            tray = offset.abs().amax(-1) / _TRAY_HALF
            radius = torch.where(scene.receptacle_shape[:, slot, None] == 1, tray, radius)
            plate = self._palette[scene.receptacle_colour[:, slot]][:, None]
            rim = 0.55 + 0.45 * ((radius > 0.62) & (radius < 0.8)).float() + 0.30 * (radius > 0.8)
            inside = radius < 1
            colour = torch.where(inside[..., None], (plate * rim[..., None]).clamp(0, 1), colour)
            covered |= inside
        self._ground, self._receptacles = colour, covered

    def render(self, state: State, scene: Scene) -> Frame:
        """Draw objects, gripper and shadows over the baked ground."""
        colour = self._ground * self._shade(state)[..., None]
        depth = torch.full(colour.shape[:2], _FAR, device=colour.device)
        for slot in range(scene.shape.shape[1]):
            self._draw_object(colour, depth, state, scene, slot)
        self._draw_gripper(colour, depth, state)
        return Frame(colour, (depth < _FAR) | self._receptacles)

    def _shade(self, state: State) -> Tensor:
        """Product of soft blob shadows under the objects and, wider with height, the gripper."""
        xyz = torch.cat([state.object_position, state.gripper[:, None, :3]], 1)
        radius = 0.045 + 0.25 * xyz[..., 2].clamp(0, 0.2)
        strength = 0.55 * 0.045 / radius
        ground = self.camera.ground
        shade = torch.ones(len(xyz), len(ground), device=xyz.device)
        for i in range(xyz.shape[1]):
            offset_x = ground[:, 0] - xyz[:, i, 0, None]
            offset_y = ground[:, 1] - xyz[:, i, 1, None]
            squared = offset_x.square_().add_(offset_y.square_())
            fall = squared.mul_(-1 / radius[:, i, None].square()).add_(1.0).clamp_(min=0.0)
            shade.mul_(fall.square_().mul_(-strength[:, i, None]).add_(1.0))
        return shade

    def _pixels(self, centre: Tensor, window: Tensor, size: tuple[int, int]) -> Tensor:
        """Flat indices of the window around a projected centre, pushed inside the image."""
        corner = self.camera.project(centre).round().long()
        row = (corner[:, 0] - size[0] // 2).clamp(0, SIZE - size[0])
        column = (corner[:, 1] - size[1] // 2).clamp(0, SIZE - size[1])
        return (row * SIZE + column)[:, None] + window

    def _draw_object(
        self, colour: Tensor, depth: Tensor, state: State, scene: Scene, slot: int
    ) -> None:
        centre, yaw = state.object_position[:, slot], state.object_yaw[:, slot]
        shape = scene.shape[:, slot]
        pixels = self._pixels(centre, self._object_window, _OBJECT_WINDOW)
        rotation = _yaw_matrix(yaw)
        rays = self.camera.rays[pixels] @ rotation
        origin = ((self.camera.origin - centre)[:, None] @ rotation)[:, 0]
        half = self._extents[shape]
        is_round = ((shape == 0) | (shape == 2))[:, None]
        t_round, light_round = _cast_ellipsoid(origin, rays, half, self._light @ rotation)
        t_box, face = _cast_boxes(origin, rays, torch.zeros_like(half)[:, None], half[:, None])
        t = torch.where(is_round, t_round, t_box[:, 0])
        light = torch.where(is_round, light_round, self._face_light[face[:, 0]])
        tint = self._palette[scene.colour[:, slot]][:, None] * light[..., None]
        _composite(colour, depth, pixels, t, tint)

    def _draw_gripper(self, colour: Tensor, depth: Tensor, state: State) -> None:
        rotation = _euler_matrix(state.gripper[:, 3:])
        tip = state.gripper[:, :3]
        pixels = self._pixels(
            tip + rotation[:, :, 2] * _GRIPPER_MIDDLE, self._gripper_window, _GRIPPER_WINDOW
        )
        rays = self.camera.rays[pixels] @ rotation
        origin = ((self.camera.origin - tip)[:, None] @ rotation)[:, 0]
        centre, half, box_colour = self._boxes
        shift = torch.where(state.is_open, 0.0, _CLOSED_SHIFT)[:, None]
        y = centre[:2, 1] - shift * centre[:2, 1].sign()
        centres = centre.expand(len(tip), -1, -1).clone()
        centres[:, :2, 1] = y
        t, face = _cast_boxes(origin, rays, centres, half.expand(len(tip), -1, -1))
        nearest = t.min(1)
        light = self._face_light[face.gather(1, nearest.indices[:, None])[:, 0]]
        tint = box_colour[nearest.indices] * light[..., None]
        _composite(colour, depth, pixels, nearest.values, tint)


def quantize(colour: Float[Tensor, "B P 3"]) -> UInt8[Tensor, "B H W 3"]:
    """Round colours in [0, 1] to bytes and shape them as images."""
    return (colour * 255).round_().clamp_(0, 255).byte().view(-1, SIZE, SIZE, 3)


def _window(height: int, width: int, device: torch.device) -> Tensor:
    rows = torch.arange(height, device=device)[:, None] * SIZE
    return (rows + torch.arange(width, device=device)).view(-1)


def _composite(colour: Tensor, depth: Tensor, pixels: Tensor, t: Tensor, tint: Tensor) -> None:
    """Write tint and depth in place where t is nearer than what is there."""
    before = depth.gather(1, pixels)
    nearer = t < before
    depth.scatter_(1, pixels, torch.where(nearer, t, before))
    index = pixels[..., None].expand(-1, -1, 3)
    colour.scatter_(1, index, torch.where(nearer[..., None], tint, colour.gather(1, index)))


def _cast_ellipsoid(
    origin: Tensor, rays: Tensor, half: Tensor, light: Tensor
) -> tuple[Float[Tensor, "B P"], Float[Tensor, "B P"]]:
    """Distance to an ellipsoid at the origin of its frame and the light on it there."""
    o, d = origin / half, rays / half[:, None]
    a = d.square().sum(-1)
    b = (d * o[:, None]).sum(-1)
    c = o.square().sum(-1, keepdim=True) - 1
    discriminant = b.square() - a * c
    t = (-b - discriminant.clamp(min=0).sqrt()) / a
    normal = torch.nn.functional.normalize((o[:, None] + t[..., None] * d) / half[:, None], dim=-1)
    shading = 0.45 + 0.55 * (normal * light[:, None]).sum(-1).clamp(min=0)
    return torch.where(discriminant > 0, t, _FAR), shading


def _cast_boxes(
    origin: Tensor, rays: Tensor, centre: Tensor, half: Tensor
) -> tuple[Float[Tensor, "B G P"], Int[Tensor, "B G P"]]:
    """Distance to G boxes aligned with the frame, and the axis of the face that is hit."""
    inverse = 1 / torch.where(rays.abs() < 1e-9, 1e-9, rays)
    offset = (centre - origin[:, None])[:, :, None]
    middle = offset * inverse[:, None]
    reach = half[:, :, None] * inverse[:, None].abs()
    enter = (middle - reach).max(-1)
    leave = (middle + reach).amin(-1)
    hit = (enter.values < leave) & (enter.values > 0)
    return torch.where(hit, enter.values, _FAR), enter.indices


def _yaw_matrix(yaw: Float[Tensor, " B"]) -> Float[Tensor, "B 3 3"]:
    zero = torch.zeros_like(yaw)
    return _euler_matrix(torch.stack([zero, zero, yaw], 1))


def _euler_matrix(angles: Float[Tensor, "B 3"]) -> Float[Tensor, "B 3 3"]:
    """Rotation Rz(yaw)·Ry(pitch)·Rx(roll)."""
    (cr, cp, cy), (sr, sp, sy) = angles.cos().unbind(1), angles.sin().unbind(1)
    rows = [
        torch.stack([cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr], 1),
        torch.stack([sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr], 1),
        torch.stack([-sp, cp * sr, cp * cr], 1),
    ]
    return torch.stack(rows, 1)
