"""Two processes that see different things on the disk go on from the same, or not at all."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from meeting import meet
from test_checkpoint import save, trained
from test_manifest import flip
from torch import distributed, multiprocessing

from probes import PARTS, probe_experiment
from roadvla.errors import UserError, WorkerError
from roadvla.train import resume
from roadvla.train.loop import train
from roadvla.train.resume import agreed_checkpoint


def _refuse(*_: object) -> None:
    raise AssertionError("this process is not to choose")


def _choose(rank: int, folder: Path, cases: tuple[str, ...]) -> None:
    world = meet(folder / "meeting", rank)
    if rank:
        resume.good_checkpoint = _refuse
    for case in cases:
        try:
            found, passed_over = agreed_checkpoint(folder / case / str(rank), world)
            told = [None if found is None else found.name, passed_over]
        except WorkerError as error:
            told = ["refused", str(error)]
        (folder / case / f"told-{rank}").write_text(json.dumps(told))
    distributed.destroy_process_group()


def _gone(newest: Path) -> None:
    shutil.rmtree(newest)


def _shorter(newest: Path) -> None:
    path = newest / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _another(newest: Path) -> None:
    """Of the same name and sizes, yet of another run."""
    policy, optimizer, generator = trained()
    other = save(newest.parents[1], (policy, optimizer, generator.manual_seed(6)), 2)
    shutil.rmtree(newest)
    other.rename(newest)


def _newer(newest: Path) -> None:
    save(newest.parent, trained(), 3)


def _damaged(newest: Path) -> None:
    flip(newest / "policy.safetensors")


def _all_gone(newest: Path) -> None:
    shutil.rmtree(newest.parent)


# What is changed in the sight of which process, and what both go on from.
CASES = {
    "same": (lambda _: None, 0, "iteration_000002"),
    "late": (_gone, 1, "is missing"),
    "late by a file": (_shorter, 1, "bytes, not"),
    "of another run": (_another, 1, ""),
    "early": (_newer, 1, "iteration_000002"),
    "damaged for the first": (_damaged, 0, "iteration_000001"),
    "behind for the first": (_gone, 0, "iteration_000001"),
    "none for the first": (_all_gone, 0, None),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[str]]]:
    """What both processes chose or said, by case."""
    folder = tmp_path_factory.mktemp("sights")
    for case, (change, rank, _) in CASES.items():
        state = trained()
        for number in (1, 2):
            save(folder / case / "0", state, number)
        shutil.copytree(folder / case / "0", folder / case / "1")
        change(folder / case / str(rank) / "iteration_000002")
    multiprocessing.spawn(_choose, (folder, tuple(CASES)), nprocs=2)
    return {
        case: [json.loads((folder / case / f"told-{rank}").read_text()) for rank in (0, 1)]
        for case in CASES
    }


@pytest.mark.parametrize("case", CASES)
def test_the_first_chooses_for_all(told: dict[str, list[list[str]]], case: str) -> None:
    expected, (first, second) = CASES[case][2], told[case]
    if first[0] != "refused":
        assert first[0] == second[0] == expected
        assert second[1] == ""
        assert ("policy.safetensors is damaged" in first[1]) == (case == "damaged for the first")
        return
    assert case in ("late", "late by a file", "of another run")
    assert second[0] == "refused"
    for _, line in (first, second):
        assert line.startswith("process 1 of 2 does not see ")
        assert "iteration_000002" in line
        assert line.endswith("the output folder must be on a disk that all processes see")
    assert expected in second[1]


def _go_on(rank: int, folder: Path) -> None:
    meet(folder / "meeting", rank)
    experiment = probe_experiment(folder / "run")
    with pytest.raises(UserError, match="2 processes were started with different settings"):
        train(replace(experiment, seed=rank), resume=True, parts=PARTS)
    # The second one, which did not see the run yet when it was asked to go on if there is one.
    train(experiment, resume=rank == 0, parts=PARTS)
    distributed.destroy_process_group()


def test_whether_to_go_on_is_the_first_one_s_to_say(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    flip(run / "checkpoints/iteration_000012/optimizer.safetensors")
    multiprocessing.spawn(_go_on, (tmp_path,), nprocs=2)
    assert not (run / "run.lock").exists()
    (note,) = (json.loads(line) for line in (run / "notes.jsonl").read_text().splitlines())
    assert note["iteration"] == 9
    mine, theirs = (
        json.loads((folder / "evaluation/VR-UnseenTable_test.json").read_text())
        for folder in (run, finished)
    )
    assert mine["per_episode"] == theirs["per_episode"]
