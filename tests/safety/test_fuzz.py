"""Damaged and malicious files: every one ends in one clear error, or in a correct load."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError

from probes import PARTS, load_table, probe_experiment
from roadvla.errors import UserError
from roadvla.evaluation.files import read_evaluation
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
ODD: list[Any] = [
    *(None, True, -1, 0, 10**30, 1e308, float("nan"), float("-inf"), 0.5),
    *("", "x" * 5000, "../../etc/passwd", "/etc/passwd", [], [[]], {}, {"a": {}}, [None] * 50),
]


@dataclass(frozen=True)
class Reader:
    """A file, and who reads it."""

    path: str
    read: Callable[[Path], object]


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
    "demonstrations": Reader("demonstrations.safetensors", load_demonstrations),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of everything, undamaged."""
    folder = tmp_path_factory.mktemp("sound")
    run = train(probe_experiment(folder / "run"), parts=PARTS)
    shutil.copytree(policy_folder(run), folder / "checkpoint")
    shutil.copy(run / "evaluation/VR-UnseenTable_test.json", folder / "evaluation.json")
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


def damage(data: bytes, rng: random.Random) -> bytes:
    """Change a file in one of the ways in which files go wrong, or are made to."""
    kind = rng.choice(["flip", "cut", "grow", "noise", "json", "json", "header", "deep"])
    if kind == "json" and data[:1] in b"{[":
        return _odd_json(data, rng)
    if kind == "header" and data[:1] not in b"{[":
        return _odd_header(data, rng)
    if kind == "deep":
        return b"[" * 100_000
    if kind == "cut":
        return data[: rng.randrange(len(data))]
    if kind == "grow":
        return data + rng.randbytes(rng.randrange(1, 100))
    if kind == "noise":
        return rng.randbytes(rng.randrange(200))
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 3])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _odd_json(data: bytes, rng: random.Random) -> bytes:
    """Put something odd somewhere in a JSON document, or leave something out."""
    lines = data.decode().splitlines()
    whole = len(lines) == 1 or not lines[0].endswith("}")
    document = json.loads(data) if whole else json.loads(lines[0])
    node, key = document, None
    while isinstance(node, dict | list) and node:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        parent, key = node, rng.choice(list(keys))
        node = parent[key]
        if rng.random() < 0.4:
            break
    if key is None or rng.random() < 0.1:
        return json.dumps(rng.choice(ODD)).encode()
    if rng.random() < 0.2 and isinstance(parent, dict):
        del parent[key]
    else:
        parent[key] = rng.choice(ODD)
    return json.dumps(document).encode() + (b"" if whole else b"\n" + "\n".join(lines[1:]).encode())


def _odd_header(data: bytes, rng: random.Random) -> bytes:
    """Let a safetensors file promise something absurd."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    entry[rng.choice(["shape", "dtype", "data_offsets"])] = rng.choice(
        [[2**40, 2**40], [-1], [], "F4096", "I8", [0, 2**60], [5, 1], None, {"a": 1}]
    )
    text = json.dumps(header).encode()
    length = rng.choice([len(text), len(text), 2**62, 0])
    return length.to_bytes(8, "little") + text + data[8 + size :]


def outcome(reader: Reader, folder: Path, data: bytes) -> str:
    (folder / reader.path).write_bytes(data)
    try:
        reader.read(folder / reader.path)
    except (UserError, TypeCheckError):  # the tests' type checks come before the package's own
        return "refused"
    return "loaded"


def attack(name: str, sound: Path, folder: Path, cases: int) -> dict[str, int]:
    reader, found = READERS[name], {"refused": 0, "loaded": 0}
    shutil.copytree(sound, folder)
    before = {path for path in folder.parent.rglob("*") if path.is_file()}
    data = (sound / reader.path).read_bytes()
    assert outcome(reader, folder, data) == "loaded"
    for seed in range(cases):
        changed = damage(data, random.Random(f"{name}-{seed}"))
        try:
            found[outcome(reader, folder, changed)] += 1
        except Exception as error:
            raise AssertionError(f"{name}, case {seed}: {error!r}") from error
    assert {path for path in folder.parent.rglob("*") if path.is_file()} == before
    return found


@pytest.mark.parametrize("name", READERS)
def test_every_damage_ends_in_an_error_or_a_load(name: str, sound: Path, tmp_path: Path) -> None:
    found = attack(name, sound, tmp_path / "files", 60)
    assert found["refused"] > 10


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_thousand_damages(name: str, sound: Path, tmp_path: Path) -> None:
    found = attack(name, sound, tmp_path / "files", 1000)
    print(f"{name}: {found}")
