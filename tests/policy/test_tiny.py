"""The network: cached decoding is teacher forcing, padding is inert, nothing looks ahead."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from roadvla.policy import TinyArchitecture, TinyVLA
from roadvla.types import Observation


def tokens_for(observation: Observation, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (observation.image.shape[0], 7), generator=generator)


def gradient_sum(parameters: Iterable[nn.Parameter]) -> float:
    return sum(0.0 if p.grad is None else float(p.grad.abs().sum()) for p in parameters)


def test_shapes(policy: TinyVLA, observation: Observation) -> None:
    logits, value = policy.evaluate(observation, tokens_for(observation))
    assert logits.shape == (6, 7, 256)
    assert value.shape == (6,)
    output = policy.act(observation, temperature=1.0)
    assert output.vision is not None
    assert output.vision.shape == (6, 144, 32)
    assert output.logits is None
    visual, attention = policy.ground(observation)
    assert visual.shape == (6, 8, 64)
    torch.testing.assert_close(attention.exp().sum(-1), torch.ones(6, 8))


def test_small_enough_to_ship() -> None:
    weights = sum(parameter.numel() for parameter in TinyVLA().parameters())
    assert 350_000 < weights < 450_000


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_cached_decoding_is_teacher_forcing(
    policy: TinyVLA, observation: Observation, temperature: float
) -> None:
    output = policy.act(observation, temperature=temperature, keep_logits=True)
    logits, value = policy.evaluate(observation, output.action_tokens)
    assert output.logits is not None
    assert output.logits.std() > 0.5
    torch.testing.assert_close(output.logits, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.value, value, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(policy.value(observation), value, atol=1e-5, rtol=1e-5)


def test_no_token_sees_itself_or_the_future(policy: TinyVLA, observation: Observation) -> None:
    tokens = tokens_for(observation)
    with torch.no_grad():
        logits, value = policy.evaluate(observation, tokens)
        for index in range(7):
            changed = tokens.clone()
            changed[:, index] = (changed[:, index] + 97) % 256
            others, same = policy.evaluate(observation, changed)
            assert torch.equal(others[:, : index + 1], logits[:, : index + 1])
            assert torch.equal(same, value)
            for later in range(index + 1, 7):
                assert (others[:, later] - logits[:, later]).abs().amax() > 1e-3


def test_padding_is_inert(policy: TinyVLA, observation: Observation) -> None:
    tokens = tokens_for(observation)
    padded = replace(observation, prompt=F.pad(observation.prompt, (0, 10)))
    with torch.no_grad():
        logits, value = policy.evaluate(observation, tokens)
        wide, same = policy.evaluate(padded, tokens)
    torch.testing.assert_close(wide, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(same, value, atol=1e-5, rtol=1e-5)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    first = policy.act(observation, temperature=1.0, generator=generators[0])
    second = policy.act(padded, temperature=1.0, generator=generators[1])
    assert torch.equal(first.action_tokens, second.action_tokens)
    torch.testing.assert_close(first.log_probs, second.log_probs, atol=1e-5, rtol=1e-5)


def test_a_short_prompt_alone_equals_itself_in_a_mixed_batch(
    policy: TinyVLA, observation: Observation
) -> None:
    tokens = tokens_for(observation)
    assert (observation.prompt[2, 3:] == 0).all()
    alone = Observation(observation.image[2:3], observation.prompt[2:3, :4])
    with torch.no_grad():
        logits, value = policy.evaluate(observation, tokens)
        single, one = policy.evaluate(alone, tokens[2:3])
    torch.testing.assert_close(single, logits[2:3], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one, value[2:3], atol=1e-5, rtol=1e-5)


def test_place_in_the_batch_does_not_matter(policy: TinyVLA, observation: Observation) -> None:
    tokens = tokens_for(observation)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    mixed = Observation(observation.image[order], observation.prompt[order])
    with torch.no_grad():
        logits, value = policy.evaluate(observation, tokens)
        moved, shuffled = policy.evaluate(mixed, tokens[order])
    torch.testing.assert_close(moved, logits[order], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shuffled, value[order], atol=1e-5, rtol=1e-5)


def test_what_the_policy_reads_matters(policy: TinyVLA, observation: Observation) -> None:
    tokens = tokens_for(observation)
    with torch.no_grad():
        logits, value = policy.evaluate(observation, tokens)
        other_image = replace(observation, image=255 - observation.image)
        other_words = replace(observation, prompt=observation.prompt.roll(1, dims=0))
        for changed in (other_image, other_words):
            difference, worth = policy.evaluate(changed, tokens)
            assert (difference - logits).abs().amax(dim=(1, 2)).min() > 1e-3
            assert (worth - value).abs().max() > 1e-5


def test_word_order_matters(policy: TinyVLA, observation: Observation) -> None:
    texts = ("put red ball on blue plate", "put blue ball on red plate")
    image = observation.image[:1].expand(2, -1, -1, -1)
    logits, _ = policy.evaluate(
        Observation(image, policy.tokenize(texts)), torch.zeros(2, 7, dtype=torch.int64)
    )
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_brought_features_stand_in_for_the_frame(policy: TinyVLA, observation: Observation) -> None:
    tokens = tokens_for(observation)
    features = policy.act(observation, temperature=0.0).vision
    brought = Observation(torch.zeros_like(observation.image), observation.prompt, features)
    logits, value = policy.evaluate(observation, tokens)
    same, worth = policy.evaluate(brought, tokens)
    assert torch.equal(logits, same)
    assert torch.equal(value, worth)
    (same.sum() + worth.sum()).backward()


def test_gradient_reaches_the_policy_but_not_the_frozen_tower(
    policy: TinyVLA, observation: Observation
) -> None:
    logits, _ = policy.evaluate(observation, tokens_for(observation))
    logits.logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.policy_parameters())
    assert gradient_sum(policy.vision.parameters()) == 0.0
    assert gradient_sum(policy.value_parameters()) == 0.0


def test_value_loss_stops_at_the_trunk(policy: TinyVLA, observation: Observation) -> None:
    _, value = policy.evaluate(observation, tokens_for(observation))
    value.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.value_parameters())
    assert gradient_sum(policy.policy_parameters()) == 0.0


def test_value_loss_reaches_the_trunk_when_asked(observation: Observation) -> None:
    policy = TinyVLA(detach_value=False)
    policy.value(observation).sum().backward()
    assert gradient_sum(policy.layers.parameters()) > 0.0
    assert gradient_sum(policy.resampler.parameters()) > 0.0


def test_the_tower_learns_when_unfrozen(policy: TinyVLA, observation: Observation) -> None:
    frozen = list(policy.policy_parameters())
    policy.unfreeze_vision()
    assert len(list(policy.policy_parameters())) > len(frozen)
    logits, _ = policy.evaluate(observation, tokens_for(observation))
    logits.logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.vision.parameters())
    assert policy.act(observation, temperature=1.0).vision is None


def test_every_parameter_belongs_to_one_list(policy: TinyVLA) -> None:
    policy.unfreeze_vision()
    lists = [*policy.policy_parameters(), *policy.value_parameters()]
    assert len(lists) == len({id(p) for p in lists}) == len(list(policy.parameters()))


def test_stale_features_are_refused_while_the_tower_is_trained(
    policy: TinyVLA, observation: Observation
) -> None:
    features = policy.act(observation, temperature=0.0).vision
    policy.unfreeze_vision()
    stale = replace(observation, vision=features)
    with pytest.raises(ValueError, match="no gradient"):
        policy.evaluate(stale, tokens_for(observation))
    fresh = replace(observation, vision=policy.vision(observation.image))
    policy.evaluate(fresh, tokens_for(observation))


def test_shares_vision(policy: TinyVLA) -> None:
    other = TinyVLA()
    assert not policy.shares_vision(other)
    other.vision.load_state_dict(policy.vision.state_dict())
    assert policy.shares_vision(other)
    assert not policy.shares_vision(object())
    with torch.no_grad():
        other.vision.mix.bias[3] += 1e-7
    assert not policy.shares_vision(other)
    other.vision.load_state_dict(policy.vision.state_dict())
    other.unfreeze_vision()
    assert not policy.shares_vision(other)
    assert not other.shares_vision(policy)
    assert not policy.shares_vision(TinyVLA(TinyArchitecture(vision_width=16)))


def test_attention_runs_over_patches_row_by_row(policy: TinyVLA, observation: Observation) -> None:
    # One changed 4x4 patch in row 2, column 9 changes most the features of patch 2·12 + 9 = 33.
    image = torch.full_like(observation.image[:1], 100)
    spot = image.clone()
    spot[:, 8:12, 36:40] = 250
    change = (policy.vision(image) - policy.vision(spot)).abs().sum(-1)[0]
    assert change.argmax() == 33
    assert policy.resampler.coordinates[33].tolist() == pytest.approx([9.5 / 6 - 1, 2.5 / 6 - 1])


def test_neighbouring_bins_start_out_alike() -> None:
    torch.manual_seed(0)
    policy = TinyVLA()
    for table in (policy.bins.embedding.unflatten(0, (6, 256)), policy.bins.head.transpose(1, 2)):
        near = F.cosine_similarity(table[:, :-1], table[:, 1:], dim=-1).mean()
        far = F.cosine_similarity(table[:, :128], table[:, 128:], dim=-1).mean()
        assert near > 0.9
        assert far.abs() < 0.4


def test_actions_are_in_units(policy: TinyVLA) -> None:
    action = torch.tensor([[0.02, -0.04, 0.0, 0.1, -0.35, 0.0, 1.0]])
    again = policy.decode(policy.encode(action))
    assert (again - action).abs().max() < 0.005
    beyond = policy.decode(policy.encode(action * 100))
    assert torch.equal(beyond, policy.decode(policy.encode(action.sign())))


def test_frames_of_another_size(policy: TinyVLA, observation: Observation) -> None:
    small = replace(observation, image=observation.image[:, :40])
    with pytest.raises(ValueError, match="48x48"):
        policy.value(small)


@pytest.mark.parametrize("sizes", [{"patch": 5}, {"heads": 3}, {"width": 30, "heads": 5}])
def test_sizes_that_do_not_divide(sizes: dict) -> None:
    with pytest.raises(ValueError, match=r"divide|multiple"):
        TinyArchitecture(**sizes)


def test_another_architecture_works(observation: Observation) -> None:
    policy = TinyVLA(TinyArchitecture(width=32, layers=3, heads=2, mlp=64, queries=3))
    output = policy.act(observation, temperature=1.0, keep_logits=True)
    logits, _ = policy.evaluate(observation, output.action_tokens)
    assert output.logits is not None
    torch.testing.assert_close(output.logits, logits, atol=1e-5, rtol=1e-5)
