"""Signals that reach simulation workers, without a simulation."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Workers of scenes that do nothing, in a group that gets three signals.
_PROGRAM = """
import os, signal, sys, types
import torch

from roadvla.envs.maniskill.workers import Workers

class Simulation:
    def __init__(self, recipe, outputs):
        pass
    def reset(self, ids):
        pass
    def step(self, action):
        pass

def scenes():
    module = types.ModuleType("roadvla.envs.maniskill.simulation")
    module.Simulation = Simulation
    sys.modules[module.__name__] = module

class Recipe:
    class settings:
        size = (4, 4)
    def __reduce__(self):
        return (made, ())

def made():
    scenes()
    return Recipe()

if __name__ == "__main__":
    heard = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: heard.append(number))
    running = Workers(Recipe(), 2, processes=2, timeout=60)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.killpg(0, number)
    running.reset(torch.tensor([1, 2]))
    running.step(torch.zeros(2, 7))
    print(running.lost.tolist(), sorted(heard), *(w.process.pid for w in running._workers))
    if sys.argv[1] == "close":
        running.close()
    if sys.argv[1] == "killed":
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("end", ["close", "leave", "killed"])
def test_workers_outlive_a_signal_to_all_and_end_with_their_parent(
    tmp_path: Path, end: str
) -> None:
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)
    done = subprocess.run(
        [sys.executable, str(program), end],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        start_new_session=True,
    )
    assert done.returncode == (-signal.SIGKILL if end == "killed" else 0), done.stderr
    lost, _, rest = done.stdout.partition("] ")
    assert lost == "[False, False", done.stderr
    assert rest.startswith(str(sorted(map(int, _SIGNALS))))
    for pid in map(int, rest.rpartition("]")[2].split()):
        assert _is_gone(pid)


def _is_gone(pid: int) -> bool:
    for _ in range(100):
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, FileNotFoundError):
            return True
        if state == "Z":
            return True
        signal.sigtimedwait([], 0.1)
    return False
