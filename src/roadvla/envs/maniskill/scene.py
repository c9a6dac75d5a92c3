"""The one scene of the suite: a WidowX, a table, and the bodies that an episode asks for."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import sapien
import torch
from jaxtyping import Float, Int, UInt8
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.utils.structs import Actor, Pose, SimConfig
from sapien.render import RenderBodyComponent
from torch import Tensor

from roadvla.envs.maniskill.agent import CAMERA, CONTROL, WidowX
from roadvla.envs.maniskill.assets import asset_folders, require
from roadvla.envs.maniskill.bodies import build_body, build_stage, kept_ids
from roadvla.envs.maniskill.catalog import read_catalog
from roadvla.envs.maniskill.episodes import Episodes, decode, total
from roadvla.envs.maniskill.frames import Frames
from roadvla.envs.maniskill.instructions import instructions
from roadvla.envs.maniskill.judge import Progress, on_receptacle
from roadvla.envs.maniskill.objects import OBJECTS, RECEPTACLES, half_sizes, read_boxes
from roadvla.envs.maniskill.options import HEIGHT, WIDTH
from roadvla.envs.maniskill.outputs import Build
from roadvla.envs.maniskill.poses import (
    ROBOT_LIFT,
    ROBOT_POSE,
    SETTLE_SPEED,
    SETTLE_SUBSTEPS,
    object_poses,
    receptacle_poses,
    spawn_poses,
    start_qpos,
    teleport_poses,
)
from roadvla.envs.maniskill.rendering import (
    camera_at,
    load_lights,
    polish,
    render_device,
    shader_config,
)
from roadvla.envs.maniskill.settings import Fixes, variant
from roadvla.envs.maniskill.shifts import DistractorReceptacle


class PutOnPlateScene(BaseEnv):
    """B scenes of one id of the suite.

    ``reset`` takes ``options`` with ``obj_set`` (train, test or all) and ``episode_id`` (int64 [B];
    drawn from a generator of the seed without it, or from torch's global one).

    Args:
        setting: RL4VLA's id, or the paper's alias.
        build: ``chosen`` builds the bodies of each episode anew at every reset: nothing is left
            over from earlier episodes. ``all`` builds everything once, as RL4VLA does, and parks
            what an episode does not use: resets on a GPU are cheap then.
        size: Height and width of frames.
        shader: Of ``options.SHADERS``; ``None`` to draw nothing.
        fixes: Oddities of RL4VLA to put right.
        stand_ins: Whether plain shapes may replace missing meshes.
        kwargs: ``BaseEnv``'s.
    """

    SUPPORTED_OBS_MODES = ("rgb+segmentation", "none")
    SUPPORTED_REWARD_MODES = ("none",)

    def __init__(
        self,
        *,
        setting: str,
        build: Build = "chosen",
        size: tuple[int, int] = (HEIGHT, WIDTH),
        shader: str | None = "one_pass",
        fixes: dict[str, bool] | None = None,
        stand_ins: bool = False,
        **kwargs: Any,
    ) -> None:
        self.variant = variant(setting, Fixes(**(fixes or {})))
        self.build, self._stand_ins = build, stand_ins
        self._shader, self._draws = shader, shader is not None
        self.size = (int(size[0]), int(size[1]))
        self._folders = asset_folders()
        self._boxes = (
            read_boxes(require(self._folders.objects / "model_db.json"), OBJECTS),
            read_boxes(require(self._folders.receptacles / "model_db.json"), RECEPTACLES),
        )
        for asset in read_catalog().assets:
            if asset.collection == "robot":
                require(asset.below(self._folders))
        self.obj_set = "train"
        self._frames: Frames | None = None
        kwargs.setdefault("control_mode", CONTROL)
        kwargs.setdefault("render_backend", "none")  # chosen in _setup_scene
        kwargs.setdefault("obs_mode", "rgb+segmentation" if self._draws else "none")
        cameras: dict[str, Any] = {}
        if shader is not None:
            cameras = {CAMERA: {"shader_config": shader_config(shader), **camera_at(self.size)}}
        kwargs.setdefault("sensor_configs", cameras)
        super().__init__(robot_uids=cast("Any", WidowX), **kwargs)

    @property
    def _default_sim_config(self) -> SimConfig:
        return SimConfig(sim_freq=500, control_freq=5, spacing=20)

    @property
    def instructions(self) -> list[str]:
        """What each running episode asks for."""
        return instructions(self.variant, self.episodes)

    # Building.

    def _setup_scene(self) -> None:
        if self._draws and self._render_device is None:
            self._render_device = self.backend.render_device = render_device(self.device)
        super()._setup_scene()

    def _load_agent(self, options: dict[str, Any]) -> None:  # type: ignore[override]
        super()._load_agent(options, sapien.Pose(ROBOT_POSE[:3], ROBOT_POSE[3:]))

    def _load_lighting(self, options: dict[str, Any]) -> None:
        load_lights(self.scene)

    def _load_scene(self, options: dict[str, Any]) -> None:
        drawn = self._shader == "default"
        build_stage(self.scene, self._folders, stand_ins=self._stand_ins, drawn=drawn)
        if self._draws:
            polish(self.agent.robot)
        if self.build == "all":
            self._objects = [
                self._build("object", i, None) for i in range(self.variant.built_objects)
            ]
            self._receptacles = [
                self._build("receptacle", i, None) for i in range(self.variant.built_receptacles)
            ]
        else:
            self._load_chosen()

    def _load_chosen(self) -> None:
        """Build each episode's own bodies; a distractor that is the target is built once."""
        episodes, kind = self.episodes, self._distractor_kind
        chosen = {"object": [], "receptacle": [], "distractor": []}
        rows = zip(
            episodes.object.tolist(),
            episodes.receptacle.tolist(),
            episodes.distractor.tolist(),
            strict=True,
        )
        for place, (target, receptacle, distractor) in enumerate(rows):
            chosen["object"].append(self._build("object", target, place))
            chosen["receptacle"].append(self._build("receptacle", receptacle, place))
            if distractor >= 0:
                same = kind == "object" and distractor == target
                body = chosen["object"][-1] if same else self._build(kind, distractor, place)
                chosen["distractor"].append(body)
        self._chosen_bodies = chosen

    def _build(self, kind: str, index: int, place: int | None) -> Actor:
        objects = kind == "object"
        model = (OBJECTS if objects else RECEPTACLES)[index]
        return build_body(
            self.scene,
            self._folders.objects if objects else self._folders.receptacles,
            model,
            name=f"{kind}-{index}" if place is None else f"{kind}-{index}-{place}",
            stand_ins=self._stand_ins,
            scenes=None if place is None else [place],
        )

    @property
    def _distractor_kind(self) -> str:
        receptacle = isinstance(self.variant.shift, DistractorReceptacle)
        return "receptacle" if receptacle else "object"

    # Starting an episode.

    def reset(
        self, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start B episodes (see the class).

        Raises:
            UserError: If there is no such set.
            ValueError: If there are not B ids, or they are not int64 or negative.
        """
        options = dict(options or {})
        self.obj_set = options.get("obj_set", "train")
        self.episodes = self._choose(options.get("episode_id"), seed)
        self._steps, self._judged = 0, -1
        if self.build == "chosen":
            options["reconfigure"] = True
        return super().reset(seed, options)

    def _choose(self, episode_ids: Any, seed: Any) -> Episodes:
        if episode_ids is None:
            generator = None
            if seed is not None:
                first = int(np.atleast_1d(seed)[0])
                generator = torch.Generator().manual_seed(first)
            count = total(self.variant, self.obj_set)
            episode_ids = torch.randint(
                0, count, (self.num_envs,), dtype=torch.int64, generator=generator
            )
        ids = torch.as_tensor(episode_ids, device=self.device)
        if ids.shape != (self.num_envs,):
            raise ValueError(f"got {tuple(ids.shape)} episode ids, expected ({self.num_envs},)")
        return decode(self.variant, self.obj_set, ids)

    def _initialize_episode(self, env_idx: Tensor, options: dict[str, Any]) -> None:
        if len(env_idx) != self.num_envs:
            raise ValueError("episodes of this scene start together")
        episodes = self.episodes
        base = torch.tensor(ROBOT_POSE, device=self.device).expand(self.num_envs, 7)
        lifted = base.clone()
        lifted[:, 2] += ROBOT_LIFT
        self.agent.robot.pose = Pose.create(lifted)
        self._place_bodies()
        self.spawned = self._body_poses()
        self.settle_substeps = self._settle()
        self.agent.robot.pose = Pose.create(base.clone())
        self.agent.reset(start_qpos(self.variant, episodes).to(self.device))
        self.settled = self._body_poses()
        turned = self.settled[:, :, 3:]
        self.half_sizes = torch.stack(
            [
                half_sizes(self._boxes[0], episodes.object, turned[:, 0]),
                half_sizes(self._boxes[1], episodes.receptacle, turned[:, 1]),
            ],
            dim=1,
        )
        self.teleported: Tensor | None = None
        self.progress = Progress.start(self.num_envs, self.device)
        if self._draws:
            if self._frames is None:
                self._frames = Frames(self.variant, self._folders, self.size, self.device)
            self._frames.start(episodes)
            self._keep = kept_ids(self.scene, self.agent.robot)

    def _place_bodies(self) -> None:
        episodes, kind = self.episodes, self._distractor_kind
        if self.build == "all":
            for bodies, poses in (
                (self._objects, object_poses(self.variant, episodes)),
                (self._receptacles, receptacle_poses(self.variant, episodes)),
            ):
                for index, body in enumerate(bodies):
                    body.set_pose(Pose.create(poses[:, index].to(self.device)))
            pick = {"object": self._objects, "receptacle": self._receptacles}
            self.target = self._view(pick["object"], episodes.object, "target")
            self.receptacle = self._view(pick["receptacle"], episodes.receptacle, "goal")
            if self._draws and not self.gpu_sim_enabled:
                self._hide_parked()
            some = bool((episodes.distractor >= 0).all())
            self.distractor = (
                self._view(pick[kind], episodes.distractor, "distractor") if some else None
            )
        else:
            chosen = self._chosen_bodies
            self.target = Actor.merge(chosen["object"], "target")
            self.receptacle = Actor.merge(chosen["receptacle"], "goal")
            others = chosen["distractor"]
            self.distractor = Actor.merge(others, "distractor") if others else None
            poses = spawn_poses(self.variant, episodes).to(self.device)
            for slot, body in enumerate(self._bodies()):
                body.set_pose(Pose.create(poses[:, slot]))

    def _hide_parked(self) -> None:
        """Draw no body that stands out of view: on a processor their triangles cost most."""
        (target,), (receptacle,), (distractor,) = (
            getattr(self.episodes, name).tolist() for name in ("object", "receptacle", "distractor")
        )
        shown = {"object": {target}, "receptacle": {receptacle}}
        shown[self._distractor_kind].add(distractor)
        for kind, bodies in (("object", self._objects), ("receptacle", self._receptacles)):
            for index, body in enumerate(bodies):
                component: Any = body._objs[0].find_component_by_type(RenderBodyComponent)
                component.visibility = float(index in shown[kind])

    def _view(self, bodies: list[Actor], index: Tensor, name: str) -> Actor:
        """One actor that stands for another body in each scene."""
        entities = [bodies[i]._objs[place] for place, i in enumerate(index.tolist())]
        places = torch.arange(self.num_envs, device=self.device)
        return Actor.create_from_entities(entities, self.scene, places, shared_name=name)

    def _bodies(self) -> list[Actor]:
        bodies = (self.target, self.receptacle, self.distractor)
        return [body for body in bodies if body is not None]

    def _body_poses(self) -> Float[Tensor, "B 3 7"]:
        """Object, receptacle, distractor; NaN without one."""
        poses = torch.full((self.num_envs, 3, 7), torch.nan, device=self.device)
        for slot, body in enumerate(self._bodies()):
            poses[:, slot] = body.pose.raw_pose
        return poses

    def _settle(self) -> tuple[int, ...]:
        """Let the bodies fall: shortly, then longer if any of the batch still moves."""
        first, more = SETTLE_SUBSTEPS
        self._advance(first)
        bodies = self._bodies()
        speed = sum(float(body.linear_velocity.norm()) for body in bodies)
        turn = sum(float(body.angular_velocity.norm()) for body in bodies)
        if speed <= SETTLE_SPEED[0] and turn <= SETTLE_SPEED[1]:
            return (first,)
        self._advance(more)
        return first, more

    def _advance(self, substeps: int) -> None:
        if self.gpu_sim_enabled:
            self.scene._gpu_apply_all()
        for _ in range(substeps):
            self.scene.step()
        if self.gpu_sim_enabled:
            self.scene._gpu_fetch_all()

    # A step.

    def _step_action(self, action: Any) -> Any:
        action = super()._step_action(action)
        self._steps += 1
        if self._steps == self.variant.reposition_step(self.obj_set):
            self._reposition()
        return action

    def _reposition(self) -> None:
        """Lift the object to its new place, in mid-air, and let the world go on for a moment."""
        pose = teleport_poses(self.variant, self.episodes).to(self.device)
        self.target.set_pose(Pose.create(pose))
        self.teleported = pose
        self._advance(SETTLE_SUBSTEPS[0])

    def evaluate(self) -> dict[str, Tensor]:
        """Judge the state; asking again in the same step changes nothing."""
        if self._judged != self._steps:
            self._judged = self._steps
            self._judge()
        progress = self.progress
        return {
            "is_src_obj_grasped": progress.grasped,
            "consecutive_grasp": progress.consecutive_grasp,
            "src_on_target": progress.success,
            "success": progress.success,
            "success_once": progress.success_once,
            **self.distances,
        }

    def _judge(self) -> None:
        """Three contact queries and four poses, however many bodies there are."""
        target, goal = self.target.pose.p, self.receptacle.pose.p
        force = self.scene.get_pairwise_contact_forces(self.target, self.receptacle)
        success = on_receptacle(target, goal, self.half_sizes[:, 0], self.half_sizes[:, 1], force)
        self.progress = self.progress.after(self.agent.is_grasping(self.target), success)
        first, second = self.agent.finger1_link, self.agent.finger2_link  # type: ignore[union-attr]
        fingers = (first.pose.p + second.pose.p) / 2
        self.distances = {
            "gripper_carrot_dist": (fingers - target).norm(dim=1),
            "gripper_plate_dist": (fingers - goal).norm(dim=1),
            "carrot_plate_dist": (target - goal).norm(dim=1),
        }

    @property
    def arm(self) -> Any:
        """The arm's controller."""
        return cast("Any", self.agent.controller).controllers["arm"]

    def state(self) -> Float[Tensor, "B S"]:
        """Simulator state for experts and analyses, to be read with ``unpack_state``."""
        arm = self.arm
        fingers = self.agent.robot.get_qpos()[:, -2:].mean(dim=1, keepdim=True)
        held = self.progress.grasp_count[:, None].float()
        hand, bodies = arm.ee_pose.raw_pose, self._body_poses().flatten(1)
        return torch.cat([hand, self._aim(arm), fingers, held, bodies], dim=1)

    def _aim(self, arm: Any) -> Float[Tensor, "B 7"]:
        """The controller's target pose, in the world frame."""
        return (self.agent.robot.pose * arm._target_pose).raw_pose

    # Pictures.

    def capture(self) -> UInt8[Tensor, "B H W 3"]:
        """Draw the frames that a policy sees."""
        return self._draw()[0]

    def _draw(self) -> tuple[UInt8[Tensor, "B H W 3"], Int[Tensor, "B H W"]]:
        """Draw frames, and the id of what each pixel shows."""
        assert self._frames is not None, "the scene was made without a shader"
        self.scene.update_render(update_sensors=True, update_human_render_cameras=False)
        camera = self._sensors[CAMERA]
        camera.capture()
        seen = camera.get_obs(depth=False, position=False)
        if self.gpu_sim_enabled:
            torch.cuda.synchronize(self.device)  # or physics runs into the drawing
        segmentation = seen["segmentation"][..., 0]
        return self._frames.compose(seen["rgb"], segmentation, self._keep), segmentation

    def _get_obs_sensor_data(self, apply_texture_transforms: bool = True) -> dict[str, Any]:
        frames, segmentation = self._draw()
        return {CAMERA: {"rgb": frames, "segmentation": segmentation[..., None]}}
