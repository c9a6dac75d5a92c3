"""RL4VLA's 17 ids in ManiSkill's registry: import this, then ``gymnasium.make`` one of them.

The environments are ``PutOnPlateScene``, with all bodies built once, as in RL4VLA; keyword
arguments are its own and ``BaseEnv``'s.
"""

from __future__ import annotations

import gymnasium
from mani_skill.utils.registration import register_env

from roadvla.envs.maniskill.scene import PutOnPlateScene
from roadvla.envs.maniskill.settings import HORIZON, VARIANTS


def register() -> None:
    """Register all ids; doing it twice is harmless."""
    for env_id in VARIANTS:
        if env_id not in gymnasium.registry:
            make = register_env(env_id, max_episode_steps=HORIZON, setting=env_id, build="all")
            make(PutOnPlateScene)


register()
