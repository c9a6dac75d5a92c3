"""Damaged and malicious files: every one ends in one clear error, or in a correct load."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from attacks import Reader, attack

from probes import PARTS, load_table, probe_experiment
from roadvla.evaluation.files import film_path, read_evaluation, read_film
from roadvla.evaluation.records import read_record
from roadvla.evaluation.results import read_study
from roadvla.policy import BACKBONE_FOLDER, load_policy
from roadvla.train.checkpoint import policy_folder, read_progress, restore_optimizer
from roadvla.train.config import Optimizer
from roadvla.train.demonstrations import Demonstrations, load_demonstrations, save_demonstrations
from roadvla.train.loop import train
from roadvla.train.metrics import read_metrics
from roadvla.train.run_folder import load_experiment
from roadvla.train.update import make_optimizer

RESULTS = Path(__file__).parents[2] / "results/tabletop"
RECORD = sorted((RESULTS / "records").iterdir())[0]
STUDY = sorted((RESULTS / "studies").iterdir())[0]


def _restore(path: Path) -> None:
    policy = load_table(path.parent)
    optimizer = make_optimizer(policy, Optimizer())
    restore_optimizer(path.parent, policy, optimizer, torch.Generator())


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
