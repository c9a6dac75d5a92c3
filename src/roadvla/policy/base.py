"""The interface every policy has, from the tiny VLA to OpenVLA-7B."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from roadvla.types import Observation, PolicyOutput


@runtime_checkable
class Critic(Protocol):
    """What judges observations."""

    def value(self, observation: Observation) -> Float[Tensor, " N"]:
        """Value alone: a prefill without any action token."""
        ...

    def shares_vision(self, other: object) -> bool:
        """Whether both see the same vision features, so that one pass serves both."""
        ...


@runtime_checkable
class Policy(Critic, Protocol):
    """A vision-language-action policy over K action tokens of V bins, with a value head."""

    num_tokens: int
    num_bins: int

    def tokenize(self, instructions: Sequence[str]) -> Int[Tensor, "B L"]:
        """Turn instructions into prompt ids on the policy's device, padded on the right.

        Only the policy knows what it pads with.
        """
        ...

    def act(
        self,
        observation: Observation,
        *,
        temperature: float,
        generator: torch.Generator | None = None,
        uniform: Float[Tensor, "N K"] | None = None,
        keep_logits: bool = False,
    ) -> PolicyOutput:
        """Sample one action per observation, without gradient; temperature 0 is greedy.

        Args:
            observation: N of them.
            temperature: At least 0.
            generator: Source of the sampling.
            uniform: Numbers in [0, 1) that decide it instead, one per token: so that what is
                sampled for an observation does not depend on what else is in the batch.
            keep_logits: Whether to return the raw logits.
        """
        ...

    def evaluate(
        self, observation: Observation, action_tokens: Int[Tensor, "N K"]
    ) -> tuple[Float[Tensor, "N K V"], Float[Tensor, " N"]]:
        """Teacher-forced raw logits of all K positions and the value: float32, with gradient."""
        ...

    def decode(self, action_tokens: Int[Tensor, "*N K"]) -> Float[Tensor, "*N K"]:
        """Bins to un-normalized actions: metres, radians, gripper in [0, 1] (1 opens)."""
        ...

    def encode(self, action: Float[Tensor, "*N K"]) -> Int[Tensor, "*N K"]:
        """Un-normalized actions to bins, clipped to the range of the statistics."""
        ...

    def policy_parameters(self) -> Iterable[nn.Parameter]:
        """Trainable parameters but the value head's."""
        ...

    def value_parameters(self) -> Iterable[nn.Parameter]:
        """Trainable parameters of the value head."""
        ...
