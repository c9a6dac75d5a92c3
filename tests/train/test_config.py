from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest

from roadvla.errors import UserError
from roadvla.policy.settings import OpenVLASettings
from roadvla.train.config import (
    Algorithm,
    EvaluationConfig,
    Experiment,
    Optimizer,
    RolloutConfig,
)
from roadvla.train.serialize import difference, fingerprint, from_dict, to_dict
from roadvla.train.warmup import WarmUp


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"algo": "pop"}, "did you mean 'ppo'"),
        ({"teacher": "od"}, "did you mean 'odd'"),
        ({"divergence": "forward"}, "forward_kl"),
        ({"algo": "road", "teacher": "odd", "teacher_logits": "rollout"}, "live"),
        ({"algo": "road", "teacher": "odd", "divergence": "jsd"}, "forward_kl"),
        ({"algo": "road", "teacher": "linear"}, "lower eta to 0.5"),
        ({"algo": "ppo", "combine": "replace"}, "set algo to 'road'"),
        ({"algo": "ppo", "teacher_logits": "rollout"}, "teacher_logits to 'live'"),
        ({"algo": "sft", "teacher_logits": "rollout"}, "algo 'sft' has no teacher"),
        (
            {"algo": "road", "combine": "replace", "surrogate_advantage": "mix"},
            "set surrogate_advantage to 'int'",
        ),
        ({"algo": "road", "combine": "replace", "distill_coef": 0.0}, "distill_coef above 0"),
        ({"algo": "grpo", "surrogate_advantage": "mix"}, "grpo has none"),
        ({"algo": "grpo", "control": "shuffled"}, "set it to 'none' with grpo"),
        ({"algo": "ppo", "reference_critic": "x"}, "would not be used"),
        ({"algo": "road", "alpha": 0.0, "reference_critic": "x"}, "would not be used"),
        ({"algo": "sft", "kl_stop": 0.1}, "sft has none"),
        ({"delta": 0.0}, "delta is 0.0: expected a number above 0 and at most 1"),
        ({"delta": 1.5}, "at most 1"),
        ({"alpha": -0.1}, "alpha is -0.1: expected a number at least 0 and at most 1"),
        ({"alpha": 1.1}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"eta": 0.0}, "eta"),
        ({"clip": -1.0}, "clip"),
        ({"clip_eps": 0.0}, "clip_eps"),
        ({"gamma": 1.01}, "gamma"),
        ({"lam": -0.5}, "lam"),
        ({"entropy_coef": -0.1}, "entropy_coef"),
        ({"value_coef": float("inf")}, "value_coef"),
        ({"epochs": 0}, "epochs"),
        ({"kl_stop": 0.0}, "kl_stop"),
        ({"value_only_iterations": -1}, "value_only_iterations"),
    ],
)
def test_contradictory_algorithms_are_refused_in_one_line(settings, says):
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        Algorithm(**settings)
    assert says in str(error.value)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Optimizer, {"learning_rate": 0.0}),
        (Optimizer, {"learning_rate": float("nan")}),
        (Optimizer, {"grad_clip": 0.0}),
        (Optimizer, {"minibatch": 0}),
        (Optimizer, {"accumulation": 0}),
        (Optimizer, {"betas": (0.9, 1.0)}),
        (Optimizer, {"schedule": "cosin"}),
        (RolloutConfig, {"num_envs": 0}),
        (RolloutConfig, {"temperature": 0.0}),
        (RolloutConfig, {"temperature": 1e-4}),
        (RolloutConfig, {"total_env_steps": 0}),
        (EvaluationConfig, {"every": -1}),
        (EvaluationConfig, {"episodes": 0}),
        (EvaluationConfig, {"temperature": -0.1}),
        (EvaluationConfig, {"temperature": 1e-40}),
        (Experiment, {"name": "x", "seed": -1}),
        (Experiment, {"name": "x", "checkpoint_every": 0}),
        (Experiment, {"name": "x", "demonstrations": "file"}),
        (Experiment, {"name": "x", "algorithm": Algorithm(algo="grpo", group_size=7)}),
        (
            Experiment,
            {"name": "x", "algorithm": Algorithm(algo="grpo", bootstrap_truncated=True)},
        ),
    ],
)
def test_values_out_of_range_are_refused(kind, settings):
    with pytest.raises(UserError, match=r"^[^\n]*$"):
        kind(**settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"checkpoint": "base"}, "checkpoint 'base' would not be used by policy 'tiny'"),
        ({"openvla": OpenVLASettings(lora_rank=8)}, "lora_rank 8 would not be used by policy"),
        ({"policy": "openvla"}, "pass --checkpoint"),
        ({"policy": "openvla", "init": "runs/warmup"}, ""),
        ({"policy": "openvla", "checkpoint": "a/b", "openvla": OpenVLASettings(lora_rank=8)}, ""),
    ],
)
@pytest.mark.parametrize("kind", [partial(Experiment, name="x"), WarmUp])
def test_a_policy_s_settings_must_fit_it(kind, settings, says):
    if not says:
        assert kind(**settings).policy == "openvla"
        return
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        kind(**settings)
    assert says in str(error.value)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", [partial(Experiment, name="x"), WarmUp])
