"""Values from a file compared with what a dataclass says its fields are."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any

_SHOWN = 40


def check_fields(kind: type, data: Mapping[str, Any], *, skip: Collection[str] = ()) -> None:
    """Make sure that values fit the fields of a dataclass.

    Args:
        kind: The dataclass.
        data: By field; lists that stand for tuples have become tuples.
        skip: Fields that are checked elsewhere.

    Raises:
        ValueError: If a field is unknown, missing, or not of its type; floats must be finite.
    """
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in data:
        if name not in fields:
            raise ValueError(f"it has an unknown field {str(name)[:_SHOWN]!r}")
    for name, field in fields.items():
        given = field.default, field.default_factory
        optional = any(value is not dataclasses.MISSING for value in given)
        if name not in data and not optional:
            raise ValueError(f"its {name} is missing")
        if name in data and name not in skip and not _fits(data[name], hints[name]):
            raise ValueError(f"its {name} is {repr(data[name])[:_SHOWN]}")


def _fits(value: Any, hint: Any) -> bool:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in options)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(entry, options[0]) for entry in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(key, options[0]) and _fits(entry, options[1]) for key, entry in value.items()
        )
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
