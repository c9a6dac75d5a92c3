"""The suite as single Gymnasium environments: ``gymnasium.make("roadvla/VR-UnseenTable-v0")``."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch

from roadvla.envs import make_env
from roadvla.envs.suite import SETTINGS

_CHARACTERS = "abcdefghijklmnopqrstuvwxyz ,.-'"
_LOW = np.array([-0.04] * 3 + [-0.35] * 3 + [0.0], dtype=np.float32)
_HIGH = np.array([0.04] * 3 + [0.35] * 3 + [1.0], dtype=np.float32)


class SuiteEnv(gymnasium.Env[dict[str, Any], np.ndarray]):
    """One episode at a time of one split of one setting.

    Observations hold ``image`` (uint8 [H, W, 3]) and ``instruction``. ``reset`` takes
    ``options={"episode_id": n}``; without it the id is drawn from the environment's own generator.

    Args:
        env: Setting of Table 3.
        split: ``train`` (in distribution) or ``test`` (out of distribution).
        sim: Which simulator.
        end_on_success: Whether an episode terminates at its first success.
        render_mode: ``rgb_array`` or ``None``.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}  # noqa: RUF012

    def __init__(
        self,
        env: str,
        *,
        split: str = "train",
        sim: str = "tabletop",
        end_on_success: bool = False,
        render_mode: str | None = None,
    ) -> None:
        self._env = make_env(env, split=split, num_envs=1, sim=sim, end_on_success=end_on_success)
        self.render_mode = render_mode
        self._image = np.zeros(self._env.image_shape, dtype=np.uint8)
        self.action_space = gymnasium.spaces.Box(_LOW, _HIGH)
        self.observation_space = gymnasium.spaces.Dict(
            {
                "image": gymnasium.spaces.Box(0, 255, self._env.image_shape, np.uint8),
                "instruction": gymnasium.spaces.Text(200, charset=_CHARACTERS),
            }
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode, by id if one is given."""
        super().reset(seed=seed)
        episode_id = (options or {}).get("episode_id")
        if episode_id is None:
            episode_id = int(self.np_random.integers(0, 1 << 40))
        self._image = self._env.reset(torch.tensor([episode_id]))[0].cpu().numpy()
        return self._observation(), {"episode_id": episode_id}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Apply one action."""
        step = self._env.step(torch.as_tensor(np.asarray(action, dtype=np.float32))[None])
        self._image = step.image[0].cpu().numpy()
        info = {name: bool(value[0]) for name, value in step.info.items()}
        return (
            self._observation(),
            float(step.reward[0]),
            bool(step.terminated[0]),
            bool(step.truncated[0]),
            info,
        )

    def render(self) -> np.ndarray | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the current frame."""
        return self._image if self.render_mode == "rgb_array" else None

    def _observation(self) -> dict[str, Any]:
        return {"image": self._image, "instruction": self._env.instructions[0]}


def register() -> None:
    """Register every setting with Gymnasium as ``roadvla/ALIAS-v0``; doing it twice is harmless."""
    for alias in SETTINGS:
        name = f"roadvla/{alias}-v0"
        if name not in gymnasium.registry:
            gymnasium.register(name, entry_point="roadvla.envs.gym:SuiteEnv", kwargs={"env": alias})


register()
