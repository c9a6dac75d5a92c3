"""A scene driven by ids and actions; it writes what it shows into given tensors."""

from __future__ import annotations

from dataclasses import asdict

import torch
from jaxtyping import Float, Int
from torch import Tensor

from roadvla.envs.maniskill.outputs import FLAGS, Outputs, Recipe
from roadvla.envs.maniskill.scene import PutOnPlateScene


class Simulation:
    """One scene of B episodes; on a processor B is 1.

    Args:
        recipe: What it is made from.
        outputs: Where it writes.
    """

    def __init__(self, recipe: Recipe, outputs: Outputs) -> None:
        self._recipe, self._outputs = recipe, outputs
        self._scene = PutOnPlateScene(
            setting=recipe.setting,
            build=recipe.build,
            size=recipe.settings.size,
            shader=recipe.shader,
            fixes=asdict(recipe.settings.fixes),
            stand_ins=recipe.settings.stand_ins,
            num_envs=len(outputs.flags),
            obs_mode="none",
            sim_backend=f"physx_{recipe.device}",
        )

    def reset(self, episode_ids: Int[Tensor, " B"]) -> None:
        """Start the episodes with these RL4VLA ids."""
        options = {"obj_set": self._recipe.obj_set, "episode_id": episode_ids}
        self._scene.reset(seed=0, options=options)
        self._write()

    def step(self, action: Float[Tensor, "B 7"]) -> None:
        """Apply one action of the controller's: metres, radians, gripper -1 to 1."""
        self._scene.step(action)
        self._write()

    def close(self) -> None:
        """Free the scene."""
        self._scene.close()

    def _write(self) -> None:
        progress, out = self._scene.progress, self._outputs
        out.image.copy_(self._scene.capture())
        out.flags.copy_(torch.stack([getattr(progress, name) for name in FLAGS], dim=1))
        out.state.copy_(self._scene.state())
