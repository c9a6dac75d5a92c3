"""Running out of memory, told as one line: where, with which settings, and what to try."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from roadvla.errors import UserError
from roadvla.policy.settings import OpenVLASettings
from roadvla.train.config import Experiment


class OutOfMemoryError(UserError):
    """The device's memory, or the machine's, did not suffice."""


@contextmanager
def within_memory(work: str, settings: str, tries: Sequence[str], *, kept: str = "") -> Iterator[None]:
    """Explain it if the block runs out of memory.

    Args:
        work: What the block does, e.g. ``"the update"``.
        settings: The sizes it does it with.
        tries: Flags that would make it smaller, best first.
        kept: What is left, said last.

    Raises:
        OutOfMemoryError: If memory did not suffice.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_exhaustion(error):
            raise
        advice = ", or ".join(tries) or "a device with more memory"
        raise OutOfMemoryError(
            f"out of memory in {work} ({settings}): try {advice}{kept and '; '}{kept}"
        ) from error


def is_exhaustion(error: BaseException) -> bool:
    """Whether an exception says that memory ran out; on a CPU torch raises a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and any(sign in str(error) for sign in ("can't allocate memory", "not enough memory"))
    )


def acting_sizes(num_envs: int, policy: str, openvla: OpenVLASettings) -> tuple[str, list[str]]:
    """Describe passes without gradient, and name smaller ones.

    Args:
        num_envs: Observations per step.
        policy: Kind of policy.
        openvla: Its settings if it is an OpenVLA.

    Returns:
        The sizes, and flags to try.
    """
    sizes, tries = f"num_envs {num_envs}", []
    if policy == "openvla":
        batch = min(openvla.inference_batch, num_envs)
        sizes = f"inference_batch {openvla.inference_batch}, {sizes}"
        if batch > 1:
            tries.append(f"--inference-batch {batch // 2}")
    if num_envs > 1:
        tries.append(f"--num-envs {num_envs // 2}")
    return sizes, tries


def update_sizes(experiment: Experiment) -> tuple[str, list[str]]:
    """Describe passes with gradient, and name smaller ones with the same optimiser steps.

    Returns:
        The sizes, and flags to try.
    """
    size, passes = experiment.optimizer.minibatch, experiment.optimizer.accumulation
    tries = []
    if size > 1:
        half = size // 2
        tries.append(f"--minibatch {half} --accumulation {size * passes // half}")
    if experiment.policy == "openvla" and not experiment.openvla.activation_checkpointing:
        tries.append("--activation-checkpointing")
    checkpointing = "on" if experiment.openvla.activation_checkpointing else "off"
    sizes = f"minibatch {size}, accumulation {passes}"
    if experiment.policy == "openvla":
        sizes += f", activation checkpointing {checkpointing}"
    return sizes, tries
