"""Wall time of a training iteration: PPO against ROAD, interleaved in one process.

Prints each phase's median seconds and the ratio ROAD / PPO, iteration by iteration, so that a
machine whose speed drifts does not bias it. Timings do not depend on what has been learned.

    python benchmarks/bench_iteration.py [--threads N] [--iterations N] [--epochs E]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from roadvla.evaluation.machine import describe_machine
from roadvla.experiments.presets import TABLETOP_PPO, TABLETOP_ROAD
from roadvla.policy import load_backbone, save_policy
from roadvla.train.config import Experiment
from roadvla.train.parts import Parts
from roadvla.train.trainer import Trainer

PHASES = ("time/rollout", "time/reference", "time/update", "time/iteration")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=9)
    parser.add_argument("--epochs", type=int, default=TABLETOP_PPO.algorithm.epochs)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "reference"
        save_policy(load_backbone(), reference)
        trainers = {
            "ppo": _trainer(TABLETOP_PPO, arguments.epochs, None),
            "road": _trainer(TABLETOP_ROAD, arguments.epochs, str(reference)),
        }
        times: dict[str, list[dict[str, float]]] = {name: [] for name in trainers}
        for _ in range(arguments.iterations):
            for name, trainer in trainers.items():
                times[name].append(trainer.iterate())
    rows = {name: rows[2:] for name, rows in times.items()}  # the first ones train the head alone
    print(f"{describe_machine()}, {arguments.threads} threads, {arguments.epochs} epochs")
    for phase in PHASES:
        medians = {n: statistics.median(r.get(phase, 0.0) for r in rows[n]) for n in rows}
        print(f"{phase:<16} ppo {medians['ppo']:7.3f} s   road {medians['road']:7.3f} s")
    ratios = [
        road["time/iteration"] / ppo["time/iteration"]
        for ppo, road in zip(rows["ppo"], rows["road"], strict=True)
    ]
    print(f"ROAD / PPO       median {statistics.median(ratios):.3f}", end="   ")
    print(f"range {min(ratios):.3f} to {max(ratios):.3f} over {len(ratios)} pairs")


def _trainer(preset: Experiment, epochs: int, reference: str | None) -> Trainer:
    algorithm = replace(preset.algorithm, epochs=epochs, reference_critic=reference)
    evaluation = replace(preset.evaluation, every=0)
    return Trainer(replace(preset, algorithm=algorithm, evaluation=evaluation), Parts(), None)


if __name__ == "__main__":
    main()
