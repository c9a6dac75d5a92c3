"""Which transitions of a whole batch a process holds, and in what order all of them are used.

The order is a function of the whole batch and the generator, never of the number of processes:
every process draws it, and passes over what it holds of each group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from roadvla.world import World


@dataclass(frozen=True)
class Share:
    """The N transitions of a batch by who holds them.

    Attributes:
        world: The processes.
        owner: Rank of the process that holds each, on the CPU.
        place: Where it stands in that process's own batch, on the CPU.
        block: Which block of environments it is from, on the CPU; ``None`` for one block.
        in_step: Whether every process must make as many passes as every other.
    """

    world: World
    owner: Int[Tensor, " N"]
    place: Int[Tensor, " N"]
    block: Int[Tensor, " N"] | None = None
    in_step: bool = False

    @staticmethod
    def alone(count: int) -> Share:
        """All of ``count`` transitions, held by the only process."""
        places = torch.arange(count)
        return Share(World(), torch.zeros_like(places), places)

    @staticmethod
    def of_rows(count: int, world: World) -> Share:
        """Rows that are shared as ``World.rows`` says.

        Raises:
            UserError: If they cannot be shared equally.
        """
        rows, size = torch.arange(count), world.share(count)
        return Share(world, rows // size, rows % size)

    @staticmethod
    def of_rollout(active: Bool[Tensor, "T B"], world: World, *, blocks: int = 1) -> Share:
        """The active steps of a rollout whose episodes are shared as ``World.rows`` says.

        Args:
            active: Of this process's B episodes.
            world: The processes.
            blocks: Equal parts of the episodes, each to be used evenly.

        Raises:
            UserError: If the episodes do not divide into the blocks.
        """
        if world.size == 1 and blocks == 1:
            return Share.alone(int(active.sum()))
        whole = world.gather(active, 1).cpu()
        episodes = whole.shape[1]
        column = torch.arange(episodes).expand_as(whole)[whole]
        owner = column // world.share(episodes)
        place = torch.empty_like(owner)
        for rank in range(world.size):
            mine = owner == rank
            place[mine] = torch.arange(int(mine.sum()))
        return Share(world, owner, place, column * blocks // episodes)

    def __len__(self) -> int:
        """N."""
        return len(self.owner)

    def groups(
        self, size: int, *, generator: torch.Generator | None, device: torch.device
    ) -> Iterator[Int[Tensor, " n"]]:
        """Shuffle all N and cut them into groups of nearly equal size, none above ``size``.

        With several blocks, every group has nearly as many transitions of each as its share.

        Args:
            size: Largest group.
            generator: Source of the order, the same in every process.
            device: Where the generator is.
        """
        order = torch.randperm(len(self), generator=generator, device=device).cpu()
        if self.block is not None:
            order = _interleave(order, self.block[order])
        yield from split(order, size)

    def passes(
        self, group: Int[Tensor, " n"], minibatch: int, device: torch.device
    ) -> list[tuple[Int[Tensor, " m"], float]]:
        """Cut this process's part of a group into passes.

        Args:
            group: From ``groups``.
            minibatch: Most transitions of a pass.
            device: Of the result.

        Returns:
            Places in this process's batch, and what part of the group each pass is. Where processes
            go in step, one that has too little of the group looks at a transition that counts for
            nothing.
        """
        owner = self.owner[group]
        most = int(owner.bincount().max())
        own = self.place[group[owner == self.world.rank]]
        parts = own.tensor_split(math.ceil(most / minibatch))
        passes = [(part.to(device), len(part) / len(group)) for part in parts if len(part)]
        if self.in_step:
            nothing = torch.zeros(1, dtype=torch.int64, device=device)
            passes += [(nothing, 0.0)] * (len(parts) - len(passes))
        return passes


def split(index: Tensor, size: int) -> tuple[Tensor, ...]:
    """Cut into parts of nearly equal length, none longer than ``size``."""
    return index.tensor_split(max(1, math.ceil(len(index) / size)))


def _interleave(order: Int[Tensor, " N"], block: Int[Tensor, " N"]) -> Int[Tensor, " N"]:
    """Move the blocks' members, each in the order they have, evenly through the whole."""
    key = torch.empty(len(order), dtype=torch.float64)
    for number in block.unique():
        members = block == number
        count = int(members.sum())
        key[members] = (torch.arange(count) + 0.5).double() / count
    return order[key.argsort(stable=True)]
