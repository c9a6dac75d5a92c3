"""The controller reaches its target poses: to 1 mm and 0.01 rad, on a processor and on a GPU."""

from __future__ import annotations

import pytest
import torch
from ms_sim import simulator  # noqa: F401

from roadvla.envs.maniskill.kinematics import solve

pytestmark = pytest.mark.sim


@pytest.fixture(scope="module")
def scene():
    from roadvla.envs.maniskill.scene import PutOnPlateScene

    made = PutOnPlateScene(setting="Single-v1", shader=None, stand_ins=True)
    yield made
    made.close()


def poses_near(qpos, pose_at, count):
    """Poses that are reached from some joint positions near these."""
    generator = torch.Generator().manual_seed(0)
    moved = qpos + 0.15 * (2 * torch.rand(count, 6, generator=generator) - 1)
    return pose_at(moved)


def residual(pose, target):
    turn = target[:, :3, :3] @ pose[:, :3, :3].mT
    cosine = (turn.diagonal(dim1=1, dim2=2).sum(dim=1) - 1) / 2
    return (target[:, :3, 3] - pose[:, :3, 3]).norm(dim=1), cosine.clamp(-1, 1).arccos()


def test_the_processor_s_solver(scene):
    scene.reset(seed=0, options={"episode_id": torch.tensor([0])})
    arm = scene.agent.controller.controllers["arm"]
    start = scene.agent.robot.get_qpos()
    from mani_skill.utils.structs import Pose

    chain = _chain(scene)
    targets = poses_near(start[:, :6], lambda q: chain.forward_kinematics(q).get_matrix(), 20)
    for target in targets:
        found = arm.kinematics.compute_ik(
            pose=Pose.create_from_pq(target[:3, 3][None], _quaternion(target)[None]), q0=start
        )
        reached = chain.forward_kinematics(found[:, :6]).get_matrix()
        far, turned = residual(reached, target[None])
        assert far.item() < 1e-3
        assert turned.item() < 0.01


def test_the_gpu_s_solver_on_the_robot_s_chain(scene):
    scene.reset(seed=0, options={"episode_id": torch.tensor([0])})
    chain = _chain(scene)
    start = scene.agent.robot.get_qpos()[:, :6].expand(64, 6)
    targets = poses_near(start[:1], lambda q: chain.forward_kinematics(q).get_matrix(), 64)
    found = solve(
        lambda q: chain.forward_kinematics(q).get_matrix(), chain.jacobian, start, targets
    )
    far, turned = residual(chain.forward_kinematics(found).get_matrix(), targets)
    assert far.max().item() < 1e-3
    assert turned.max().item() < 0.01


def _chain(scene):
    import pytorch_kinematics

    urdf = scene._folders.robot.read_bytes()
    return pytorch_kinematics.build_serial_chain_from_urdf(urdf, "ee_gripper_link")


def _quaternion(matrix):
    from mani_skill.utils.geometry.rotation_conversions import matrix_to_quaternion

    return matrix_to_quaternion(matrix[:3, :3])
