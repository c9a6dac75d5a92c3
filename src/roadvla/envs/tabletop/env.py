"""The tabletop as a vector environment: B kinematic episodes, rendered, in one batch of tensors."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from roadvla.envs.base import Snapshot, Step, check_ids, check_step
from roadvla.envs.suite import setting
from roadvla.envs.tabletop.camera import SIZE
from roadvla.envs.tabletop.dynamics import State, advance, initial_state
from roadvla.envs.tabletop.render import Renderer, quantize
from roadvla.envs.tabletop.scene import Scene, sample_scene
from roadvla.envs.tabletop.shifts import apply_overlay
from roadvla.envs.tabletop.textures import overlays


class TabletopEnv:
    """B episodes of one split of one setting (see ``roadvla.envs.base.VectorEnv``).

    Args:
        env: Setting of Table 3, by paper alias or RL4VLA id.
        split: ``train`` (in distribution) or ``test`` (out of distribution).
        num_envs: B.
        device: Where all tensors live.
        end_on_success: Whether an episode terminates at its first success. By default it does not:
            the length is fixed and success is read at the last step, as in RL4VLA.
    """

    def __init__(
        self,
        env: str,
        *,
        split: str,
        num_envs: int,
        device: str | torch.device = "cpu",
        end_on_success: bool = False,
    ) -> None:
        self.distribution = setting(env).distribution(split)
        self.num_envs = num_envs
        self.horizon = self.distribution.horizon
        self.image_shape: tuple[int, int, int] = (SIZE, SIZE, 3)
        self.device = torch.device(device)
        self.end_on_success = end_on_success
        self._renderer = Renderer(self.device)
        self._overlays = overlays().to(self.device)
        self._scene: Scene | None = None
        self._state: State | None = None
        self._ids = torch.empty(0, dtype=torch.int64)
        self._instructions: list[str] = []

    @property
    def scene(self) -> Scene:
        """What the running episodes started from.

        Raises:
            RuntimeError: Before the first reset.
        """
        if self._scene is None:
            raise RuntimeError("reset the environment first")
        return self._scene

    @property
    def state(self) -> State:
        """Simulator state of the running episodes: privileged, for experts and analyses.

        Raises:
            RuntimeError: Before the first reset.
        """
        if self._state is None:
            raise RuntimeError("reset the environment first")
        return self._state

    def snapshot(self) -> Snapshot:
        """Where things are now (see ``roadvla.envs.base.Privileged``).

        Raises:
            RuntimeError: Before the first reset.
        """
        state = self.state
        return Snapshot(
            tip=state.gripper[:, :3],
            objects=state.object_position,
            receptacles=torch.nn.functional.pad(self.scene.receptacle_xy, (0, 1)),
            held=state.held,
            is_open=state.is_open,
            usual_place=torch.zeros(2, device=self.device),
        )

    @property
    def instructions(self) -> list[str]:
        """What each episode asks for."""
        return self._instructions

    def reset(self, episode_ids: Int[Tensor, " N"]) -> UInt8[Tensor, "B H W 3"]:
        """Start the episodes with these ids and return their first frames.

        Raises:
            ValueError: If there are not exactly ``num_envs`` ids or one is negative.
        """
        check_ids(episode_ids, self.num_envs)
        self._ids = episode_ids.to(self.device, torch.int64)
        self._scene = sample_scene(self._ids, self.distribution)
        self._state = initial_state(self._scene)
        self._instructions = self._scene.instructions()
        self._renderer.bake(self._scene)
        return self._image()

    def step(self, action: Float[Tensor, "N A"]) -> Step:
        """Apply one action per environment (see the contract)."""
        before, scene = self.state, self.scene
        check_step(action, self.num_envs, elapsed=before.elapsed, horizon=self.horizon)
        after = advance(
            before,
            scene,
            action.to(self.device, torch.float32),
            self._ids,
            reposition_step=self.distribution.reposition_step,
        )
        terminated = after.success & ~after.ended & self.end_on_success
        after = replace(after, ended=after.ended | terminated)
        self._state = after
        last = after.elapsed == self.horizon
        return Step(
            image=self._image(),
            reward=after.potential() - before.potential(),
            terminated=terminated,
            truncated=torch.full_like(terminated, last) & ~after.ended,
            info={
                "success": after.success,
                "success_once": after.success_once,
                "grasped": after.grasped,
                "consecutive_grasp": after.held_long,
            },
        )

    def _image(self) -> Tensor:
        frame = self._renderer.render(self.state, self.scene)
        colour = apply_overlay(
            frame,
            self._overlays,
            self.scene.overlay,
            self._ids,
            self.distribution,
            self.state.elapsed,
        )
        return quantize(colour)
