"""Damaged and malicious files: every one ends in one clear error, or in a correct load."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from attacks import Reader, attack

from probes import PARTS, load_table, probe_experiment
from roadvla.evaluation.files import film_path, read_evaluation, read_film
from roadvla.evaluation.records import check_comparable, read_record
from roadvla.evaluation.results import Results, read_study
from roadvla.policy import BACKBONE_FOLDER, load_policy
from roadvla.train.checkpoint import policy_folder, read_progress, restore_optimizer
from roadvla.train.config import Optimizer
from roadvla.train.demonstrations import Demonstrations, load_demonstrations, save_demonstrations
from roadvla.train.loop import train
from roadvla.train.manifest import seal, verify
from roadvla.train.metrics import read_metrics
from roadvla.train.run_folder import load_experiment
from roadvla.train.update import make_optimizer
from sealing import reseal, sealed_by

RESULTS = Path(__file__).parents[2] / "results/tabletop"
RECORD = sorted((RESULTS / "records").iterdir())[0]
STUDY = sorted((RESULTS / "studies").iterdir())[0]


def _restore(path: Path) -> None:
    policy, generator = load_table(path.parent), torch.Generator()
    optimizer = make_optimizer(policy, Optimizer())
    restore_optimizer(path.parent, policy, optimizer, generator)
    for parameter in policy.parameters():
        parameter.grad = torch.rand(parameter.shape, generator=generator)
    optimizer.step()


def _resume(path: Path) -> None:
    verify(path.parent)
    seal(path.parent)
    read_progress(path.parent)
    _restore(path)


def _read_study(path: Path) -> None:
    Results(path.parent, {}, {}).missing(read_study(path))


def _read_record(path: Path) -> None:
    record = read_record(path)
    check_comparable([record, record])
    assert hash((record.name, record.method, record.env, record.envs, record.seed)) is not None


def _seal_object(path: Path, separators: tuple[str, str] | None = None) -> None:
    data = json.loads(path.read_bytes())
    if isinstance(data, dict):
        path.write_text(json.dumps(sealed_by(data, separators)))


def _seal_result(path: Path) -> None:
    _seal_object(path, (",", ":"))


def _seal_checkpoint(path: Path) -> None:
    reseal(path.parent)


def _seal_weights(path: Path) -> None:
    description = json.loads(path.with_name("policy.json").read_text())
    description["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_name("policy.json").write_text(json.dumps(description))


READERS = {
    "configuration": Reader("run/config.json", lambda path: load_experiment(path.parent)),
    "metrics": Reader("run/metrics.jsonl", lambda path: read_metrics(path.parent)),
    "latest": Reader("run/checkpoints/latest.json", lambda path: policy_folder(path.parents[1])),
    "state": Reader("checkpoint/state.json", lambda path: read_progress(path.parent)),
    "manifest": Reader("checkpoint/manifest.json", lambda path: read_progress(path.parent)),
    "optimiser": Reader("checkpoint/optimizer.safetensors", _restore),
    "evaluation": Reader("evaluation.json", read_evaluation),
    "record": Reader(RECORD.name, read_record),
    "study": Reader(STUDY.name, read_study),
    "description": Reader("policy/policy.json", lambda path: load_policy(path.parent)),
    "weights": Reader("policy/policy.safetensors", lambda path: load_policy(path.parent)),
    "film": Reader("evaluation_frames.npz", read_film),
    "demonstrations": Reader("demonstrations.safetensors", load_demonstrations),
}

RESEALED = {
    "manifest": Reader("checkpoint/manifest.json", _resume, _seal_object),
    "state": Reader("checkpoint/state.json", _resume, _seal_checkpoint),
    "optimiser": Reader("checkpoint/optimizer.safetensors", _resume, _seal_checkpoint),
    "policy description": Reader(
        "policy/policy.json", lambda path: load_policy(path.parent), lambda _: None
    ),
    "policy weights": Reader(
        "policy/policy.safetensors", lambda path: load_policy(path.parent), _seal_weights
    ),
    "record": Reader(RECORD.name, _read_record, _seal_result),
    "study": Reader(STUDY.name, _read_study, _seal_result),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of everything, undamaged."""
    folder = tmp_path_factory.mktemp("sound")
    run = train(probe_experiment(folder / "run"), parts=PARTS)
    shutil.copytree(policy_folder(run), folder / "checkpoint")
    shutil.copy(run / "evaluation/VR-UnseenTable_test.json", folder / "evaluation.json")
    film = film_path(run / "evaluation/VR-UnseenTable_test.json")
    shutil.copy(film, folder / "evaluation_frames.npz")
    shutil.copy(RECORD, folder)
    shutil.copy(STUDY, folder)
    shutil.copytree(str(BACKBONE_FOLDER), folder / "policy")
    demonstrations = Demonstrations(
        image=torch.zeros(4, 8, 8, 3, dtype=torch.uint8),
        action=torch.zeros(4, 7),
        episode_index=torch.tensor([0, 0, 1, 1]),
        step_index=torch.tensor([0, 1, 0, 1]),
        instructions=("a", "b"),
        origin={},
    )
    save_demonstrations(demonstrations, folder / "demonstrations.safetensors")
    return folder


@pytest.mark.parametrize("name", READERS)
def test_every_damage_ends_in_an_error_or_a_load(name: str, sound: Path, tmp_path: Path) -> None:
    found = attack(name, READERS[name], sound, tmp_path / "files", 60)
    assert found["refused"] > 10


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_thousand_damages(name: str, sound: Path, tmp_path: Path) -> None:
    found = attack(name, READERS[name], sound, tmp_path / "files", 1000)
    print(f"{name}: {found}")


@pytest.mark.parametrize("name", RESEALED)
def test_damage_with_a_new_checksum(name: str, sound: Path, tmp_path: Path) -> None:
    found = attack(f"resealed {name}", RESEALED[name], sound, tmp_path / "files", 100)
    assert found["refused"] > 10


@pytest.mark.slow
@pytest.mark.parametrize("name", RESEALED)
def test_thousands_of_damages_with_a_new_checksum(name: str, sound: Path, tmp_path: Path) -> None:
    found = attack(f"resealed {name}", RESEALED[name], sound, tmp_path / "files", 2000, seed=100)
    print(f"resealed {name}: {found}")
