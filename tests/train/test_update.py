from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from probes import BINS, COLOURS, TOKENS, ColourEnv, TablePolicy
from roadvla.objective import (
    agd_loss,
    entropy,
    inverse_prob_weight,
    ppo_loss,
    sft_loss,
    token_log_probs,
    value_loss,
)
from roadvla.train.config import Algorithm, Optimizer
from roadvla.train.guidance import guide
from roadvla.train.rollout import collect, training_episode_ids
from roadvla.train.update import (
    losses,
    make_optimizer,
    schedule_factor,
    select,
    set_learning_rates,
    update,
)
from roadvla.types import Batch, Observation


def make_batch(count=64, seed=0, *, logits=False) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    colour = torch.arange(count) % COLOURS
    image = torch.zeros(count, 4, 4, 3, dtype=torch.uint8)
    image[..., 0] = (colour * 60)[:, None, None].to(torch.uint8)
    return Batch(
        observation=Observation(image=image, prompt=torch.ones(count, 2, dtype=torch.int64)),
        action_tokens=torch.randint(BINS, (count, TOKENS), generator=generator),
        old_log_probs=-1.4 + 0.2 * torch.randn(count, TOKENS, generator=generator),
        old_value=torch.rand(count, generator=generator),
        advantage=torch.randn(count, generator=generator),
        returns=torch.rand(count, generator=generator),
        weight=torch.randn(count, generator=generator).clamp(-2, 2),
        logits=torch.randn(count, TOKENS, BINS, generator=generator) if logits else None,
    )


def train_once(batch, algorithm, *, settings=None, seed=0, **options):
    policy, settings = TablePolicy(), settings or Optimizer(learning_rate=0.05, minibatch=16)
    optimizer = make_optimizer(policy, settings)
    generator = torch.Generator().manual_seed(seed)
    options = {"temperature": 1.0, "generator": generator, **options}
    return policy, update(policy, optimizer, batch, algorithm, settings, **options)


def same(a: TablePolicy, b: TablePolicy) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# The loss is the sum the configuration says.


def by_hand(policy, batch, algorithm, temperature):
    logits, value = policy.evaluate(batch.observation, batch.action_tokens)
    logits = logits / temperature
    old, a = batch.old_log_probs, algorithm
    total = torch.zeros(())
    if a.combine == "add":
        total = ppo_loss(
            token_log_probs(logits, batch.action_tokens),
            old,
            batch.advantage,
            clip_eps=a.clip_eps,
            ratio=a.ratio,
        )[0]
    if a.algo == "road":
        weighted = a.token_weighting == "inverse_prob"
        total = total + a.distill_coef * agd_loss(
            logits,
            batch.action_tokens,
            batch.weight,
            eta=a.eta,
            kind=a.divergence,
            reduction=a.distill_reduction,
            teacher=a.teacher,
            behaviour_logits=batch.logits / temperature if a.teacher_logits == "rollout" else None,
            token_weight=inverse_prob_weight(old, delta=a.delta) if weighted else None,
        )
    if a.algo != "grpo":
        worth = value_loss(
            value, batch.old_value, batch.returns, clip_eps=a.value_clip_eps, huber=a.huber
        )
        total = total + a.value_coef * worth
    return total - a.entropy_coef * entropy(logits).mean()


