"""Pretraining data: the labels are right, nothing of the test sets leaks, and it is repeatable."""

from __future__ import annotations

import re

import torch

from roadvla.envs.tabletop.camera import SIZE
from roadvla.privileged.relspatial import ALIGNED
from roadvla.train.pretrain import PretrainConfig, PretrainProgress, pretrain
from roadvla.train.primitives import PrimitiveSampler, grid

CPU = torch.device("cpu")


def test_a_batch_is_its_index() -> None:
    first, again = PrimitiveSampler(16, CPU).sample(5), PrimitiveSampler(16, CPU).sample(5)
    assert torch.equal(first.image, again.image)
    assert first.prompts == again.prompts
    assert torch.equal(first.action, again.action)
    assert not torch.equal(first.image, PrimitiveSampler(16, CPU).sample(6).image)


def test_prompts_are_primitives_and_never_the_task() -> None:
    sampler = PrimitiveSampler(64, CPU)
    plain = [index for index in range(16) if index % 13 not in (4, 8, 12)]
    prompts = [text for index in plain for text in sampler.sample(index).prompts]
    assert {text.split()[0] for text in prompts} == {"reach", "go", "pick", "touch"}
    assert not any("put" in text or " on " in text for text in prompts)


def test_actions_are_on_the_grid_and_within_limits() -> None:
    action = torch.cat([PrimitiveSampler(64, CPU).sample(i).action for i in range(8)])
    steps = action[:, :6] / torch.tensor([0.04] * 3 + [0.35] * 3) * 8
    assert torch.allclose(steps, steps.round(), atol=1e-4)
    assert (steps.abs() <= 8 + 1e-4).all()
    assert set(action[:, 6].tolist()) == {0.0, 1.0}
    assert torch.equal(grid(action), action)


# Reaching moves towards the object: the label has the sign of the offset wherever that is not
# rounded away (0.7 of it, in units of 1/8 of 4 cm: at least 5 mm / 2 / 0.7 = 3.6 mm).
def test_reaching_goes_towards_the_object_and_going_towards_the_plate() -> None:
    checked = 0
    for index in range(8):
        batch = PrimitiveSampler(64, CPU).sample(index)
        for i, text in enumerate(batch.prompts):
            offset = batch.geometry[i, :3] if text.startswith("reach") else batch.geometry[i, 3:5]
            if text.split()[0] not in ("reach", "go"):
                continue
            offset = offset / 10
            sure = offset.abs() > 0.004
            assert torch.equal(batch.action[i, : len(offset)][sure].sign(), offset[sure].sign())
            checked += 1
    assert checked > 100


def test_of_13_batches_one_has_hints_of_each_kind() -> None:
    sampler = PrimitiveSampler(64, CPU)
    starts = ("Reference plan", "Hint (q=")
    for index in range(13):
        batch, plain = sampler.sample(index), sampler.hinted(index, "action")[0]
        if index not in (4, 8, 12):
            assert batch.prompts == plain.prompts
            assert torch.equal(batch.image, plain.image)
            assert torch.equal(batch.named, plain.named)
            continue
        hints = [
            p.removeprefix(f"{q}. ") for p, q in zip(batch.prompts, plain.prompts, strict=True)
        ]
        found = [next((s for s in starts if hint.startswith(s)), "state") for hint in hints]
        assert set(found) == {("state", *starts)[index // 4 - 1]}
        # The label is that of the prompt without the hint.
        assert torch.equal(batch.action, plain.action)


# Also with hints the request is a primitive: the suite's sentence is but quoted, by the plan.
def test_hinted_prompts_ask_for_primitives_too() -> None:
    sampler = PrimitiveSampler(64, CPU)
    for index, quotes in ((4, 0), (8, 1), (12, 0)):
        for text in sampler.sample(index).prompts:
            assert text.split()[0] in ("reach", "go", "pick", "touch")
            assert text.count("put ") == text.count("Reference plan for “put ") == quotes


def test_hints_are_true_of_their_own_state() -> None:
    batch = PrimitiveSampler(128, CPU).hinted(3, "relspatial")[1]
    for text, geometry in zip(batch.prompts, batch.geometry.tolist(), strict=True):
        _, thing, place, *_ = text.split(". ")
        assert ("not grasped" in thing) == (geometry[5] == 0.0)
        axes = (("ahead", "behind"), ("left", "right"), ("below", "above"))
        for said, decimetres in ((thing, geometry[:3]), (place, geometry[3:5])):
            for (negative, positive), x in zip(axes, decimetres, strict=False):
                assert (negative in said) == (x < -10 * ALIGNED + 1e-6)
                assert (positive in said) == (x > 10 * ALIGNED - 1e-6)


def test_where_the_frame_is_covered_nothing_in_it_is_asked_for() -> None:
    batch = PrimitiveSampler(256, CPU).sample(4)
    covered = (batch.image == 128).flatten(1).all(1)
    assert 0.2 < covered.float().mean() < 0.4
    assert not batch.named[covered].any()
    assert batch.named[~covered].any(1).all()


def test_a_hinted_action_is_near_the_right_one() -> None:
    batch = PrimitiveSampler(64, CPU).hinted(0, "action")[1]
    for prompt, action in zip(batch.prompts, batch.action.tolist(), strict=True):
        numbers = [float(x) for x in re.findall(r"[+-]\d\.\d+", prompt)]
        limits = [0.04] * 3 + [0.35] * 3
        for said, right, limit in zip(numbers, action, limits, strict=False):
            assert abs(said - right) <= 0.15 * limit + 5e-4
        assert len(numbers) == 6
        assert prompt.endswith("open." if action[6] > 0.5 else "closed.")


def test_only_what_the_prompt_names_is_asked_about() -> None:
    batch = PrimitiveSampler(256, CPU).sample(2)
    for text, named in zip(batch.prompts, batch.named, strict=True):
        verb = text.split()[0]
        assert bool(named[:3].all()) == (verb != "go")
        assert bool(named[3:5].all()) == (verb in ("go", "touch"))
        assert bool(named[10:].all())
        elongated = "carrot" in text or "brick" in text
        assert bool(named[6:10].any()) == (elongated and verb != "go")


def test_what_is_named_is_mostly_in_the_frame() -> None:
    pixel = torch.cat([PrimitiveSampler(64, CPU).sample(i).pixel for i in range(8)])
    inside = ((pixel > -1) & (pixel < SIZE)).all(-1)
    assert inside.float().mean() > 0.95


def test_pretraining_learns_and_freezes_the_tower() -> None:
    seen: list[PretrainProgress] = []
    config = PretrainConfig(steps=30, batch=32, warmup_steps=5)
    policy = pretrain(config, seen.append, report_every=10)
    assert [progress.step for progress in seen] == [10, 20, 30]
    assert seen[-1].token_loss < seen[0].token_loss - 0.3
    assert policy.vision_frozen
