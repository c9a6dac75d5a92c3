"""Fetching the assets that are missing here.

ManiSkill's collections come from the addresses that ManiSkill has for them, but not through its
downloader: that removes the folder that is there before anything has come.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote, urlsplit

from roadvla.envs.maniskill.archive import archive_fault, unpack
from roadvla.envs.maniskill.assets import AssetFolders
from roadvla.envs.maniskill.catalog import (
    Asset,
    Catalog,
    Collection,
    Mirror,
    read_catalog,
    root_of,
)
from roadvla.envs.maniskill.download import MAX_FILE, DownloadError, Report, download
from roadvla.envs.maniskill.inspection import State, inspect
from roadvla.errors import UserError

_SLACK = 1 << 20
_HUB = "https://huggingface.co"


@dataclass(frozen=True, kw_only=True)
class Download:
    """One thing to download.

    Attributes:
        label: What it is, for people.
        url: Its address.
        root: The folder that its files belong to.
        run: Does it; raises ``DownloadError``.
    """

    label: str
    url: str
    root: Path
    run: Callable[[Report], None]


def needed_downloads(
    folders: AssetFolders, *, mirror: Mirror = "github", catalog: Catalog | None = None
) -> list[Download]:
    """Find what has to be downloaded: files that are missing or damaged, stand-ins and such.

    Args:
        folders: Where the files belong.
        mirror: Where RL4VLA's files come from.
        catalog: What is needed; the package's catalogue unless given.
    """
    catalog = catalog or read_catalog()
    downloads: list[Download] = []
    for group in catalog.collections:
        lacking = [
            asset
            for asset in group.assets
            if inspect(asset, asset.below(folders)).state not in (State.OK, State.UNKNOWN)
        ]
        root = root_of(group.root, folders)
        if group.archive is not None and lacking:
            downloads.append(_archive(group, group.archive, root))
        elif group.archive is None:
            base = _address(catalog.mirrors[mirror])
            downloads += [_single(asset, base, root) for asset in lacking]
    return downloads


def fetch(downloads: Sequence[Download], show: Callable[[int, Download], Report]) -> None:
    """Download everything that can be had.

    Args:
        downloads: What is needed.
        show: Called as each begins, with its number from 1; returns what is told its progress.

    Raises:
        UserError: If anything did not come; the message says what to do without a network.
    """
    failed: list[tuple[Download, DownloadError]] = []
    unreachable: dict[str, DownloadError] = {}
    for number, item in enumerate(downloads, start=1):
        host = urlsplit(item.url).netloc
        if host in unreachable:
            failed.append((item, unreachable[host]))
            continue
        try:
            item.run(show(number, item))
        except DownloadError as error:
            failed.append((item, error))
            if error.unreachable:
                unreachable[host] = error
    if failed:
        raise _failure(failed)


def _failure(failed: Sequence[tuple[Download, DownloadError]]) -> UserError:
    item, problem = failed[0]
    others = f", nor {len(failed) - 1} more" if len(failed) > 1 else ""
    return UserError(
        f"cannot fetch {item.url} ({problem}){others}: run `roadvla assets fetch` again, with "
        f"--mirror hub or github; without a network, copy {item.root} from a machine that has it "
        f"and run `roadvla assets check`"
    )


def _single(asset: Asset, base: str, root: Path) -> Download:
    url = base + quote(asset.path)
    # Pieces of two versions would not be noticed without a checksum.
    resume = asset.checksum is not None

    def run(report: Report) -> None:
        target = root / asset.path
        # A picture that was compressed anew, or pieces of two files, may be larger than the file.
        limit = MAX_FILE if asset.size is None else 2 * asset.size + _SLACK
        download(
            url,
            target,
            fault=partial(_fault, asset),
            resume=resume,
            limit=limit,
            report=report,
        )

    return Download(label=asset.path, url=url, root=root, run=run)


def _fault(asset: Asset, file: Path) -> str:
    """A file whose checksum nobody knows may come; one that is known to be another may not."""
    found = inspect(asset, file)
    if found.state is State.OK or (found.state is State.UNKNOWN and asset.blob is None):
        return ""
    return found.note


def _archive(group: Collection, address: str, root: Path) -> Download:
    url = _address(address)

    def run(report: Report) -> None:
        file = root / f"{group.folder}.zip"
        if not file.is_file() or archive_fault(group, file):
            download(
                url,
                file,
                fault=partial(archive_fault, group),
                resume=group.archive_sha256 is not None,
                report=report,
            )
        try:
            unpack(file, group, root)
        except DownloadError:
            file.unlink()  # another try needs another archive
            raise
        file.unlink()

    return Download(label=f"{group.name} ({Path(address).name})", url=url, root=root, run=run)


def _address(url: str) -> str:
    """Honour ``HF_ENDPOINT``, as the hub's own client does."""
    endpoint = os.environ.get("HF_ENDPOINT")
    if endpoint and url.startswith(f"{_HUB}/"):
        return endpoint.rstrip("/") + url.removeprefix(_HUB)
    return url
