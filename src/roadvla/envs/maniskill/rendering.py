"""How frames are drawn: which device, which shader, which lights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import sapien
import torch
from mani_skill.envs.scene import ManiSkillScene
from mani_skill.render.shaders import PREBUILT_SHADER_CONFIGS, ShaderConfig
from sapien.render import RenderBodyComponent

from roadvla.envs.maniskill.options import HEIGHT, SHADERS, WIDTH
from roadvla.errors import UserError, unknown_name

AMBIENT = (0.3, 0.3, 0.3)
LIGHTS = (((0.0, 0.0, -1.0), 2.2), ((-1.0, -0.5, -1.0), 0.7), ((1.0, 1.0, -1.0), 0.7))
"""Directions and intensities; none casts shadows."""
ROBOT_SPECULAR, ROBOT_ROUGHNESS = 0.9, 0.3

_PACKS = Path(__file__).with_name("shaders")


def shader_config(shader: str) -> ShaderConfig:
    """Return the shader's configuration; the picture formats that it needs are set globally.

    Raises:
        UserError: If there is none of that name.
    """
    if shader not in SHADERS:
        raise unknown_name("shader", shader, SHADERS)
    if shader == "default":
        sapien.render.set_picture_format("Color", "r32g32b32a32sfloat")
        sapien.render.set_picture_format("Segmentation", "r32g32b32a32uint")
        return PREBUILT_SHADER_CONFIGS["default"]
    # Small formats: frames are copied out of the renderer at every step.
    sapien.render.set_picture_format("Color", "r8g8b8a8unorm")
    sapien.render.set_picture_format("Segmentation", "r16g16b16a16uint")
    return ShaderConfig(
        shader_pack=str(_PACKS / shader),
        texture_names={"Color": ["rgb"], "Segmentation": ["segmentation"]},
        texture_transforms={
            "Color": lambda data: {"rgb": data[..., :3]},
            "Segmentation": lambda data: {"segmentation": data[..., 1:2]},
        },
    )


def render_device(physics: torch.device) -> sapien.Device:
    """Find the device that Vulkan draws on.

    Args:
        physics: Where the scene is simulated; frames stay on that GPU. Beside a processor any
            device does: a GPU, or the processor with a software driver.

    Raises:
        UserError: If there is none.
    """
    wanted = [sapien.Device(f"cuda:{physics.index or 0}")] if physics.type == "cuda" else []
    try:
        found = sapien.render.RenderSystem(*wanted).device
    except RuntimeError as error:
        raise UserError(
            f"no Vulkan device to draw with ({error}): `roadvla doctor` says what to install"
        ) from error
    if wanted and not found.is_cuda():
        raise UserError(
            f"{physics} simulates but Vulkan would draw on {found.name}: unset VK_ICD_FILENAMES, "
            f"and see `roadvla doctor`"
        )
    return found


def load_lights(scene: ManiSkillScene) -> None:
    """Put RL4VLA's lights into a scene."""
    scene.set_ambient_light(list(AMBIENT))
    for direction, intensity in LIGHTS:
        scene.add_directional_light(list(direction), [intensity] * 3)


def polish(robot: Any) -> None:
    """Make the robot shine as RL4VLA does."""
    for link in robot.links:
        for part in link._objs:
            component = part.entity.find_component_by_type(RenderBodyComponent)
            for shape in component.render_shapes if component is not None else ():
                for piece in shape.parts:
                    piece.material.set_specular(ROBOT_SPECULAR)
                    piece.material.set_roughness(ROBOT_ROUGHNESS)


def camera_at(size: tuple[int, int]) -> dict[str, Any]:
    """The camera at another resolution sees the same."""
    height, width = size
    across, down = width / WIDTH, height / HEIGHT
    intrinsic = np.array(
        [[623.588 * across, 0, 319.501 * across], [0, 623.588 * down, 239.545 * down], [0, 0, 1]]
    )
    return {"width": width, "height": height, "intrinsic": intrinsic}
