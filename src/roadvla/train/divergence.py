"""When a run must stop: numbers that are none, too much lost, processes that disagree."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import nn

from roadvla.errors import UserError, WorkerError
from roadvla.policy.base import Policy
from roadvla.train.checkpoint import latest_checkpoint
from roadvla.train.config import Experiment
from roadvla.train.diagnosis import write_diagnosis
from roadvla.train.digest import digest
from roadvla.train.run_folder import about
from roadvla.train.serialize import fingerprint
from roadvla.types import Batch
from roadvla.world import World


class TrainingDivergedError(UserError):
    """A number stopped being finite; the last checkpoint is from before that."""


def refuse_divergence(
    experiment: Experiment,
    policy: Policy,
    batch: Batch,
    metrics: dict[str, float],
    *,
    iteration: int,
    world: World,
) -> None:
    """Stop if a number is not finite, or too much had to be left out of an iteration.

    Args:
        experiment: Of the run.
        policy: With its last gradients.
        batch: What it learned from.
        metrics: Of the iteration.
        iteration: Its number, from 1.
        world: The first of its processes writes the diagnosis.

    Raises:
        TrainingDivergedError: If so; what was seen is in the run folder.
    """
    reasons, run = _reasons(experiment, metrics), Path(experiment.output)
    if not reasons:
        return
    where = str(run)
    if world.is_first:
        named = cast("nn.Module", policy).named_parameters()
        where = str(
            write_diagnosis(
                run,
                iteration=iteration,
                reason="; ".join(reasons),
                metrics=metrics,
                parameters={name: p for name, p in named if p.requires_grad},
                batch=batch,
                about=about(experiment.device),
            )
        )
    found = latest_checkpoint(run / "checkpoints")
    kept = f"the last good checkpoint is {found}" if found else "no checkpoint yet"
    raise TrainingDivergedError(
        f"{reasons[0]} in iteration {iteration}: stopped, {kept}; what was seen is in {where}; try "
        f"a lower --learning-rate or --grad-clip"
    )


def check_same_settings(experiment: Experiment, world: World) -> None:
    """Make sure that every process was given the same settings; folders may be named differently.

    Raises:
        UserError: If one was given others.
    """
    if not world.agree(int(fingerprint(experiment)[:15], 16)):
        raise UserError(
            f"the {world.size} processes were started with different settings: start all of them "
            f"with the same command"
        )


def check_alike(
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    world: World,
    iteration: int,
    kept: Callable[[], str],
) -> None:
    """Make sure that every process has the same weights, moments and generator, bit for bit.

    Args:
        optimizer: Of the weights.
        generator: Of all that is random.
        world: The processes.
        iteration: For the message.
        kept: Says what there is to go on from, for the message.

    Raises:
        WorkerError: If they have not.
    """
    if world.size == 1:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = [optimizer.state.get(parameter, {}) for parameter in parameters]
    moments = [
        state[name] for state in states for name in sorted(state) if torch.is_tensor(state[name])
    ]
    held = {
        "weights": parameters,
        "optimizer states": moments,
        "random generators": [generator.get_state()],
    }
    for what, tensors in held.items():
        if not world.agree(digest(tensors)):
            raise WorkerError(
                f"the {what} of the {world.size} processes are no longer the same after iteration "
                f"{iteration}: a device or a connection is at fault; {kept()}"
            )


def _reasons(experiment: Experiment, metrics: dict[str, float]) -> list[str]:
    count, most = experiment.rollout.num_envs, experiment.optimizer.max_skipped
    lost, skipped = (
        metrics.get(name, 0.0) for name in ("rollout/lost_episodes", "loss/skipped_steps")
    )
    reasons: list[str] = []
    if lost > count / 2:
        reasons.append(f"{lost:g} of {count} episodes were lost")
    if skipped > most:
        reasons.append(
            f"{skipped:g} optimiser steps had gradients that are not finite, more than "
            f"max_skipped {most}"
        )
    return reasons + [f"{name} is {v}" for name, v in metrics.items() if not math.isfinite(v)]