@pytest.mark.parametrize(
    "settings",
    [
        {"algo": "ppo"},
        {"algo": "ppo", "ratio": "token", "clip_eps": 0.1, "value_coef": 0.3, "entropy_coef": 0.5},
        {"algo": "ppo", "value_clip_eps": 0.05, "huber": 0.1},
        {"algo": "grpo"},
        {"algo": "road"},
        {"algo": "road", "distill_coef": 3.0, "distill_reduction": "sum", "eta": 0.5},
        {"algo": "road", "combine": "replace"},
        {"algo": "road", "combine": "replace", "teacher": "odd"},
        {"algo": "road", "combine": "replace", "teacher": "linear", "eta": 0.4},
        {"algo": "road", "token_weighting": "inverse_prob", "delta": 0.2},
        {"algo": "road", "divergence": "jsd"},
        {"algo": "road", "divergence": "reverse_kl", "teacher": "linear", "eta": 0.4},
        {"algo": "road", "teacher_logits": "rollout"},
        {"algo": "road", "teacher_logits": "rollout", "token_weighting": "inverse_prob"},
    ],
    ids=lambda settings: "-".join(str(x) for x in settings.values()),
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_loss_and_gradient_are_the_objective_s(settings, temperature):
    algorithm = Algorithm(**settings)
    batch = make_batch(logits=algorithm.teacher_logits == "rollout")
    mine, theirs = TablePolicy(), TablePolicy()
    total, parts = losses(mine, batch, algorithm, temperature=temperature, value_only=False)
    expected = by_hand(theirs, batch, algorithm, temperature)
    total.backward()
    expected.backward()
    assert float(total.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        if b.grad is None:
            assert a.grad is None
        else:
            assert torch.allclose(a.grad, b.grad, atol=1e-6)
    assert not any(part.requires_grad for part in parts.values())


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_without_advantage_the_rollout_s_teacher_is_the_policy_that_acted(divergence):
    # ω = 0 and unchanged logits: teacher and student are both softmax(z/0.7), nothing to distil
    policy, batch = TablePolicy(), make_batch()
    logits, _ = policy.evaluate(batch.observation, batch.action_tokens)
    batch = replace(batch, weight=torch.zeros(64), logits=logits.detach())
    algorithm = Algorithm(
        algo="road",
        combine="replace",
        teacher_logits="rollout",
        divergence=divergence,
        entropy_coef=0.0,
    )
    total, parts = losses(policy, batch, algorithm, temperature=0.7, value_only=False)
    total.backward()
    assert float(parts["loss/agd"]) == pytest.approx(0.0, abs=1e-6)
    assert policy.table.grad is not None
    assert float(policy.table.grad.abs().max()) < 1e-7


def test_sft_is_cross_entropy_alone():
    batch, policy = make_batch(), TablePolicy()
    total, parts = losses(policy, batch, Algorithm(algo="sft"), temperature=1.0, value_only=False)
    logits, _ = policy.evaluate(batch.observation, batch.action_tokens)
    assert torch.equal(total, sft_loss(logits, batch.action_tokens))
    right = (logits.argmax(-1) == batch.action_tokens).float().mean()
    assert float(parts["policy/accuracy"]) == float(right)
    assert "loss/value" not in parts


def test_the_value_head_can_learn_alone():
    batch, algorithm = make_batch(), Algorithm(entropy_coef=0.1, epochs=3)
    policy, metrics = train_once(batch, algorithm, value_only=True)
    fresh = TablePolicy()
    assert torch.equal(policy.table, fresh.table)
    assert not torch.equal(policy.value_head, fresh.value_head)
    assert "loss/policy" not in metrics
    assert float(metrics["policy/kl"]) == 0.0


def test_the_trunk_stays_even_where_the_value_depends_on_it(monkeypatch):
    def value_from_trunk(self, observation, action_tokens):
        colour = self._colour(observation)
        logits = torch.einsum("nc,ckv->nkv", colour, self.table)
        assert not logits.requires_grad  # nothing is kept for a backward pass through the trunk
        return logits, colour @ self.value_head + logits.mean((1, 2))

    monkeypatch.setattr(TablePolicy, "evaluate", value_from_trunk)
    alone, _ = train_once(make_batch(), Algorithm(), value_only=True)
    assert all(parameter.requires_grad for parameter in alone.parameters())
    assert torch.equal(alone.table, TablePolicy().table)
    assert not torch.equal(alone.value_head, TablePolicy().value_head)


# Identities.


def test_distillation_with_coefficient_zero_is_ppo_bit_for_bit():
    batch = make_batch()
    road, _ = train_once(batch, Algorithm(algo="road", alpha=0.0, distill_coef=0.0, epochs=2))
    ppo, _ = train_once(batch, Algorithm(epochs=2))
    assert same(road, ppo)


def test_distillation_with_another_coefficient_is_not_ppo():
    batch = make_batch()
    road, _ = train_once(batch, Algorithm(algo="road", alpha=0.0, epochs=2))
    ppo, _ = train_once(batch, Algorithm(epochs=2))
    assert not same(road, ppo)


@pytest.mark.parametrize("count", [64, 61])
def test_accumulating_4_passes_of_8_is_one_of_32(count):
    batch, algorithm = make_batch(count), Algorithm(algo="road", alpha=0.0)
    split, few = train_once(
        batch, algorithm, settings=Optimizer(learning_rate=0.01, minibatch=8, accumulation=4)
    )
    whole, one = train_once(batch, algorithm, settings=Optimizer(learning_rate=0.01, minibatch=32))
    for a, b in zip(split.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-6)
    for name in ("loss/total", "loss/agd", "policy/entropy", "loss/grad_norm"):
        assert float(few[name]) == pytest.approx(float(one[name]), abs=1e-5)


@pytest.mark.parametrize(
    ("count", "minibatch", "accumulation"), [(64, 16, 1), (61, 8, 2), (5, 4, 1)]
)
def test_every_epoch_uses_every_transition_once(count, minibatch, accumulation, monkeypatch):
    batch = make_batch(count)
    batch = replace(batch, returns=torch.arange(count).float())
    seen, steps = [], 0

    def note(policy, part, algorithm, **options):
        seen.append(part.returns.long().tolist())
        return losses(policy, part, algorithm, **options)

    monkeypatch.setattr("roadvla.train.update.losses", note)
    settings = Optimizer(minibatch=minibatch, accumulation=accumulation)
    optimizer_step = torch.optim.AdamW.step

    def counted(self, *args, **kwargs):
        nonlocal steps
        steps += 1
        return optimizer_step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    train_once(batch, Algorithm(epochs=2), settings=settings)
    flat = [i for part in seen for i in part]
    assert sorted(flat[:count]) == sorted(flat[count:]) == list(range(count))
    assert flat[:count] != flat[count:]
    assert max(map(len, seen)) <= minibatch
    assert steps == 2 * -(-count // (minibatch * accumulation))


def test_no_pass_is_larger_than_the_minibatch_the_kl_s_included(monkeypatch):
    real, sizes = TablePolicy.evaluate, []

    def evaluate(self, observation, action_tokens):
        sizes.append(len(action_tokens))
        return real(self, observation, action_tokens)

    monkeypatch.setattr(TablePolicy, "evaluate", evaluate)
    settings = Optimizer(minibatch=8, accumulation=3)
    train_once(make_batch(30), Algorithm(), settings=settings)
    # Before, the update, after: 30 in four parts, two groups of 15 in two, 30 in four.
    assert sizes == [8, 8, 7, 7, 8, 7, 8, 7, 8, 8, 7, 7]
    sizes.clear()
    train_once(make_batch(30), Algorithm(), settings=settings, value_only=True)
    assert sizes == [8, 7, 8, 7]


def test_minibatches_follow_the_generator():
    batch, algorithm = make_batch(), Algorithm()
    assert same(train_once(batch, algorithm)[0], train_once(batch, algorithm)[0])
    assert not same(train_once(batch, algorithm)[0], train_once(batch, algorithm, seed=1)[0])


# What is reported.


def test_the_kl_is_exact():
    batch = make_batch(64)
    policy, metrics = train_once(batch, Algorithm(), temperature=0.8)
    p = (TablePolicy().table / 0.8).softmax(-1)
    q = (policy.table / 0.8).softmax(-1)
    # every colour is equally frequent among the 64, and the probe is all of them
    expected = (p * (p / q).log()).sum(-1).sum(-1).mean()
    assert float(metrics["policy/kl"]) == pytest.approx(float(expected.detach()), rel=1e-4)


def test_the_update_stops_when_the_kl_is_too_large(monkeypatch):
    batch = make_batch()
    policy = TablePolicy()
    logits, _ = policy.evaluate(batch.observation, batch.action_tokens)
    old = token_log_probs(logits, batch.action_tokens).detach()
    batch = replace(batch, old_log_probs=old)
    settings = Optimizer(learning_rate=0.05, minibatch=16)
    # at the first minibatch the policy has not moved: one step is always taken, then it stops
    stopped, _ = train_once(batch, Algorithm(kl_stop=1e-9, epochs=3), settings=settings)
    index = torch.randperm(64, generator=_after_probe())
    one = TablePolicy()
    optimizer = make_optimizer(one, settings)
    total, _ = losses(
        one,
        select(batch, index.tensor_split(4)[0]),
        Algorithm(),
        temperature=1.0,
        value_only=False,
    )
    total.backward()
    torch.nn.utils.clip_grad_norm_(one.parameters(), 1.0)
    optimizer.step()
    assert same(stopped, one)
    free, _ = train_once(batch, Algorithm(epochs=3), settings=settings)
    loose, _ = train_once(batch, Algorithm(epochs=3, kl_stop=1e9), settings=settings)
    assert same(free, loose)
    assert not same(free, stopped)


def _after_probe() -> torch.Generator:
    generator = torch.Generator().manual_seed(0)
    torch.randperm(64, generator=generator)
    return generator


def test_the_kl_estimate_is_that_of_the_sampled_actions():
    batch, policy = make_batch(), TablePolicy()
    _, parts = losses(policy, batch, Algorithm(), temperature=1.0, value_only=False)
    logits, _ = policy.evaluate(batch.observation, batch.action_tokens)
    ratio = (token_log_probs(logits, batch.action_tokens) - batch.old_log_probs).sum(-1)
    expected = (ratio.exp() - 1 - ratio).mean()
    assert float(parts["policy/kl_estimate"]) == pytest.approx(float(expected.detach()))


def test_the_gradient_is_clipped_as_one_vector():
    batch = make_batch()
    settings = Optimizer(minibatch=64, grad_clip=1e-3, learning_rate=1.0)
    policy = TablePolicy()
    optimizer = torch.optim.SGD(
        [{"params": policy.policy_parameters()}, {"params": policy.value_parameters()}],
        lr=1.0,
        fused=True,
    )
    update(policy, optimizer, batch, Algorithm(), settings, temperature=1.0)
    fresh = TablePolicy()
    moved = sum(
        float((a - b).square().sum().detach())
        for a, b in zip(policy.parameters(), fresh.parameters(), strict=True)
    )
    assert moved**0.5 == pytest.approx(1e-3, rel=1e-3)


# The optimiser.


def test_the_schedule_by_hand():
    settings = Optimizer(schedule="cosine")
    # two warm-up iterations of 10: 1/2, 1; then half a cosine over the other 8
    got = [schedule_factor(settings, i, 10, warmup=2) for i in (0, 1, 2, 6, 9)]
    assert got == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.5 * (1 - 0.9238795325)])
    constant = Optimizer(schedule="constant")
    assert [schedule_factor(constant, i, 10, warmup=4) for i in (0, 3, 9)] == [0.25, 1.0, 1.0]


def test_only_the_policy_warms_up():
    policy = TablePolicy()
    settings = Optimizer(learning_rate=1.0, value_learning_rate=2.0, warmup_iterations=4)
    optimizer = make_optimizer(policy, settings)
    assert set_learning_rates(optimizer, settings, 0, 8) == 0.25
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 2.0]
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]


