"""Text-guided teachers in a rollout: hints for every step, and the prompts that carry them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from roadvla.envs.base import Privileged, VectorEnv
from roadvla.errors import UserError
from roadvla.objective import gae
from roadvla.policy.base import Policy
from roadvla.privileged.hints import join
from roadvla.privileged.mcts import SuccessTree, state_features
from roadvla.privileged.plan import plan_hints
from roadvla.privileged.relspatial import relspatial_hints
from roadvla.privileged.verbalise import action_hints
from roadvla.train.algorithm import Hints
from roadvla.types import Rollout
from roadvla.world import World

_WRITERS = {"relspatial": relspatial_hints, "plan": plan_hints}


@runtime_checkable
class _Watched(VectorEnv, Privileged, Protocol):
    """An environment that says where things are."""


@runtime_checkable
class Hinter(Protocol):
    """Watches an environment as it is acted in, and knows what a teacher would be told."""

    def observe(self) -> None:
        """Note the state before an action."""
        ...

    def hinted(self, rollout: Rollout, policy: Policy, world: World) -> Rollout:
        """Give a rollout, whose every step was observed, its hinted prompts; forget the steps.

        Args:
            rollout: Of this process's episodes.
            policy: Tokenizes.
            world: The processes that learn together.
        """
        ...

    @property
    def silent(self) -> str:
        """Why it has nothing to say; ``""`` if it has."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What it has learned, for a checkpoint."""
        ...

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what it had learned.

        Raises:
            ValueError: If the tensors do not fit.
        """
        ...


def make_hinter(kind: Hints, env: VectorEnv, *, gamma: float) -> Hinter:
    """Build what gives hints of a kind.

    Args:
        kind: Not ``none``.
        env: Where the hints come from.
        gamma: Discount of the values in MCTS's hints.

    Raises:
        UserError: If the environment does not say where things are.
    """
    if not isinstance(env, Privileged):
        raise UserError(
            f"hints {kind!r} need an environment that says where things are: "
            f"{type(env).__name__} does not; set hints to 'none'"
        )
    watched = cast("_Watched", env)
    return SuccessHinter(watched, gamma) if kind == "mcts" else StateHinter(watched, kind)


class StateHinter:
    """Hints that say where things are, with or without the plan."""

    def __init__(self, env: _Watched, kind: Hints) -> None:
        self._env, self._write = env, _WRITERS[kind]
        self._prompts: list[str] = []

    def observe(self) -> None:
        """Describe the state."""
        asked = self._env.instructions
        hints = self._write(self._env.snapshot(), asked)
        self._prompts += [join(text, hint) for text, hint in zip(asked, hints, strict=True)]

    def hinted(self, rollout: Rollout, policy: Policy, world: World) -> Rollout:
        """Tokenize all prompts at once."""
        prompts, self._prompts = self._prompts, []
        return _with_prompts(rollout, policy, prompts, torch.ones_like(rollout.active))

    @property
    def silent(self) -> str:
        """There is always a state to describe."""
        return ""

    def tensors(self) -> dict[str, Tensor]:
        """Nothing is learned."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing is learned."""


class SuccessHinter:
    """Hints that tell what was done in a similar state of a rollout that succeeded.

    A rollout is hinted by those before it; its own successes are added after.
    """

    def __init__(self, env: _Watched, gamma: float) -> None:
        self._env, self._gamma = env, gamma
        self.tree = SuccessTree.empty(env.device)
        self._features: list[Tensor] = []

    def observe(self) -> None:
        """Note the state's features."""
        self._features.append(state_features(self._env.snapshot()))

    def hinted(self, rollout: Rollout, policy: Policy, world: World) -> Rollout:
        """Retrieve for all steps at once, then let the tree grow, alike in every process."""
        features, self._features = torch.stack(self._features), []
        asked = list(self._env.instructions) * len(features)
        if self.tree.size:
            action, q = self.tree.retrieve(features.flatten(0, 1))
            hints = action_hints(action, q)
            asked = [join(text, hint) for text, hint in zip(asked, hints, strict=True)]
        known = torch.full_like(rollout.active, self.tree.size > 0)
        hinted = _with_prompts(rollout, policy, asked, known)
        succeeded = rollout.outcome["success"] & rollout.active
        # With λ = 1 and no values GAE's returns are the discounted sums of the rewards to come.
        nothing = torch.zeros_like(rollout.reward)
        ends = rollout.terminated, rollout.truncated
        _, q = gae(rollout.reward, nothing, nothing[0], *ends, gamma=self._gamma, lam=1.0)
        succeeded, features = world.gather(succeeded, 1), world.gather(features, 1)
        action = policy.decode(world.gather(rollout.action_tokens, 1)[succeeded])
        if len(action):
            self.tree = self.tree.grow(features[succeeded], action, world.gather(q, 1)[succeeded])
        return hinted

    @property
    def silent(self) -> str:
        """There is nothing to tell before the first success."""
        if self.tree.size:
            return ""
        return (
            "no rollout has succeeded, so the MCTS teacher never had a hint: nothing was distilled "
            "(guidance/hinted is 0)"
        )

    def tensors(self) -> dict[str, Tensor]:
        """The tree."""
        return self.tree.tensors()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put the tree back."""
        device = self._env.device
        self.tree = SuccessTree.from_tensors({k: v.to(device) for k, v in tensors.items()})


def _with_prompts(rollout: Rollout, policy: Policy, prompts: list[str], hinted: Tensor) -> Rollout:
    ids = policy.tokenize(prompts).unflatten(0, rollout.active.shape)
    return replace(rollout, hinted_prompt=ids, hinted=hinted & rollout.active)
