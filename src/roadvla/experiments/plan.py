"""``roadvla plan``: what a run of OpenVLA needs and takes, before it is started."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

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
    """Name the fewest flags that make the run fit, or the least memory that it takes."""
    needs = _gb(plan, architecture)
    said = f"--gpu {plan.gpu} is too small: with a micro-batch of 1 the run needs {needs}"
    easings = _easings(plan)
    for count in range(1, len(easings) + 1):
        for flags in combinations(easings, count):
            eased = _eased(plan, [easings[flag] for flag in flags])
            if memory_of(eased, architecture).fits:
                least = _gb(eased, architecture)
                return UserError(f"{said}, but only {least} with {' '.join(flags)}")
    least = _gb(_eased(plan, easings.values()), architecture)
    if least == needs:
        return UserError(f"{said}, and no flag lowers it: take a larger GPU")
    return UserError(f"{said}, and still {least} with {' '.join(easings)}: take a larger GPU")


def _easings(plan: Plan) -> dict[str, dict[str, Any]]:
    """Flags that save memory, the mildest first, and what they set."""
    easings: dict[str, dict[str, Any]] = {}
    if not plan.activation_checkpointing:
        easings["--activation-checkpointing"] = {"activation_checkpointing": True}
    if plan.inference_batch > _ACTING:
        easings[f"--inference-batch {_ACTING}"] = {"inference_batch": _ACTING}
    if plan.lora_rank > _RANK:
        easings[f"--lora-rank {_RANK}"] = {"lora_rank": _RANK}
    return easings


def _eased(plan: Plan, changes: Iterable[dict[str, Any]]) -> Plan:
    for change in changes:
        plan = replace(plan, **change)
    return plan


def _gb(plan: Plan, architecture: Architecture) -> str:
    """The smallest GPU that the run fits, reserve included."""
    memory = memory_of(plan, architecture)
    needed = (memory.least - memory.reserve) / (1 - plan.reserve)
    return f"{math.ceil(needed / 1e8) / 10:.1f} GB"
