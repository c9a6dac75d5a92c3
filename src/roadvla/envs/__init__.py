"""The environment suite: Table 3's settings on each simulator, behind one vector contract."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from roadvla.envs.base import Step, VectorEnv
from roadvla.envs.maniskill.options import ManiSkillSettings
from roadvla.envs.suite import SETTINGS, Distribution, Setting, setting
from roadvla.errors import UserError, unknown_name

__all__ = [
    "SETTINGS",
    "Distribution",
    "ManiSkillSettings",
    "Setting",
    "Step",
    "VectorEnv",
    "canonical",
    "close",
    "horizon",
    "make_env",
    "setting",
]

SIMULATORS = ("tabletop", "maniskill")


def make_env(
    env: str,
    *,
    split: str,
    num_envs: int,
    sim: str = "tabletop",
    device: str | torch.device = "cpu",
    end_on_success: bool = False,
    maniskill: ManiSkillSettings | None = None,
) -> VectorEnv:
    """Build B environments of one split of one setting.

    Args:
        env: Setting of Table 3, by paper alias or RL4VLA id; on ManiSkill any of RL4VLA's 17.
        split: ``train`` (in distribution) or ``test`` (out of distribution).
        num_envs: B.
        sim: ``tabletop`` or ``maniskill``.
        device: Where its tensors live.
        end_on_success: Whether episodes terminate at their first success.
        maniskill: How ManiSkill simulates; the tabletop has no such settings.

    Raises:
        UserError: If there is no such simulator, setting or split, or packages or assets are
            missing.
    """
    if sim not in SIMULATORS:
        raise unknown_name("simulator", sim, SIMULATORS)
    if sim == "maniskill":
        return _maniskill(
            env,
            split=split,
            num_envs=num_envs,
            device=device,
            end_on_success=end_on_success,
            settings=maniskill or ManiSkillSettings(),
        )
    from roadvla.envs.tabletop import TabletopEnv

    return TabletopEnv(
        env, split=split, num_envs=num_envs, device=device, end_on_success=end_on_success
    )


def _maniskill(
    env: str,
    *,
    split: str,
    num_envs: int,
    device: str | torch.device,
    end_on_success: bool,
    settings: ManiSkillSettings,
) -> VectorEnv:
    if find_spec("mani_skill") is None:
        raise UserError(
            "sim 'maniskill' needs packages that are missing: pip install 'roadvla[maniskill]'"
        )
    from roadvla.envs.maniskill.env import ManiSkillEnv

    return ManiSkillEnv(
        env,
        split=split,
        num_envs=num_envs,
        device=device,
        end_on_success=end_on_success,
        settings=settings,
    )


def canonical(env: str, sim: str) -> str:
    """Return the name under which results of a setting are kept: the paper's if it has one.

    Raises:
        UserError: If there is no such simulator or setting.
    """
    if sim not in SIMULATORS:
        raise unknown_name("simulator", sim, SIMULATORS)
    if sim == "tabletop":
        return setting(env).alias
    from roadvla.envs.maniskill.settings import variant

    env_id = variant(env).env_id
    return next((row.alias for row in SETTINGS.values() if row.rl4vla_id == env_id), env_id)


def horizon(env: str, split: str, sim: str) -> int:
    """Actions per episode of a set, without building an environment.

    Raises:
        UserError: If there is no such setting or set.
    """
    if sim == "tabletop":
        return setting(env).distribution(split).horizon
    from roadvla.envs.maniskill.settings import HORIZON

    return HORIZON


def close(env: VectorEnv) -> None:
    """Free what an environment holds, processes say, if it has anything to free."""
    release = getattr(env, "close", None)
    if release is not None:
        release()
