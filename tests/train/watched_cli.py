"""The command line, telling at any moment what it is doing, and killing itself where it is told to.

    python watched_cli.py SHEET train debug --output ...

SHEET is a file that survives the process: one byte, the index of the phase it is in. The variable
KILL is ``PHASE OCCURRENCE SECONDS``: SIGKILL comes that long after the phase began for that time.
On a normal end, the sheet's name with ``.json`` holds what each phase took, in seconds.
"""

from __future__ import annotations

import functools
import json
import mmap
import os
import signal
import sys
import threading
import time

PHASES = (
    *("start", "load", "between", "rollout", "hints", "reference", "update", "evaluation", "row"),
    *("board", "checkpoint", "manifest", "pointer", "retention", "final files"),
)


class Sheet:
    """What is going on, in a file shared with whoever kills this process."""

    def __init__(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(descriptor, 1)
        self._map = mmap.mmap(descriptor, 1)
        self._map[0] = 0
        self.took: dict[str, list[float]] = {}
        self._phase, number, after = [*os.environ.get("KILL", "none 0 0").rsplit(" ", 2)]
        self._number, self._after = int(number), float(after)

    def watch(self, owner: object, name: str, phase: str) -> None:
        real, counts = getattr(owner, name), self.took.setdefault(phase, [])

        @functools.wraps(real)
        def watched(*args, **options):
            before, self._map[0] = self._map[0], PHASES.index(phase)
            began = time.perf_counter()
            if phase == self._phase and len(counts) + 1 == self._number:
                self._kill()
            try:
                return real(*args, **options)
            finally:
                counts.append(time.perf_counter() - began)
                self._map[0] = PHASES.index("between") if phase == "load" else before

        setattr(owner, name, watched)

    def _kill(self) -> None:
        kill = functools.partial(os.kill, os.getpid(), signal.SIGKILL)
        if self._after == 0:
            kill()
        timer = threading.Timer(self._after, kill)
        timer.daemon = True
        timer.start()


def main() -> int:
    sheet = Sheet(sys.argv[1])
    import torch

    torch.set_num_threads(1)
    from roadvla import cli
    from roadvla.train import checkpoint, loop, trainer
    from roadvla.train.board import Board
    from roadvla.train.hinting import SuccessHinter
    from roadvla.train.metrics import MetricsWriter

    sheet.watch(trainer.Trainer, "__init__", "load")
    sheet.watch(trainer, "collect", "rollout")
    sheet.watch(SuccessHinter, "hinted", "hints")
    sheet.watch(trainer, "reference_values", "reference")
    sheet.watch(trainer, "update", "update")
    sheet.watch(trainer, "evaluate", "evaluation")
    for name in ("write", "amend"):
        sheet.watch(MetricsWriter, name, "row")
    sheet.watch(Board, "write", "board")
    sheet.watch(trainer, "save_checkpoint", "checkpoint")
    sheet.watch(checkpoint, "write_manifest", "manifest")
    sheet.watch(checkpoint, "_point_at", "pointer")
    sheet.watch(checkpoint, "retire_checkpoints", "retention")
    sheet.watch(loop, "write_evaluation", "final files")
    code = cli.main(sys.argv[2:])
    with open(f"{sys.argv[1]}.json", "w", encoding="utf-8") as file:
        json.dump(
            {phase: sum(took) / len(took) for phase, took in sheet.took.items() if took}, file
        )
    return code


if __name__ == "__main__":
    sys.exit(main())
