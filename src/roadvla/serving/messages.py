"""Messages between policy server and client: msgpack with arrays, as openpi's clients speak it.

An array travels as a map with the byte-string keys ``__ndarray__`` (true), ``data``, ``dtype``
(NumPy's short form) and ``shape``. Nothing else is ever built from a message than numbers, text,
lists, maps and arrays of plain numbers, at most ``MAX_VALUES`` of them together, and no array is
larger than the bytes that came for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import msgpack
import numpy as np

from roadvla.errors import UserError
from roadvla.policy.temperature import check_temperature
from roadvla.serving.counting import MAX_VALUES, count_values
from roadvla.serving.settings import MAX_TEMPERATURE

PROTOCOL = 1
MAX_BYTES = 8_000_000
"""Largest message: 8 frames of 480 × 640, or 1,000 of the tabletop's."""
MAX_SIDE = 2048
MAX_PROMPT = 1000
IMAGE_KEYS = ("observation/image", "image")
PROMPT_KEYS = ("prompt", "instruction")

_KINDS = ("|u1", "|b1", "<f4", "<f8", "<i4", "<i8")
_MARK, _DATA, _DTYPE, _SHAPE = b"__ndarray__", b"data", b"dtype", b"shape"


class MessageError(UserError):
    """A message that is none, or asks for what cannot be; only its sender is told."""


def pack(message: Mapping[str, Any]) -> bytes:
    """Write a message; arrays may be anywhere in it."""
    return cast("bytes", msgpack.packb(message, default=_pack_array))


def unpack(data: bytes) -> dict[str, Any]:
    """Read a message from whoever sent it.

    Raises:
        MessageError: If it is not a map in msgpack, or holds what no message may hold.
    """
    try:
        count_values(data)
        message = msgpack.unpackb(
            data,
            object_hook=_unpack_array,
            max_bin_len=MAX_BYTES,
            max_str_len=10_000,
            max_array_len=MAX_VALUES,
            max_map_len=1000,
            max_ext_len=0,
        )
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise MessageError(
            f"the message is not readable: {error or type(error).__name__}"
        ) from error
    if not isinstance(message, dict):
        raise MessageError(f"the message is a {type(message).__name__}, expected a map")
    return message


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a client wants actions for.

    Attributes:
        image: Frames, uint8 [N, H, W, 3].
        prompts: Instruction of each.
        temperature: Of the sampling; 0 is greedy.
        uniform: Numbers in [0, 1) that decide the sampling, [N, K]; the server's own if ``None``.
        single: Whether one frame came without a batch dimension.
    """

    image: np.ndarray
    prompts: tuple[str, ...]
    temperature: float
    uniform: np.ndarray | None
    single: bool


def read_request(
    message: Mapping[str, Any], *, tokens: int, rows: int, temperature: float
) -> Request:
    """Check a client's message.

    Args:
        message: With an image under ``observation/image`` or ``image`` and its instruction under
            ``prompt`` or ``instruction``: one frame [H, W, 3] and a text, or [N, H, W, 3] and a
            list of N texts. Optional: ``temperature``; ``uniform`` [N, K] or ``seed``.
        tokens: K.
        rows: Most frames of a request.
        temperature: Unless the message says otherwise.

    Raises:
        MessageError: If something is missing, of another type or shape, or out of range.
    """
    image = _first(message, IMAGE_KEYS)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim not in (3, 4):
        raise MessageError(f"{_describe(image)} stands for the image: expected uint8 [H, W, 3]")
    single = image.ndim == 3
    image = image[None] if single else image
    count, height, width, channels = image.shape
    if channels != 3 or not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise MessageError(f"the image is {image.shape[1:]}: expected [H, W, 3] up to {MAX_SIDE}")
    if not 1 <= count <= rows:
        raise MessageError(f"{count} frames at once: expected 1 to {rows}")
    asked = _first(message, PROMPT_KEYS)
    prompts = tuple(asked) if isinstance(asked, list | tuple) else (asked,)
    if len(prompts) != count or not all(isinstance(text, str) for text in prompts):
        raise MessageError(f"{_describe(asked)} stands for the prompt: expected {count} texts")
    if max(map(len, prompts)) > MAX_PROMPT:
        raise MessageError(f"a prompt is longer than {MAX_PROMPT} characters")
    heat = _number(message.get("temperature", temperature), "temperature")
    try:
        check_temperature(heat, most=MAX_TEMPERATURE)
    except UserError as error:
        raise MessageError(str(error)) from error
    return Request(
        image=image,
        prompts=prompts,
        temperature=heat,
        uniform=_uniform(message, count, tokens),
        single=single,
    )


def _uniform(message: Mapping[str, Any], count: int, tokens: int) -> np.ndarray | None:
    given, seed = message.get("uniform"), message.get("seed")
    if given is None and seed is None:
        return None
    if given is None:
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
            raise MessageError(f"seed is {_describe(seed)}: expected a whole number from 0")
        return np.random.default_rng(seed).random((count, tokens), dtype=np.float32)
    good = isinstance(given, np.ndarray) and given.dtype == np.float32
    if not good or given.shape != (count, tokens):
        raise MessageError(f"uniform is {_describe(given)}: expected float32 [{count}, {tokens}]")
    if not bool(((given >= 0) & (given < 1)).all()):
        raise MessageError("uniform holds a number outside [0, 1)")
    return given


def _first(message: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    for name in names:
        if name in message:
            return message[name]
    raise MessageError(f"{names[0]!r} is missing: the message has {_names(message)}")


def _names(message: Mapping[str, Any]) -> list[str]:
    return sorted(str(name)[:20] for name in message)[:10]


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MessageError(f"{name} is {_describe(value)}: expected a number")
    return float(value)


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return f"{type(value).__name__} {str(value)[:40]!r}"


def _pack_array(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.str in _KINDS:
        return {
            _MARK: True,
            _DATA: value.tobytes(),
            _DTYPE: value.dtype.str,
            _SHAPE: value.shape,
        }
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a message cannot hold {_describe(value)}")


def _unpack_array(found: dict[Any, Any]) -> Any:
    if _MARK not in found:
        return found
    data, kind, shape = found.get(_DATA), found.get(_DTYPE), found.get(_SHAPE)
    kind = kind.decode("ascii", "replace") if isinstance(kind, bytes) else kind
    if not isinstance(data, bytes) or kind not in _KINDS:
        raise ValueError(
            f"an array of dtype {str(kind)[:20]!r}: expected one of {', '.join(_KINDS)}"
        )
    if not isinstance(shape, list | tuple) or len(shape) > 5:
        raise ValueError("an array without a shape of up to 5 dimensions")
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape):
        raise ValueError("an array whose shape is not whole numbers")
    dtype = np.dtype(kind)
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"an array of shape {list(shape)} with {len(data)} bytes")
    return np.frombuffer(data, dtype=dtype).reshape(shape)
