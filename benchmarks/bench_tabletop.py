"""Rendered environment steps per second of the tabletop, per setting and part.

python benchmarks/bench_tabletop.py [--threads N] [--envs B]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from roadvla.envs.suite import SETTINGS
from roadvla.envs.tabletop import TabletopEnv
from roadvla.envs.tabletop.dynamics import advance
from roadvla.evaluation.machine import describe_machine


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--envs", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    count = arguments.envs
    print(f"{describe_machine()}, {arguments.threads} threads, B = {count}")
    for alias in SETTINGS:
        for split in ("train", "test"):
            env = TabletopEnv(alias, split=split, num_envs=count)
            env.reset(torch.arange(count))
            action = torch.zeros(count, 7)
            seconds = _median(lambda env=env, action=action: _step(env, action))
            print(f"{alias:<18} {split:<5} {count / seconds:8.0f} steps/s")
    env = TabletopEnv("VR-UnseenTable", split="train", num_envs=count)
    ids = torch.arange(count)
    env.reset(ids)
    action = torch.zeros(count, 7)
    parts: dict[str, Callable[[], object]] = {
        "reset": lambda: env.reset(ids),
        "dynamics": lambda: advance(env.state, env.scene, action, ids, reposition_step=0),
        "render": lambda: env._renderer.render(env.state, env.scene),
    }
    for name, call in parts.items():
        print(f"{name:<24} {1e3 * _median(call):8.2f} ms")


def _step(env: TabletopEnv, action: torch.Tensor) -> None:
    if env.state.elapsed == env.horizon:
        env.reset(torch.arange(env.num_envs))
    env.step(action)


def _median(call: Callable[[], object], repeats: int = 41) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]


if __name__ == "__main__":
    main()
