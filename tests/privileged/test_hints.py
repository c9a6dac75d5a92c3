"""Hints say what is true, in the paper's words, and nothing that the tiny VLA cannot read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from roadvla.envs import make_env
from roadvla.envs.base import Snapshot
from roadvla.policy.vocabulary import MAX_PROMPT, UNKNOWN, Tokenizer, split
from roadvla.privileged.hints import join, names
from roadvla.privileged.plan import plan_hints
from roadvla.privileged.relspatial import ALIGNED, relspatial_hints
from roadvla.privileged.verbalise import action_hints
from roadvla.train.primitives import HINTS, PrimitiveSampler

CPU = torch.device("cpu")


def snapshot(thing, place, *, tip=(0.0, 0.0, 0.2), held=-1, is_open=True) -> Snapshot:
    return Snapshot(
        tip=torch.tensor([tip]),
        objects=torch.tensor([[thing]]),
        receptacles=torch.tensor([[place]]),
        held=torch.tensor([held]),
        is_open=torch.tensor([is_open]),
        usual_place=torch.zeros(2),
    )


# The paper's own example. Ahead is -x and right is +y, and the tip is at (0, 0, 0.2): the carrot is
# 5 cm right, 3 ahead and 2 below, the plate 20 ahead, 6 left and 5 below; so from carrot to plate
# it is 17 cm ahead and 11 left; height is left out. The largest comes first, which fits all the
# paper's sentences.
PAPER = ((-0.03, 0.05, 0.18), (-0.20, -0.06, 0.15))
STATE = (
    "carrot is right, ahead, below gripper, not grasped. plate is ahead, left, below gripper. "
    "carrot to plate: move ahead and left. gripper open."
)


def test_relspatial_speaks_as_the_paper_does():
    assert relspatial_hints(snapshot(*PAPER), ["put carrot on plate"]) == [STATE]


def test_the_plan_comes_before_the_state():
    (hint,) = plan_hints(snapshot(*PAPER), ["put carrot on plate"])
    assert hint == (
        "Reference plan for “put carrot on plate”: 1. Approach the object. 2. Align for grasping. "
        "3. Grasp and lift. 4. Move toward the target. 5. Align for placement. 6. Place and "
        f"retract. Current state: {STATE}"
    )


# The paper's action, with the third decimal that steps of 4 cm need.
def test_actions_are_spelled_out():
    action = torch.tensor([[0.05, -0.02, 0.10, 0.0, 0.05, -0.0001, 1.0]])
    assert action_hints(action, torch.tensor([1.2])) == [
        "Hint (q=1.20): move (+0.050, -0.020, +0.100), rotate (+0.000, +0.050, +0.000), "
        "gripper open."
    ]
    assert action_hints(action * 0, torch.tensor([-0.004]))[0].startswith("Hint (q=0.00): move")
    assert action_hints(action * 0, torch.tensor([0.0]))[0].endswith("gripper closed.")


def test_what_is_held_and_closed_is_said():
    (hint,) = relspatial_hints(
        snapshot((0.0, 0.0, 0.2), (0.0, 0.0, 0.2), held=0, is_open=False), ["put a on b"]
    )
    assert hint == "a is at gripper, grasped. b is at gripper. a to b: stay. gripper closed."
    (hint,) = relspatial_hints(snapshot(*PAPER, held=1), ["put a on b"])
    assert "a is right, ahead, below gripper, not grasped" in hint


OPPOSITE = {"ahead": "behind", "left": "right", "below": "above"}
OPPOSITE |= {b: a for a, b in OPPOSITE.items()}
offset = st.floats(-0.3, 0.3).filter(lambda x: abs(abs(x) - ALIGNED) > 1e-4)


@given(st.tuples(offset, offset, offset))
def test_a_mirrored_displacement_has_the_opposite_words(d):
    mirrored = [-x for x in d]
    words, opposite = (
        relspatial_hints(snapshot(tuple(x), (0.0, 0.0, 0.0), tip=(0.0,) * 3), ["put a on b"])[0]
        .split(" gripper")[0]
        .removeprefix("a is ")
        for x in (d, mirrored)
    )
    if words == "at":
        assert all(abs(x) < ALIGNED for x in d)
        assert opposite == "at"
    else:
        assert [OPPOSITE[word] for word in words.split(", ")] == opposite.split(", ")
        assert len(words.split(", ")) == sum(abs(x) >= ALIGNED for x in d)


@pytest.mark.parametrize("env", ["VR-UnseenTable", "CR-MultiObject", "CR-MultiReceptacle"])
def test_an_episode_is_described_alike_in_any_batch(env):
    one, many = (
        make_env(env, split="test", num_envs=n, sim="tabletop", device="cpu") for n in (1, 6)
    )
    many.reset(torch.arange(6))
    one.reset(torch.tensor([4]))
    hints = relspatial_hints(many.snapshot(), many.instructions)
    assert hints[4] == relspatial_hints(one.snapshot(), one.instructions)[0]
    assert len(set(hints)) == 6


@pytest.mark.parametrize("kind", HINTS)
def test_the_tiny_vla_knows_every_word_and_has_room_for_all(kind):
    sampler, read = PrimitiveSampler(128, CPU), Tokenizer()
    for index in (0, 5, 9):
        _, batch = sampler.hinted(index, kind)
        assert not (read(batch.prompts) == UNKNOWN).any()
        assert max(len(split(prompt)) for prompt in batch.prompts) <= MAX_PROMPT - 8


@pytest.mark.parametrize(
    ("instruction", "found"),
    [
        ("put red cube on blue plate", ("red cube", "blue plate")),
        ("Put carrot onto plate.", ("carrot", "plate")),
        ("please put the carrot on the plate", ("carrot", "plate")),
        ("the carrot should be placed on the plate.", ("object", "target")),
    ],
)
def test_names_come_from_the_instruction(instruction, found):
    assert names(instruction) == found


def test_a_hint_follows_the_instruction():
    assert join("Can you put a on b?", "Hint.") == "Can you put a on b. Hint."
