"""The WidowX of the suite, with RL4VLA's iterated inverse kinematics on every device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mani_skill.agents.controllers.pd_ee_pose import PDEEPoseController
from mani_skill.agents.registration import register_agent
from mani_skill.envs.tasks.digital_twins.bridge_dataset_eval.base_env import (
    WidowX250SBridgeDatasetFlatTable,
)

from roadvla.envs.maniskill.kinematics import IteratedKinematics

CONTROL = "arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos"
CAMERA = "3rd_view_camera"


class IteratedPoseController(PDEEPoseController):
    """Upstream's controller; on a GPU it iterates to the target instead of taking one step.

    On a processor upstream iterates too (Pinocchio), as RL4VLA does.
    """

    def _initialize_joints(self) -> None:
        super()._initialize_joints()
        if self.kinematics.use_gpu_ik:
            self.kinematics = IteratedKinematics(self.kinematics)


@register_agent(asset_download_ids=["widowx250s"])
class WidowX(WidowX250SBridgeDatasetFlatTable):
    """Upstream's robot of the Bridge scenes: gains, limits and camera are its own."""

    uid = "widowx250s_roadvla"

    @property
    def _controller_configs(self) -> dict[str, Any]:
        (parts,) = super()._controller_configs.values()
        arm: Any = replace(parts["arm"])
        arm.controller_cls = IteratedPoseController
        first, second = self.gripper_joint_names
        # What upstream assumes, with a warning, if it is not told.
        gripper = replace(parts["gripper"], mimic={first: {"joint": second}})
        return {CONTROL: {"arm": arm, "gripper": gripper}}
