"""The suite on ManiSkill as a vector environment: on a GPU in one process, or in workers."""

from __future__ import annotations

import os
import sys
from functools import cache
from typing import Protocol

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from roadvla.envs.base import Snapshot, Step, check_ids, check_step
from roadvla.envs.maniskill.assets import asset_folders, require
from roadvla.envs.maniskill.episodes import Episodes, decode, draw_ids
from roadvla.envs.maniskill.inspection import stand_ins_in
from roadvla.envs.maniskill.instructions import instructions
from roadvla.envs.maniskill.judge import potential
from roadvla.envs.maniskill.objects import OBJECTS, RECEPTACLES, read_boxes
from roadvla.envs.maniskill.options import ManiSkillSettings
from roadvla.envs.maniskill.outputs import FLAGS, Outputs, Recipe
from roadvla.envs.maniskill.positions import CENTRE
from roadvla.envs.maniskill.settings import HORIZON, variant
from roadvla.envs.maniskill.shifts import DistractorObject, DistractorReceptacle
from roadvla.envs.maniskill.state import State, unpack_state
from roadvla.envs.maniskill.workers import Workers
from roadvla.errors import UserError

MAX_TRANSLATION, MAX_ROTATION = 0.1, 0.5
"""Largest motions of one action, metres and radians: well beyond what Bridge's policies do. A
farther target could not be reached, and the arm would stop until the next reset."""
_DEFAULT = ManiSkillSettings()
_HALF_OPEN = 0.026  # of the fingers' 0.015 to 0.037 m


class _Backend(Protocol):
    def reset(self, episode_ids: Int[Tensor, " B"]) -> None: ...
    def step(self, action: Float[Tensor, "B 7"]) -> None: ...
    def close(self) -> None: ...


