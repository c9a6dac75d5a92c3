"""The fixed perspective camera: one ray per pixel and the projection back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

SIZE = 48
_POSITION = (0.50, 0.0, 0.46)
_TARGET = (0.0, 0.0, 0.045)
_FIELD_OF_VIEW = math.radians(34.0)


@dataclass(frozen=True)
class Camera:
    """Pinhole camera, image rows downwards, pixels flattened row by row.

    Attributes:
        origin: Position, metres.
        axes: Rows: right, down and forward unit vectors.
        focal: Focal length in pixels.
        rays: Direction through each pixel's centre, of depth 1 along ``forward``.
        ground: Where each ray meets the table plane z = 0, metres.
    """

    origin: Float[Tensor, " 3"]
    axes: Float[Tensor, "3 3"]
    focal: float
    rays: Float[Tensor, "P 3"]
    ground: Float[Tensor, "P 2"]

    def project(self, points: Float[Tensor, "*N 3"]) -> Float[Tensor, "*N 2"]:
        """Return the (row, column) of points in space, in pixels."""
        local = (points - self.origin) @ self.axes.T
        scaled = self.focal * local[..., :2] / local[..., 2:].clamp(min=0.05)
        return scaled.flip(-1) + (SIZE - 1) / 2


def make_camera(device: torch.device) -> Camera:
    """Build the suite's camera."""
    origin, target = torch.tensor(_POSITION), torch.tensor(_TARGET)
    forward = torch.nn.functional.normalize(target - origin, dim=0)
    right = torch.nn.functional.normalize(
        torch.linalg.cross(forward, torch.tensor([0.0, 0.0, 1.0])), dim=0
    )
    axes = torch.stack([right, torch.linalg.cross(forward, right), forward])
    focal = SIZE / 2 / math.tan(_FIELD_OF_VIEW / 2)
    axis = (torch.arange(SIZE) - (SIZE - 1) / 2) / focal
    row, column = torch.meshgrid(axis, axis, indexing="ij")
    rays = torch.stack([column, row, torch.ones_like(row)], -1).view(-1, 3) @ axes
    ground = origin[:2] - rays[:, :2] * (origin[2] / rays[:, 2:])
    return Camera(origin.to(device), axes.to(device), focal, rays.to(device), ground.to(device))
