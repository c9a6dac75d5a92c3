from __future__ import annotations

import itertools

import pytest
import torch

import oracles
from probes import ColourEnv, TablePolicy
from roadvla.train.config import Algorithm
from roadvla.train.guidance import centre_by_step, explained_variance, guide, time_step_share
from roadvla.train.rollout import collect, reference_values, training_episode_ids


def lived(*, end_on_success=True, seed=0, keep_logits=False, groups=1):
    policy = TablePolicy()
    with torch.no_grad():
        policy.value_head += torch.tensor([0.1, 0.4, 0.2, 0.3])
    return collect(
        policy,
        ColourEnv(16, end_on_success=end_on_success),
        training_episode_ids(seed, 0, 16, repeats=groups),
        temperature=1.0,
        generator=torch.Generator().manual_seed(seed),
        keep_logits=keep_logits,
    )


def critic():
    policy = TablePolicy()
    with torch.no_grad():
        policy.value_head += torch.tensor([0.5, -0.4, 0.2, 0.9])
    return policy


def test_time_step_share_by_hand():
    # weights 1, 3 | 5, 7: mean 4, step means 2 and 6; between 4·4 = 16, total 9+1+1+9 = 20
    active = torch.ones(2, 2, dtype=torch.bool)
    assert float(time_step_share(torch.tensor([1.0, 3.0, 5.0, 7.0]), active)) == pytest.approx(0.8)


def test_time_step_share_counts_active_steps_only():
    # steps {1, 3} and {8}: mean 4, step means 2, 8; between 2·4 + 16 = 24, total 9+1+16 = 26
    active = torch.tensor([[True, True], [True, False]])
    share = time_step_share(torch.tensor([1.0, 3.0, 8.0]), active)
    assert float(share) == pytest.approx(24 / 26)


def test_time_step_share_of_constants_is_zero():
    assert float(time_step_share(torch.ones(4), torch.ones(2, 2, dtype=torch.bool))) == 0.0


def test_explained_variance_by_hand():
    # returns 0, 2: variance 1; errors 0.5, 0.5 vary by 0; errors 0, 1 vary by 1/4
    returns = torch.tensor([0.0, 2.0])
    assert float(explained_variance(returns - 0.5, returns)) == 1.0
    assert float(explained_variance(torch.tensor([0.0, 1.0]), returns)) == 0.75
    assert float(explained_variance(returns, torch.ones(2))) == 0.0


def test_only_active_steps_are_kept_in_order():
    rollout = lived()
    batch, _ = guide(rollout, Algorithm(), None)
    active = rollout.active
    assert 16 < len(batch.action_tokens) == int(active.sum()) < 64
    assert torch.equal(batch.action_tokens, rollout.action_tokens[active])
    assert torch.equal(batch.old_log_probs, rollout.log_probs[active])
    assert torch.equal(batch.old_value, rollout.value[active])
    assert torch.equal(batch.observation.image, rollout.observation.image[active])
    assert torch.equal(batch.observation.vision, rollout.observation.vision[active])


