"""How episodes end: each mode is enacted on the tabletop, and called by its name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from roadvla.envs import make_env
from roadvla.envs.tabletop.dynamics import SUCCESS_RADIUS
from roadvla.evaluation.failures import (
    EVENTS,
    MODES,
    EventLog,
    as_lists,
    check_modes,
    confusion,
    mode_counts,
)

OPEN, CLOSED = 1.0, 0.0


class Puppet:
    """Moves the grippers of a batch of episodes to places, and watches."""

    def __init__(self, env="VR-UnseenTable", split="train", ids=(0, 1, 2, 3)):
        self.env = make_env(env, split=split, num_envs=len(ids), sim="tabletop", device="cpu")
        self.env.reset(torch.tensor(ids))
        moved = self.env.distribution.reposition_step
        self.log = EventLog(self.env.snapshot(), moved)
        self.left = self.env.horizon
        self.info = {}

    def to(self, place, gripper, *, height=None, steps=99, reached=2e-3):
        """Go towards places [B, 2 or 3] until all are there; with a height, along the level."""
        place = torch.as_tensor(place, dtype=torch.float32)
        for _ in range(min(steps, self.left)):
            tip = self.env.state.gripper
            goal = tip[:, :3].clone()
            goal[:, : place.shape[1]] = place
            if height is not None:
                goal[:, 2] = height
            delta = goal - tip[:, :3]
            if delta.abs().max() < reached:
                break
            turn = torch.zeros(len(delta), 3)
            if gripper == OPEN:
                error = self.env.state.object_yaw[:, self.slot] - tip[:, 5]
                turn[:, 2] = error - torch.pi * (error / torch.pi).round()
            self.act(torch.cat([delta.clamp(-0.04, 0.04), turn.clamp(-0.35, 0.35)], 1), gripper)
        return self

    slot = 0

    def act(self, motion, gripper):
        command = torch.full((len(motion), 1), gripper)
        step = self.env.step(torch.cat([motion, command], 1))
        self.info = step.info
        self.log.note(self.env.snapshot(), step.info["success"])
        self.left -= 1

    def rest(self, gripper, steps=99):
        for _ in range(min(steps, self.left)):
            self.act(torch.zeros(self.env.num_envs, 6), gripper)
        return self

    def grasp(self, slot=0, steps=99):
        self.slot = slot
        thing = self.env.state.object_position[:, slot]
        self.to(thing, OPEN, steps=steps)
        return self.rest(CLOSED, 1)

    def end(self, gripper=OPEN):
        self.rest(gripper)
        mode, events = self.log.outcome(self.info["success"], self.info["success_once"])
        found = as_lists({"mode": mode, **events})
        return [MODES[i] for i in found.pop("mode")], found

    @property
    def goal(self):
        return self.env.scene.receptacle_xy[:, 0]


def lift(puppet, height=0.06):
    return puppet.to(torch.zeros(4, 0), CLOSED, height=height)


def test_success():
    puppet = Puppet().grasp()
    modes, events = lift(puppet).to(puppet.goal, CLOSED).to(
        puppet.goal, CLOSED, height=0.04
    ).end()  # fmt: skip
    assert modes == ["success"] * 4
    assert all(0 < r <= g < p for r, g, p in zip(
        events["reach"], events["grasp"], events["place"], strict=True))  # fmt: skip
    assert events["grasps"] == [1] * 4
    assert all(x < 10 for x in events["closest_mm"])
    assert all(x < 1000 * SUCCESS_RADIUS for x in events["goal_mm"])


def test_lost():
    puppet = Puppet().grasp()
    lift(puppet).to(puppet.goal, CLOSED).rest(OPEN, 1)
    assert puppet.info["success"].all()
    # The hand is still there: it takes the object away again.
    modes, _ = puppet.grasp().to(puppet.goal * 0.2, CLOSED).end(CLOSED)
    assert modes == ["lost"] * 4


def test_wrong_receptacle():
    puppet = Puppet("CR-MultiReceptacle").grasp()
    other = puppet.env.scene.receptacle_xy[:, 1]
    modes, _ = lift(puppet).to(other, CLOSED).to(other, CLOSED, height=0.04).end()
    assert modes == ["wrong_receptacle"] * 4


def test_what_is_held_over_another_receptacle_does_not_lie_there():
    puppet = Puppet("CR-MultiReceptacle").grasp()
    other = puppet.env.scene.receptacle_xy[:, 1]
    modes, _ = lift(puppet).to(other, CLOSED).end(CLOSED)
    assert set(modes) <= {"drift", "held"}


def test_wrong_object():
    puppet = Puppet("CR-MultiObject").grasp(slot=1)
    modes, events = puppet.end(CLOSED)
    assert modes == ["wrong_object"] * 4
    assert events["grasp"] == [0] * 4
    assert all(step > 0 for step in events["other"])


def test_no_grasp():
    modes, events = Puppet().end()
    assert modes == ["no_grasp"] * 4
    assert events["grasp"] == events["release"] == events["place"] == [0] * 4


def test_drift_is_to_where_receptacles_usually_are():
    for gripper in (OPEN, CLOSED):  # whether let go or not
        puppet = Puppet().grasp()
        start = puppet.env.snapshot()
        usual = start.usual_place.expand(4, 2)
        assert ((start.objects[:, 0, :2] - usual).norm(dim=1) > 0.04).all()
        assert lift(puppet, 0.03).to(usual, CLOSED).end(gripper)[0] == ["drift"] * 4


@pytest.mark.parametrize(
    ("end", "mode"),
    [
        ((0.10, 0.00), "drift"),  # 14.4 cm nearer to the usual place, 5.6 cm nearer to the goal
        ((0.145, 0.14), "drop"),  # 4.3 cm and 4.7 cm, though the usual place is the nearer one
        ((0.13, 0.19), "drop"),  # 1.4 cm
    ],
)
def test_drift_comes_nearer_to_the_usual_place_and_more_so_than_to_the_goal(end, mode):
    start = Puppet().env.snapshot()
    objects, receptacles = torch.zeros(4, 1, 3), torch.zeros(4, 1, 3)
    receptacles[:, 0, 0] = 0.30
    objects[:, 0, :2] = torch.tensor([0.14, 0.20])
    start = replace(start, objects=objects, receptacles=receptacles, usual_place=torch.zeros(2))
    log, never = EventLog(start), torch.zeros(4, dtype=torch.bool)
    log.note(replace(start, held=torch.zeros_like(start.held)), never)
    moved = objects.clone()
    moved[:, 0, :2] = torch.tensor(end)
    log.note(replace(start, objects=moved), never)
    assert [MODES[i] for i in log.outcome(never, never)[0]] == [mode] * 4


def test_what_is_let_go_where_it_was_grasped_is_dropped():
    puppet = Puppet(ids=tuple(range(64)))
    place = puppet.env.state.object_position[:, 0].clone()
    start = puppet.env.snapshot()
    usual = (start.objects[:, 0, :2] - start.usual_place).norm(dim=1)
    goal = (start.objects[:, 0, :2] - start.receptacles[:, 0, :2]).norm(dim=1)
    assert (usual < goal).float().mean() > 0.9  # without having moved
    modes, events = puppet.grasp().end(OPEN)
    still = (puppet.env.state.object_position[:, 0] - place)[:, :2].norm(dim=1) < 0.01
    held = [step > 0 for step in events["grasp"]]
    assert sum(held) > 48
    assert {m for m, h, s in zip(modes, held, still.tolist(), strict=True) if h and s} == {"drop"}


def test_an_object_that_was_thrown_was_held():
    """Far in one step, but not where the setting moves objects."""
    for repositioned, mode in ((0, "drop"), (9, "drop"), (2, "no_grasp")):
        start = Puppet().env.snapshot()
        log, never = EventLog(start, repositioned), torch.zeros(4, dtype=torch.bool)
        log.note(replace(start, held=torch.zeros_like(start.held)), never)
        away = start.objects.clone()
        # Away from the usual place and from the goal.
        away[:, 0, :2] += 0.1 * torch.nn.functional.normalize(
            start.objects[:, 0, :2] - start.receptacles[:, 0, :2], dim=1
        )
        log.note(replace(start, objects=away), never)
        modes, _ = log.outcome(never, never)
        assert [MODES[i] for i in modes] == [mode] * 4


def test_drop_and_held_are_on_the_way():
    for gripper, mode in ((OPEN, "drop"), (CLOSED, "held")):
        puppet = Puppet().grasp()
        beyond = puppet.goal * (1 + 0.06 / puppet.goal.norm(dim=1, keepdim=True))
        modes, events = lift(puppet, 0.03).to(beyond, CLOSED).end(gripper)
        assert modes == [mode] * 4
        assert (events["release"] == [0] * 4) == (gripper == CLOSED)


def test_what_was_held_before_the_object_moved_does_not_count():
    puppet = Puppet("ER-Repositioning", "test", ids=tuple(range(64)))
    modes, events = puppet.grasp(steps=3).end(CLOSED)
    before = [0 < step <= 5 for step in events["grasp"]]
    assert any(before)
    # The gripper stays closed, so nothing is held again: it is as if nothing ever had been.
    assert {m for m, early in zip(modes, before, strict=True) if early} == {"no_grasp"}


def test_a_carried_object_has_not_jumped():
    puppet = Puppet().grasp()
    lift(puppet)
    before, rest = puppet.env.state.object_position[:, 0], puppet.log._rest[:, 0].clone()
    fast = torch.tensor([0.04, 0.04, 0.0, 0.0, 0.0, 0.3]).expand(4, 6)
    puppet.act(fast, CLOSED)
    assert puppet.log._held_since.all()
    moved = puppet.env.state.object_position[:, 0] - before
    assert (moved[:, :2].norm(dim=1) > 0.05).all()
    assert torch.equal(puppet.log._rest[:, 0], rest)


def test_an_episode_ends_alike_in_any_batch():
    env = make_env("CR-MultiObject", split="test", num_envs=8, sim="tabletop", device="cpu")
    one = make_env("CR-MultiObject", split="test", num_envs=1, sim="tabletop", device="cpu")
    generator = torch.Generator().manual_seed(0)
    actions = torch.rand(env.horizon, 8, 7, generator=generator) * 0.08 - 0.04
    actions[..., 6] = (actions[..., 6] > 0).float()

    def outcome(world, ids, columns):
        world.reset(torch.tensor(ids))
        log = EventLog(world.snapshot())
        for action in actions[:, columns]:
            step = world.step(action)
            log.note(world.snapshot(), step.info["success"])
        mode, events = log.outcome(step.info["success"], step.info["success_once"])
        return as_lists({"mode": mode, **events})

    whole = outcome(env, list(range(8)), list(range(8)))
    for i in range(8):
        alone = outcome(one, [i], [i])
        assert {name: [values[i]] for name, values in whole.items()} == alone


def test_counts_and_confusion_by_hand():
    assert mode_counts([0, 0, 7])["success"] == 2
    assert mode_counts([0, 0, 7])["no_grasp"] == 1
    assert sum(mode_counts([0, 0, 7]).values()) == 3
    table = confusion([7, 7, 0], [0, 7, 0])
    assert (table[7, 0], table[7, 7], table[0, 0]) == (1, 1, 1)
    assert table.sum() == 3
    with pytest.raises(ValueError, match="2 and 1 episodes"):
        confusion([0, 0], [0])


@pytest.mark.parametrize(
    ("modes", "wrong"),
    [
        ([0, 7, 1], ""),
        ([0, 7, 8], "does not exist"),
        ([7, 7, 1], "contradicts"),
        ([0, 0, 1], "contradicts"),
        ([0, 7, 7], "contradicts"),
        ([0, 1, 1], "contradicts"),
    ],
)
def test_modes_must_fit_the_outcomes(modes, wrong):
    said = check_modes(modes, [True, False, False], [True, False, True])
    assert wrong in said
    assert bool(said) == bool(wrong)


def test_evaluations_carry_modes_and_files_keep_them(tmp_path):
    from roadvla.errors import UserError
    from roadvla.evaluation.evaluate import evaluate
    from roadvla.evaluation.files import read_evaluation, write_evaluation
    from roadvla.evaluation.records import outcomes_of
    from roadvla.policy import load_backbone

    policy = load_backbone(torch.device("cpu"))
    result = evaluate(policy, env="VR-UnseenTable", split="test", episodes=6, num_envs=4)
    assert len(result.modes) == 6
    assert set(result.events) == set(EVENTS)
    assert [MODES[m] == "success" for m in result.modes] == list(result.success)
    path = write_evaluation(result, tmp_path)
    assert read_evaluation(path) == result
    assert outcomes_of(result).modes == result.modes
    lied = replace(result, modes=tuple(0 if m else 7 for m in result.modes))
    with pytest.raises(UserError, match="a mode contradicts the outcome"):
        read_evaluation(write_evaluation(lied, tmp_path))
    short = replace(result, events={**result.events, "lift": (0,)})
    with pytest.raises(UserError, match="lift does not list 6 episodes"):
        read_evaluation(write_evaluation(short, tmp_path))
    none = replace(result, events={name: v for name, v in result.events.items() if name != "lift"})
    with pytest.raises(UserError, match="its events are not those known"):
        read_evaluation(write_evaluation(none, tmp_path))


def test_modes_are_distinct():
    assert len(set(MODES)) == len(MODES)
    assert np.array_equal(np.argsort(MODES).argsort().shape, (len(MODES),))


@pytest.mark.parametrize(("shift", "mode"), [(0.04, "wrong_object"), (0.02, "no_grasp")])
def test_another_object_pushed_about_without_a_grasp(shift, mode):
    start = Puppet("CR-MultiObject").env.snapshot()
    objects = start.objects.clone()
    objects[:, 1, 0] += shift
    log, never = EventLog(start), torch.zeros(4, dtype=torch.bool)
    log.note(replace(start, objects=objects), never)
    modes, events = log.outcome(never, never)
    assert [MODES[i] for i in modes] == [mode] * 4
    assert events["other"].tolist() == [int(mode == "wrong_object")] * 4