def test_an_unknown_policy_is_refused(kind):
    with pytest.raises(UserError, match="did you mean 'openvla'"):
        kind(policy="openvlaa", checkpoint="x")


def test_boundaries_are_accepted():
    Algorithm(alpha=1.0, gamma=0.0, lam=1.0, delta=1.0, entropy_coef=0.0)
    Algorithm(algo="road", teacher="linear", eta=0.5, clip=2.0)
    Algorithm(algo="road", combine="add", surrogate_advantage="mix", distill_coef=0.0)
    Algorithm(algo="road", combine="replace", teacher_logits="rollout")


def test_what_presets_hand_down_is_accepted():
    # Presets derive from each other, so PPO's may carry ROAD's settings.
    Algorithm(algo="ppo", eta=0.5, clip=1.0, teacher="odd", token_weighting="inverse_prob")


def test_missing_files_are_named_only_when_the_run_begins():
    road = Experiment(name="x", algorithm=Algorithm(algo="road"))
    with pytest.raises(UserError, match="--reference-critic"):
        road.check_complete()
    replace(road, algorithm=Algorithm(algo="road", alpha=0.0)).check_complete()
    mix = replace(road, algorithm=Algorithm(surrogate_advantage="mix"))
    with pytest.raises(UserError, match="--reference-critic"):
        mix.check_complete()
    with pytest.raises(UserError, match="--demonstrations"):
        replace(road, algorithm=Algorithm(algo="sft")).check_complete()
    replace(road, algorithm=Algorithm()).check_complete()


def test_the_budget_is_never_exceeded():
    # 64 · 24 = 1536; 92160 / 1536 = 60; one step less has no room for the last iteration
    experiment = Experiment(name="x")
    assert experiment.iterations(24) == 60
    shorter = replace(experiment, rollout=RolloutConfig(total_env_steps=92_159))
    assert shorter.iterations(24) == 59
    with pytest.raises(UserError, match="raise it to 1536"):
        replace(experiment, rollout=RolloutConfig(total_env_steps=1_535)).iterations(24)


def test_json_round_trip_is_exact():
    experiment = Experiment(
        name="x",
        init="warm",
        algorithm=Algorithm(algo="road", reference_critic="ppo", kl_stop=0.1),
        optimizer=Optimizer(betas=(0.5, 0.6)),
    )
    assert from_dict(json.loads(json.dumps(to_dict(experiment)))) == experiment


def _changed(path: str, value: object) -> dict:
    data = to_dict(Experiment(name="x"))
    *parents, last = path.split(".")
    node = data
    for parent in parents:
        node = node[parent]
    node[last] = value
    return data


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("sede", 1, "did you mean 'seed'"),
        ("algorithm.alhpa", 1, "algorithm.alpha"),
        ("algorithm.alpha", "0.5", "algorithm.alpha is '0.5', expected float"),
        ("algorithm.epochs", 1.5, "expected int"),
        ("algorithm.epochs", True, "expected int"),
        ("algorithm.gate", 1, "expected bool"),
        ("algorithm", 3, "algorithm is 3"),
        ("optimizer.betas", [0.9], "betas"),
        ("init", 3, "init is 3"),
        ("algorithm.algo", "ppoo", "did you mean 'ppo'"),
        ("algorithm.algo", ["ppo"], "unknown algo"),
    ],
)
def test_a_damaged_configuration_is_refused(path, value, says):
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        from_dict(_changed(path, value), source="config.json")
    assert says in str(error.value)


def test_a_missing_setting_is_named():
    data = to_dict(Experiment(name="x"))
    del data["rollout"]["num_envs"]
    with pytest.raises(UserError, match=r"rollout\.num_envs"):
        from_dict(data)


def test_a_whole_number_is_a_number():
    assert from_dict(_changed("algorithm.eta", 2)).algorithm.eta == 2.0


def test_the_fingerprint_covers_every_setting_but_the_folder():
    base = Experiment(name="x")
    assert fingerprint(replace(base, output="elsewhere")) == fingerprint(base)
    for other in (
        replace(base, seed=1),
        replace(base, algorithm=Algorithm(eta=0.5)),
        replace(base, optimizer=Optimizer(betas=(0.9, 0.99))),
    ):
        assert fingerprint(other) != fingerprint(base)


def test_differences_are_named():
    base = Experiment(name="x")
    other = replace(base, seed=1, algorithm=Algorithm(eta=0.5))
    assert difference(base, other) == ["seed", "algorithm.eta"]
    assert difference(base, base) == []
