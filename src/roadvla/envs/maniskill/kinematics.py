"""Iterated inverse kinematics on B arms at once: RL4VLA's; upstream takes one step on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_RATE = 0.2
_DAMPING = 1e-9
_ITERATIONS = 200
_ASK_EVERY = 5
_NEAR = (1e-3, 0.01)
_REACHED = (1e-2, 0.1)


def solve(
    pose_at: Callable[[Tensor], Tensor],
    jacobian_at: Callable[[Tensor], Tensor],
    qpos: Float[Tensor, "B J"],
    target: Float[Tensor, "B 4 4"],
    *,
    rate: float = _RATE,
    iterations: int = _ITERATIONS,
) -> Float[Tensor, "B J"]:
    """Find joint positions that reach a pose, from those at hand.

    q ← q + rate · Jᵀ (J Jᵀ + 1e-9 I)⁻¹ e, e being the translation and the rotation vector that are
    missing; arms that have come within 1 mm and 0.01 rad move no further. There is no test of joint
    limits. Whether all have arrived is asked every few iterations only: asking waits for a GPU.

    Args:
        pose_at: Pose of the end effector, [B, 4, 4], from joint positions.
        jacobian_at: [B, 6, J], translation first, in the same frame.
        qpos: Where to start, rad.
        target: Pose wanted.
        rate: Share of the missing motion that is made up in one iteration.
        iterations: How many.
    """
    eye = _DAMPING * torch.eye(6, dtype=qpos.dtype, device=qpos.device)
    for iteration in range(iterations):
        missing = _missing(pose_at(qpos), target)
        away = (missing[:, :3].norm(dim=1) > _NEAR[0]) | (missing[:, 3:].norm(dim=1) > _NEAR[1])
        if iteration % _ASK_EVERY == 0 and not bool(away.any()):
            break
        jacobian = jacobian_at(qpos)
        square = jacobian @ jacobian.mT + eye
        # One singular arm must not stop the others: its step is not finite and is left out.
        solved = torch.linalg.solve_ex(square, missing.unsqueeze(-1)).result
        step = (jacobian.mT @ solved).squeeze(-1)
        moves = away & torch.isfinite(step).all(dim=1)
        qpos = torch.where(moves.unsqueeze(-1), qpos + rate * step, qpos)
    return qpos


def reached(pose: Float[Tensor, "B 4 4"], target: Float[Tensor, "B 4 4"]) -> Bool[Tensor, " B"]:
    """Whether a pose is within 1 cm and 0.1 rad of another."""
    left = _missing(pose, target)
    return (left[:, :3].norm(dim=1) < _REACHED[0]) & (left[:, 3:].norm(dim=1) < _REACHED[1])


def _missing(pose: Float[Tensor, "B 4 4"], target: Float[Tensor, "B 4 4"]) -> Float[Tensor, "B 6"]:
    """Translation and rotation vector from one pose to another."""
    turn = target[:, :3, :3] @ pose[:, :3, :3].mT
    return torch.cat([target[:, :3, 3] - pose[:, :3, 3], _rotation_vector(turn)], dim=1)


def _rotation_vector(rotation: Float[Tensor, "B 3 3"]) -> Float[Tensor, "B 3"]:
    """Axis times angle, rad; for angles well below π, as between steps of control."""
    axis = torch.stack(
        [
            rotation[:, 2, 1] - rotation[:, 1, 2],
            rotation[:, 0, 2] - rotation[:, 2, 0],
            rotation[:, 1, 0] - rotation[:, 0, 1],
        ],
        dim=1,
    )
    double_sine = axis.norm(dim=1, keepdim=True)
    double_cosine = rotation.diagonal(dim1=1, dim2=2).sum(dim=1, keepdim=True) - 1
    angle = torch.atan2(double_sine, double_cosine)
    return axis * (angle / double_sine.clamp(min=1e-12))


class IteratedKinematics:
    """Upstream's kinematics on a GPU, with another solver; the rest is passed on.

    Args:
        upstream: ``mani_skill``'s ``Kinematics``.
    """

    def __init__(self, upstream: Any) -> None:
        self._upstream = upstream

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)  # or copying would look for ``_upstream`` without end
        return getattr(self._upstream, name)

    def compute_ik(self, *, pose: Any, q0: Tensor, **_: Any) -> Tensor:
        """Return the arm's joint positions that reach a pose in the robot's base frame.

        An arm that cannot reach it keeps its positions, as with the processor's solver.
        """
        chain = self._upstream.pk_chain
        start = q0[:, self._upstream.active_ancestor_joint_idxs]
        target = pose.to_transformation_matrix()

        def pose_at(q: Tensor) -> Tensor:
            return chain.forward_kinematics(q).get_matrix()

        found = solve(pose_at, chain.jacobian, start, target)
        near = reached(pose_at(found), target)
        found = torch.where(near.unsqueeze(-1), found, start)
        return found[:, self._upstream.qmask]
