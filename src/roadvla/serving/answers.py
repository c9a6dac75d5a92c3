"""What a policy server says, checked by whoever asked: a server may be a stranger, or broken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from roadvla.errors import UserError
from roadvla.policy.action_tokens import NUM_BINS, NUM_TOKENS, NormStats
from roadvla.serving.messages import PROTOCOL, MessageError

_MAX_TEXT = 4096


@dataclass(frozen=True, kw_only=True)
class Greeting:
    """What a server says of itself.

    Attributes:
        rows: Most frames that it takes at once.
        stats: Units of its actions.
        about: ``policy``, ``checkpoint``, ``iteration`` and ``env_steps``.
    """

    rows: int
    stats: NormStats
    about: dict[str, Any]


def read_greeting(message: Mapping[str, Any]) -> Greeting:
    """Check what a server says on connecting.

    Raises:
        MessageError: If something is missing, of another type or out of range, or it speaks
            another version of the protocol.
    """
    version = message.get("protocol")
    if type(version) is not int or version != PROTOCOL:
        raise MessageError(
            f"it speaks version {version!r:.40} of the protocol, this is {PROTOCOL}: use the same "
            f"version of roadvla on both sides"
        )
    about: dict[str, Any] = {}
    for name in ("policy", "checkpoint"):
        about[name] = message.get(name)
        if not isinstance(about[name], str) or not 0 < len(about[name]) <= _MAX_TEXT:
            raise MessageError(f"its {name} is {about[name]!r:.40}: expected a text")
    for name in ("iteration", "env_steps"):
        about[name] = message.get(name)
        if about[name] is not None and (type(about[name]) is not int or about[name] < 0):
            raise MessageError(f"its {name} is {about[name]!r:.40}: expected a whole number")
    rows = message.get("max_batch")
    if type(rows) is not int or rows < 1:
        raise MessageError(f"its max_batch is {rows!r:.40}: expected a whole number from 1")
    return Greeting(rows=rows, stats=_read_stats(message.get("norm_stats")), about=about)


def read_answer(message: Mapping[str, Any], count: int) -> dict[str, np.ndarray]:
    """Check an answer to a request.

    Args:
        message: The answer.
        count: Frames that were asked for.

    Returns:
        ``action_tokens`` [count, 7], ``log_probs`` [count, 7] and ``value`` [count].

    Raises:
        MessageError: If one is missing, of another type or shape, out of range or no number.
    """
    tokens = _array(message, "action_tokens", np.int64, (count, NUM_TOKENS))
    if not bool(((tokens >= 0) & (tokens < NUM_BINS)).all()):
        raise MessageError(f"its action_tokens are not all in 0 to {NUM_BINS - 1}")
    log_probs = _array(message, "log_probs", np.float32, (count, NUM_TOKENS))
    value = _array(message, "value", np.float32, (count,))
    for name, array in (("log_probs", log_probs), ("value", value)):
        if not bool(np.isfinite(array).all()):
            raise MessageError(f"its {name} are not all finite numbers")
    return {"action_tokens": tokens, "log_probs": log_probs, "value": value}


def _array(
    message: Mapping[str, Any], name: str, dtype: type[np.generic], shape: tuple[int, ...]
) -> np.ndarray:
    found = message.get(name)
    if isinstance(found, np.ndarray) and found.dtype == dtype and found.shape == shape:
        return found
    what = f"{found!r:.40}"
    if isinstance(found, np.ndarray):
        what = f"{found.dtype} {list(found.shape)}"
    raise MessageError(f"its {name} is {what}: expected {np.dtype(dtype)} {list(shape)}")


def _read_stats(entry: Any) -> NormStats:
    try:
        stats = NormStats.from_dict(entry if isinstance(entry, dict) else {})
    except UserError as error:
        raise MessageError(f"its norm_stats: {error}") from error
    if len(stats.q01) != NUM_TOKENS:
        raise MessageError(f"its norm_stats are of {len(stats.q01)} numbers, not {NUM_TOKENS}")
    ends = torch.tensor([[0] * NUM_TOKENS, [NUM_BINS - 1] * NUM_TOKENS])
    if not bool(torch.isfinite(stats.decode(ends)).all()):
        raise MessageError("its norm_stats make actions that are no numbers")
    return stats
