"""``roadvla demos``: collect demonstrations, describe them, export them.

Modules that load torch are imported inside the functions, so that the command line's help comes at
once.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro

from roadvla.errors import unknown_name
from roadvla.flags import bound, parse


def demos(arguments: list[str]) -> None:
    """Collect demonstrations of the scripted expert; describe or export them."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: roadvla demos ACTION [flags]; roadvla demos ACTION --help lists the flags\n")
        for name, action in _ACTIONS.items():
            print(f"  {name:<8} {(action.__doc__ or '').splitlines()[0]}")
        return
    name, *flags = arguments
    if name == "collect":
        collect(flags)
    elif name in _ACTIONS:
        parse(bound(_ACTIONS[name]), f"demos {name}", flags)()
    else:
        raise unknown_name("action of demos:", name, _ACTIONS)


def collect(arguments: list[str]) -> None:
    """Let the expert act until there are enough successful episodes, or go on where that stopped.

    Args:
        arguments: Flags: the fields of ``Collection``.
    """
    from roadvla.experiments.stages import continued_by
    from roadvla.train.collecting import collect as run
    from roadvla.train.collection import Collection

    settings = parse(Collection, "demos collect", arguments)
    with continued_by(shlex.join(["roadvla", "demos", "collect", *arguments])):
        folder = run(settings)
    info(folder)
    print(folder)


def info(folder: tyro.conf.Positional[Path]) -> None:
    """Say what a collection has, and how often the expert succeeded.

    Args:
        folder: A collection; or a warm-up, or a file of demonstrations, which tell less.
    """
    from roadvla.train.collecting import describe
    from roadvla.train.collection import read_record
    from roadvla.train.demonstrations import load_demonstrations

    record = read_record(folder)
    if record is not None:
        print(*describe(record), sep="\n")
        return
    found = load_demonstrations(folder)
    origin = ", ".join(f"{name} {value}" for name, value in found.origin.items())
    steps, (height, width, _) = len(found.action), found.image.shape[1:]
    print(f"{len(found.instructions)} demonstrations: {origin}")
    print(f"  frames      {steps} of {height} x {width}")


def export(
    folder: tyro.conf.Positional[Path],
    *,
    to: Literal["lerobot"],
    output: Path,
    force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Write demonstrations in a format that other tools read.

    Args:
        folder: A collection, a warm-up, or a file of demonstrations.
        to: ``lerobot``: a LeRobot dataset, format v3.0, frames as PNG.
        output: Folder to write.
        force: Replace a LeRobot dataset that is there.
    """
    from roadvla.train.lerobot import export_lerobot

    print(export_lerobot(folder, output, force=force))


_ACTIONS: dict[str, Callable[..., None]] = {"collect": collect, "info": info, "export": export}
