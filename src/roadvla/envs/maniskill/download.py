"""One file over HTTPS: verified before it takes its place, and continued where that is safe."""

from __future__ import annotations

import http.client
import os
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from roadvla import __version__

Report = Callable[[int, int | None], None]
"""Told how many bytes have come, and of how many if the server says."""

PARTIAL = ".partial"
"""Ending of a file that is not complete, or not verified yet."""

_ATTEMPTS, _BLOCK, _TIMEOUT = 3, 1 << 16, 60.0
MAX_FILE = 1 << 30
"""Bytes; all assets of the suite together have a seventh of it."""
PAUSE = 1.0
"""Seconds before the second attempt; twice that before the third."""
_TRY_AGAIN = (408, 416, 429)
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_BROKEN = (
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
)


class DownloadError(Exception):
    """A file did not come, or was not the right one.

    Attributes:
        unreachable: Whether no server answered, so that others of its files will not come either.
    """

    def __init__(self, message: str, *, unreachable: bool = False):
        super().__init__(message)
        self.unreachable = unreachable


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str):
        _demand_https(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_OPENER = urllib.request.build_opener(_SafeRedirects)


def download(
    url: str,
    target: Path,
    *,
    fault: Callable[[Path], str],
    resume: bool,
    limit: int = MAX_FILE,
    report: Report = lambda received, total: None,
) -> None:
    """Download a file, verify it, and only then put it where it belongs.

    Args:
        url: Its address.
        target: Where it belongs; what is there is replaced.
        fault: Says what is wrong with the file that came; nothing if it is right.
        resume: Whether what came before may be continued: only if ``fault`` would notice pieces
            that do not belong together.
        limit: Bytes that the file may have; a server that sends more is not listened to further.
        report: Told about progress.

    Raises:
        DownloadError: If it does not come, or is not the right one; the message is one line.
    """
    _demand_https(url)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + PARTIAL)
    problem, unreachable = "", False
    for attempt in range(_ATTEMPTS):
        time.sleep(PAUSE * attempt)
        start = partial.stat().st_size if resume and partial.is_file() else 0
        try:
            start = _receive(url, partial, start, limit, report)
        except DownloadError:
            partial.unlink(missing_ok=True)  # another try would begin with too much
            raise
        except urllib.error.HTTPError as error:
            problem, unreachable = f"the server answers {error.code} {error.reason}", False
            if error.code == 416:  # there is nothing after what came before
                partial.unlink()
            elif error.code < 500 and error.code not in _TRY_AGAIN:
                break
            continue
        except _BROKEN as error:
            problem = str(getattr(error, "reason", error)) or type(error).__name__
            unreachable = True
            continue
        problem, unreachable = fault(partial), False
        if not problem:
            os.replace(partial, target)
            return
        partial.unlink()
        if not start:  # it came in one piece: a second would be the same
            break
    raise DownloadError(problem, unreachable=unreachable)


def _receive(url: str, partial: Path, start: int, limit: int, report: Report) -> int:
    """Append what follows ``start``; return where writing began, 0 if the server sent it all.

    Raises:
        DownloadError: If it has, or says that it has, more bytes than the file may have.
    """
    headers = {"User-Agent": f"roadvla/{__version__}", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    request = urllib.request.Request(url, headers=headers)
    with _OPENER.open(request, timeout=_TIMEOUT) as answer:
        part = (answer.headers.get("Content-Range") or "").startswith(f"bytes {start}-")
        if answer.status != http.client.PARTIAL_CONTENT or not part:
            start = 0
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length is not None and length.isdecimal() else None
        received = start
        _demand_size(total or 0, limit)
        with partial.open("ab" if start else "wb") as file:
            while block := answer.read(_BLOCK):
                received += len(block)
                _demand_size(received, limit)
                file.write(block)
                report(received, total)
    if total is not None and received != total:
        raise ConnectionError(f"the connection ended after {received:,} of {total:,} bytes")
    return start


def _demand_size(size: int, limit: int) -> None:
    if size > limit:
        raise DownloadError(f"the server sends more than the {limit:,} bytes it may have")


def _demand_https(url: str) -> None:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" and parts.hostname not in _LOOPBACK:
        raise DownloadError(f"{url} is not an https address")
