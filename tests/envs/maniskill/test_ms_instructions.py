"""Wordings of the instructions."""

from __future__ import annotations

import torch

from roadvla.envs.maniskill.episodes import decode
from roadvla.envs.maniskill.instructions import TEMPLATES, instructions
from roadvla.envs.maniskill.settings import PREFIX, SETS, VARIANTS, variant

WORDED = [
    "put golf ball on plate",
    "Place the golf ball on the plate",
    "set golf ball on plate",
    "move the golf ball to the plate",
    "Take the golf ball and put it on the plate",
    "pick up golf ball and set it down on plate",
    "please put the golf ball on the plate",
    "Put golf ball onto plate.",
    "place the golf ball onto the plate surface",
    "Make sure golf ball is on plate.",
    "on the plate, put the golf ball",
    "put the golf ball where the plate is",
    "Move the golf ball from the table to the plate",
    "Move golf ball so it\N{RIGHT SINGLE QUOTATION MARK}s on plate.",
    "Can you put golf ball on plate?",
    "golf ball on the plate, please.",
    "the golf ball should be placed on the plate.",
]


def test_every_template() -> None:
    row = VARIANTS[PREFIX + "Instruct-v1"]
    ids = torch.arange(17) * 16 * 3136 + 14 * 17 * 16 * 3136
    assert instructions(row, decode(row, "all", ids)) == WORDED
    assert len(set(TEMPLATES)) == 17
    lowered = {text.lower() for text in TEMPLATES}
    assert len(lowered) == 17  # policies read them in lower case: still all different


def test_templates_belong_to_instruct_alone() -> None:
    for row in VARIANTS.values():
        for obj_set in SETS:
            texts = instructions(row, decode(row, obj_set, torch.arange(0, 10**6, 99_991)))
            plain = [text.startswith("put ") and " the " not in text for text in texts]
            if not (row.env_id == PREFIX + "Instruct-v1" and obj_set != "train"):
                assert all(plain)
            elif obj_set == "test":
                assert not any(plain)


def test_target_and_receptacle_are_named_and_distractors_are_not() -> None:
    row = variant("CR-MultiReceptacle")
    last = torch.tensor([678_666_239])
    assert instructions(row, decode(row, "test", last)) == ["put BBQ sauce on notepad"]
    row = variant("CR-MultiObject")
    last = torch.tensor([9_695_231])
    assert instructions(row, decode(row, "test", last)) == ["put cup on plate"]
