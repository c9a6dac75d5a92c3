"""MCTS PI: what was done before, successfully, in a state like this one (Sec. 4.2.1, reading R43).

Nodes are transitions of successful rollouts. Rollouts that pass through the same state with the
same action share a node, whose visits count up and whose q is the mean of their returns-to-go; so
the tree branches where actions differ, and grows by one path per success.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from roadvla.envs.base import Snapshot

STATE_CELL = 0.02
"""States closer than this, in metres along every axis, are one."""
ACTION_CELL = (0.01, 0.01, 0.01, 0.1, 0.1, 0.1, 1.0)
"""Actions closer than this, in metres, radians and gripper, are one."""
CAPACITY = 20_000
"""Nodes kept; the least visited go first, of those the oldest."""

_APART = 0.3  # metres that a different grasp or gripper is worth: more than any distance at work
_DISTANCES = 2**24  # computed at a time: 64 MB, whatever the number of environments
_FEATURES = 8
_ACTION = 7


def state_features(snapshot: Snapshot) -> Float[Tensor, "B 8"]:
    """What makes two states alike: object and receptacle seen from the tip, grasp and gripper.

    Args:
        snapshot: Of B episodes.

    Returns:
        Metres; the last two numbers are 0 or far apart.
    """
    tip = snapshot.tip
    held, is_open = snapshot.held == 0, snapshot.is_open
    flags = torch.stack([held, is_open], dim=1).to(tip.dtype) * _APART
    to_object = snapshot.objects[:, 0] - tip
    return torch.cat([to_object, snapshot.receptacles[:, 0] - tip, flags], dim=1)


@dataclass(frozen=True)
class SuccessTree:
    """Transitions of successful rollouts; growing it makes a new one.

    Attributes:
        features: Mean state of each node's visits.
        action: Mean action.
        q: Mean return-to-go, in units of return.
        visits: How often rollouts passed through.
        born: In which growth the node first appeared.
        growths: How often the tree was grown.
    """

    features: Float[Tensor, "M 8"]
    action: Float[Tensor, "M 7"]
    q: Float[Tensor, " M"]
    visits: Int[Tensor, " M"]
    born: Int[Tensor, " M"]
    growths: int = 0

    @classmethod
    def empty(cls, device: torch.device | str = "cpu") -> SuccessTree:
        """Make a tree without a node."""
        counts = torch.zeros(0, dtype=torch.int64, device=device)
        return cls(
            features=torch.zeros(0, _FEATURES, device=device),
            action=torch.zeros(0, _ACTION, device=device),
            q=torch.zeros(0, device=device),
            visits=counts,
            born=counts,
        )

    @property
    def size(self) -> int:
        """M."""
        return len(self.q)

    def grow(
        self,
        features: Float[Tensor, "N 8"],
        action: Float[Tensor, "N 7"],
        q: Float[Tensor, " N"],
        *,
        capacity: int = CAPACITY,
    ) -> SuccessTree:
        """Add the transitions of successful rollouts, and back their values up into shared nodes.

        Args:
            features: Of the states, from ``state_features``.
            action: Taken there: metres, radians, gripper.
            q: Return-to-go of each.
            capacity: Most nodes to keep.
        """
        one = torch.ones(len(q), dtype=torch.int64, device=q.device)
        features = torch.cat([self.features, features.to(self.features.dtype)])
        action = torch.cat([self.action, action.to(self.action.dtype)])
        values, visits = torch.cat([self.q, q.to(self.q.dtype)]), torch.cat([self.visits, one])
        born = torch.cat([self.born, one * self.growths])
        cells = torch.tensor(ACTION_CELL, device=action.device)
        keys = torch.cat([features / STATE_CELL, action / cells], dim=1).round().long()
        unique, node = keys.unique(dim=0, return_inverse=True)
        count = len(unique)
        total = visits.new_zeros(count).index_add_(0, node, visits)

        def mean(rows: Tensor) -> Tensor:
            weighted = rows * visits.view(-1, *[1] * (rows.dim() - 1))
            sums = rows.new_zeros(count, *rows.shape[1:]).index_add_(0, node, weighted)
            return sums / total.view(-1, *[1] * (rows.dim() - 1))

        first = torch.full_like(total, self.growths).scatter_reduce(0, node, born, "amin")
        kept = _most_visited(total, first, capacity)
        return SuccessTree(
            features=mean(features)[kept],
            action=mean(action)[kept],
            q=mean(values)[kept],
            visits=total[kept],
            born=first[kept],
            growths=self.growths + 1,
        )

    def retrieve(
        self, features: Float[Tensor, "B 8"]
    ) -> tuple[Float[Tensor, "B 7"], Float[Tensor, " B"]]:
        """Find the most similar transition for each state; of equally similar ones the best.

        Args:
            features: Of the states, from ``state_features``.

        Returns:
            Its action and its q.

        Raises:
            ValueError: If the tree is empty.
        """
        if not self.size:
            raise ValueError("the tree is empty: no rollout has succeeded yet")
        rows = max(1, _DISTANCES // self.size)
        best = torch.cat([self._nearest(some) for some in features.split(rows)])
        return self.action[best], self.q[best]

    def _nearest(self, features: Float[Tensor, "B 8"]) -> Int64[Tensor, " B"]:
        distance = torch.cdist(
            features.to(self.features.dtype),
            self.features,
            compute_mode="donot_use_mm_for_euclid_dist",
        )
        nearest = distance.min(dim=1, keepdim=True).values
        return torch.where(distance <= nearest, self.q, -torch.inf).argmax(dim=1)

    def tensors(self) -> dict[str, Tensor]:
        """Take it apart, for a checkpoint."""
        return {
            "features": self.features,
            "action": self.action,
            "q": self.q,
            "visits": self.visits,
            "born": self.born,
            "growths": torch.tensor([self.growths]),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> SuccessTree:
        """Put it together again.

        Raises:
            ValueError: If something is missing or does not fit.
        """
        empty = cls.empty().tensors()
        if set(tensors) != set(empty):
            raise ValueError(f"it holds {sorted(tensors)}, expected {sorted(empty)}")
        count = tensors["q"].numel()
        for name, like in empty.items():
            found, rows = tensors[name], 1 if name == "growths" else count
            if found.dtype != like.dtype or found.shape != (rows, *like.shape[1:]):
                raise ValueError(f"{name} is {found.dtype} {tuple(found.shape)}")
            least = {"visits": 1, "born": 0, "growths": 0}.get(name, -math.inf)
            if not bool((found.isfinite() & (found >= least)).all()):
                raise ValueError(f"{name} holds what a tree cannot have come to")
        parts = {name: value for name, value in tensors.items() if name != "growths"}
        return cls(**parts, growths=int(tensors["growths"]))


def _most_visited(visits: Tensor, born: Tensor, capacity: int) -> Tensor:
    """Indices of the nodes to keep, in their order."""
    if len(visits) <= capacity:
        return torch.arange(len(visits), device=visits.device)
    # Newest first, then stably by visits: of equally visited nodes the newest stay.
    newest = born.argsort(descending=True, stable=True)
    order = newest[visits[newest].argsort(descending=True, stable=True)]
    return order[:capacity].sort().values
