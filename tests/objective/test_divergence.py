from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from roadvla.objective import divergence

KINDS = ("forward_kl", "reverse_kl", "jsd")
INF = math.inf


def logits_of(seed: int, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    teacher, student = scale * torch.randn(2, 4, 3, 7, generator=generator, dtype=torch.float64)
    return teacher, student


@given(st.integers(0, 2**31), st.floats(0.01, 30.0), st.sampled_from(KINDS))
def test_is_a_divergence(seed: int, scale: float, kind: str) -> None:
    teacher, student = logits_of(seed, scale)
    value = divergence(teacher, student, kind=kind)
    assert value.shape == (4, 3)
    assert value.min() >= -1e-12
    assert torch.allclose(divergence(student, student, kind=kind), torch.zeros(4, 3).double())
    shifted = divergence(teacher + 3.0, student - 5.0, kind=kind)
    assert torch.allclose(shifted, value, atol=1e-10)


@given(st.integers(0, 2**31), st.floats(0.01, 1000.0))
def test_jsd_is_symmetric_and_at_most_log_2(seed: int, scale: float) -> None:
    teacher, student = logits_of(seed, scale)
    value = divergence(teacher, student, kind="jsd")
    assert torch.allclose(value, divergence(student, teacher, kind="jsd"), atol=1e-12)
    assert value.max() <= math.log(2.0) + 1e-12
    forward = divergence(teacher, student, kind="forward_kl")
    assert torch.allclose(forward, divergence(student, teacher, kind="reverse_kl"))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_matches_its_formula(kind: str) -> None:
    teacher, student = logits_of(5)
    teacher.requires_grad_()
    student.requires_grad_()
    gradient = torch.autograd.grad(
        divergence(teacher, student, kind=kind).sum(), [teacher, student], allow_unused=True
    )
    assert gradient[0] is None
    q, p = teacher.detach().softmax(-1), student.detach().softmax(-1)
    m = 0.5 * (p + q)
    ratio = {"reverse_kl": p / q, "jsd": p / m}
    if kind == "forward_kl":
        expected = p - q
    else:
        log_ratio = ratio[kind].log()
        expected = p * (log_ratio - (p * log_ratio).sum(-1, keepdim=True))
        expected = 0.5 * expected if kind == "jsd" else expected
    assert torch.allclose(gradient[1], expected, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_survives_huge_logits(kind: str) -> None:
    rows = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [1e4, 1e4, 1e4], [0.0, 1.0, 2.0]])
    teacher, student = rows.repeat_interleave(4, 0), rows.repeat(4, 1).requires_grad_()
    value = divergence(teacher, student, kind=kind)
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    exact = divergence(teacher.double(), student.detach().double(), kind=kind)
    assert torch.allclose(value.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_bins_masked_by_both_do_not_count(kind: str) -> None:
    teacher, student = torch.randn(2, 1, 5)
    mask = torch.tensor([False, True, False, True, False])
    masked = student.masked_fill(mask, -INF).requires_grad_()
    value = divergence(teacher.masked_fill(mask, -INF)[None], masked[None], kind=kind)
    short = divergence(teacher[:, ~mask][None], student[:, ~mask][None], kind=kind)
    assert torch.allclose(value, short, atol=1e-7)
    value.sum().backward()
    assert masked.grad is not None
    assert masked.grad.isfinite().all()
    assert not masked.grad[:, mask].any()


def test_mass_that_only_one_side_has() -> None:
    # q = (1/2, 1/2), p = (1, 0): KL(q||p) = inf, KL(p||q) = log 2,
    # JSD = 1/2 [1/2 log(2/3) + 1/2 log 2] + 1/2 log(4/3) = 3/4 log(4/3)
    both, one = torch.zeros(1, 1, 2), torch.tensor([[[0.0, -INF]]])
    expected = {"forward_kl": INF, "reverse_kl": math.log(2.0), "jsd": 0.75 * math.log(4 / 3)}
    for kind, value in expected.items():
        student = one.clone().requires_grad_()
        result = divergence(both, student, kind=kind)
        assert math.isclose(result.item(), value, rel_tol=1e-6)
        result.sum().backward()
        assert student.grad is not None
        assert student.grad.isfinite().all()
        if kind == "forward_kl":
            assert student.grad.flatten().tolist() == [0.5, -0.5]
    mirrored = {"forward_kl": math.log(2.0), "reverse_kl": INF, "jsd": 0.75 * math.log(4 / 3)}
    for kind, value in mirrored.items():
        assert math.isclose(divergence(one, both, kind=kind).item(), value, rel_tol=1e-6)


def test_half_precision_is_raised() -> None:
    teacher, student = (x.to(torch.bfloat16) for x in torch.randn(2, 2, 3, 8))
    value = divergence(teacher, student.requires_grad_())
    assert value.dtype == torch.float32
    assert torch.equal(value, divergence(teacher.float(), student.float()))


@pytest.mark.usefixtures("unchecked")
def test_refusals() -> None:
    with pytest.raises(ValueError, match="'tv'"):
        divergence(torch.zeros(1, 2), torch.zeros(1, 2), kind="tv")
    with pytest.raises(ValueError, match="one shape"):
        divergence(torch.zeros(1, 2), torch.zeros(2, 2))
