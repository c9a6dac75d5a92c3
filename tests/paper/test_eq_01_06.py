"""Eq. 1-6: imitation, PPO and self-distillation, with golden numbers derived by hand."""

from __future__ import annotations

import math

import pytest
import torch

import oracles
from roadvla.objective import (
    divergence,
    joint_log_probs,
    ppo_loss,
    self_distillation_loss,
    sft_loss,
    token_log_probs,
)

LN2, LN3 = math.log(2.0), math.log(3.0)


def test_eq_01_golden() -> None:
    # softmax(log 3, 0) = (3/4, 1/4): -log of 3/4 and of 1/4, averaged over the two tokens.
    logits = torch.tensor([[[LN3, 0.0], [LN3, 0.0]]])
    loss = sft_loss(logits, torch.tensor([[0, 1]]))
    assert math.isclose(loss.item(), -0.5 * math.log(3 / 16), rel_tol=1e-6)


@pytest.mark.parametrize(
    ("advantage", "expected"),
    [
        # Ratios 3/2, 1, 1/2 and ε = 1/5.
        (1.0, -(1.2 + 1.0 + 0.5) / 3),  # min(1.5, 1.2), min(1, 1), min(.5, .8)
        (-1.0, (1.5 + 1.0 + 0.8) / 3),  # min(-1.5, -1.2), min(-1, -1), min(-.5, -.8)
    ],
)
def test_eq_02_golden(advantage: float, expected: float) -> None:
    log_probs = torch.tensor([[1.5], [1.0], [0.5]]).log()
    loss, fraction = ppo_loss(log_probs, torch.zeros(3, 1), torch.full((3,), advantage))
    assert math.isclose(loss.item(), expected, rel_tol=1e-6)
    assert math.isclose(fraction.item(), 2 / 3, rel_tol=1e-6)


def test_eq_03_ratio_of_an_action_is_the_product_over_its_tokens() -> None:
    # New token probabilities (1/2, 1/3), old (1/4, 2/3): ratio 2 · 1/2 = 1 for the action.
    new, old = torch.tensor([[0.5, 1 / 3]]).log(), torch.tensor([[0.25, 2 / 3]]).log()
    loss, fraction = ppo_loss(new, old, torch.tensor([3.0]))
    assert math.isclose(loss.item(), -3.0, rel_tol=1e-6)
    assert fraction.item() == 0.0


def test_eq_04_tokens_conditioned_on_the_prefix_make_the_action() -> None:
    first, second = torch.randn(1, 1, 1, 3).double(), torch.randn(1, 1, 3, 3).double()
    joint = joint_log_probs((first, second))
    for a in range(3):
        for b in range(3):
            forced = torch.stack([first[0, 0, 0], second[0, 0, a]])
            tokens = token_log_probs(forced, torch.tensor([a, b]))
            assert torch.isclose(tokens.sum(), joint[0, 0, 3 * a + b])


def test_eq_05_is_the_mean_over_steps_and_tokens() -> None:
    teacher, student = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    total = 0.0
    for t in range(4):
        for k in range(7):
            q, p = oracles.softmax(teacher[t, k].tolist()), oracles.softmax(student[t, k].tolist())
            m = [(x + y) / 2 for x, y in zip(q, p, strict=True)]
            total += 0.5 * oracles.kl(q, m) + 0.5 * oracles.kl(p, m)
    loss = self_distillation_loss(teacher, student)
    assert math.isclose(loss.item(), total / 28, rel_tol=1e-10)
    forward = self_distillation_loss(teacher, student, kind="forward_kl")
    assert torch.isclose(forward, divergence(teacher, student, kind="forward_kl").mean())


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # q = (3/4, 1/4), p = (1/2, 1/2), m = (5/8, 3/8)
        ("forward_kl", 0.75 * math.log(1.5) - 0.25 * LN2),
        ("reverse_kl", 0.5 * math.log(2 / 3) + 0.5 * LN2),
        (
            "jsd",
            0.5 * (0.75 * math.log(6 / 5) + 0.25 * math.log(2 / 3))
            + 0.5 * (0.5 * math.log(4 / 5) + 0.5 * math.log(4 / 3)),
        ),
    ],
)  # fmt: skip
def test_eq_06_golden(kind: str, expected: float) -> None:
    teacher, student = torch.tensor([[LN3, 0.0]]), torch.zeros(1, 2)
    value = divergence(teacher, student, kind=kind)
    assert math.isclose(value.item(), expected, rel_tol=1e-5)
