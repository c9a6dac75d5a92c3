"""Plays one recorded episode in our scene and says how far each quantity is off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from roadvla.envs.maniskill.episodes import encode, total
from roadvla.envs.maniskill.golden import Comparison
from roadvla.envs.maniskill.objects import OBJECTS, RECEPTACLES
from roadvla.envs.maniskill.overlays import bounding_boxes, kept, opacity
from roadvla.envs.maniskill.positions import positions
from roadvla.envs.maniskill.scene import PutOnPlateScene
from roadvla.envs.maniskill.shifts import DistractorReceptacle, TextureShift, WholeImageShift

_EXTRAS = ("texture_index", "template_index", "qpos_offset_index")
_BLOCK = 16
# A processor that rounds a sine in another way sets the arm elsewhere by 1e-7, and contact makes
# millimetres of that: paths are compared loosely there, and outcomes exactly.
_LOOSE, _LOOSE_TURN = 1e-2, 0.2
_BLOCK_ROW, _MOVED_BLOCK = ("images, block", 12.0), ("images in contact, block", 60.0)
# Beyond these a body that was seen to depend on rounding may come to rest elsewhere.
_UNSTABLE_HEIGHT, _UNSTABLE_POSITION = 5e-3, 4e-2


class Play:
    """One episode: reset, actions, comparison.

    Args:
        scene: Of the episode's id.
        entry: The episode's facts.
        arrays: Its numbers.
        image_steps: After which actions pictures were stored.
        result: Gets the deviations.
        pictures: Whether the scene can draw.
    """

    def __init__(
        self,
        scene: PutOnPlateScene,
        entry: dict[str, Any],
        arrays: dict[str, np.ndarray],
        image_steps: Sequence[int],
        result: Comparison,
        *,
        pictures: bool,
    ) -> None:
        self.scene, self.entry, self.arrays, self.result = scene, entry, arrays, result
        self.image_steps, self.pictures = list(image_steps), pictures
        self.where = f"{entry['env_id']} {entry['obj_set']} {entry['episode_id']}"
        self.stable = bool(entry.get("order_sensitivity", {}).get("stable", True))
        self.grasp = "k" in entry
        self._contact = self._first_contact()

    def _first_contact(self) -> int:
        """The step from which fingers may touch the object; beyond all steps if they never do.

        They touch it before the grasp is seen, and a teleport may put it onto them.
        """
        if self.grasp:
            return max(_first(self.arrays["flags"][:, 0]) - 2, 0)
        teleport = self.entry.get("teleport")
        return teleport["step"] if teleport else len(self.arrays["flags"])

    def run(self) -> None:
        """Play it."""
        ids = torch.tensor([self.entry["episode_id"]], dtype=torch.int64)
        options = {"obj_set": self.entry["obj_set"], "episode_id": ids, "reconfigure": True}
        self.scene.reset(seed=0, options=options)
        self._contents()
        self._reset()
        flags = [self._flags()]
        self._state(0)
        for step, action in enumerate(torch.from_numpy(self.arrays["actions"]), start=1):
            self.scene.step(action[None])
            flags.append(self._flags())
            self._state(step)
        self._teleport()
        self._outcome(np.array(flags))

    def _contents(self) -> None:
        entry, scene, episodes = self.entry, self.scene, self.scene.episodes
        others = RECEPTACLES if isinstance(scene.variant.shift, DistractorReceptacle) else OBJECTS
        for kind, models in (
            ("object", OBJECTS),
            ("receptacle", RECEPTACLES),
            ("distractor", others),
        ):
            index = int(getattr(episodes, kind))
            found = None
            if index >= 0:
                model = models[index]
                found = {"index": index, "model": model.folder, "name": model.name}
            self._same("names and indices", found, entry[kind])
        digits = {
            "table_index": int(episodes.table),
            "pos_index": int(episodes.position),
            "yaw_index": int(episodes.yaw),
            **{name: int(episodes.extra) for name in _EXTRAS if name in entry},
        }
        for name, index in digits.items():
            self._same("names and indices", index, entry[name])
        self._same("instruction", scene.instructions, [entry["instruction"]])
        self._same("totals", total(scene.variant, entry["obj_set"]), entry["total"])
        self._same(
            "totals",
            encode(scene.variant, entry["obj_set"], episodes).tolist(),
            [entry["episode_id_mod_total"]],
        )
        counts = {
            "objects_built": scene.variant.built_objects,
            "receptacles_built": scene.variant.built_receptacles,
            "positions": len(positions(scene.variant.layout)),
            "yaws": scene.variant.yaws.all.stop,
        }
        self._same("counts", counts, entry["counts"])
        shift = scene.variant.shift
        if isinstance(shift, TextureShift | WholeImageShift):
            mix = float(opacity(shift, episodes.extra)) - entry["texture_mix"]
            self._add("texture_mix", 1e-6, "", mix)

    def _reset(self) -> None:
        scene, arrays = self.scene, self.arrays
        self._same("settle steps", list(scene.settle_substeps), self.entry["settle_substeps"])
        base = scene.agent.robot.pose.raw_pose[0].numpy()
        self._add("robot_base_pose", 1e-6, "m", base - self.entry["robot_base_pose"])
        self._add("spawn", 1e-6, "m", _where_set(scene.spawned[0].numpy(), arrays["spawn"]))
        qpos = scene.agent.robot.get_qpos()[0].numpy()
        self._add("reset_qpos", 1e-6, "rad, m", qpos - arrays["qpos"][0])
        self._bodies("settled bodies", scene.settled[0].numpy(), arrays["settled"])
        if self.stable:
            half = scene.half_sizes[0].numpy() - arrays["obj_rec_half_sizes"]
            self._add("half sizes", 1e-3, "m", half)

    def _state(self, step: int) -> None:
        scene, arrays = self.scene, self.arrays
        controller = scene.arm
        target = controller._target_pose.raw_pose[0].numpy()
        teleported = bool(self.entry.get("teleport"))
        if self.stable or not teleported:
            touched = step >= self._contact
            loose, when = (_LOOSE, " in contact") if touched else (1e-4, "")
            qpos = scene.agent.robot.get_qpos()[0].numpy() - arrays["qpos"][step]
            self._add(f"qpos{when}", loose, "rad, m", qpos)
            hand = controller.ee_pose.raw_pose[0].numpy()
            self._pose(f"end effector{when}", hand, arrays["ee_world"][step], loose, loose)
        self._pose("controller's target", target, arrays["ee_target_base"][step], 1e-5, 1e-5)
        bodies = scene._body_poses()[0].numpy()
        if self.stable or not teleported:
            self._bodies("bodies", bodies, arrays["body_poses"][step], step=step)
        if self.stable:
            own = np.array([float(value) for value in scene.distances.values()])
            self._add("distances", 2e-3, "m", own - arrays["dists"][step])
        if self.pictures and step in self.image_steps:
            self._picture(self.image_steps.index(step))

    def _bodies(
        self, name: str, found: np.ndarray, expected: np.ndarray, *, step: int | None = None
    ) -> None:
        """Compare poses after an action; without one, settled ones."""
        for own, recorded in zip(found, expected, strict=True):
            if np.isnan(recorded).any():
                self._same("bodies there are", bool(np.isnan(own).all()), True)
            elif self.stable and step is not None and step >= self._contact:
                self._pose(f"{name} in contact", own, recorded, _LOOSE, _LOOSE_TURN)
            elif self.stable:
                self._pose(name, own, recorded, 1e-3, 2e-2)
            elif step is None:
                self._add("settled, unstable: height", _UNSTABLE_HEIGHT, "m", own[2] - recorded[2])
                off = own[:2] - recorded[:2]
                self._add("settled, unstable: position", _UNSTABLE_POSITION, "m", off)

    def _picture(self, frame: int) -> None:
        data = self.scene._get_obs_sensor_data()["3rd_view_camera"]
        mask = kept(data["segmentation"][..., 0], self.scene._keep)
        seg = self._seg(data["segmentation"][0, ..., 0].numpy(), mask)
        if not self.stable:
            return
        small = blocks(data["rgb"][0].numpy())
        off = np.abs(small - self.arrays["images"][frame])
        self._add("images, mean", 0.5, "of 255", off.mean())
        moved = self.image_steps[frame] >= self._contact
        self._add(*(_MOVED_BLOCK if moved else _BLOCK_ROW), "of 255", off.max())
        recorded = self.arrays["seg"][frame]
        for index in range(5):
            if recorded[index] >= 0:
                allowed = 0.02 * recorded[index] + 30
                self._add("pixels / allowed", 1.0, "", (seg[index] - recorded[index]) / allowed)
        self._add("box of pixels", 3.0, "pixels", seg[5:] - recorded[5:])
        if frame == 0:
            share = float(mask.float().mean()) * mask.numel()
            recorded_share = self.entry["foreground_fraction"] * mask.numel()
            allowed = 0.02 * recorded_share + 30
            self._add("foreground / allowed", 1.0, "", (share - recorded_share) / allowed)

    def _seg(self, ids: np.ndarray, mask: torch.Tensor) -> np.ndarray:
        scene = self.scene
        robot = [link._objs[0].entity.per_scene_id for link in scene.agent.robot.links]
        counts = [int(mask.sum()), int(np.isin(ids, robot).sum())]
        for body in (scene.target, scene.receptacle, scene.distractor):
            own = -1 if body is None else int((ids == body._objs[0].per_scene_id).sum())
            counts.append(own)
        return np.array([*counts, *bounding_boxes(mask)[0].tolist()])

    def _teleport(self) -> None:
        recorded, scene = self.entry.get("teleport"), self.scene
        own = scene.teleported
        self._same("teleports", own is not None, recorded is not None)
        if recorded and own is not None:
            step = scene.variant.reposition_step(self.entry["obj_set"])
            self._same("teleport step", step, recorded["step"])
            self._add("teleport pose", 1e-6, "m", own[0].numpy() - self.arrays["teleport"][0])

    def _flags(self) -> list[int]:
        progress = self.scene.progress
        flags = (progress.grasped, progress.consecutive_grasp, progress.success, progress.success)
        return [int(flag) for flag in flags]

    def _outcome(self, flags: np.ndarray) -> None:
        recorded = self.arrays["flags"]
        self._same("flags at the end", flags[-1].tolist(), recorded[-1].tolist())
        for column in range(3):
            own, theirs = (_first(f[:, column]) for f in (flags, recorded))
            row = (
                ("first step of a flag, grasp", 1.0)
                if self.grasp
                else ("first step of a flag", 0.0)
            )
            self._add(*row, "steps", own - theirs)

    def _pose(
        self, name: str, own: np.ndarray, recorded: np.ndarray, far: float, turned: float
    ) -> None:
        self._add(f"{name}: position", far, "m", own[:3] - recorded[:3])
        self._add(f"{name}: rotation", turned, "rad", _angle(own[3:], recorded[3:]))

    def _same(self, name: str, found: object, expected: object) -> None:
        self.result.same(name, found, expected, self.where)

    def _add(self, name: str, tolerance: float, unit: str, deviation: np.ndarray | float) -> None:
        self.result.row(name, tolerance, unit).add(deviation, self.where)


def blocks(image: np.ndarray) -> np.ndarray:
    """Average blocks of 16 by 16 pixels, rounded as in the recordings."""
    rows, columns = image.shape[0] // _BLOCK, image.shape[1] // _BLOCK
    parts = image.astype(np.float64).reshape(rows, _BLOCK, columns, _BLOCK, 3)
    return np.floor(parts.mean(axis=(1, 3)) + 0.5)


def _where_set(own: np.ndarray, recorded: np.ndarray) -> np.ndarray:
    """Differences where either is a number."""
    none = np.isnan(own) & np.isnan(recorded)
    return (own - recorded)[~none]


def _angle(first: np.ndarray, second: np.ndarray) -> float:
    """Angle between two rotations; from the chord between quaternions, exact for small ones."""
    a, b = (q.astype(np.float64) / np.linalg.norm(q.astype(np.float64)) for q in (first, second))
    chord = min(np.linalg.norm(a - b), np.linalg.norm(a + b))
    return float(4 * np.arcsin(chord / 2))


def _first(flags: np.ndarray) -> int:
    """The first step at which a flag is true; one past the last if it never is."""
    return int(flags.argmax()) if flags.any() else len(flags)