class ManiSkillEnv:
    """B episodes of one set of one setting (see ``roadvla.envs.base.VectorEnv``).

    Episodes are numbered as everywhere in the project; ``rl4vla_ids`` says which of RL4VLA's own
    ids the running ones are.

    Args:
        env: Paper alias, or one of RL4VLA's 17 ids.
        split: ``train``, ``test`` or ``all``.
        num_envs: B.
        device: ``cuda:k`` simulates all episodes at once on that GPU; ``cpu`` in worker processes.
        end_on_success: Whether an episode terminates at its first success.
        settings: How it is simulated.

    Attributes:
        boxes: Lowest and highest corners of all objects and all receptacles, in their own frames,
            metres, [M, 2, 3] each.

    Raises:
        UserError: If there is no such setting, set or asset, or nothing to draw with.
    """

    def __init__(
        self,
        env: str,
        *,
        split: str,
        num_envs: int,
        device: str | torch.device = "cpu",
        end_on_success: bool = False,
        settings: ManiSkillSettings = _DEFAULT,
    ) -> None:
        self.variant = variant(env, settings.fixes)
        self.variant.objects.of(split)
        self.split, self.settings = split, settings
        self.num_envs, self.horizon = num_envs, HORIZON
        self.image_shape: tuple[int, int, int] = (*settings.size, 3)
        self.device = torch.device(device)
        self.end_on_success = end_on_success
        gpu = self.device.type == "cuda"
        if settings.batch_texture_box and not gpu and num_envs > 1:
            raise UserError(
                "batch_texture_box needs episodes that are simulated together: pass --device cuda "
                "or drop it"
            )
        folders = asset_folders()
        self._stand_in_files = tuple(found.asset.path for found in stand_ins_in(folders))
        if self._stand_in_files and not settings.stand_ins:
            _warn(self._stand_in_files)
        self.boxes = (
            read_boxes(require(folders.objects / "model_db.json"), OBJECTS),
            read_boxes(require(folders.receptacles / "model_db.json"), RECEPTACLES),
        )
        self._shader = settings.shader or ("default" if gpu else "one_pass")
        recipe = Recipe(
            setting=self.variant.env_id,
            obj_set=split,
            settings=settings,
            shader=self._shader,
            build="all" if gpu else "chosen",
            device=str(self.device),
        )
        self._backend: _Backend
        if gpu:
            from roadvla.envs.maniskill.simulation import Simulation

            self._out = Outputs.empty(num_envs, settings.size, self.device)
            self._backend = Simulation(recipe, self._out)
        else:
            processes = settings.processes or len(os.sched_getaffinity(0))
            workers = Workers(recipe, num_envs, processes=processes)
            self._backend, self._out = workers, workers.outputs
        self._elapsed = -1
        self._ids = torch.empty(0, dtype=torch.int64)
        self._episodes: Episodes | None = None
        self._instructions: list[str] = []
        self._image = self._out.image
        self._potential = torch.zeros(num_envs, device=self.device)
        self._ended = torch.zeros(num_envs, dtype=torch.bool, device=self.device)
        self._info = self._flags()

    @property
    def facts(self) -> dict[str, object]:
        """What decides episodes and frames beyond setting and set; evaluations record it."""
        return {
            **self.settings.facts,
            "shader": self._shader,
            "physics": self.device.type,
            "stand_in_files": list(self._stand_in_files),
        }

    @property
    def episodes(self) -> Episodes:
        """What the running episodes contain.

        Raises:
            RuntimeError: Before the first reset.
        """
        if self._episodes is None:
            raise RuntimeError("reset the environment first")
        return self._episodes

    @property
    def rl4vla_ids(self) -> Int[Tensor, " B"]:
        """RL4VLA's ids of the running episodes."""
        return self._ids

    @property
    def state(self) -> State:
        """Simulator state of the running episodes: privileged, for experts and analyses.

        Raises:
            RuntimeError: Before the first reset.
        """
        if self._episodes is None:
            raise RuntimeError("reset the environment first")
        return unpack_state(self._out.state.clone())

    def snapshot(self) -> Snapshot:
        """Where things are now (see ``roadvla.envs.base.Privileged``).

        Only a grasp of the named object is seen, not one of a distractor.

        Raises:
            RuntimeError: Before the first reset.
        """
        state = self.state
        named, goal, other = state.bodies[..., :3].unbind(1)
        more_objects = isinstance(self.variant.shift, DistractorObject)
        more_receptacles = isinstance(self.variant.shift, DistractorReceptacle)
        holding = state.held > 0
        return Snapshot(
            tip=state.hand[:, :3],
            objects=torch.stack([named, other] if more_objects else [named], dim=1),
            receptacles=torch.stack([goal, other] if more_receptacles else [goal], dim=1),
            held=torch.where(holding, 0, -1),
            is_open=~holding & (state.fingers > _HALF_OPEN),
            usual_place=torch.tensor(CENTRE, device=self.device),
        )

    @property
    def instructions(self) -> list[str]:
        """What each episode asks for."""
        return self._instructions

    def reset(self, episode_ids: Int[Tensor, " N"]) -> UInt8[Tensor, "B H W 3"]:
        """Start the episodes with these numbers and return their first frames.

        Raises:
            ValueError: If there are not exactly ``num_envs`` of them or one is negative.
            WorkerError: If a worker fails, dies or hangs.
        """
        check_ids(episode_ids, self.num_envs)
        numbers = episode_ids.to("cpu", torch.int64)
        return self.start(draw_ids(self.variant, self.split, numbers))

    def start(self, rl4vla_ids: Int[Tensor, " B"]) -> UInt8[Tensor, "B H W 3"]:
        """Start the episodes with these ids of RL4VLA's and return their first frames."""
        self._ids = rl4vla_ids.cpu()
        self._episodes = decode(self.variant, self.split, self._ids)
        self._instructions = instructions(self.variant, self._episodes)
        self._elapsed = -1
        self._backend.reset(self._ids.to(self.device))
        self._elapsed = 0
        self._potential.zero_()
        self._ended.zero_()
        self._info, self._image = self._flags(), self._out.image.clone()
        return self._image

    def step(self, action: Float[Tensor, "N A"]) -> Step:
        """Apply one action per environment (see the contract)."""
        if self._elapsed < 0:
            raise RuntimeError("reset the environment first")
        check_step(action, self.num_envs, elapsed=self._elapsed, horizon=self.horizon)
        self._backend.step(_command(action.to(self.device, torch.float32)))
        self._elapsed += 1
        return self._outcome()

    def _outcome(self) -> Step:
        before, over = self._potential, self._ended
        found = self._flags()
        self._info = {name: torch.where(over, self._info[name], found[name]) for name in FLAGS}
        self._image = (
            torch.where(over[:, None, None, None], self._image, self._out.image)
            if self.end_on_success
            else self._out.image.clone()
        )
        info = self._info
        if isinstance(self._backend, Workers):
            lost = self._backend.lost.clone()
            self._info = info = {**info, "success": info["success"] & ~lost, "lost": lost}
        self._potential = potential(info["grasped"], info["consecutive_grasp"], info["success"])
        terminated = self._info["success"] & ~over & self.end_on_success
        self._ended = over | terminated
        last = self._elapsed == self.horizon
        return Step(
            image=self._image,
            reward=self._potential - before,
            terminated=terminated,
            truncated=torch.full_like(terminated, last) & ~self._ended,
            info=self._info,
        )

    def _flags(self) -> dict[str, Tensor]:
        return {name: self._out.flags[:, k].clone() for k, name in enumerate(FLAGS)}

    def close(self) -> None:
        """End the workers, or free the scene; doing it twice is harmless."""
        self._backend.close()


@cache
def _warn(files: tuple[str, ...]) -> None:
    """Say once that results are not the benchmark's own."""
    print(
        f"roadvla: {len(files)} assets are plain shapes in place of the originals, and results say "
        f"so: roadvla assets check names them, --stand-ins accepts them",
        file=sys.stderr,
    )


def _command(action: Float[Tensor, "B 7"]) -> Float[Tensor, "B 7"]:
    """Clip the motion, and let the gripper open fully above 0.5 and close otherwise."""
    limit = action.new_tensor([MAX_TRANSLATION] * 3 + [MAX_ROTATION] * 3)
    motion = torch.minimum(torch.maximum(action[:, :6], -limit), limit)
    grip = torch.where(action[:, 6:] > 0.5, 1.0, -1.0)
    return torch.cat([motion, grip], dim=1)
