from __future__ import annotations

import math

import pytest
import torch

from roadvla.objective import (
    entropy,
    ppo_loss,
    self_distillation_loss,
    sft_loss,
    token_log_probs,
    value_loss,
)

LN2 = math.log(2.0)


def test_token_log_probs_survive_huge_logits_and_masks() -> None:
    logits = torch.tensor([[[1e4, 1e4, -1e4], [-math.inf, 0.0, 0.0]]], requires_grad=True)
    result = token_log_probs(logits, torch.tensor([[1, 2]]))
    assert torch.allclose(result, torch.tensor([[-LN2, -LN2]]))
    result.sum().backward()
    assert logits.grad is not None
    assert torch.allclose(logits.grad, torch.tensor([[[-0.5, 0.5, 0.0], [0.0, -0.5, 0.5]]]))
    assert token_log_probs(logits.bfloat16(), torch.tensor([[1, 2]])).dtype == torch.float32


def test_entropy_in_nats_per_token() -> None:
    # uniform over 4: log 4; (1/2, 1/4, 1/4): 3/2 log 2; one bin left: 0
    logits = torch.tensor(
        [[0.0, 0.0, 0.0, 0.0], [LN2, 0.0, 0.0, -math.inf], [0.0, -math.inf, -math.inf, -1e4]],
        requires_grad=True,
    )
    result = entropy(logits)
    assert torch.allclose(result, torch.tensor([2 * LN2, 1.5 * LN2, 0.0]), atol=1e-6)
    result.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    # dH/dz_u = -p_u (log p_u + H): 1/2 (log 2 - 3/2 log 2), twice 1/4 (2 log 2 - 3/2 log 2)
    expected = -torch.tensor([0.25 * LN2, -0.125 * LN2, -0.125 * LN2, 0.0])
    assert torch.allclose(logits.grad[1], expected, atol=1e-6)


def test_sft_gradient_is_student_minus_demonstration() -> None:
    logits, tokens = torch.randn(5, 3, 6, requires_grad=True), torch.randint(6, (5, 3))
    sft_loss(logits, tokens).backward()
    one_hot = torch.nn.functional.one_hot(tokens, 6)
    assert logits.grad is not None
    assert torch.allclose(logits.grad, (logits.detach().softmax(-1) - one_hot) / 15, atol=1e-7)


def test_ppo_gradient_stops_where_the_clip_acts() -> None:
    # Action ratios 2, 1/2, 2, 1/2 with advantages +, -, -, +: the first two have left the
    # trust region in the direction they gain from, the other two are pulled back.
    log_ratio = torch.tensor([[LN2 / 2] * 2, [-LN2 / 2] * 2, [LN2 / 2] * 2, [-LN2 / 2] * 2])
    log_probs = log_ratio.clone().requires_grad_()
    advantage = torch.tensor([1.0, -1.0, -1.0, 1.0])
    old = torch.zeros(4, 2, requires_grad=True)
    loss, fraction = ppo_loss(log_probs, old, advantage)
    # -mean(min(2, 1.2), min(-.5, -.8), min(-2, -1.2), min(.5, .8)) = -(1.2 - .8 - 2 + .5)/4
    assert math.isclose(loss.item(), 1.1 / 4, rel_tol=1e-6)
    assert fraction.item() == 1.0
    loss.backward()
    assert log_probs.grad is not None
    assert torch.allclose(
        log_probs.grad, torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.5, 0.5], [-0.125, -0.125]])
    )
    assert old.grad is None
    assert not fraction.requires_grad


def test_ppo_ratio_per_token() -> None:
    # Token ratios 1.5 and 1.1, advantage 2: mean of min(3, 2.4) and 2.2 is 2.3; one is outside.
    log_probs = torch.tensor([[1.5, 1.1]]).log().requires_grad_()
    loss, fraction = ppo_loss(log_probs, torch.zeros(1, 2), torch.tensor([2.0]), ratio="token")
    assert math.isclose(loss.item(), -2.3, rel_tol=1e-6)
    assert fraction.item() == 0.5
    # Their product, 1.65, is what the action has: min(3.3, 2.4)
    loss, fraction = ppo_loss(log_probs, torch.zeros(1, 2), torch.tensor([2.0]), ratio="action")
    assert math.isclose(loss.item(), -2.4, rel_tol=1e-6)
    assert fraction.item() == 1.0


