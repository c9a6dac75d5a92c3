"""What an optimiser and a random generator are put back from: checked before either is touched."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from roadvla.train.listed import ELSEWHERE, DamagedError

GENERATOR = "generator"
STEP = "step"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_LARGEST = "max_exp_avg_sq"
_SQUARES = ("exp_avg_sq", _LARGEST)


def take_moments(
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    path: Path,
) -> dict[str, dict[str, Tensor]]:
    """Sort AdamW's moments by parameter.

    Args:
        tensors: By parameter name and moment, ``vision.weight.exp_avg``.
        parameters: By name.
        optimizer: Theirs; it decides which moments there are.
        path: Where the tensors were read, for messages.

    Returns:
        By parameter name and moment; nothing for a parameter that was never trained.

    Raises:
        DamagedError: If one is missing, unknown, or not of its parameter's shape and kind, or holds
            what AdamW cannot have come to.
    """
    greedy = {
        id(p) for group in optimizer.param_groups if group.get("amsgrad") for p in group["params"]
    }
    states: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    for key, tensor in tensors.items():
        name, _, moment = key.rpartition(".")
        if name not in states:
            raise _misfit(path, name, "the policy has no such weight")
        like = tensor.new_empty((), dtype=torch.float32) if moment == STEP else parameters[name]
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            found, fits = _kind(tensor), _kind(like)
            raise _misfit(path, name, f"its {moment[:40]} is {found}, expected {fits}")
        if not bool(tensor.isfinite().all()):
            raise _misfit(path, name, f"its {moment[:40]} is not finite")
        if moment in (STEP, *_SQUARES) and bool((tensor < 0).any()):
            raise _misfit(path, name, f"its {moment} is negative")
        states[name][moment] = tensor
    for name, state in states.items():
        known = {STEP, *_MOMENTS, *((_LARGEST,) if id(parameters[name]) in greedy else ())}
        if state and state.keys() != known:
            odd = ", ".join(sorted(state.keys() ^ known)[:3])[:80]
            raise _misfit(path, name, f"it has {odd} too many or too few")
    return states


def put_generator(generator: torch.Generator, tensors: dict[str, Tensor], path: Path) -> None:
    """Take the random generator's state out of a file's tensors and put it back.

    Raises:
        DamagedError: If there is none, or none of this kind of generator.
    """
    state = tensors.pop(GENERATOR, None)
    if state is None:
        raise DamagedError(f"{path} does not hold the random generator's state; {ELSEWHERE}")
    like = generator.get_state()
    if state.shape != like.shape or state.dtype != like.dtype:
        raise DamagedError(
            f"{path} does not fit: its random generator's state is {_kind(state)}, here it is "
            f"{_kind(like)}; {ELSEWHERE}, or go on with the same --device"
        )
    try:
        generator.set_state(state)
    except (RuntimeError, TypeError) as error:  # it looks at what the bytes stand for
        raise DamagedError(
            f"{path} does not hold a state that the random generator can have; {ELSEWHERE}"
        ) from error


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _misfit(path: Path, name: str, what: str) -> DamagedError:
    return DamagedError(
        f"{path} does not fit the policy beside it at {name[:80]!r}: {what}; {ELSEWHERE}"
    )
