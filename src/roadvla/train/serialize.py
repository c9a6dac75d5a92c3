"""An experiment as plain values: saved with every result, compared, and read back strictly."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from typing import Any, Literal, TypeVar

from roadvla.errors import UserError, unknown_name
from roadvla.train.config import Experiment

Node = TypeVar("Node")

_LATER: dict[str, Any] = {
    "optimizer.max_skipped": 5,
    "optimizer.blocks": 1,
    "rollout.overlap": False,
    "openvla.shard": False,
}
"""Settings that did not always exist, and the value that means what was done before them."""


def to_dict(experiment: Experiment) -> dict[str, Any]:
    """Turn an experiment into nested plain values, for JSON."""
    return json.loads(json.dumps(dataclasses.asdict(experiment)))


def from_dict(data: dict[str, Any], *, source: str = "the configuration") -> Experiment:
    """Build an experiment from nested plain values, refusing unknown, missing or mistyped ones.

    Args:
        data: What ``to_dict`` made.
        source: Named in errors, e.g. the file it came from.

    Raises:
        UserError: If a field is unknown, of another type, or contradicts another.
    """
    return _build(Experiment, data, source)


def fingerprint(experiment: Experiment) -> str:
    """Hash every setting but the folder, so that a checkpoint can name what it belongs to."""
    text = json.dumps({**decisive(experiment), "output": None}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def decisive(experiment: Experiment) -> dict[str, Any]:
    """Settings as ``to_dict`` gives them, less those that are as before they could be chosen.

    Hashes are made of these, so that a new setting does not turn earlier runs into others.
    """
    data = to_dict(experiment)
    for name, before in _LATER.items():
        group, _, field = name.partition(".")
        if data[group][field] == before:
            del data[group][field]
    return data


def difference(first: Experiment, second: Experiment) -> list[str]:
    """Name the settings in which two experiments differ, dotted."""
    a, b = _flatten(to_dict(first)), _flatten(to_dict(second))
    return [name for name in a if a[name] != b[name]]


def setting(experiment: Experiment, name: str) -> object:
    """Read a setting by its dotted name."""
    value: object = experiment
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def _build(kind: type[Node], data: Any, source: str, prefix: str = "") -> Node:
    if not isinstance(data, dict):
        raise UserError(f"{source}: {prefix.rstrip('.')} is {data!r}, expected a table of settings")
    hints = typing.get_type_hints(kind)
    for name in data:
        if name not in hints:
            raise unknown_name(f"setting in {source}:", prefix + name, [prefix + h for h in hints])
    earlier = {name: before for name, before in _LATER.items() if name.startswith(prefix)}
    data = {**{name.removeprefix(prefix): before for name, before in earlier.items()}, **data}
    data = {name: value for name, value in data.items() if name in hints}
    if missing := [prefix + name for name in hints if name not in data]:
        raise UserError(f"{source}: setting {missing[0]!r} is missing")
    values: dict[str, Any] = {}
    for name, hint in hints.items():
        value = data[name]
        if dataclasses.is_dataclass(hint):
            values[name] = _build(typing.cast("type", hint), value, source, f"{prefix}{name}.")
        else:
            values[name] = _convert(hint, value, f"{source}: {prefix}{name}")
    return kind(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value  # the dataclass itself checks its choices and suggests the nearest
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        return _convert(next(o for o in options if o is not type(None)), value, where)
    if origin is tuple and options[1:] == (Ellipsis,):
        if not isinstance(value, list | tuple):
            raise UserError(f"{where} is {value!r}, expected a list")
        return tuple(_convert(options[0], entry, where) for entry in value)
    if origin is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(options):
            raise UserError(f"{where} is {value!r}, expected {len(options)} numbers")
        return tuple(_convert(o, v, where) for o, v in zip(options, value, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{where} is {value!r}, expected {hint.__name__}")
    return value
