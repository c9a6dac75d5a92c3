"""How long writing a checkpoint keeps the learner waiting, as a share of an iteration.

Every iteration of the small policy on the tabletop is followed by a checkpoint, as with
``--checkpoint-every 1``; the presets write one every ten iterations.

    python benchmarks/bench_checkpoint.py [--threads N] [--iterations N] [--folder DIR]
        [--output JSON]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from roadvla.evaluation.machine import describe_machine
from roadvla.experiments.presets import DEBUG, TABLETOP_PPO
from roadvla.train.checkpoint import good_checkpoint
from roadvla.train.config import Experiment
from roadvla.train.parts import Parts
from roadvla.train.trainer import Trainer

PRESETS = (DEBUG, TABLETOP_PPO)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary one")
    parser.add_argument("--output", type=Path, help="write the numbers as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = {
        "machine": describe_machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "threads": arguments.threads,
        "iterations": arguments.iterations,
        "presets": {p.name: _measure(p, arguments.iterations, arguments.folder) for p in PRESETS},
    }
    print(json.dumps(result, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def _measure(preset: Experiment, iterations: int, folder: Path | None) -> dict[str, float]:
    algorithm = replace(preset.algorithm, value_only_iterations=0)
    evaluation = replace(preset.evaluation, every=0)
    trainer = Trainer(replace(preset, algorithm=algorithm, evaluation=evaluation), Parts(), None)
    worked, saved, verified = [], [], []
    with tempfile.TemporaryDirectory(dir=folder) as run:
        for _ in range(iterations + 1):
            times = [time.perf_counter()]
            trainer.iterate()
            times.append(time.perf_counter())
            trainer.save(Path(run))
            times.append(time.perf_counter())
            found, _ = good_checkpoint(Path(run) / "checkpoints")
            times.append(time.perf_counter())
            for seconds, later, earlier in zip(
                (worked, saved, verified), times[1:], times[:-1], strict=True
            ):
                seconds.append(later - earlier)
        assert found is not None
        size = sum(path.stat().st_size for path in found.iterdir())
    # The first iteration warms up, and its checkpoint has none to retire.
    work, save, verify = (statistics.median(seconds[1:]) for seconds in (worked, saved, verified))
    return {
        "checkpoint_bytes": size,
        "iteration_seconds": round(work, 4),
        "save_seconds": round(save, 4),
        "save_seconds_most": round(max(saved[1:]), 4),
        "verify_seconds": round(verify, 4),
        "stall_percent_every_iteration": round(100 * save / work, 2),
        "stall_percent_as_preset": round(100 * save / work / preset.checkpoint_every, 2),
        "checkpoint_every": preset.checkpoint_every,
    }


if __name__ == "__main__":
    main()
