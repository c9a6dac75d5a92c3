"""Command-line flags from dataclasses and functions, with complaints of one line."""

from __future__ import annotations

import contextlib
import functools
import io
import re
from collections.abc import Callable
from dataclasses import field, fields, make_dataclass
from typing import Annotated, Any, get_type_hints

import tyro

from roadvla.errors import UserError, unknown_name


def parse(form: Callable[..., Any], command: str, flags: list[str]) -> Any:
    """Build what the flags describe.

    Args:
        form: Dataclass whose fields, or function whose parameters, are the flags.
        command: For messages, e.g. ``"eval"``.
        flags: What follows the command.

    Raises:
        UserError: If a flag is unknown, missing or malformed.
    """
    prog = f"roadvla {command}"
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(form, prog=prog, args=flags)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
    raise UserError(f"{_one_line(complaint.getvalue())}; see {prog} --help")


def bound(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """Give a function the command's parameters, and let it only note their values.

    So the command itself runs after ``parse``, where its output is its own.
    """

    @functools.wraps(command)
    def note(*values: Any, **named: Any) -> Callable[[], None]:
        return functools.partial(command, *values, **named)

    return note


def form_of(
    default: Any,
    *,
    short: tuple[str, ...] = (),
    fixed: tuple[str, ...] = (),
    **extra: tuple[Any, Any, str],
) -> type:
    """Make a form of a dataclass value's fields, each defaulting to what the value holds.

    Args:
        default: The value, e.g. a preset.
        short: Nested fields whose flags drop the prefix: ``--eta`` for ``--algorithm.eta``.
        fixed: Fields that are no flags and keep the value's.
        extra: Further flags: type, default and help of each.
    """
    hints = get_type_hints(type(default))
    columns: list[Any] = []
    for item in fields(default):
        hint = hints[item.name]
        if item.name in short:
            hint = tyro.conf.OmitArgPrefixes[hint]
        if item.name in fixed:
            hint = tyro.conf.Suppress[tyro.conf.Fixed[hint]]
        columns.append((item.name, hint, field(default=getattr(default, item.name))))
    for name, (kind, value, purpose) in extra.items():
        about = Annotated[kind, tyro.conf.arg(help=purpose), tyro.conf.FlagCreatePairsOff]
        columns.append((name, about, field(default=value)))
    form = make_dataclass("Flags", columns, frozen=True)
    form.__doc__ = type(default).__doc__
    return form


def value_of(kind: type, chosen: Any) -> Any:
    """Build the dataclass again from what was chosen on its form."""
    return kind(**{item.name: getattr(chosen, item.name) for item in fields(kind)})


def _one_line(complaint: str) -> str:
    """Take the title and the frame off tyro's complaint, and the help text that it repeats."""
    plain = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯]", "", complaint)
    _, _, body = plain.partition("\n")
    parts = [" ".join(part.split()) for part in re.split("[─-]{3,}", body)]
    wanted = [p for p in parts if p and not p.startswith(("For full help", "Argument help"))]
    line = "; ".join(part[0].lower() + part[1:].rstrip(".") for part in wanted)
    choice = re.match(r"invalid choice '(.*)' for argument '(.*)'\. Expected one of (.*)", line)
    if choice:
        value, flag, known = choice.groups()
        return str(unknown_name(flag, value, re.findall(r"'([^']+)'", known)))
    return line
