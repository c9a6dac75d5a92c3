from __future__ import annotations

import pytest
import torch

from probes import ColourEnv, TablePolicy
from roadvla.train.rollout import collect, reference_values, training_episode_ids


def rollout(env=None, **options):
    generator = torch.Generator().manual_seed(3)
    return collect(
        TablePolicy(),
        env or ColourEnv(32),
        training_episode_ids(0, 0, 32),
        temperature=1.0,
        generator=generator,
        **options,
    )


def test_ids_never_meet_evaluation_or_another_seed():
    assert training_episode_ids(0, 0, 3).tolist() == [1_000_000, 1_000_001, 1_000_002]
    assert training_episode_ids(2, 7, 2).tolist() == [3_000_007, 3_000_008]


def test_a_group_shares_an_id():
    ids = training_episode_ids(0, 5, 6, repeats=3)
    assert ids.tolist() == [1_000_005] * 3 + [1_000_006] * 3


def test_a_rollout_is_what_happened():
    env, policy = ColourEnv(32), TablePolicy()
    got = rollout()
    assert got.action_tokens.shape == (4, 32, 7)
    assert bool(got.active.all())
    assert got.truncated.tolist() == [[False] * 32] * 3 + [[True] * 32]
    env.reset(training_episode_ids(0, 0, 32))
    for t in range(4):
        colour = env.colour()
        assert torch.equal(got.observation.image[t, :, 0, 0, 0], (colour * 60).to(torch.uint8))
        logits = policy.table.detach()[colour]
        expected = logits.log_softmax(-1).gather(-1, got.action_tokens[t][..., None])[..., 0]
        assert torch.allclose(got.log_probs[t], expected)
        step = env.step(got.action_tokens[t].float())
        assert torch.equal(got.reward[t], step.reward)
    assert torch.equal(got.outcome["success"], step.info["success"])


def test_same_generator_same_rollout():
    assert torch.equal(rollout().action_tokens, rollout().action_tokens)


def test_log_probs_are_those_of_the_tempered_distribution():
    got = collect(TablePolicy(), ColourEnv(8), training_episode_ids(0, 0, 8), temperature=0.5)
    logits, _ = TablePolicy().evaluate(
        type(got.observation)(got.observation.image[0], got.observation.prompt[0]),
        got.action_tokens[0],
    )
    tempered = (logits / 0.5).log_softmax(-1).detach()
    assert torch.allclose(
        got.log_probs[0], tempered.gather(-1, got.action_tokens[0][..., None])[..., 0]
    )


def test_steps_after_an_early_end_are_inactive_and_earn_nothing():
    got = rollout(ColourEnv(32, end_on_success=True))
    ended = got.terminated.cumsum(0).bool()
    assert bool(ended.any())
    assert not bool(ended.all())
    expected = torch.cat([torch.ones(1, 32, dtype=torch.bool), ~ended[:-1]])
    assert torch.equal(got.active, expected)
    assert float(got.reward[~got.active].sum()) == 0.0
    assert torch.equal(got.terminated.any(0), got.outcome["success"])


def test_logits_and_features_are_kept_only_when_there_are_any():
    plain = rollout()
    assert plain.logits is None
    assert plain.observation.vision is not None
    kept = rollout(keep_logits=True)
    assert kept.logits is not None
    chosen = kept.logits.log_softmax(-1).gather(-1, kept.action_tokens[..., None])[..., 0]
    assert torch.allclose(chosen, kept.log_probs)
    blind = collect(
        TablePolicy(keeps_vision=False),
        ColourEnv(4),
        training_episode_ids(0, 0, 4),
        temperature=1.0,
    )
    assert blind.observation.vision is None


def test_the_last_value_is_computed_only_to_bootstrap():
    assert rollout().last_observation is None
    policy = TablePolicy()
    with torch.no_grad():
        policy.value_head += torch.tensor([1.0, 2.0, 3.0, 4.0])
    env = ColourEnv(4)
    got = collect(policy, env, training_episode_ids(0, 0, 4), temperature=1.0, bootstrap=True)
    assert torch.equal(got.last_value, (env.colour() + 1).float())


@pytest.mark.parametrize("share", [True, False])
def test_reference_values_judge_every_observation(share):
    got, critic = rollout(bootstrap=True), TablePolicy()
    with torch.no_grad():
        critic.value_head += torch.tensor([1.0, 2.0, 3.0, 4.0])
    values, last = reference_values(critic, got, share_vision=share)
    colour = got.observation.image[..., 0, 0, 0].long() // 60
    assert torch.equal(values, (colour + 1).float())
    assert last.shape == (32,)
    assert float(last.min()) >= 1.0
    assert critic.looks == (32 if share else 32 * 5)
