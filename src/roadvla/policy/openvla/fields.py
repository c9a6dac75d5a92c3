"""Fields of a checkpoint's ``config.json``, refused by name where they are no good."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

from roadvla.errors import UserError

_COUNTS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size", "max_position_embeddings"),
)
_NUMBERS = ("rms_norm_eps", "rope_theta")


def read_object(config: Mapping[str, Any], name: str, source: str) -> dict[str, Any]:
    """Read an object; an empty one if it is left out.

    Raises:
        UserError: If it is something else.
    """
    value = config.get(name, {})
    if not isinstance(value, dict):
        raise UserError(f"{source}: {name} is {value!r}; an object {{…}} is needed")
    return dict(value)


def read_list(config: Mapping[str, Any], name: str, kind: type, source: str) -> list[Any]:
    """Read a list of one kind of value; an empty one if it is left out or null.

    Raises:
        UserError: If it is something else.
    """
    value = config.get(name)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise UserError(f"{source}: {name} is {value!r}; a list of {kind.__name__} is needed")
    return list(value)


def check_text(text: Mapping[str, Any], source: str) -> None:
    """Check the numbers of a complete ``text_config``.

    Raises:
        UserError: If one is of another type or out of range, or two do not go together.
    """
    for name in _COUNTS:
        if not is_count(text[name]):
            raise UserError(f"{source}: {name} is {text[name]!r}; a positive number is needed")
    for name in _NUMBERS:
        value = text[name]
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        if not numeric or not 0 < cast("float", value) < math.inf:
            raise UserError(f"{source}: {name} is {value!r}; a positive number is needed")
    heads, shared = text["num_attention_heads"], text["num_key_value_heads"]
    if text.get("head_dim") is None and text["hidden_size"] % heads:
        raise UserError(
            f"{source}: hidden_size {text['hidden_size']} is no multiple of num_attention_heads "
            f"{heads}: use the config.json that the weights were saved with"
        )
    if text.get("head_dim") is not None and not is_count(text["head_dim"]):
        raise UserError(f"{source}: head_dim is {text['head_dim']!r}; a positive number is needed")
    if heads % shared:
        raise UserError(
            f"{source}: num_attention_heads {heads} is no multiple of num_key_value_heads {shared}"
        )
    pad = text["pad_token_id"]
    if not isinstance(pad, int) or isinstance(pad, bool) or not 0 <= pad < text["vocab_size"]:
        raise UserError(
            f"{source}: pad_token_id is {pad!r}; a token id below {text['vocab_size']} is needed"
        )


def is_count(value: object) -> bool:
    """Whether a value is a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
