"""``roadvla train``: begin a run or go on with one, in this process or in several.

Modules that load torch are imported inside the functions, so that the command line's help comes at
once.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from roadvla.errors import UserError
from roadvla.flags import form_of, parse, value_of

if TYPE_CHECKING:
    from roadvla.train.config import Experiment


def train(arguments: list[str]) -> None:
    """Adapt a policy by PPO, ROAD, GRPO or SFT: train PRESET [flags], train --resume RUN."""
    from roadvla.experiments.presets import PRESETS, get_preset
    from roadvla.train.config import Experiment

    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            "usage: roadvla train PRESET [flags]\n       roadvla train --resume RUN [--nproc N]\n"
        )
        print("presets:", *sorted(PRESETS), sep="\n  ")
        print("\nroadvla train PRESET --help lists the flags and what the preset sets them to")
        return
    name, *flags = arguments
    if name == "--resume" and flags and not flags[0].startswith("-"):
        chosen = parse(form_of(_Processes()), "train --resume RUN", flags[1:])
        _train(value_of(_Processes, chosen), arguments, folder=Path(flags[0]))
        return
    if name.startswith("-"):
        raise UserError(f"{name!r} stands where the preset should: roadvla train PRESET [flags]")
    form = form_of(
        get_preset(name),
        short=(
            "openvla",
            "maniskill",
            "algorithm",
            "optimizer",
            "rollout",
        ),  # evaluation has a temperature of its own
        resume=(bool, False, "Continue the run in the output folder, started with these flags."),
        resume_if_begun=(bool, False, "Continue it if it is there, begin it if not: for queues."),
        force=(bool, False, "Replace the run in the output folder."),
        nproc=(int, 1, "Processes on this machine that share the run, one per GPU."),
        max_restarts=(int, 0, "How often they go on from the last checkpoint if one fails."),
    )
    chosen = parse(form, f"train {name}", flags)
    _train(
        _Processes(nproc=chosen.nproc, max_restarts=chosen.max_restarts),
        arguments,
        experiment=value_of(Experiment, chosen),
        resume=chosen.resume,
        if_begun=chosen.resume_if_begun,
        force=chosen.force,
    )


@dataclass(frozen=True, kw_only=True)
class _Processes:
    """Processes on this machine that share a run.

    Attributes:
        nproc: How many, one per GPU.
        max_restarts: How often they go on from the last checkpoint if one fails.
    """

    nproc: int = 1
    max_restarts: int = 0


def _train(
    processes: _Processes,
    arguments: list[str],
    *,
    experiment: Experiment | None = None,
    folder: Path | None = None,
    resume: bool = True,
    if_begun: bool = False,
    force: bool = False,
) -> None:
    """Train, here or in processes that are started with the same arguments."""
    from roadvla.train.distributed import launch
    from roadvla.train.launched import is_launched, speaks
    from roadvla.train.loop import train as run
    from roadvla.train.run_folder import load_experiment

    if processes != _Processes() and not is_launched():
        restarts = processes.max_restarts
        if code := launch(processes.nproc, ["train", *arguments], max_restarts=restarts):
            sys.exit(code)
        return
    if experiment is None:
        experiment = load_experiment(folder or Path())
    done = run(experiment, resume=resume, if_begun=if_begun, force=force)
    if speaks():
        print(done)
