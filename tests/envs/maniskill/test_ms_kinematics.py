"""The solver on an arm whose kinematics are written here, in double precision."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.nn.functional import normalize

from roadvla.envs.maniskill.kinematics import (
    IteratedKinematics,
    _rotation_vector,
    reached,
    solve,
)

# Joints as lines of a product of exponentials, shoulder to wrist, and the hand with all at zero:
# about the size and order of a WidowX.
AXES = torch.tensor(
    [[0, 0, 1], [0, 1, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0]], dtype=torch.float64
)
POINTS = torch.tensor(
    [
        [0, 0, 0.11],
        [0, 0, 0.11],
        [0.05, 0, 0.36],
        [0.15, 0, 0.36],
        [0.30, 0, 0.36],
        [0.37, 0, 0.36],
    ],
    dtype=torch.float64,
)
HAND = torch.eye(4, dtype=torch.float64)
HAND[0, 3], HAND[2, 3] = 0.45, 0.36
START = torch.tensor([-0.02, 0.04, 0.22, 0.01, 1.36, 0.02], dtype=torch.float64)


def skew(axis: Tensor) -> Tensor:
    x, y, z = axis.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).unflatten(-1, (3, 3))


def turned(axis: Tensor, angle: Tensor) -> Tensor:
    """Rodrigues' formula, [B, 3, 3]: B angles about one axis or B axes."""
    cross, angle = skew(axis), angle[:, None, None]
    return torch.eye(3).to(axis) + angle.sin() * cross + (1 - angle.cos()) * (cross @ cross)


# Turning about a line: exp(θX) = I + sin θ X + (1 − cos θ) X², with −ω × p beside the axis ω.
TWISTS = torch.zeros(6, 4, 4, dtype=torch.float64)
TWISTS[:, :3, :3], TWISTS[:, :3, 3] = skew(AXES), -torch.linalg.cross(AXES, POINTS)


def frames(qpos: Tensor) -> list[Tensor]:
    """What the first k joints do to space, for k from 0 to 6."""
    twists, angle = TWISTS.to(qpos), qpos[..., None, None]
    eye = torch.eye(4).to(qpos)
    moved = [eye.expand(len(qpos), 4, 4)]
    about = eye + angle.sin() * twists + (1 - angle.cos()) * (twists @ twists)
    for joint in range(6):
        moved.append(moved[-1] @ about[:, joint])
    return moved


def pose_at(qpos: Tensor) -> Tensor:
    return frames(qpos)[-1] @ HAND.to(qpos)


def jacobian_at(qpos: Tensor) -> Tensor:
    *before, last = frames(qpos)
    moved = torch.stack(before, dim=1)
    axes = moved[..., :3, :3] @ AXES.to(qpos)[..., None]
    points = moved[..., :3, :3] @ POINTS.to(qpos)[..., None] + moved[..., :3, 3:]
    arms = (last @ HAND.to(qpos))[:, None, :3, 3:] - points
    return torch.cat([torch.linalg.cross(axes, arms, dim=2), axes], dim=2).squeeze(-1).mT