def test_ppo_starts_as_the_policy_gradient() -> None:
    log_probs = torch.randn(6, 3).requires_grad_()
    advantage = torch.randn(6)
    loss, fraction = ppo_loss(log_probs, log_probs.detach(), advantage)
    assert math.isclose(loss.item(), -advantage.mean().item(), rel_tol=1e-5)
    assert fraction.item() == 0.0
    loss.backward()
    assert log_probs.grad is not None
    assert torch.allclose(log_probs.grad, -advantage[:, None].expand(6, 3) / 6)


@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_ppo_survives_enormous_ratios(advantage: float) -> None:
    log_probs = torch.tensor([[500.0], [-500.0]], requires_grad=True)
    loss, _ = ppo_loss(log_probs, torch.zeros(2, 1), torch.full((2,), advantage))
    loss.backward()
    assert loss.isfinite()
    assert log_probs.grad is not None
    assert log_probs.grad.isfinite().all()


def test_ppo_advantage_gets_no_gradient() -> None:
    advantage = torch.ones(2, requires_grad=True)
    loss, _ = ppo_loss(torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3), advantage)
    loss.backward()
    assert advantage.grad is None


def test_value_loss_takes_the_worse_of_clipped_and_free() -> None:
    # old 0, eps 1/4. V = 1, R = 1: free 0, clipped (1/4 - 1)^2 / 2 = 9/32, no gradient.
    # V = 1, R = -1: free 2, clipped (5/4)^2/2 = 25/32: free wins, gradient V - R = 2.
    value = torch.tensor([1.0, 1.0], requires_grad=True)
    old, returns = torch.zeros(2, requires_grad=True), torch.tensor([1.0, -1.0], requires_grad=True)
    loss = value_loss(value, old, returns, clip_eps=0.25)
    assert loss.item() == (9 / 32 + 2) / 2
    loss.backward()
    assert value.grad is not None
    assert value.grad.tolist() == [0.0, 1.0]
    assert old.grad is None
    assert returns.grad is None


def test_value_loss_huber_and_switches() -> None:
    value, old = torch.tensor([3.0, 0.5]), torch.tensor([3.0, 0.5])
    returns = torch.zeros(2)
    # delta 1: |3| gives 1 (3 - 1/2) = 5/2; |1/2| gives 1/8. Without Huber 9/2 and 1/8.
    assert value_loss(value, old, returns, huber=1.0).item() == (2.5 + 0.125) / 2
    assert value_loss(value, old, returns, huber=None).item() == (4.5 + 0.125) / 2
    assert value_loss(value, old, returns).item() == (4.5 + 0.125) / 2
    # delta 2: 2 (3 - 1) = 4
    assert value_loss(value, old, returns, huber=2.0).item() == (4.0 + 0.125) / 2
    # V = 0 may only come down to .8 from old 1 by default: (.8)^2/2; unclipped: 0
    moved = torch.zeros(1), torch.ones(1), torch.zeros(1)
    assert math.isclose(value_loss(*moved).item(), 0.32, rel_tol=1e-6)
    assert value_loss(*moved, clip_eps=None).item() == 0.0


def test_self_distillation_moves_the_student_alone() -> None:
    teacher, student = (x.requires_grad_() for x in torch.randn(2, 4, 3, 5))
    self_distillation_loss(teacher, student).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().max() > 0


@pytest.mark.usefixtures("unchecked")
def test_refusals() -> None:
    tokens, steps = torch.zeros(3, 2), torch.zeros(3)
    with pytest.raises(ValueError, match="one shape"):
        ppo_loss(tokens, tokens[:1], steps)
    with pytest.raises(ValueError, match="one value per action"):
        ppo_loss(tokens, tokens, torch.zeros(3, 1))
    with pytest.raises(ValueError, match="clip_eps"):
        ppo_loss(tokens, tokens, steps, clip_eps=0.0)
    with pytest.raises(ValueError, match="'joint'"):
        ppo_loss(tokens, tokens, steps, ratio="joint")
    with pytest.raises(ValueError, match="one shape"):
        value_loss(steps, steps, tokens)
    with pytest.raises(ValueError, match="clip_eps"):
        value_loss(steps, steps, steps, clip_eps=0.0)
    with pytest.raises(ValueError, match="huber"):
        value_loss(steps, steps, steps, huber=-1.0)
