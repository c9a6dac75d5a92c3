from __future__ import annotations

import pytest

from roadvla.errors import UserError
from roadvla.experiments.presets import DEPARTURES, PAPER, PRESETS, get_preset
from roadvla.flags import form_of, parse, value_of
from roadvla.train.config import Experiment
from roadvla.train.serialize import difference, from_dict, setting, to_dict


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'tabletop-road'"):
        get_preset("tabletop-raod")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_carry_their_name_and_survive_json(name):
    preset = get_preset(name)
    assert preset.name == name
    # runs/demo is the folder of `roadvla demo`, which holds several runs
    assert preset.output == ("runs/demo-run" if name == "demo" else f"runs/{name}")
    assert from_dict(to_dict(preset)) == preset


@pytest.mark.parametrize("name", [n for n in PRESETS if n not in ("paper", "rl4vla")])
def test_every_departure_from_table_4_is_listed_with_a_reason(name):
    changed = {n for n in difference(PAPER, PRESETS[name]) if n not in ("name", "output")}
    assert set(DEPARTURES[name]) == changed
    assert all(len(reason) > 10 for reason in DEPARTURES[name].values())


@pytest.mark.parametrize("name", [n for n in PRESETS if n.startswith("tabletop")])
def test_methods_differ_from_ppo_in_the_algorithm_alone(name):
    changed = difference(get_preset("tabletop-ppo"), get_preset(name))
    assert all(n in ("name", "output") or n.startswith("algorithm.") for n in changed)


def test_the_demo_preset_is_the_tabletop_s_ppo():
    assert difference(get_preset("tabletop-ppo"), get_preset("demo")) == ["name", "output"]


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        ("--algo ppo", []),
        (
            "--algo road --reference-critic runs/ppo",
            ["algorithm.algo", "algorithm.reference_critic"],
        ),
        ("--algo grpo", ["algorithm.algo"]),
        ("--algo sft --demonstrations runs/demos", ["demonstrations", "algorithm.algo"]),
    ],
)
def test_the_demo_preset_takes_every_algorithm(flags, changed):
    form = form_of(get_preset("demo"), short=("algorithm", "optimizer", "rollout", "openvla"))
    chosen = value_of(Experiment, parse(form, "train demo", flags.split()))
    chosen.check_complete()
    assert chosen.iterations(24) == 60
    assert difference(get_preset("demo"), chosen) == changed


def test_the_tabletop_recipe():
    preset = get_preset("tabletop-ppo")
    expected = {
        "optimizer.learning_rate": 1e-4,
        "optimizer.value_learning_rate": 1e-3,
        "optimizer.minibatch": 128,
        "optimizer.warmup_iterations": 5,
        "optimizer.schedule": "cosine",
        "optimizer.grad_clip": 1.0,
        "algorithm.epochs": 3,
        "algorithm.entropy_coef": 0.001,
        "algorithm.value_only_iterations": 2,
        "algorithm.ratio": "action",
        "algorithm.clip_eps": 0.2,
        "rollout.num_envs": 64,
        "rollout.total_env_steps": 92_160,
    }
    assert {name: setting(preset, name) for name in expected} == expected


def test_rl4vla_keeps_its_own_constants():
    # reading R6: clip 10, no entropy bonus, constant rate, value head 3e-3, 2M steps
    preset = get_preset("rl4vla")
    assert preset.algorithm.algo == "ppo"
    assert preset.optimizer.grad_clip == 10.0
    assert preset.optimizer.schedule == "constant"
    assert preset.optimizer.value_learning_rate == 3e-3
    assert preset.algorithm.entropy_coef == 0.0
    assert preset.iterations(80) == 390  # 2,000,000 / 5,120
