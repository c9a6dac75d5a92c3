"""Checks that configurations make of their own values."""

from __future__ import annotations

import math
import typing
from dataclasses import fields
from typing import Any, Literal

from roadvla.envs import SIMULATORS, ManiSkillSettings
from roadvla.errors import UserError, unknown_name
from roadvla.policy.settings import OpenVLASettings


def check_choices(node: Any) -> None:
    """Refuse a value that is none of its field's choices; the nearest is suggested.

    Raises:
        UserError: If there is one.
    """
    for name, hint in typing.get_type_hints(type(node)).items():
        if typing.get_origin(hint) is Literal:
            value, choices = getattr(node, name), typing.get_args(hint)
            if value not in choices:
                raise unknown_name(name, str(value), choices)


def check_range(
    node: Any,
    name: str,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float = math.inf,
) -> None:
    """Refuse a number outside (above, most] or [least, most], NaN and infinity included.

    Args:
        node: Holds it.
        name: Of the field.
        above: Lower bound that is not allowed itself.
        least: Lower bound that is; 0 if neither is given.
        most: Upper bound.

    Raises:
        UserError: If it is outside.
    """
    value = getattr(node, name)
    low = math.isfinite(value) and (value > above if above is not None else value >= (least or 0))
    if low and value <= most:
        return
    bound = f"above {above:g}" if above is not None else f"at least {least or 0:g}"
    ceiling = f" and at most {most:g}" if most < math.inf else ""
    raise UserError(f"{name} is {value!r}: expected a number {bound}{ceiling}")


def check_policy(node: Any) -> None:
    """Refuse settings of a policy that it would not use, or that it cannot be built from.

    Args:
        node: Has ``policy``, ``checkpoint``, ``init`` and ``openvla``.

    Raises:
        UserError: If they contradict each other.
    """
    if node.policy == "openvla":
        if node.checkpoint is None and node.init is None:
            raise UserError(
                "policy 'openvla' needs weights: pass --checkpoint with the folder or hub id of an "
                "HF-format OpenVLA, or --init with a policy that was trained on one"
            )
        return
    unused = [
        (item.name, getattr(node.openvla, item.name))
        for item in fields(OpenVLASettings)
        if getattr(node.openvla, item.name) != item.default
    ]
    if node.checkpoint is not None:
        unused.insert(0, ("checkpoint", node.checkpoint))
    if unused:
        name, value = unused[0]
        raise UserError(
            f"{name} {value!r} would not be used by policy {node.policy!r}: drop it or set policy "
            f"to 'openvla'"
        )


def check_shares(node: Any) -> None:
    """Refuse environments that cannot be cut as asked.

    Args:
        node: Has ``rollout``, ``optimizer`` and ``algorithm``.

    Raises:
        UserError: If they do not divide, or hints should watch half-batches.
    """
    count, blocks = node.rollout.num_envs, node.optimizer.blocks
    if count % blocks:
        raise UserError(f"num_envs {count} is not a multiple of blocks {blocks}: change one")
    if not node.rollout.overlap:
        return
    if count % 2:
        raise UserError(
            f"num_envs {count} has no two halves: make it even, or set overlap to false"
        )
    if node.algorithm.hints != "none":
        raise UserError(
            f"hints {node.algorithm.hints!r} watch all environments at once: set overlap to false"
        )


def check_simulator(node: Any) -> None:
    """Refuse a simulator that there is not, and settings that it would not use.

    Args:
        node: Has ``sim`` and ``maniskill``.

    Raises:
        UserError: If there are some.
    """
    if node.sim not in SIMULATORS:
        raise unknown_name("simulator", node.sim, SIMULATORS)
    unused = ManiSkillSettings()
    for item in fields(unused) if node.sim != "maniskill" else ():
        value = getattr(node.maniskill, item.name)
        if value != getattr(unused, item.name):
            raise UserError(
                f"{item.name} {value!r} would not be used by sim {node.sim!r}: drop it or pass "
                f"--sim maniskill"
            )
