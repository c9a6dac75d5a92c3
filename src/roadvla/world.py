"""The processes that share one run, and what they tell each other.

Every process holds the whole policy and its share of the environments: process r of n has rows
r·B/n to (r + 1)·B/n of everything that is counted over B environments. All of them hold the same
random generator, so whatever is random is drawn for all B and cut: no number depends on n.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from roadvla.errors import LostContactError, UserError


@dataclass(frozen=True)
class World:
    """This process among those of its run; alone unless ``torch.distributed`` was started.

    Attributes:
        rank: Its number, from 0.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @staticmethod
    def current() -> World:
        """The world that ``torch.distributed`` was initialized for."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return World()
        return World(distributed.get_rank(), distributed.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether this is the one process that writes and speaks."""
        return self.rank == 0

    def share(self, count: int) -> int:
        """How many of ``count`` rows this process has.

        Raises:
            UserError: If they cannot be shared equally.
        """
        if count % self.size:
            raise UserError(
                f"{count} environments cannot be shared equally by {self.size} processes: make "
                f"num_envs a multiple of {self.size}"
            )
        return count // self.size

    def rows(self, count: int) -> slice:
        """Which of ``count`` rows this process has.

        Raises:
            UserError: If they cannot be shared equally.
        """
        share = self.share(count)
        return slice(self.rank * share, (self.rank + 1) * share)

    def gather(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """Put everyone's tensor, all of one shape, side by side in the order of ranks.

        Raises:
            LostContactError: If another process does not take part.
        """
        if self.size == 1:
            return tensor
        is_bool = tensor.dtype == torch.bool
        mine = (tensor.to(torch.uint8) if is_bool else tensor.detach()).contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        self._try(lambda: distributed.all_gather(parts, mine))
        whole = torch.cat(parts, dim=dim)
        return whole.bool() if is_bool else whole

    def total(self, tensor: Tensor) -> Tensor:
        """Add up everyone's tensor; the result has the same bits everywhere.

        Raises:
            LostContactError: If another process does not take part.
        """
        if self.size == 1:
            return tensor
        tensor = tensor.detach().clone()
        self._try(lambda: distributed.all_reduce(tensor))
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process.

        Raises:
            LostContactError: If another process does not take part.
        """
        if self.size == 1:
            return flag
        return bool(self.total(torch.tensor(int(flag))) > 0)

    def most(self, number: int) -> int:
        """The largest of everyone's numbers, below 2⁶³.

        Raises:
            LostContactError: If another process does not take part.
        """
        return number if self.size == 1 else int(self.gather(torch.tensor([number])).max())

    def agree(self, number: int) -> bool:
        """Whether every process has the same number, below 2⁶³.

        Raises:
            LostContactError: If another process does not take part.
        """
        return self.size == 1 or len(self.gather(torch.tensor([number])).unique()) == 1

    def follow(self, number: int) -> int:
        """The first process's number, below 2⁶³, in every process.

        Raises:
            LostContactError: If another process does not take part.
        """
        return number if self.size == 1 else int(self.gather(torch.tensor([number]))[0])

    def wait(self) -> None:
        """Let everyone come to this point.

        Raises:
            LostContactError: If another process does not.
        """
        self.any(False)

    def _try(self, exchange: Callable[[], object]) -> None:
        try:
            exchange()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise LostContactError(
                f"process {self.rank} lost contact with the others ({reason}): what is saved is "
                f"intact, go on with --resume"
            ) from error