def start(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return START.to(dtype).expand(count, 6).clone()


def near(qpos: Tensor, most: float = 0.3) -> Tensor:
    return qpos + most * (2 * torch.rand(qpos.shape, dtype=qpos.dtype) - 1)


def missing(pose: Tensor, target: Tensor) -> np.ndarray:
    """Translation and rotation vector, [B, 6], by scipy."""
    turn = target[:, :3, :3].double() @ pose[:, :3, :3].double().mT
    vector = Rotation.from_matrix(turn.numpy()).as_rotvec()
    return np.hstack([(target - pose)[:, :3, 3].double().numpy(), vector])


def assert_reached(qpos: Tensor, target: Tensor, slack: float = 1e-9) -> None:
    left = missing(pose_at(qpos), target)
    assert np.linalg.norm(left[:, :3], axis=1).max() <= 1e-3 + slack
    assert np.linalg.norm(left[:, 3:], axis=1).max() <= 0.01 + slack


def directions(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return normalize(torch.randn(count, 3, dtype=dtype), dim=1)


def moved_by(pose: Tensor, *, metres: float = 0.0, rad: float = 0.0) -> Tensor:
    """Poses off by so much, each in a direction of its own."""
    target, count = pose.clone(), len(pose)
    target[:, :3, 3] += metres * directions(count)
    angle = torch.full((count,), rad, dtype=pose.dtype)
    target[:, :3, :3] = turned(directions(count), angle) @ pose[:, :3, :3]
    return target


def test_the_arm_of_these_tests() -> None:
    assert torch.equal(pose_at(torch.zeros(1, 6, dtype=torch.float64))[0], HAND)
    qpos, step = near(start(20)), 1e-6
    jacobian = jacobian_at(qpos)
    for joint in range(6):
        off = torch.zeros(6, dtype=torch.float64)
        off[joint] = step
        slope = missing(pose_at(qpos - off), pose_at(qpos + off)) / (2 * step)
        np.testing.assert_allclose(jacobian[:, :, joint].numpy(), slope, atol=1e-8)


def test_reachable_targets_are_reached() -> None:
    qpos = start(256)
    target = pose_at(near(qpos))
    found = solve(pose_at, jacobian_at, qpos, target)
    assert found.dtype == torch.float64
    assert_reached(found, target)
    # It is the arm's way there, not another posture.
    assert float((found - qpos).abs().max()) < 1


def test_single_precision_is_enough() -> None:
    qpos = start(64, torch.float32)
    target = pose_at(near(qpos))
    found = solve(pose_at, jacobian_at, qpos, target)
    assert found.dtype == torch.float32
    assert_reached(found, target, slack=1e-5)


@pytest.mark.parametrize(("metres", "rad"), [(0.1, 0.0), (0.0, 0.5), (0.02, 0.2), (0.0, 1.0)])
def test_one_iteration_is_a_share_of_the_least_step(metres: float, rad: float) -> None:
    qpos = near(start(8))
    target = moved_by(pose_at(qpos), metres=metres, rad=rad)
    found = solve(pose_at, jacobian_at, qpos, target, iterations=1, rate=0.3)
    inverse = np.linalg.pinv(jacobian_at(qpos).numpy())
    step = np.einsum("bji,bi->bj", inverse, missing(pose_at(qpos), target))
    np.testing.assert_allclose(found.numpy(), qpos.numpy() + 0.3 * step, rtol=0, atol=1e-4)


def test_rate_and_number_of_iterations() -> None:
    qpos = start(4)
    target = pose_at(near(qpos))
    assert torch.equal(solve(pose_at, jacobian_at, qpos, target, iterations=0), qpos)
    found = qpos
    for _ in range(3):
        found = solve(pose_at, jacobian_at, found, target, iterations=1, rate=0.2)
    torch.testing.assert_close(solve(pose_at, jacobian_at, qpos, target, iterations=3), found)


def test_iterations_end_soon_after_all_arms_have_arrived() -> None:
    calls = []

    def counted(qpos: Tensor) -> Tensor:
        calls.append(len(qpos))
        return pose_at(qpos)

    qpos = start(2)
    solve(counted, jacobian_at, qpos, pose_at(qpos))
    assert len(calls) == 1
    target = pose_at(near(qpos))
    calls.clear()
    solve(counted, jacobian_at, qpos, target)
    assert 5 < len(calls) < 60
    far = target.clone()
    far[0, :3, 3] += 10.0  # one arm that never arrives keeps the batch going
    calls.clear()
    solve(counted, jacobian_at, qpos, far)
    assert len(calls) == 200


def test_arms_at_their_targets_do_not_move() -> None:
    qpos = near(start(32))
    pose = pose_at(qpos)
    for target in (
        pose,
        moved_by(pose, metres=0.99e-3),
        moved_by(pose, rad=0.0099),
        moved_by(pose, metres=0.99e-3, rad=0.0099),
    ):
        assert torch.equal(solve(pose_at, jacobian_at, qpos, target, iterations=5), qpos)


def test_arms_that_are_away_in_either_respect_move() -> None:
    qpos = near(start(32))
    pose = pose_at(qpos)
    for target in (moved_by(pose, metres=1.01e-3), moved_by(pose, rad=0.0101)):
        found = solve(pose_at, jacobian_at, qpos, target)
        assert bool((found != qpos).any(dim=1).all())
        assert_reached(found, target)


def test_arms_are_independent() -> None:
    qpos = near(start(6))
    target = pose_at(near(qpos))
    target[1] = pose_at(qpos[1:2])[0]  # there already
    target[3, :3, 3] *= 4  # out of reach
    found = solve(pose_at, jacobian_at, qpos, target, iterations=60)
    assert torch.equal(found[1], qpos[1])
    for b in (0, 1, 2, 4, 5):
        one = slice(b, b + 1)
        alone = solve(pose_at, jacobian_at, qpos[one], target[one], iterations=60)
        torch.testing.assert_close(found[one], alone, rtol=0, atol=1e-9)
    within = [0, 1, 2, 4, 5]
    assert_reached(found[within], target[within])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("times", [1.5, 3.0, 100.0])
def test_targets_out_of_reach_leave_joints_finite(dtype: torch.dtype, times: float) -> None:
    qpos = start(16, dtype)
    target = pose_at(near(qpos))
    target[:, :3, 3] *= times
    assert bool(solve(pose_at, jacobian_at, qpos, target).isfinite().all())


def test_a_stretched_arm_moves_again() -> None:
    qpos = torch.zeros(4, 6, dtype=torch.float64)  # elbow and wrist in line: singular
    assert int(torch.linalg.matrix_rank(jacobian_at(qpos[:1]))) < 6
    target = pose_at(near(start(4)))
    assert_reached(solve(pose_at, jacobian_at, qpos, target), target)


# Rotation vectors


def rotations(vectors: Tensor) -> Tensor:
    return torch.from_numpy(Rotation.from_rotvec(vectors.double().numpy()).as_matrix())


drawn = st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda v: math.hypot(*v) > 0.1)


@given(st.lists(drawn, min_size=1, max_size=5), st.floats(0, 3))
def test_rotation_vectors_against_scipy(axes: list[tuple[float, ...]], angle: float) -> None:
    unit = normalize(torch.tensor(axes, dtype=torch.float64), dim=1)
    matrix = rotations(angle * unit)
    expected = torch.from_numpy(Rotation.from_matrix(matrix.numpy()).as_rotvec())
    torch.testing.assert_close(_rotation_vector(matrix), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(_rotation_vector(matrix), angle * unit, rtol=0, atol=1e-9)


@pytest.mark.parametrize("angle", [1.0, 0.1, 1e-3, 1e-6, 1e-9, 1e-11, 1e-13, 1e-15])
def test_rotation_vectors_of_one_radian_and_of_next_to_none(angle: float) -> None:
    vectors = angle * directions(20)
    found = _rotation_vector(torch.eye(3, dtype=torch.float64) + _less_one(vectors))
    # Below 1e-12 vectors are cut short rather than divided by next to nothing.
    torch.testing.assert_close(found, vectors, rtol=1e-6, atol=1e-12)


def _less_one(vectors: Tensor) -> Tensor:
    """Rotation matrices less the identity."""
    angle = vectors.norm(dim=1)[:, None, None]
    cross = skew(vectors)
    return torch.sinc(angle / math.pi) * cross + (1 - angle.cos()) / angle**2 * (cross @ cross)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_rotation(dtype: torch.dtype) -> None:
    assert torch.equal(
        _rotation_vector(torch.eye(3, dtype=dtype)[None]), torch.zeros(1, 3).to(dtype)
    )


def test_rotation_vectors_in_single_precision() -> None:
    vectors = 0.5 * directions(50, torch.float32)
    found = _rotation_vector(rotations(vectors).float())
    torch.testing.assert_close(found, vectors, rtol=0, atol=1e-6)


def test_axes_are_not_swapped() -> None:
    for axis in torch.eye(3, dtype=torch.float64):
        found = _rotation_vector(turned(axis, torch.tensor([0.5, -0.5], dtype=torch.float64)))
        torch.testing.assert_close(found, torch.stack([0.5 * axis, -0.5 * axis]))


# In upstream's place


class Chain:
    """What the solver needs of a chain of ``pytorch_kinematics``."""

    jacobian = staticmethod(jacobian_at)

    @staticmethod
    def forward_kinematics(qpos: Tensor) -> SimpleNamespace:
        return SimpleNamespace(get_matrix=lambda: pose_at(qpos))


def test_upstream_s_kinematics_with_this_solver() -> None:
    # Eight joints of which six, in an order of their own, lead to the hand; the last is not driven.
    places = [7, 1, 5, 2, 0, 3]
    driven = torch.tensor([True] * 5 + [False])
    upstream = SimpleNamespace(
        pk_chain=Chain(), active_ancestor_joint_idxs=places, qmask=driven, end_link="hand"
    )
    kinematics = IteratedKinematics(upstream)
    assert kinematics.end_link == "hand"
    with pytest.raises(AttributeError):
        kinematics.no_such_thing  # noqa: B018
    q0 = torch.full((5, 8), torch.nan, dtype=torch.float64)
    q0[:, places] = start(5)
    target = pose_at(near(start(5)))
    found = kinematics.compute_ik(
        pose=SimpleNamespace(to_transformation_matrix=lambda: target),
        q0=q0,
        is_delta_pose=False,
        current_pose=None,
        solver_config={"type": "levenberg_marquardt"},
    )
    assert found.shape == (5, 5)
    expected = solve(pose_at, jacobian_at, start(5), target)
    torch.testing.assert_close(found, expected[:, :5])
    assert_reached(expected, target)


def test_a_singular_arm_does_not_stop_the_others() -> None:
    qpos = start(3).float()
    target = pose_at(near(start(3))).float()

    def jacobian(q: Tensor) -> Tensor:
        found = jacobian_at(q.double()).float().clone()
        found[1] = 0.0  # no joint moves this arm's hand: J Jᵀ is singular in float32
        return found

    found = solve(lambda q: pose_at(q.double()).float(), jacobian, qpos, target)
    assert torch.equal(found[1], qpos[1])
    near_it = reached(pose_at(found.double()).float(), target)
    assert near_it.tolist() == [True, False, True]


def test_reached_is_within_a_centimetre_and_a_tenth_of_a_radian() -> None:
    pose = pose_at(start(1))
    assert reached(moved_by(pose, metres=0.0099), pose).item()
    assert not reached(moved_by(pose, metres=0.0101), pose).item()
    assert reached(moved_by(pose, rad=0.099), pose).item()
    assert not reached(moved_by(pose, rad=0.101), pose).item()
