"""What several processes are worth on this machine, and what they say to each other.

    python benchmarks/scaling.py --processes 1 2 --output benchmarks/results/DATE-scaling.json

The same PPO on the tabletop, the same global batch, one thread per process, after a first iteration
that is not counted. Messages and bytes are those that one process hands to torch.distributed in one
iteration without evaluation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

from roadvla.evaluation.machine import describe_machine
from roadvla.experiments.presets import get_preset
from roadvla.train.config import Experiment
from roadvla.train.trainer import Trainer
from roadvla.world import World

_CALLS = ("all_gather", "all_reduce")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--num-envs", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--overlap", action="store_true", help="simulate in half-batches")
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    rows: dict[int, list[dict[str, Any]]] = {count: [] for count in asked.processes}
    for _ in range(asked.rounds):  # in turn: the machine's speed drifts
        for count, found in rows.items():
            found.append(_measure(count, asked))
    table = [_summary(count, found) for count, found in rows.items()]
    for row in table:
        print(json.dumps(row))
    if asked.output is not None:
        about = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": describe_machine("cpu"),
            "num_envs": asked.num_envs,
            "iterations": asked.iterations,
            "rounds": asked.rounds,
            "overlap": asked.overlap,
        }
        asked.output.write_text(json.dumps({**about, "rows": table}, indent=1) + "\n")


def _measure(count: int, asked: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        multiprocessing.spawn(_run, (count, place, asked), nprocs=count)
        return json.loads((place / "result.json").read_text())


def _run(rank: int, size: int, folder: Path, asked: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    said = _listen()
    if size > 1:
        meeting = f"file://{folder / 'meeting'}"
        distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    trainer = Trainer(_experiment(asked, size), None, None, World.current())
    trainer.iterate()
    said.clear()
    seconds: list[dict[str, float]] = []
    for _ in range(asked.iterations):
        metrics = trainer.iterate()
        seconds.append({k: v for k, v in metrics.items() if k.startswith("time/")})
    if rank == 0:
        phases = ("time/iteration", "time/rollout", "time/update")
        result = {name: statistics.median(row[name] for row in seconds) for name in phases}
        per = {name: total / asked.iterations for name, total in said.items()}
        (folder / "result.json").write_text(json.dumps({**result, **per}))
    if size > 1:
        distributed.destroy_process_group()


def _experiment(asked: argparse.Namespace, size: int) -> Experiment:
    preset = get_preset("tabletop-ppo")
    rollout = replace(
        preset.rollout,
        num_envs=asked.num_envs,
        total_env_steps=10**9,
        overlap=asked.overlap,
    )
    algorithm = replace(preset.algorithm, value_only_iterations=0)
    optimizer = replace(preset.optimizer, blocks=max(size, max(asked.processes)))
    evaluation = replace(preset.evaluation, every=0)
    return replace(
        preset,
        rollout=rollout,
        algorithm=algorithm,
        optimizer=optimizer,
        evaluation=evaluation,
    )


def _listen() -> Counter[str]:
    """Count what is handed to torch.distributed."""
    said: Counter[str] = Counter()
    for name in _CALLS:
        call = getattr(distributed, name)

        def counted(*arguments: Any, _call: Any = call, _name: str = name, **named: Any) -> Any:
            mine = arguments[1] if _name == "all_gather" else arguments[0]
            said[f"{_name} messages"] += 1
            said[f"{_name} bytes"] += mine.numel() * mine.element_size()
            return _call(*arguments, **named)

        setattr(distributed, name, counted)
    return said


def _summary(count: int, found: list[dict[str, Any]]) -> dict[str, Any]:
    keys = sorted({key for row in found for key in row})
    middle = {key: statistics.median(row.get(key, 0) for row in found) for key in keys}
    every = [round(row["time/iteration"], 4) for row in found]
    return {"processes": count, **middle, "seconds of an iteration in each round": every}


if __name__ == "__main__":
    main()
