"""``roadvla assets`` and ``roadvla fetch-vulkan``.

What takes time to load is imported inside the functions, so that the command line's help comes at
once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from roadvla.errors import FailedCheckError

if TYPE_CHECKING:
    from rich.console import Console

    from roadvla.envs.maniskill.assets import AssetFolders
    from roadvla.envs.maniskill.inspection import Finding

_SHOWN = 10


def assets(
    action: tyro.conf.Positional[Literal["list", "fetch", "check"]],
    *,
    mirror: Literal["github", "hub"] = "github",
    files: bool = False,
) -> None:
    """List, fetch or check the meshes and pictures of the ManiSkill suite.

    They belong in MS_ASSET_DIR, as ManiSkill reads it, and RL4VLA's in ROADVLA_ASSETS if that is
    set. A folder prepared elsewhere needs no network.

    Args:
        action: What to do: ``list`` says what is needed and from where, ``fetch`` downloads what
            is missing or damaged, ``check`` verifies what is here.
        mirror: Where RL4VLA's files come from: its repository on GitHub, or the Hugging Face hub.
        files: Name every file, with its size and checksum, or its state.
    """
    from roadvla.envs.maniskill.assets import asset_folders

    folders = asset_folders()
    if action == "list":
        _list(folders, files=files)
    elif action == "check":
        _check(folders, files=files)
    else:
        _fetch(folders, mirror=mirror)
        _check(folders, files=files)


def fetch_vulkan(folder: tyro.conf.Positional[Path]) -> None:
    """Put a Vulkan driver that needs no GPU into a folder; nothing is installed (Debian).

    Args:
        folder: Gets the driver; the line to set in the shell is printed.
    """
    from roadvla.envs.maniskill.software_vulkan import fetch_software_vulkan

    print(f"export VK_ICD_FILENAMES={fetch_software_vulkan(folder).resolve()}")


def _list(folders: AssetFolders, *, files: bool) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from roadvla.envs.maniskill.catalog import read_catalog, root_of

    catalog = read_catalog()
    console = Console()
    table = Table("collection", "files", "bytes", "known by", box=SIMPLE_HEAD)
    for group in catalog.collections:
        unknown = sum(asset.checksum is None for asset in group.assets)
        sizes = [asset.size or 0 for asset in group.assets]
        size = f"{sum(sizes):,}" + " and more" * (0 in sizes)
        known = f"all but {unknown} by checksum" if unknown else "checksum"
        table.add_row(group.name, str(len(group.assets)), size, known)
    console.print(table)
    for group in catalog.collections:
        _line(console, f"{group.name}: {root_of(group.root, folders) / group.folder}")
        _line(console, f"  from     {group.archive or f'one of the mirrors, {group.origin}'}")
        _line(console, f"  licence  {group.licence}")
        for asset in group.assets if files else ():
            size = "?" if asset.size is None else f"{asset.size:,}"
            _line(console, f"  {asset.path}  {size} bytes  {asset.checksum or 'no checksum known'}")
    for name, address in catalog.mirrors.items():
        _line(console, f"--mirror {name}: {address}")


def _fetch(folders: AssetFolders, *, mirror: Literal["github", "hub"]) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    from roadvla.envs.maniskill.fetch import Download, fetch, needed_downloads

    downloads = needed_downloads(folders, mirror=mirror)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=None, visible=False)

        def show(number: int, item: Download) -> Callable[[int, int | None], None]:
            label = f"{number}/{len(downloads)} {item.label}"
            progress.reset(bar, description=label, total=None, visible=True)
            return lambda received, total: progress.update(bar, completed=received, total=total)

        fetch(downloads, show)


def _check(folders: AssetFolders, *, files: bool) -> None:
    from rich.console import Console

    from roadvla.envs.maniskill.catalog import root_of
    from roadvla.envs.maniskill.inspection import UNUSABLE, State, count_states, inspect_all

    findings = inspect_all(folders)
    console = Console()
    for name in dict.fromkeys(finding.asset.collection for finding in findings):
        group = [finding for finding in findings if finding.asset.collection == name]
        root = root_of(group[0].asset.root, folders)
        _line(console, f"{name:<12} {count_states(group)}  in {root}")
    unusable = [finding for finding in findings if finding.state in UNUSABLE]
    altered = [f for f in findings if f.state in (State.STAND_IN, State.REDUCED)]
    stand_ins = [finding for finding in altered if finding.state is State.STAND_IN]
    for finding in findings if files else [*unusable[:_SHOWN], *stand_ins]:
        _line(console, _described(finding))
    if altered:
        _line(
            console,
            f"{count_states(altered)}: frames and results with these are not those of the "
            f"originals; `roadvla assets fetch` replaces them",
        )
    if unusable:
        raise FailedCheckError(
            f"of {len(findings)} assets {count_states(unusable)}: run `roadvla assets fetch`, or "
            f"name the folder that has them in MS_ASSET_DIR or ROADVLA_ASSETS"
        )


def _described(finding: Finding) -> str:
    note = f" ({finding.note})" if finding.note else ""
    return f"{finding.state}: {finding.path}{note}"


def _line(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)
