"""How frames are drawn: which device, which shader, which lights."""

from __future__ import annotations

from pathlib import Path

import sapien
from mani_skill.envs.scene import ManiSkillScene
from mani_skill.render.shaders import PREBUILT_SHADER_CONFIGS, ShaderConfig

from roadvla.envs.maniskill.options import SHADERS
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


def render_device() -> sapien.Device:
    """Find the device that Vulkan draws on: a GPU, or a processor with a software driver.

    Raises:
        UserError: If there is none.
    """
    try:
        return sapien.render.RenderSystem().device
    except RuntimeError as error:
        raise UserError(
            f"no Vulkan device to draw with ({error}): `roadvla doctor` says what to install"
        ) from error


def load_lights(scene: ManiSkillScene) -> None:
    """Put RL4VLA's lights into a scene."""
    scene.set_ambient_light(list(AMBIENT))
    for direction, intensity in LIGHTS:
        scene.add_directional_light(list(direction), [intensity] * 3)
