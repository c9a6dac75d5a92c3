"""Milliseconds of the tiny VLA, part by part: `python benchmarks/bench_policy.py`.

Wall time on a quiet machine; CPU time beside it tells how much other processes disturbed.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from roadvla.policy import TinyVLA
from roadvla.types import Observation


def measure(name: str, call: Callable[[], object], repeats: int) -> None:
    """Print the median wall time and the median CPU time of a call."""
    for _ in range(5):
        call()
    wall, cpu = [], []
    for _ in range(repeats):
        begin, used = time.perf_counter(), time.process_time()
        call()
        wall.append(time.perf_counter() - begin)
        cpu.append(time.process_time() - used)
    middle = repeats // 2
    print(f"  {name:<44}{sorted(wall)[middle] * 1e3:8.2f} ms{sorted(cpu)[middle] * 1e3:10.2f} ms")


def observations(policy: TinyVLA, count: int) -> tuple[Observation, Observation]:
    """Make random frames, and the same with the vision features at hand."""
    image = torch.randint(0, 256, (count, 48, 48, 3), dtype=torch.uint8)
    plain = Observation(image, policy.tokenize(["put red ball on blue plate"] * count))
    return plain, Observation(image, plain.prompt, policy.features(plain))


def bench(threads: int, repeats: int) -> None:
    """Print every line for one number of threads."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    policy = TinyVLA()
    print(f"{threads} thread(s){'wall':>42}{'CPU':>13}")
    plain, seen = observations(policy, 64)
    measure("act, 64 frames", lambda: policy.act(plain, temperature=1.0), repeats)
    measure("  vision tower", lambda: policy.features(plain), repeats)
    measure("  the rest", lambda: policy.act(seen, temperature=1.0), repeats)
    with torch.no_grad():
        measure("    resampler", lambda: policy.ground(seen), repeats)
        measure("    resampler, prefill and value", lambda: policy.value(seen), repeats)
    plain, seen = observations(policy, 128)
    tokens = torch.randint(0, 256, (128, 7))

    def forward() -> torch.Tensor:
        logits, value = policy.evaluate(seen, tokens)
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten()) + value.square().mean()

    def pretraining() -> None:
        logits, _ = policy.evaluate(plain, tokens)
        F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()

    measure("evaluate, forward, 128 frames, frozen tower", forward, repeats)
    measure("  forward and backward", lambda: forward().backward(), repeats)
    policy.unfreeze_vision()
    measure("  forward and backward, tower trained", pretraining, repeats)


def main() -> None:
    """Time with one thread and with two."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=30)
    chosen = parser.parse_args()
    print(f"{platform.platform()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    for threads in chosen.threads:
        bench(threads, chosen.repeats)


if __name__ == "__main__":
    main()
