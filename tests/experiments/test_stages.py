"""Steps of demo and studies: what is there already is not made again."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from roadvla.errors import UserError
from roadvla.evaluation.evaluate import Evaluation
from roadvla.evaluation.files import evaluation_path, read_evaluation, write_evaluation
from roadvla.experiments import stages
from roadvla.train.manifest import FORMAT, write_manifest


def _write_warm_up(folder: Path, settings: stages.WarmUp) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "policy.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps({"name": "warm-up", **asdict(settings)}))


def _write_checkpoint(run: Path, iteration: int) -> Path:
    """A run as far as evaluations look at it."""
    name = f"iteration_{iteration:06d}"
    folder = run / "checkpoints" / name
    folder.mkdir(parents=True)
    (run / "checkpoints" / "latest.json").write_text(json.dumps({"folder": name}))
    (folder / "policy.json").write_text("{}")
    for name in ("policy.safetensors", "optimizer.safetensors"):
        (folder / name).write_bytes(b"")
    counters = {"iteration": iteration, "env_steps": 10 * iteration, "episodes": 1}
    (folder / "state.json").write_text(json.dumps({"format": FORMAT, **counters, "config": ""}))
    write_manifest(folder)
    return folder


def _count_evaluations(monkeypatch) -> list[tuple[str, str, int]]:
    """Put a stand-in for the evaluation and note what it is asked for."""
    made: list[tuple[str, str, int]] = []

    def evaluate(policy, *, env, split, episodes, temperature, seed, **_) -> Evaluation:
        made.append((env, split, episodes))
        outcomes = (True,) * episodes
        return Evaluation(
            env=env,
            split=split,
            sim="tabletop",
            horizon=24,
            seed=seed,
            **dict.fromkeys(("success", "success_once", "grasped"), outcomes),
            **dict.fromkeys(("machine", "date", "torch"), "-"),
            temperature=temperature,
            episode_ids=tuple(range(episodes)),
            seconds=1.0,
        )

    monkeypatch.setattr(stages, "evaluate", evaluate)
    monkeypatch.setattr(stages, "load_policy", lambda folder: None)
    return made


def test_a_warm_up_is_made_once(tmp_path, monkeypatch) -> None:
    calls = []

    def run_warm_up(settings: stages.WarmUp, **flags: bool) -> Path:
        calls.append((settings, flags))
        return Path(settings.output)

    monkeypatch.setattr(stages, "run_warm_up", run_warm_up)
    settings = stages.WarmUp(output=str(tmp_path / "warm"))
    stages.ensure_warm_up(settings)
    assert calls == [(settings, {})]
    _write_warm_up(tmp_path / "warm", settings)
    assert stages.ensure_warm_up(settings) == tmp_path / "warm"
    assert len(calls) == 1
    # Cut off before the policy was written: made again.
    (tmp_path / "warm" / "policy.json").unlink()
    stages.ensure_warm_up(settings)
    assert calls[1:] == [(settings, {"force": True})]


def test_a_warm_up_with_other_settings_is_refused(tmp_path) -> None:
    settings = stages.WarmUp(output=str(tmp_path / "warm"))
    _write_warm_up(tmp_path / "warm", replace(settings, steps=10, output="elsewhere"))
    with pytest.raises(UserError, match=r"other settings \(steps 10, not 200\): choose another"):
        stages.ensure_warm_up(settings)
    _write_warm_up(tmp_path / "warm", replace(settings, gain=(0.5, 0.8)))
    with pytest.raises(UserError, match=r"\(gain \[0.5, 0.8\], not \[0.55, 0.8\]\)"):
        stages.ensure_warm_up(settings)
    for content in ("{", "[]", None):
        config = tmp_path / "warm" / "config.json"
        config.unlink() if content is None else config.write_text(content)
        with pytest.raises(UserError, match=r"choose another --output or delete it"):
            stages.ensure_warm_up(settings)


def test_an_evaluation_is_repeated_only_if_it_is_stale(tmp_path, monkeypatch) -> None:
    made = _count_evaluations(monkeypatch)
    run = tmp_path / "run"
    checkpoint = _write_checkpoint(run, iteration=60)
    stages.ensure_evaluations(run, episodes=8)
    assert len(made) == 11
    assert len({key[:2] for key in made}) == 11
    stored = read_evaluation(evaluation_path(run / "evaluation", "VR-UnseenTable", "test"))
    assert stored.checkpoint == "checkpoints/iteration_000060"
    assert (stored.iteration, stored.env_steps) == (60, 600)
    made.clear()

    stages.ensure_evaluations(run, episodes=7)
    stages.ensure_evaluations(run, episodes=8, more={"VR-UnseenTable": 8})
    assert made == []
    # Of too few episodes; four settings share the training distribution of VR-DynamicNoise.
    stages.ensure_evaluations(run, episodes=8, more={"VR-DynamicNoise": 9})
    assert made == [("VR-UnseenTable", "train", 9), ("VR-DynamicNoise", "test", 9)]
    made.clear()
    # At another temperature, of another iteration, with another seed, damaged.
    folder = run / "evaluation"
    for change in ({"temperature": 0.0}, {"iteration": 59}, {"iteration": None}, {"seed": 1}):
        write_evaluation(replace(stored, **change), folder)
        stages.ensure_evaluations(run, episodes=8)
    evaluation_path(folder, "VR-UnseenTable", "test").write_text("{")
    stages.ensure_evaluations(run, episodes=8)
    assert made == [("VR-UnseenTable", "test", 8)] * 5
    made.clear()
    # The policy was trained further.
    shutil.rmtree(checkpoint)
    _write_checkpoint(run, iteration=61)
    stages.ensure_evaluations(run, episodes=8)
    assert len(made) == 11


def test_a_warm_up_has_no_iteration(tmp_path, monkeypatch) -> None:
    made = _count_evaluations(monkeypatch)
    (tmp_path / "policy.json").write_text("{}")
    for _ in range(2):
        stages.ensure_evaluations(tmp_path, episodes=2, more={"VR-UnseenTable": 4})
    assert sorted(count for *_, count in made) == [2] * 9 + [4] * 2
    stored = read_evaluation(evaluation_path(tmp_path / "evaluation", "VR-UnseenTable", "test"))
    assert (stored.checkpoint, stored.iteration, stored.env_steps) == (".", None, None)


@pytest.mark.slow
def test_the_demo_runs_and_a_second_call_repeats_nothing(tmp_path, capsys) -> None:
    from roadvla.cli import main

    assert main(["demo", "--fast", "--output", str(tmp_path / "demo")]) == 0
    folder = tmp_path / "demo"
    report = (folder / "report" / "report.md").read_text()
    for alias in ("VR-UnseenTable", "VR-DynamicNoise", "ER-Repositioning"):
        assert f"## {alias}" in report

    def files() -> list[Path]:
        """What took time to make: policies, and the evaluations with their films."""
        results = folder.glob("*/evaluation/*")
        return [*folder.rglob("*.safetensors"), *results]

    written = {path: path.stat().st_mtime_ns for path in files()}
    last = "checkpoints/iteration_000003"
    assert {str(path.relative_to(folder)) for path in written if path.suffix == ".safetensors"} == {
        *("warmup/policy.safetensors", "warmup/demonstrations.safetensors"),
        *(f"ppo/{last}/policy.safetensors", f"ppo/{last}/optimizer.safetensors"),
        *(f"road/{last}/policy.safetensors", f"road/{last}/optimizer.safetensors"),
    }
    assert main(["demo", "--fast", "--output", str(tmp_path / "demo")]) == 0
    assert {path: path.stat().st_mtime_ns for path in files()} == written
    assert "road" in capsys.readouterr().out
