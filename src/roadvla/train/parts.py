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
from roadvla.train.checkpoint import policy_folder
from roadvla.train.config import Experiment
from roadvla.train.memory import loading_sizes, within_memory
from roadvla.train.run_folder import check_critic_trained
from roadvla.world import World


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


def make_envs(parts: Parts, experiment: Experiment, world: World) -> list[VectorEnv]:
    """Make a process's training environments: one, or two halves that are stepped in turn.

    Raises:
        UserError: If they cannot be shared equally, or have no halves.
    """
    rollout = experiment.rollout
    count, share = 2 if rollout.overlap else 1, world.share(rollout.num_envs)
    if share % count:
        raise UserError(
            f"a process has {share} environments, which has no two halves: raise num_envs to a "
            f"multiple of {count * world.size}, or set overlap to false"
        )
    return [
        parts.make_env(
            experiment.env,
            split="train",
            num_envs=share // count,
            sim=experiment.sim,
            device=experiment.device,
            end_on_success=rollout.end_on_success,
        )
        for _ in range(count)
    ]


def load_policies(
    parts: Parts,
    experiment: Experiment,
    source: Path | str | None,
    device: torch.device,
    world: World,
) -> tuple[Policy, Critic | None]:
    """Load the live policy and the reference critic; cheap checks come first.

    Args:
        parts: Load them.
        experiment: Names the critic.
        source: Of the live policy; ``None`` for the pretrained one.
        device: Where they go.
        world: The processes that may hold them together.

    Raises:
        UserError: If something does not load or fit, or memory runs out.
    """
    critic = experiment.algorithm.reference_critic
    folder = None if source is None else policy_folder(Path(source))
    if critic is not None:
        check_critic_trained(Path(critic))
    sizes = loading_sizes(experiment.device, experiment.policy, experiment.openvla)
    spread = parts.spread if world.size > 1 else None
    place = device if spread is None else torch.device("cpu")
    reference: Critic | None = None
    with within_memory("loading the policy", *sizes):
        policy = parts.load_backbone(place) if folder is None else parts.load_policy(folder, place)
        if critic is not None:
            reference = parts.critic(policy_folder(Path(critic)), policy, place)
        if spread is not None:
            spread(policy, reference, device, world.size)
    return policy, reference
