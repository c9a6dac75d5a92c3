"""The gradient of one optimiser step, added up over the processes that share the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn

from roadvla.errors import LostContactError
from roadvla.world import World

CHUNK_BYTES = 25_000_000
"""Sent at once: large enough to fill the wire, small enough to leave before backward is through."""


class Gradients:
    """All parameters' gradients in one flat buffer, sent chunk by chunk as they become final.

    Use it as ``for step: open(); for pass: expect(…); backward; close()``. The last backward pass
    fills the buffer from its end; a chunk leaves when the gradients in it, and all chunks after
    it, are final, so that every process sends the same chunks in the same order.

    Args:
        parameters: Those that take gradient, of one dtype and device.
        world: The processes.
        chunk_bytes: Size of a chunk.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], world: World, *, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        self._parameters, self._world = parameters, world
        sizes = [parameter.numel() for parameter in parameters]
        self._flat = torch.zeros(sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device)
        # Laid out in memory as the parameter is: the fused optimiser walks both in that order.
        self._views = [
            part.as_strided(parameter.shape, parameter.stride(), part.storage_offset())
            for part, parameter in zip(self._flat.split(sizes), parameters, strict=True)
        ]
        self._cut(sizes, max(1, chunk_bytes // self._flat.element_size()))
        self._touched = torch.zeros(len(parameters), device=self._flat.device)
        self._unused: list[int] | None = None
        self._armed, self._counts, self._work = False, True, []  # type: ignore[var-annotated]
        self._hooks = [parameter.register_hook(self._counted) for parameter in parameters]
        self._hooks += [
            parameter.register_post_accumulate_grad_hook(lambda _, i=index: self._arrived(i))
            for index, parameter in enumerate(parameters)
        ]

    def open(self) -> None:
        """Begin a step with a gradient of zero."""
        self._flat.zero_()
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view
        self._armed, self._counts = False, True
        self._work, self._next = [], len(self._chunks) - 1
        self._missing = [len(members) for members, _ in self._chunks]

    def expect(self, *, last: bool, counts: bool = True) -> None:
        """Say what the next backward pass of this process is.

        Args:
            last: Whether it is the step's last.
            counts: Whether it adds to the gradient, or is made for the other processes' sake.
        """
        self._armed, self._counts = last, counts

    def close(self) -> None:
        """Send what has not left yet and wait for the sums.

        Raises:
            LostContactError: If another process does not take part.
        """
        try:
            while self._next >= 0:
                self._send()
            for work in self._work:
                work.wait()
        except RuntimeError as error:
            raise LostContactError(
                f"process {self._world.rank} lost contact with the others while gradients were "
                f"added up: what is saved is intact, go on with --resume"
            ) from error
        if self._unused is None:
            touched = self._world.total(self._touched).tolist()
            self._unused = [index for index, count in enumerate(touched) if count == 0]
        for index in self._unused:
            # As in a single process: AdamW leaves alone what no loss depends on.
            self._parameters[index].grad = None

    def end(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self._parameters:
            parameter.grad = None

    def _cut(self, sizes: list[int], most: int) -> None:
        """Group neighbouring parameters into chunks of about ``most`` elements."""
        self._chunks: list[tuple[list[int], slice]] = []
        start = stop = 0
        members: list[int] = []
        for index, size in enumerate(sizes):
            members.append(index)
            stop += size
            if stop - start >= most or index == len(sizes) - 1:
                self._chunks.append((members, slice(start, stop)))
                members, start = [], stop
        self._chunk_of = {index: c for c, (many, _) in enumerate(self._chunks) for index in many}

    def _counted(self, gradient: Tensor) -> Tensor | None:
        """Put zeros in place of a gradient that counts for nothing: it may be NaN."""
        return None if self._counts else torch.zeros_like(gradient)

    def _arrived(self, index: int) -> None:
        """Note that a gradient has been added; in the last pass it is final."""
        if self._unused is None:
            self._touched[index] = 1
        if not self._armed:
            return
        self._missing[self._chunk_of[index]] -= 1
        while self._next >= 0 and self._missing[self._next] == 0:
            self._send()

    def _send(self) -> None:
        _, where = self._chunks[self._next]
        self._work.append(distributed.all_reduce(self._flat[where], async_op=True))
        self._next -= 1


@contextmanager
def exchanged(optimizer: torch.optim.Optimizer, world: World) -> Iterator[Gradients | None]:
    """Exchange the gradients of the optimiser's parameters in the block, if there is anyone to.

    Args:
        optimizer: Its parameters that take gradient at this moment are meant.
        world: The processes.
    """
    if world.size == 1:
        yield None
        return
    every = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    gradients = Gradients(every, world)
    try:
        yield gradients
    finally:
        gradients.end()
