"""What a run is built from: an environment, and a kind of policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch

from roadvla import envs
from roadvla import policy as policies
from roadvla.envs import ManiSkillSettings
from roadvla.envs.base import VectorEnv
from roadvla.errors import UserError
from roadvla.policy.base import Critic, Policy
from roadvla.policy.settings import OpenVLASettings, PolicyKind
from roadvla.policy.tiny import TinyArchitecture


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a run is built from: exchange them to train another policy in another environment.

    Attributes:
        make_env: As ``roadvla.envs.make_env``.
        load_policy: Reads a policy from a folder onto a device.
        load_backbone: Reads the pretrained policy onto a device.
        save_policy: Writes a policy into a folder.
        load_critic: Reads a frozen critic from a folder for a live policy, beside which it lives;
            ``None`` for ``load_policy`` onto the live one's device.
        spread: Spreads policy and critic, loaded on the CPU, over the devices of a number of
            processes, which then make the same passes; ``None``: each has all of them.
    """

    make_env: Callable[..., VectorEnv] = envs.make_env
    load_policy: Callable[..., Policy] = policies.load_tiny
    load_backbone: Callable[..., Policy] = policies.load_backbone
    save_policy: Callable[..., None] = policies.save_policy
    load_critic: Callable[[Path, Policy], Critic] | None = None
    spread: Callable[[Policy, Critic | None, torch.device, int], None] | None = None

    def critic(self, folder: Path, policy: Policy, device: torch.device) -> Critic:
        """Read the reference critic of a run whose live policy is on a device."""
        if self.load_critic is None:
            return self.load_policy(folder, device)
        return self.load_critic(folder, policy)


def maker_of(policy: PolicyKind, maniskill: ManiSkillSettings) -> Callable[..., VectorEnv]:
    """Bind ``envs.make_env`` to a simulator's settings, with frames that the policy can see.

    Raises:
        UserError: If other frames are asked for.
    """
    if policy == "tiny":
        side = TinyArchitecture().image_size
        if maniskill.image_size not in (None, (side, side)):
            raise UserError(
                f"image_size is {maniskill.image_size}: the tiny policy sees {side} by {side} "
                f"pixels only, drop it"
            )
        maniskill = replace(maniskill, image_size=(side, side))
    return partial(envs.make_env, maniskill=maniskill)


def parts_of(
    policy: PolicyKind,
    checkpoint: str | None,
    openvla: OpenVLASettings,
    maniskill: ManiSkillSettings,
) -> Parts:
    """Choose the parts for a kind of policy, in the environments of the package.

    Args:
        policy: Which kind.
        checkpoint: Base of an OpenVLA; ``None`` for the one that a folder names.
        openvla: How an OpenVLA is run and adapted, whatever a folder says.
        maniskill: How ManiSkill simulates.

    Raises:
        UserError: If packages that the kind needs are not installed.
    """
    make_env = maker_of(policy, maniskill)
    if policy == "tiny":
        return Parts(make_env=make_env)
    from roadvla.policy.openvla.policy import (
        OpenVLAPolicy,
        ReferenceCritic,
        load_critic,
        load_openvla,
        make_openvla,
        save_openvla,
    )

    def load(folder: Path, device: torch.device | str) -> Policy:
        return load_openvla(folder, device, settings=openvla, checkpoint=checkpoint)

    def make(device: torch.device | str) -> Policy:
        return make_openvla(cast("str", checkpoint), openvla, device)

    def save(live: Policy, folder: Path) -> None:
        save_openvla(cast("OpenVLAPolicy", live), folder)

    def critic(folder: Path, live: Policy) -> Critic:
        return load_critic(folder, cast("OpenVLAPolicy", live))

    def spread(
        live: Policy, reference: Critic | None, device: torch.device, processes: int
    ) -> None:
        from roadvla.policy.openvla import sharded

        frozen = cast("ReferenceCritic | None", reference)
        sharded.spread(cast("OpenVLAPolicy", live), frozen, device, processes)

    return Parts(
        make_env=make_env,
        load_policy=load,
        load_backbone=make,
        save_policy=save,
        load_critic=critic,
        spread=spread if openvla.shard else None,
    )