def test_ppo_standardizes_its_own_advantage_over_the_active_steps():
    batch, metrics = guide(lived(), Algorithm(), None)
    assert float(batch.advantage.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(batch.advantage.std(correction=0)) == pytest.approx(1.0, abs=1e-5)
    assert torch.allclose(batch.weight, batch.advantage.clamp(-2, 2), atol=1e-6)
    assert "guidance/agreement" not in metrics


def test_road_follows_algorithm_1():
    rollout = lived()
    values, last = reference_values(critic(), rollout, share_vision=True)
    algorithm = Algorithm(algo="road", surrogate_advantage="mix")
    batch, metrics = guide(rollout, algorithm, (values, last))
    ends = (rollout.terminated | rollout.truncated).tolist()
    live, other = (
        oracles.advantages(rollout.reward.tolist(), v.tolist(), [0.0] * 16, ends, 0.99, 0.95)
        for v in (rollout.value, values)
    )
    keep = rollout.active.flatten().tolist()

    def flat(table):
        return [x for x, k in zip(itertools.chain(*table), keep, strict=True) if k]

    weight, agree, _ = oracles.guidance(flat(live), flat(other), alpha=0.5, clip=2.0, eps=1e-8)
    assert torch.allclose(batch.weight, torch.tensor(weight), atol=1e-4)
    assert float(metrics["guidance/agreement"]) == pytest.approx(sum(agree) / len(agree))
    returns = torch.tensor(flat(live)) + rollout.value[rollout.active]
    assert torch.allclose(batch.returns, returns, atol=1e-6)
    assert torch.allclose(batch.weight, batch.advantage.clamp(-2, 2), atol=1e-6)


def test_alpha_zero_is_the_live_critic_alone():
    rollout = lived()
    reference = reference_values(critic(), rollout, share_vision=True)
    mixed, _ = guide(rollout, Algorithm(algo="road", alpha=0.0), reference)
    alone, _ = guide(rollout, Algorithm(algo="road", alpha=0.0), None)
    assert torch.equal(mixed.weight, alone.weight)
    assert torch.equal(mixed.advantage, alone.advantage)


def test_the_surrogate_keeps_the_live_advantage_unless_asked():
    rollout = lived()
    reference = reference_values(critic(), rollout, share_vision=True)
    own, _ = guide(rollout, Algorithm(algo="road"), reference)
    plain, _ = guide(rollout, Algorithm(), None)
    mix, _ = guide(rollout, Algorithm(surrogate_advantage="mix"), reference)
    assert torch.equal(own.advantage, plain.advantage)
    assert not torch.allclose(mix.advantage, plain.advantage)
    assert torch.allclose(own.weight, mix.advantage.clamp(-2, 2), atol=1e-6)


def test_gate_and_sign_gate_are_passed_on():
    rollout = lived()
    reference = reference_values(critic(), rollout, share_vision=True)
    gated, _ = guide(rollout, Algorithm(algo="road"), reference)
    open_, _ = guide(rollout, Algorithm(algo="road", gate=False), reference)
    positive, _ = guide(rollout, Algorithm(algo="road", positive_only=True), reference)
    clipped, _ = guide(rollout, Algorithm(algo="road", clip=0.5), reference)
    assert not torch.allclose(gated.weight, open_.weight)
    assert torch.equal(positive.weight, gated.weight.clamp(min=0))
    assert torch.equal(clipped.weight, gated.weight.clamp(-0.5, 0.5))


def test_the_value_after_the_horizon_counts_only_when_asked():
    policy = TablePolicy()
    with torch.no_grad():
        policy.value_head += 1.0
    rollout = collect(
        policy, ColourEnv(8), training_episode_ids(0, 0, 8), temperature=1.0, bootstrap=True
    )
    for asked in (False, True):
        batch, _ = guide(rollout, Algorithm(bootstrap_truncated=asked), None)
        # δ at the last step is r - V, plus γ V of what follows when it counts; V is 1 everywhere
        expected = rollout.reward[-1] + (0.99 if asked else 0.0)
        assert torch.allclose(batch.returns.view(4, 8)[-1], expected)


def test_grpo_compares_whole_episodes_of_a_group():
    rollout = lived(end_on_success=False, groups=4)
    batch, metrics = guide(rollout, Algorithm(algo="grpo", group_size=4), None)
    outcome = rollout.reward.sum(0).view(4, 4)
    expected = (outcome - outcome.mean(1, keepdim=True)) / (
        outcome.std(1, correction=0, keepdim=True) + 1e-8
    )
    assert torch.allclose(batch.advantage.view(4, 16), expected.view(1, 16).expand(4, 16))
    assert "critic/value_mean" not in metrics
    batched, _ = guide(rollout, Algorithm(algo="grpo", grpo_form="batch"), None)
    assert not torch.allclose(batched.advantage, batch.advantage)


def test_rollout_metrics_are_those_of_the_episodes():
    rollout = lived()
    _, metrics = guide(rollout, Algorithm(), None)
    assert float(metrics["rollout/success_rate"]) == float(
        rollout.outcome["success"].float().mean()
    )
    assert float(metrics["rollout/return"]) == pytest.approx(float(rollout.reward.sum()) / 16)


def test_behaviour_logits_travel_with_their_transitions():
    rollout = lived(keep_logits=True)
    batch, _ = guide(rollout, Algorithm(algo="road", alpha=0.0, teacher_logits="rollout"), None)
    assert rollout.logits is not None
    assert torch.equal(batch.logits, rollout.logits[rollout.active])


def test_centring_takes_out_each_time_steps_mean():
    # steps {1, 3} and {8}: means 2 and 8
    active = torch.tensor([[True, True], [True, False]])
    left = centre_by_step(torch.tensor([1.0, 3.0, 8.0]), active)
    assert left.tolist() == [-1.0, 1.0, 0.0]


@pytest.mark.parametrize("algo", ["ppo", "road"])
def test_a_shuffled_control_deals_the_same_values_to_other_steps(algo):
    rollout = lived()
    plain, _ = guide(rollout, Algorithm(algo=algo, alpha=0.0), None)
    dealt, _ = guide(
        rollout,
        Algorithm(algo=algo, alpha=0.0, control="shuffled"),
        None,
        generator=torch.Generator().manual_seed(1),
    )
    controlled, left = ("advantage", "weight") if algo == "ppo" else ("weight", "advantage")
    ours, theirs = getattr(dealt, controlled), getattr(plain, controlled)
    assert torch.equal(ours.sort().values, theirs.sort().values)
    assert not torch.equal(ours, theirs)
    assert torch.equal(getattr(dealt, left), getattr(plain, left))


def test_a_uniform_control_says_the_same_of_every_step():
    rollout = lived()
    road, _ = guide(rollout, Algorithm(algo="road", alpha=0.0, control="uniform"), None)
    assert torch.equal(road.weight, torch.ones_like(road.weight))
    assert not torch.equal(road.advantage, torch.ones_like(road.weight))
    ppo, _ = guide(rollout, Algorithm(control="uniform"), None)
    assert torch.equal(ppo.advantage, torch.ones_like(ppo.advantage))


@pytest.mark.parametrize("algo", ["ppo", "road"])
def test_a_time_centred_weight_does_not_depend_on_the_time_step(algo):
    rollout = lived(end_on_success=False)
    algorithm = Algorithm(algo=algo, alpha=0.0, clip=100.0, control="time_centred")
    batch, metrics = guide(rollout, algorithm, None)
    assert float(metrics["guidance/time_step_share"]) == pytest.approx(0.0, abs=1e-6)
    plain, _ = guide(rollout, Algorithm(algo=algo, alpha=0.0, clip=100.0), None)
    chosen = batch.advantage if algo == "ppo" else batch.weight
    expected = centre_by_step(plain.weight, rollout.active)
    expected = expected / expected.std(correction=0)
    torch.testing.assert_close(chosen, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(batch.advantage, plain.advantage) == (algo == "road")
