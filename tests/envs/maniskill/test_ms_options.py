"""Choosing the simulator and how it works, on machines that may not have it."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest

from roadvla import envs
from roadvla.envs import SETTINGS, SIMULATORS, ManiSkillSettings, canonical, close, make_env
from roadvla.envs.maniskill import env as maniskill_env
from roadvla.envs.maniskill.options import SHADERS
from roadvla.envs.maniskill.settings import PREFIX, VARIANTS, Fixes
from roadvla.errors import UserError
from roadvla.train.checks import check_simulator
from roadvla.train.parts import maker_of

OTHERS: dict[str, Any] = {
    "image_size": (48, 64),
    "shader": "lambert",
    "processes": 3,
    "stand_ins": True,
    "distinct_distractors": True,
    "seen_tables": True,
    "batch_texture_box": True,
}
"""A value for every setting that is not its default."""


def test_all_settings_are_here() -> None:
    default = ManiSkillSettings()
    assert list(OTHERS) == [item.name for item in fields(default)]
    assert all(value != getattr(default, name) for name, value in OTHERS.items())


# Refusals


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"shader": "lamber"}, "unknown shader 'lamber': did you mean 'lambert'?"),
        ({"shader": "x"}, "unknown shader 'x': known: default, lambert, one_pass"),
        ({"processes": 0}, "processes is 0: at least 1 is needed"),
        ({"processes": -2}, "processes is -2: at least 1 is needed"),
        ({"image_size": (15, 640)}, "image_size is (15, 640): expected height and width of 16 to"),
        ({"image_size": (480, 4097)}, "of 16 to 4096 pixels"),
        ({"image_size": (0, 0)}, "image_size is (0, 0)"),
        ({"image_size": (-48, 48)}, "image_size is (-48, 48)"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_values_out_of_range(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        ManiSkillSettings(**wrong)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_values_at_the_edge_of_their_range() -> None:
    for size in ((16, 4096), (4096, 16)):
        assert ManiSkillSettings(image_size=size).size == size
    assert ManiSkillSettings(processes=1).processes == 1
    for shader in SHADERS:
        assert ManiSkillSettings(shader=shader).shader == shader


def test_replacing_checks_again() -> None:
    with pytest.raises(UserError, match="processes is 0"):
        replace(ManiSkillSettings(), processes=0)


# What follows from them


def test_size() -> None:
    assert ManiSkillSettings().size == (480, 640)  # RL4VLA's, height first
    assert ManiSkillSettings(image_size=(48, 64)).size == (48, 64)


def test_fixes() -> None:
    # RL4VLA's episodes, and textures that do not depend on the batch.
    assert ManiSkillSettings().fixes == Fixes(own_texture_box=True)
    assert ManiSkillSettings(batch_texture_box=True).fixes == Fixes()
    assert ManiSkillSettings(seen_tables=True).fixes == Fixes(
        own_texture_box=True, seen_tables=True
    )
    assert ManiSkillSettings(distinct_distractors=True).fixes == Fixes(
        own_texture_box=True, distinct_distractors=True
    )


def test_facts() -> None:
    facts = ManiSkillSettings(**OTHERS).facts
    expected = {**OTHERS, "image_size": [48, 64]}
    del expected["processes"]
    assert facts == expected
    assert json.loads(json.dumps(facts)) == facts


def test_facts_differ_with_what_decides_frames_and_episodes() -> None:
    default = ManiSkillSettings()
    assert default.facts["image_size"] == [480, 640]
    for name, value in OTHERS.items():
        same = replace(default, **{name: value}).facts == default.facts
        assert same == (name == "processes"), name
    assert ManiSkillSettings(image_size=(480, 640)).facts == default.facts


# Names of settings


@pytest.mark.parametrize("sim", SIMULATORS)
def test_the_paper_s_settings_have_the_paper_s_names(sim: str) -> None:
    for alias, row in SETTINGS.items():
        assert canonical(alias, sim) == canonical(row.rl4vla_id, sim) == alias


def test_the_other_ids_keep_rl4vla_s_names() -> None:
    names = {env_id: canonical(env_id, "maniskill") for env_id in VARIANTS}
    assert len(set(names.values())) == 17
    aliases = {row.rl4vla_id: alias for alias, row in SETTINGS.items()}
    assert names == {env_id: aliases.get(env_id, env_id) for env_id in VARIANTS}
    for env_id, name in names.items():
        short = env_id.removeprefix(PREFIX)
        assert canonical(short, "maniskill") == canonical(name, "maniskill") == name


def test_names_that_there_are_not() -> None:
    with pytest.raises(UserError, match=r"unknown environment .*did you mean 'VR-UnseenTable'"):
        canonical("VR-UnseenTabel", "maniskill")
    with pytest.raises(UserError, match=r"unknown environment .*did you mean 'VR-UnseenTable'"):
        canonical("VR-UnseenTabel", "tabletop")
    # Ten of the 17 are ManiSkill's only.
    with pytest.raises(UserError, match="unknown environment"):
        canonical(f"{PREFIX}Main-v3", "tabletop")
    with pytest.raises(UserError, match="unknown simulator 'maniskil': did you mean 'maniskill'"):
        canonical("VR-UnseenTable", "maniskil")


# Making environments


def test_unknown_simulators() -> None:
    with pytest.raises(UserError) as caught:
        make_env("VR-UnseenTable", split="test", num_envs=1, sim="ManiSkill")
    assert str(caught.value) == (
        "unknown simulator 'ManiSkill': did you mean 'maniskill'? known: maniskill, tabletop"
    )


def test_without_mani_skill(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def find_spec(name: str) -> None:
        asked.append(name)

    monkeypatch.setattr(envs, "find_spec", find_spec)
    monkeypatch.setattr(maniskill_env, "ManiSkillEnv", None)
    with pytest.raises(UserError) as caught:
        make_env("VR-UnseenTable", split="test", num_envs=1, sim="maniskill")
    assert asked == ["mani_skill"]
    assert "pip install 'roadvla[maniskill]'" in str(caught.value)
    assert "\n" not in str(caught.value)
    # The tabletop does not ask.
    made = make_env("VR-UnseenTable", split="test", num_envs=2)
    assert made.num_envs == 2
    assert asked == ["mani_skill"]


@pytest.mark.usefixtures("unchecked")
def test_with_mani_skill_everything_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envs, "find_spec", lambda name: object())
    monkeypatch.setattr(maniskill_env, "ManiSkillEnv", lambda *args, **options: (args, options))
    settings = ManiSkillSettings(stand_ins=True)
    found = make_env(
        "Main-v3",
        split="all",
        num_envs=5,
        sim="maniskill",
        device="cuda:1",
        end_on_success=True,
        maniskill=settings,
    )
    options = {"split": "all", "num_envs": 5, "device": "cuda:1", "end_on_success": True}
    assert found == (("Main-v3",), {**options, "settings": settings})
    _, options = make_env("Main-v3", split="test", num_envs=1, sim="maniskill")
    assert options == {
        "split": "test",
        "num_envs": 1,
        "device": "cpu",
        "end_on_success": False,
        "settings": ManiSkillSettings(),
    }


@pytest.mark.usefixtures("unchecked")
def test_closing_what_can_be_closed() -> None:
    closed = []
    close(SimpleNamespace(close=lambda: closed.append(1)))  # type: ignore[arg-type]
    close(SimpleNamespace())  # type: ignore[arg-type]
    assert closed == [1]


# Configurations


def node(sim: str, **settings: Any) -> SimpleNamespace:
    return SimpleNamespace(sim=sim, maniskill=ManiSkillSettings(**settings))


@pytest.mark.parametrize("name", OTHERS)
def test_settings_that_the_tabletop_would_not_use(name: str) -> None:
    with pytest.raises(UserError) as caught:
        check_simulator(node("tabletop", **{name: OTHERS[name]}))
    assert str(caught.value) == (
        f"{name} {OTHERS[name]!r} would not be used by sim 'tabletop': drop it or pass "
        f"--sim maniskill"
    )


def test_settings_that_are_used() -> None:
    check_simulator(node("maniskill", **OTHERS))
    check_simulator(node("maniskill"))
    check_simulator(node("tabletop"))


def test_simulators_that_there_are_not() -> None:
    with pytest.raises(UserError, match="unknown simulator 'table': did you mean 'tabletop'"):
        check_simulator(node("table", **OTHERS))


# Frames that a policy sees


def maniskill_of(monkeypatch: pytest.MonkeyPatch, policy: Any, **settings: Any) -> Any:
    """What an environment that is made for a policy gets."""
    monkeypatch.setattr(envs, "make_env", lambda *args, **options: (args, options))
    make = maker_of(policy, ManiSkillSettings(**settings))
    args, options = make("Main-v3", split="test")  # type: ignore[misc]
    assert args == ("Main-v3",)
    assert options.pop("split") == "test"
    assert list(options) == ["maniskill"]
    return options["maniskill"]


def test_frames_of_the_tiny_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    others = {**OTHERS, "image_size": None}
    found = maniskill_of(monkeypatch, "tiny", **others)
    assert found == ManiSkillSettings(**{**others, "image_size": (48, 48)})


def test_an_explicit_size_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert maniskill_of(monkeypatch, "openvla", **OTHERS) == ManiSkillSettings(**OTHERS)


def test_a_size_that_the_tiny_policy_cannot_see_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="48 by 48"):
        maniskill_of(monkeypatch, "tiny", **{**OTHERS, "image_size": (96, 96)})
    found = maniskill_of(monkeypatch, "tiny", **{**OTHERS, "image_size": (48, 48)})
    assert found.image_size == (48, 48)


def test_frames_of_openvla_are_rl4vla_s(monkeypatch: pytest.MonkeyPatch) -> None:
    found = maniskill_of(monkeypatch, "openvla")
    assert found == ManiSkillSettings()
    assert found.size == (480, 640)
