"""Sampling: exact log-probabilities, the right distribution, the generator decides everything."""

from __future__ import annotations

import pytest
import scipy.stats
import torch

from roadvla.errors import UserError
from roadvla.policy import TinyVLA
from roadvla.policy.sampling import sample_tokens
from roadvla.policy.temperature import MIN_TEMPERATURE, check_temperature
from roadvla.types import Observation


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.0])
def test_log_probs_are_those_of_the_sampled_distribution(
    policy: TinyVLA, observation: Observation, temperature: float
) -> None:
    output = policy.act(observation, temperature=temperature)
    logits, _ = policy.evaluate(observation, output.action_tokens)
    expected = (logits / temperature).log_softmax(-1)
    expected = expected.gather(-1, output.action_tokens.unsqueeze(-1)).squeeze(-1)
    assert output.log_probs.dtype == torch.float32
    torch.testing.assert_close(output.log_probs, expected.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0 - 2**-24])
def test_the_least_temperature_is_still_sampled_at(uniform: float) -> None:
    logits = torch.tensor([[1e4, -1e4, 9.999e3, 0.0]])
    tokens, log_probs = sample_tokens(logits / MIN_TEMPERATURE, torch.tensor([uniform]))
    assert (tokens.item(), log_probs.item()) == (0, 0.0)
    check_temperature(MIN_TEMPERATURE)


@pytest.mark.parametrize("value", [-1.0, 1e-300, 9.9e-4, float("nan"), float("inf")])
def test_other_temperatures_are_refused(value: float) -> None:
    with pytest.raises(UserError, match="expected 0"):
        check_temperature(value)
    with pytest.raises(UserError, match=r"expected 0\.001 or more"):
        check_temperature(value, greedy=False)
    with pytest.raises(UserError, match=r"expected 0\.001 or more"):
        check_temperature(0.0, greedy=False)


def test_greedy(policy: TinyVLA, observation: Observation) -> None:
    output = policy.act(observation, temperature=0.0)
    logits, _ = policy.evaluate(observation, output.action_tokens)
    assert torch.equal(output.action_tokens, logits.argmax(-1))
    assert torch.equal(output.log_probs, torch.zeros(6, 7))


def test_nothing_carries_gradient(policy: TinyVLA, observation: Observation) -> None:
    output = policy.act(observation, temperature=1.0, keep_logits=True)
    assert output.vision is not None
    assert output.logits is not None
    for part in (output.log_probs, output.value, output.logits, output.vision):
        assert not part.requires_grad
        assert not part.is_inference()


def test_the_generator_decides(policy: TinyVLA, observation: Observation) -> None:
    def run(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        torch.rand(seed)  # Noise in the global stream must not matter.
        return policy.act(observation, temperature=1.0, generator=generator).action_tokens

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_each_call_advances_the_generator(policy: TinyVLA, observation: Observation) -> None:
    generator = torch.Generator().manual_seed(0)
    first = policy.act(observation, temperature=1.0, generator=generator)
    second = policy.act(observation, temperature=1.0, generator=generator)
    assert not torch.equal(first.action_tokens, second.action_tokens)


def test_same_call_twice_is_bit_identical(policy: TinyVLA, observation: Observation) -> None:
    runs = [
        policy.act(observation, temperature=1.0, generator=torch.Generator().manual_seed(5))
        for _ in range(2)
    ]
    assert torch.equal(runs[0].action_tokens, runs[1].action_tokens)
    assert torch.equal(runs[0].log_probs, runs[1].log_probs)
    assert torch.equal(runs[0].value, runs[1].value)


def test_first_token_follows_its_distribution(policy: TinyVLA, observation: Observation) -> None:
    # 4096 draws of the first token of one observation, pooled into 16 groups of equal-ish mass.
    count = 4096
    features = policy.features(observation)[:1].expand(count, -1, -1)
    one = Observation(
        observation.image[:1].expand(count, -1, -1, -1),
        observation.prompt[:1].expand(count, -1),
        features,
    )
    generator = torch.Generator().manual_seed(11)
    output = policy.act(one, temperature=0.6, generator=generator, keep_logits=True)
    assert output.logits is not None
    probabilities = (output.logits[0, 0].double() / 0.6).softmax(-1)
    group = (probabilities.cumsum(0) * 16).long().clamp(max=15)
    expected = torch.zeros(16, dtype=torch.float64).index_add(0, group, probabilities) * count
    observed = torch.bincount(group[output.action_tokens[:, 0]], minlength=16)
    keep = expected > 5
    statistic = ((observed - expected) ** 2 / expected)[keep].sum()
    assert scipy.stats.chi2.sf(float(statistic), int(keep.sum()) - 1) > 0.01


def test_sampling_inverts_the_cumulative_distribution() -> None:
    # Masses 1/8, 0, 1/2, 3/8, so the steps are at 1/8, 1/8, 5/8, 1.
    logits = torch.tensor([0.125, 0.0, 0.5, 0.375]).log()
    uniform = torch.tensor([0.0, 0.12, 0.13, 0.62, 0.63, 1.0 - 2.0**-24])
    tokens, log_probs = sample_tokens(logits.expand(6, 4), uniform)
    assert tokens.tolist() == [0, 0, 2, 2, 3, 3]
    assert log_probs.exp().tolist() == pytest.approx([0.125, 0.125, 0.5, 0.5, 0.375, 0.375])


def test_impossible_bins_are_never_drawn() -> None:
    logits = torch.randn(64, 256)
    logits[:, 200:] = -torch.inf
    logits[:, :3] = -torch.inf
    for extreme in (0.0, 1.0 - 2.0**-24):
        tokens, log_probs = sample_tokens(logits, torch.full((64,), extreme))
        assert log_probs.isfinite().all()
        assert ((tokens >= 3) & (tokens < 200)).all()


def test_every_token_can_follow(policy: TinyVLA, observation: Observation) -> None:
    # No hidden top-k: at a high temperature far more than 50 bins turn up.
    features = policy.features(observation)[:1].expand(512, -1, -1)
    image = observation.image[:1].expand(512, -1, -1, -1)
    prompt = observation.prompt[:1].expand(512, -1)
    output = policy.act(Observation(image, prompt, features), temperature=50.0)
    assert all(output.action_tokens[:, index].unique().numel() > 180 for index in range(7))
    # And each token has its own random number: nearly flat distributions do not move together.
    correlation = torch.corrcoef(output.action_tokens.double().T)
    assert (correlation - torch.eye(7)).abs().max() < 0.3


def test_negative_temperature(policy: TinyVLA, observation: Observation) -> None:
    with pytest.raises(ValueError, match="temperature is -1"):
        policy.act(observation, temperature=-1.0)
