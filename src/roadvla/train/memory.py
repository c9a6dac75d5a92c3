"""Running out of memory, told as one line: where, with which settings, and what to try."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from roadvla.errors import UserError
from roadvla.policy.settings import OpenVLASettings
from roadvla.train.config import Experiment

_SIGNS = (
    *("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED"),
    "could not create a primitive",  # oneDNN, on a CPU
)


class OutOfMemoryError(UserError):
    """The device's memory, or the machine's, did not suffice."""


@contextmanager
def within_memory(
    work: str, sizes: str, tries: Sequence[str], *, kept: Callable[[], str] | None = None
) -> Iterator[None]:
    """Explain it if the block runs out of memory.

    Args:
        work: What the block does, e.g. ``"the update"``.
        sizes: The settings it does it with.
        tries: Flags that would make it smaller, best first.
        kept: Says what is left; asked only then.

    Raises:
        OutOfMemoryError: If memory did not suffice.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_exhaustion(error):
            raise
        advice = ", or ".join(tries) or "a device with more memory"
        left = "" if kept is None else f"; {kept()}"
        raise OutOfMemoryError(f"out of memory in {work} ({sizes}): try {advice}{left}") from error


def is_exhaustion(error: BaseException) -> bool:
    """Whether an exception says that memory ran out; on a CPU torch raises a plain RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def loading_sizes(device: str, policy: str, openvla: OpenVLASettings) -> tuple[str, list[str]]:
    """Describe a policy that is loaded, and name what needs less.

    Returns:
        The sizes, and flags to try.
    """
    if policy != "openvla":
        return f"device {device}", []
    tries = ["--dtype bfloat16"] if openvla.dtype == "float32" else []
    return (
        f"device {device}, dtype {openvla.dtype}; `roadvla plan` tells what a run needs",
        [*tries, "a device with more memory"],
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


def learning_sizes(
    minibatch: str, smaller: Sequence[str], policy: str, openvla: OpenVLASettings
) -> tuple[str, list[str]]:
    """Describe passes with gradient, and name smaller ones with the same optimiser steps.

    Args:
        minibatch: How many transitions go into a pass.
        smaller: Flags for fewer.
        policy: Kind of policy.
        openvla: Its settings if it is an OpenVLA.

    Returns:
        The sizes, and flags to try.
    """
    if policy != "openvla":
        return minibatch, list(smaller)
    if openvla.activation_checkpointing:
        return f"{minibatch}, activation checkpointing on", list(smaller)
    return f"{minibatch}, activation checkpointing off", [*smaller, "--activation-checkpointing"]


def update_sizes(experiment: Experiment) -> tuple[str, list[str]]:
    """Describe an experiment's passes with gradient, and name smaller ones.

    Returns:
        The sizes, and flags to try.
    """
    size, passes = experiment.optimizer.minibatch, experiment.optimizer.accumulation
    half = size // 2
    smaller = [f"--minibatch {half} --accumulation {size * passes // half}"] if half else []
    return learning_sizes(
        f"minibatch {size}, accumulation {passes}", smaller, experiment.policy, experiment.openvla
    )
