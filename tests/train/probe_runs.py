"""Runs of the probe environment, and what has to be the same of two of them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from probes import PARTS, probe_experiment
from roadvla.evaluation.files import read_evaluation
from roadvla.train.loop import train
from roadvla.train.metrics import read_metrics

LAST = "checkpoints/iteration_000012"


def run(output, *, resume=False, force=False, parts=PARTS, **changes) -> Path:
    return train(probe_experiment(output, **changes), resume=resume, force=force, parts=parts)


def rows(folder):
    skipped = ("time/", "memory/")
    return [
        {name: value for name, value in row.items() if not name.startswith(skipped)}
        for row in read_metrics(folder)
    ]


def assert_same_run(a: Path, b: Path) -> None:
    for name in ("policy.safetensors", "optimizer.safetensors"):
        mine, theirs = load_file(a / LAST / name), load_file(b / LAST / name)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    for name in ("state.json", "manifest.json"):
        assert (a / LAST / name).read_text() == (b / LAST / name).read_text()
    assert rows(a) == rows(b)
    assert shown(a) == shown(b)
    assert [row["iteration"] for row in rows(a)] == list(range(13))
    for split in ("train", "test"):
        name = f"evaluation/VR-UnseenTable_{split}.json"
        mine, theirs = read_evaluation(a / name), read_evaluation(b / name)
        assert mine.success == theirs.success
        assert mine.iteration == theirs.iteration == 12


def shown(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: per tag the steps and values, in the order in which it has them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in board.Scalars(tag)]
        for tag in sorted(board.Tags()["scalars"])
        if not tag.startswith(("time/", "memory/"))
    }
