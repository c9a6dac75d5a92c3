"""A run goes on with what it began with, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from probe_runs import run

from roadvla.errors import UserError
from roadvla.train import sources
from roadvla.train.config import Algorithm, EvaluationConfig
from roadvla.train.run_folder import load_experiment

NONE = EvaluationConfig(every=0, final_episodes=0)


@pytest.fixture
def critic(tmp_path: Path) -> Path:
    return run(tmp_path / "critic", evaluation=NONE, keep_checkpoints="all")


def road(folder: Path, critic: Path, *, resume: bool = False) -> Path:
    algorithm = Algorithm(algo="road", alpha=0.5, epochs=2, reference_critic=str(critic))
    return run(folder, resume=resume, algorithm=algorithm, evaluation=NONE)


def test_a_reference_critic_that_moved_on_is_refused(critic: Path, tmp_path: Path) -> None:
    folder = road(tmp_path / "run", critic)
    road(folder, critic, resume=True)
    latest = critic / "checkpoints/latest.json"
    before = latest.read_text()
    latest.write_text(json.dumps({"iteration": 3, "folder": "iteration_000003"}))
    config = (folder / "config.json").read_bytes()
    with pytest.raises(UserError) as refused:
        road(folder, critic, resume=True)
    said = str(refused.value)
    assert said.startswith(f"cannot resume {folder}: reference_critic {critic} is no longer")
    assert "it was iteration_000012 and is iteration_000003" in said
    assert (folder / "config.json").read_bytes() == config
    latest.write_text(before)
    critic.rename(tmp_path / "moved")
    (tmp_path / "critic").symlink_to(tmp_path / "moved")  # it may be elsewhere, if it is the same
    road(folder, critic, resume=True)


def test_a_run_that_noted_nothing_is_taken_on_trust(critic: Path, tmp_path: Path) -> None:
    folder = road(tmp_path / "run", critic)
    data = json.loads((folder / "config.json").read_text())
    assert data.pop("sources")["reference_critic"]["found"] == "iteration_000012"
    (folder / "config.json").write_text(json.dumps(data))
    (critic / "checkpoints/latest.json").write_text(
        json.dumps({"iteration": 3, "folder": "iteration_000003"})
    )
    road(folder, critic, resume=True)
    assert load_experiment(folder).algorithm.reference_critic == str(critic)


def test_a_policy_folder_and_demonstrations_are_known_by_what_they_hold(
    critic: Path, tmp_path: Path
) -> None:
    folder, file = tmp_path / "policy", tmp_path / "demonstrations.safetensors"
    folder.mkdir()
    (folder / "policy.json").write_text("{}")
    file.write_bytes(b"one")

    def found() -> set[str]:
        experiment = load_experiment(critic)
        object.__setattr__(experiment, "demonstrations", str(file))
        object.__setattr__(experiment.algorithm, "reference_critic", str(folder))
        return {source["digest"] for source in sources.sources_now(experiment).values()}

    first = found()
    assert found() == first
    file.write_bytes(b"two")
    assert len(found() & first) == 1
    (folder / "policy.json").write_text("{ }")
    assert not found() & first
