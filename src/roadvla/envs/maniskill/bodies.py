"""Bodies put into the simulator: convex pieces with friction, and what they look like."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sapien
import torch
from jaxtyping import Bool
from mani_skill.envs.scene import ManiSkillScene
from mani_skill.utils.structs import Actor
from sapien.physx import PhysxMaterial
from torch import Tensor

from roadvla.envs.maniskill.assets import COLLISION, AssetFolders, require, visual_of
from roadvla.envs.maniskill.objects import Model

STAGE = "arena"
_FRICTION = 1.0
# Ids above those of robot and bodies, the stage's say, must be found in the table of what is kept.
_MORE_IDS = 1024
_STAGE_POSE = sapien.Pose([2.0634, 2.8313, 0.0])
_STAGE_TURN = sapien.Pose(q=[0.707, 0.707, 0.0, 0.0])
_STAND_IN_COLOUR = [0.6, 0.6, 0.6, 1.0]
# The table that stands in for the stage: its top is where RL4VLA's bodies come to rest.
_TABLE_TOP, _TABLE_HALF, _TABLE_CENTRE = 0.8695, (0.6, 0.7, 0.03), (-0.15, 0.0)
_FLOOR_HALF = 4.0


def build_body(
    scene: ManiSkillScene,
    models: Path,
    model: Model,
    *,
    name: str,
    stand_ins: bool,
    scenes: Sequence[int] | None = None,
) -> Actor:
    """Build a body from a model's meshes.

    Args:
        scene: Gets the body.
        models: Folder of models.
        model: Which of them.
        name: Unique in the scene.
        stand_ins: Whether a missing visual mesh may be replaced by the collision mesh in grey.
        scenes: Sub-scenes that get it; all unless given.

    Raises:
        UserError: If a mesh is missing.
    """
    folder = models / model.folder
    builder: Any = scene.create_actor_builder()
    collision = str(require(folder / COLLISION))
    material = PhysxMaterial(static_friction=_FRICTION, dynamic_friction=_FRICTION, restitution=0.0)
    scale = [model.scale] * 3
    builder.add_multiple_convex_collisions_from_file(
        filename=collision, scale=scale, material=material, density=model.density
    )
    visual = visual_of(folder)
    if scene.can_render() and visual is None and stand_ins:
        grey = sapien.render.RenderMaterial(base_color=_STAND_IN_COLOUR)
        builder.add_visual_from_file(filename=collision, scale=scale, material=grey)
    elif scene.can_render():
        builder.add_visual_from_file(
            filename=str(visual or require(folder / "textured.glb")), scale=scale
        )
    if scenes is not None:
        builder.set_scene_idxs(list(scenes))
    builder.initial_pose = sapien.Pose([0.0, 0.0, 10.0])
    return builder.build(name=name)


def build_stage(
    scene: ManiSkillScene, folders: AssetFolders, *, stand_ins: bool, drawn: bool
) -> Actor:
    """Build table and room. The green screen covers them; they hide what is below the table's top.

    Args:
        scene: Gets the stage.
        folders: Where the assets lie.
        stand_ins: Whether a plain table may replace a missing mesh.
        drawn: Whether the renderer draws them. Our shaders hide what they would hide without that.

    Raises:
        UserError: If the mesh is missing.
    """
    builder: Any = scene.create_actor_builder()
    if folders.stage.is_file() or not stand_ins:
        stage = str(require(folders.stage))
        builder.add_nonconvex_collision_from_file(stage, pose=_STAGE_TURN)
        if drawn:
            builder.add_visual_from_file(stage, pose=_STAGE_TURN)
        builder.initial_pose = _STAGE_POSE
    else:
        x, y = _TABLE_CENTRE
        top = sapien.Pose([x, y, _TABLE_TOP - _TABLE_HALF[2]])
        floor = sapien.Pose([0.0, 0.0, -0.1])
        builder.add_box_collision(pose=top, half_size=list(_TABLE_HALF))
        builder.add_box_collision(pose=floor, half_size=[_FLOOR_HALF, _FLOOR_HALF, 0.1])
        builder.initial_pose = sapien.Pose()
    return builder.build_static(name=STAGE)


def kept_ids(scene: ManiSkillScene, robot: Any) -> Bool[Tensor, " K"]:
    """Of each segmentation id, whether it is the robot's or a body's: pixels that are kept."""
    parts = [part.entity for link in robot.links for part in link._objs]
    for actor in scene.actors.values():
        parts += actor._objs if actor.name != STAGE else []
    ids = torch.tensor([part.per_scene_id for part in parts], device=scene.device)
    keep = torch.zeros(int(ids.max()) + _MORE_IDS, dtype=torch.bool, device=scene.device)
    keep[ids] = True
    return keep
