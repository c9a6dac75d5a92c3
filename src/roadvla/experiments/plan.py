"""``roadvla plan``: what a run of OpenVLA needs and takes, before it is started."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from roadvla.errors import UserError, unknown_name
from roadvla.experiments.plan_budget import memory_of, micro_batch, time_of
from roadvla.experiments.plan_settings import Plan
from roadvla.experiments.plan_tables import print_plan
from roadvla.policy.openvla.architecture import Architecture, read_architecture
from roadvla.policy.openvla.checkpoint import open_checkpoint
from roadvla.policy.openvla.cost import OPENVLA_7B

__all__ = ["Plan", "architecture_of", "run"]

_BY_CHECKPOINT = "openvla"
_KNOWN = {"openvla-7b": OPENVLA_7B}
_ACTING, _RANK = 8, 8
"""Inference batch and adapter rank that are proposed where memory is short."""


def run(plan: Plan, *, console: Console | None = None) -> None:
    """Print parameters, memory, time and the flags that fit.

    Args:
        plan: The run.
        console: Where to; stdout unless given.

    Raises:
        UserError: If the policy is unknown, the checkpoint unusable, or the GPU too small; the
            last says what would fit.
    """
    architecture = architecture_of(plan)
    memory = memory_of(plan, architecture)
    if memory.fits == 0:
        raise _too_small(plan, architecture)
    chosen = micro_batch(plan, memory.fits)
    print_plan(plan, architecture, memory, chosen, time_of(plan, architecture), console)


def architecture_of(plan: Plan) -> Architecture:
    """Look the policy's sizes up, or read them from the checkpoint's headers.

    Raises:
        UserError: If the policy is unknown, the checkpoint is unusable, or the prompt too long.
    """
    if plan.policy not in (*_KNOWN, _BY_CHECKPOINT):
        raise unknown_name("policy", plan.policy, (*_KNOWN, _BY_CHECKPOINT))
    architecture = _KNOWN.get(plan.policy)
    if plan.checkpoint is not None:
        folder = Path(plan.checkpoint)
        if not folder.is_dir():
            raise UserError(
                f"--checkpoint {plan.checkpoint}: no such folder; plan downloads nothing, "
                f"`--policy openvla-7b` alone needs no checkpoint"
            )
        found = open_checkpoint(folder)
        architecture = read_architecture(
            found.config, found.shapes, str(found.folder / "config.json")
        )
    if architecture is None:
        raise UserError(
            "--policy openvla takes its sizes from a checkpoint: add --checkpoint DIR, or plan "
            "for --policy openvla-7b"
        )
    if plan.prompt_tokens > architecture.max_prompt:
        raise UserError(
            f"--prompt-tokens {plan.prompt_tokens}: the policy takes at most "
            f"{architecture.max_prompt}"
        )
    return architecture


def _too_small(plan: Plan, architecture: Architecture) -> UserError:
    """Name the least change that makes the run fit, or the least memory that it takes."""
    flags: list[str] = []
    best = plan
    for flag, eased in _easings(plan):
        if _needed(eased, architecture) < _needed(best, architecture):
            flags.append(flag)
            best = eased
        if memory_of(best, architecture).fits:
            break
    said = f"--gpu {plan.gpu} is too small: with a micro-batch of 1 the run needs "
    said += _gb(plan, architecture)
    if not flags:
        return UserError(f"{said}, and no flag lowers it: take a larger GPU")
    outcome = f"{_gb(best, architecture)} with {' '.join(flags)}"
    if memory_of(best, architecture).fits:
        return UserError(f"{said}, but only {outcome}")
    return UserError(f"{said}, and still {outcome}: take a larger GPU")


def _easings(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Flags that save memory, each on top of those before, and the plan with them."""
    plan = replace(plan, activation_checkpointing=True)
    yield "--activation-checkpointing", plan
    plan = replace(plan, inference_batch=min(_ACTING, plan.inference_batch))
    yield f"--inference-batch {plan.inference_batch}", plan
    plan = replace(plan, lora_rank=min(_RANK, plan.lora_rank))
    yield f"--lora-rank {plan.lora_rank}", plan


def _needed(plan: Plan, architecture: Architecture) -> int:
    """Bytes that the run needs at least, without the reserve."""
    memory = memory_of(plan, architecture)
    return memory.least - memory.reserve


def _gb(plan: Plan, architecture: Architecture) -> str:
    """The same with the reserve, as the size of the GPU that would do."""
    return f"{math.ceil(_needed(plan, architecture) / (1 - plan.reserve) / 1e8) / 10:.1f} GB"
