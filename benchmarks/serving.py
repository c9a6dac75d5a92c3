"""What a policy server bears: 64 clients at once, and others that mean no good.

    python benchmarks/serving.py --output benchmarks/results/DATE-serving-cpu.json

`roadvla serve` runs in a process of its own with the shipped backbone. The clients, threads here,
ask as fast as they are answered, one frame of 48 x 48 each; every answer is checked against what
the policy does alone. Meanwhile others send noise, too much, too little, or leave.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from roadvla.evaluation.machine import describe_machine
from roadvla.policy import BACKBONE_FOLDER, load_backbone
from roadvla.serving.messages import MAX_BYTES, pack, unpack
from roadvla.types import Observation

PROMPT = "put carrot on plate"
FRAMES = 32


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    frames, expected = _answers()
    command = [sys.executable, "-m", "roadvla", "serve", str(BACKBONE_FOLDER), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline().split("ws://")[1].split()[0].rpartition(":")[2])
        rows = {}
        for name, bad in (("clients alone", False), ("with bad clients", True)):
            before = _memory(server.pid)
            rows[name] = _load(port, asked.clients, asked.seconds, frames, expected, bad=bad)
            rows[name]["server memory before, MB"] = before
            rows[name]["server memory after, MB"] = _memory(server.pid)
            rows[name]["server alive"] = server.poll() is None
        rows["one client"] = _load(port, 1, asked.seconds / 4, frames, expected, bad=False)
        server.terminate()
        rows["exit code after SIGTERM"] = server.wait(30)
    print(json.dumps(rows, indent=1))
    if asked.output is not None:
        about = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": describe_machine("cpu"),
            "seconds": asked.seconds,
        }
        asked.output.write_text(json.dumps({**about, **rows}, indent=1) + "\n")


def _answers() -> tuple[np.ndarray, np.ndarray]:
    """Frames, and the value of each, which tells them apart."""
    frames = np.random.default_rng(0).integers(0, 256, (FRAMES, 48, 48, 3), dtype=np.uint8)
    policy = load_backbone("cpu")
    seen = Observation(torch.from_numpy(frames), policy.tokenize([PROMPT] * FRAMES))
    return frames, policy.act(seen, temperature=0.0).value.numpy()


def _load(
    port: int,
    clients: int,
    seconds: float,
    frames: np.ndarray,
    expected: np.ndarray,
    *,
    bad: bool,
) -> dict[str, Any]:
    """Let everyone ask for some seconds and add up what came."""
    stop, times, seen = threading.Event(), [], Counter()  # type: ignore[var-annotated]
    with ThreadPoolExecutor(clients + 8) as pool:
        jobs = [
            pool.submit(_ask, port, seed, stop, frames, expected, times, seen)
            for seed in range(clients)
        ]
        if bad:
            jobs += [pool.submit(_disturb, port, seed, stop, seen) for seed in range(8)]
        time.sleep(seconds)
        stop.set()
        for job in jobs:
            job.result(60)
    low, middle, high = np.quantile(times, [0.5, 0.99, 1.0]) * 1e3
    return {
        "clients": clients,
        "answers": len(times),
        "answers per second": len(times) / seconds,
        "median, ms": float(low),
        "99th percentile, ms": float(middle),
        "longest, ms": float(high),
        **dict(sorted(seen.items())),
    }


def _ask(
    port: int,
    seed: int,
    stop: threading.Event,
    frames: np.ndarray,
    expected: np.ndarray,
    times: list[float],
    seen: Counter[str],
) -> None:
    rng = random.Random(seed)
    with connect(f"ws://127.0.0.1:{port}", compression=None, proxy=None) as ours:
        ours.recv()
        while not stop.is_set():
            number = rng.randrange(FRAMES)
            begun = time.perf_counter()
            ours.send(pack({"image": frames[number], "prompt": PROMPT}))
            answer = ours.recv()
            times.append(time.perf_counter() - begun)
            if isinstance(answer, str):
                seen["refused: " + answer[:20]] += 1
            elif abs(float(unpack(answer)["value"]) - expected[number]) > 1e-4:
                seen["WRONG ANSWERS"] += 1


def _disturb(port: int, seed: int, stop: threading.Event, seen: Counter[str]) -> None:
    """Do one bad thing after the other."""
    rng = random.Random(1000 + seed)
    lists = b"\xdd" + (99_999).to_bytes(4, "big") + b"\x90" * 99_999
    wide = b"\x81\xa1a\xdc\x00\x4f" + lists * 79  # 7.9 MB that would become half a gigabyte
    while not stop.is_set():
        kind = rng.choice(
            ["noise", "too large", "cut off", "leaves", "never speaks", "deep", "wide"]
        )
        seen[f"disturbed: {kind}"] += 1
        if kind == "never speaks":
            with socket.create_connection(("127.0.0.1", port)) as line:
                line.sendall(b"GET / HTTP/1.1\r\n")
                stop.wait(1.0)
            continue
        try:
            with connect(f"ws://127.0.0.1:{port}", compression=None, proxy=None) as ours:
                ours.recv()
                good = pack({"image": np.zeros((48, 48, 3), np.uint8), "prompt": PROMPT})
                sent = {
                    "noise": rng.randbytes(rng.randrange(1, 5000)),
                    "too large": b"\0" * (MAX_BYTES + 1),
                    "cut off": good[: rng.randrange(1, len(good))],
                    "deep": b"\x91" * 100_000,
                    "wide": wide,
                    "leaves": good,
                }[kind]
                ours.send(sent)
                if kind == "leaves":
                    ours.socket.close()
                else:
                    ours.recv(timeout=30)
        except (ConnectionClosed, OSError):
            pass


def _memory(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1e3


if __name__ == "__main__":
    main()
