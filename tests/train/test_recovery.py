"""Several processes go on from one checkpoint: the first chooses, the others must see the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_checkpoint import save, trained
from test_manifest import flip, two
from torch import distributed, multiprocessing

from roadvla.errors import UserError
from roadvla.train.recovery import shared_checkpoint
from roadvla.world import World


def _ask(rank: int, size: int, root: Path, names: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{root / 'meeting'}"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    world = World.current()
    told = {
        "agree": [world.agree(7), world.agree(7 + rank), world.agree(2**62 + rank)],
        "first": [world.first(rank - 1), world.first(5 + rank)],
        "most": world.most(rank),
        "any": [world.any(False), world.any(rank == 1)],
    }
    for name in names:
        try:
            found, passed_over = shared_checkpoint(root / f"{name}-{rank}", world)
            told[name] = [None if found is None else found.name, passed_over]
        except UserError as error:
            told[name] = [str(error)]
    (root / f"told-{rank}.json").write_text(json.dumps(told))
    distributed.destroy_process_group()


def _copies(root: Path, name: str) -> tuple[Path, Path]:
    """The same two checkpoints as seen by each of two processes."""
    mine, theirs = root / f"{name}-0", root / f"{name}-1"
    two(mine)
    shutil.copytree(mine, theirs)
    return mine, theirs


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    root = tmp_path_factory.mktemp("world")
    _copies(root, "alike")
    mine, _ = _copies(root, "first-damaged")
    flip(mine / "iteration_000002" / "optimizer.safetensors")
    _, theirs = _copies(root, "second-newer")
    save(theirs, trained(), 3)
    _, theirs = _copies(root, "second-lacks")
    shutil.rmtree(theirs / "iteration_000002")
    _, theirs = _copies(root, "second-other")
    shutil.rmtree(theirs / "iteration_000002")
    save(theirs, trained(value_only=True), 2)
    _, theirs = _copies(root, "second-damaged")
    flip(theirs / "iteration_000002" / "optimizer.safetensors")
    names = (
        "alike",
        "first-damaged",
        "second-damaged",
        "second-newer",
        "second-lacks",
        "second-other",
        "none",
    )
    multiprocessing.spawn(_ask, (2, root, names), nprocs=2)
    return [json.loads((root / f"told-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("rank", [0, 1])
def test_all_processes_come_to_the_same_answer(told: list[dict], rank: int) -> None:
    assert told[rank]["agree"] == [True, False, False]
    assert told[rank]["first"] == [-1, 5]
    assert told[rank]["most"] == 1
    assert told[rank]["any"] == [False, True]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_chooses_for_all(told: list[dict], rank: int) -> None:
    assert told[rank]["alike"] == ["iteration_000002", ""]
    assert told[rank]["first-damaged"][0] == "iteration_000001"
    assert ("optimizer.safetensors" in told[rank]["first-damaged"][1]) == (rank == 0)
    # What the second cannot read it finds when it loads; here it only compares manifests.
    assert told[rank]["second-damaged"] == ["iteration_000002", ""]
    assert told[rank]["second-newer"] == ["iteration_000002", ""]
    assert told[rank]["none"] == [None, ""]


@pytest.mark.parametrize("case", ["second-lacks", "second-other"])
@pytest.mark.parametrize("rank", [0, 1])
def test_who_sees_another_checkpoint_stops_all(told: list[dict], rank: int, case: str) -> None:
    (said,) = told[rank][case]
    assert "iteration_000002 is not the same checkpoint for all processes" in said


def test_alone_nothing_is_asked(tmp_path: Path) -> None:
    _, newest = two(tmp_path)
    assert shared_checkpoint(tmp_path, World()) == (newest, "")
    assert World().first(3) == 3