# And it learns.


@pytest.mark.parametrize(
    "algorithm",
    [
        Algorithm(entropy_coef=0.0),
        Algorithm(algo="grpo", entropy_coef=0.0, group_size=8),
        Algorithm(algo="road", alpha=0.0, distill_reduction="sum", entropy_coef=0.0),
        Algorithm(
            algo="road",
            combine="replace",
            alpha=0.0,
            teacher="odd",
            token_weighting="inverse_prob",
            distill_reduction="sum",
            distill_coef=1.0,
            entropy_coef=0.0,
        ),
    ],
    ids=["ppo", "grpo", "road", "odd"],
)
def test_the_right_colour_is_learned(algorithm):
    policy, env = TablePolicy(), ColourEnv(64)
    settings = Optimizer(learning_rate=0.1, value_learning_rate=0.1, minibatch=64)
    optimizer = make_optimizer(policy, settings)
    generator = torch.Generator().manual_seed(0)
    before = policy.hit_rate()
    repeats = algorithm.group_size if algorithm.algo == "grpo" else 1
    for iteration in range(12):
        ids = training_episode_ids(0, 64 * iteration, 64, repeats=repeats)
        rollout = collect(policy, env, ids, temperature=1.0, generator=generator)
        batch, _ = guide(rollout, algorithm, None)
        update(policy, optimizer, batch, algorithm, settings, temperature=1.0, generator=generator)
    assert before < 0.45
    assert policy.hit_rate() > 0.75
