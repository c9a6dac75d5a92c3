"""``tabletop``: a batched, kinematic, ray-cast simulator in plain PyTorch."""

from roadvla.envs.tabletop.env import TabletopEnv

__all__ = ["TabletopEnv"]
