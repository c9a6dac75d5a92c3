"""A collection that comes as one zip archive."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from roadvla.envs.maniskill.catalog import Asset, Collection, check_relative
from roadvla.envs.maniskill.download import PARTIAL, DownloadError
from roadvla.envs.maniskill.inspection import UNUSABLE, State, inspect
from roadvla.errors import UserError

_BROKEN = (
    *(zipfile.BadZipFile, zlib.error, EOFError, UserError, struct.error),
    *(RuntimeError, ValueError),  # encrypted, packed in unknown ways, names that are no text
)
_LARGEST = 1 << 30
"""Bytes of one file; meshes and pictures have a hundredth of it."""


def archive_fault(collection: Collection, file: Path) -> str:
    """Say what is wrong with an archive; nothing if it is the right one."""
    if collection.archive_sha256 is not None:
        with file.open("rb") as data:
            digest = hashlib.file_digest(data, "sha256").hexdigest()
        return "" if digest == collection.archive_sha256 else "its SHA-256 is not ManiSkill's"
    return "" if zipfile.is_zipfile(file) else "not a complete zip archive"


def unpack(file: Path, collection: Collection, root: Path) -> None:
    """Unpack a collection's archive, file by file, each verified before it takes its place.

    An archive with a checksum is unpacked whole, for ManiSkill takes its folder for complete; of
    another only the catalogue's files are. Files that are right or not ours stay as they are.

    Args:
        file: The archive.
        collection: What it holds.
        root: The folder that the collection belongs to.

    Raises:
        DownloadError: If the archive lacks files, has wrong ones, or ones that lead elsewhere.
    """
    needed = {asset.path: asset for asset in collection.assets}
    try:
        with zipfile.ZipFile(file) as archive:
            for member, path in _members(archive, collection):
                asset = needed.pop(path, None)
                if _wanted(asset, root / path, verified=collection.archive_sha256 is not None):
                    _extract(archive, member, asset, root / path)
    except _BROKEN as error:
        raise DownloadError(f"bad archive: {error}") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # a position before the beginning: damage; else the disk
            raise
        raise DownloadError(f"bad archive: {error.strerror}") from error
    if needed:
        raise DownloadError(f"the archive lacks {', '.join(sorted(needed))}")


def _members(
    archive: zipfile.ZipFile, collection: Collection
) -> Iterator[tuple[zipfile.ZipInfo, str]]:
    """Yield the files below the archive's own top folder, with their paths below the root."""
    anchor = collection.assets[0].path.removeprefix(f"{collection.folder}/")
    names = [info.filename for info in archive.infolist()]
    tops = [name.removesuffix(anchor) for name in names if f"/{name}".endswith(f"/{anchor}")]
    if not tops:
        return
    top = min(tops, key=len)
    for info in archive.infolist():
        if info.is_dir() or not info.filename.startswith(top):
            continue
        if stat.S_ISLNK(info.external_attr >> 16):
            raise UserError(f"{info.filename!r} is a link: refused")
        if info.file_size > _LARGEST:
            raise UserError(f"{info.filename!r} unpacks to {info.file_size:,} bytes: refused")
        path = check_relative(info.filename.removeprefix(top))
        yield info, f"{collection.folder}/{path}"


def _wanted(asset: Asset | None, target: Path, *, verified: bool) -> bool:
    if asset is None:
        return verified and not target.exists()
    return inspect(asset, target).state not in (State.OK, State.UNKNOWN)


def _extract(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, asset: Asset | None, target: Path
) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + PARTIAL)
    with archive.open(member) as source, partial.open("wb") as file:
        shutil.copyfileobj(source, file)
    found = None if asset is None else inspect(asset, partial)
    if found is not None and found.state in UNUSABLE:
        partial.unlink()
        raise DownloadError(f"{member.filename} in the archive: {found.note}")
    os.replace(partial, target)
