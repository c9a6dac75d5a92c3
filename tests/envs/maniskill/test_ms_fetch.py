"""Fetching assets, from a server on this machine: nothing wrong takes its place."""

from __future__ import annotations

import contextlib
import io
import re
import stat
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ms_made_assets import BEAR, asset_at, files_in, glb, png, point_nowhere, sha

from roadvla.envs.maniskill import download as downloads
from roadvla.envs.maniskill.assets import AssetFolders
from roadvla.envs.maniskill.catalog import Asset, Catalog, Collection
from roadvla.envs.maniskill.download import DownloadError, download
from roadvla.envs.maniskill.fetch import Download, fetch, needed_downloads
from roadvla.envs.maniskill.inspection import (
    State,
    inspect_all,
)
from roadvla.errors import UserError
from roadvla.experiments.asset_commands import assets


class Server:
    """Serves files, and misbehaves on demand."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut: dict[str, list[int]] = {}  # where answers to a path end early, one by one
        self.redirects: dict[str, str] = {}
        self.failures: dict[str, list[int]] = {}
        self.ranges = True
        self.asked: list[tuple[str, str | None]] = []
        handler = type("Handler", (_Handler,), {"server_of_test": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.base = f"http://127.0.0.1:{self._http.server_port}/"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


class _Handler(BaseHTTPRequestHandler):
    server_of_test: Server

    def do_GET(self) -> None:
        server, path = self.server_of_test, self.path[1:]
        wanted = self.headers.get("Range")
        server.asked.append((path, wanted))
        if server.failures.get(path):
            return self.send_error(server.failures[path].pop(0))
        if path in server.redirects:
            self.send_response(302)
            self.send_header("Location", server.redirects[path])
            return self.end_headers()
        if path not in server.files:
            return self.send_error(404)
        data, start = server.files[path], 0
        if wanted and server.ranges:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(data):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        ends = server.cut.get(path) or [len(data)]
        self.wfile.write(data[start : ends.pop(0)])
        return None

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(downloads, "PAUSE", 0.0)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    running = Server()
    yield running
    running.close()


MESH, BIG, PICTURE = b"mesh" * 50, glb("bear"), np.zeros((4, 4, 3), np.uint8)
ROBOT = {"wx250s.urdf": b"<robot/>", "meshes/base.stl": b"solid" * 9}


def _zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _collection(server: Server, *, checksum: str | None = None) -> Collection:
    robots = [
        Asset(
            collection="robot",
            root="maniskill",
            path=f"robots/widowx/{path}",
            size=len(data),
            sha256=sha(data),
        )
        for path, data in ROBOT.items()
    ]
    return Collection(
        name="robot",
        root="maniskill",
        folder="robots/widowx",
        origin="",
        licence="",
        assets=tuple(robots),
        archive=server.base + "robot.zip",
        archive_sha256=checksum,
    )


@pytest.fixture
def catalog(server: Server) -> Catalog:
    """A small catalogue of every kind of file, which the server has."""
    models = (
        asset_at("more_carrot/002_kitchen shovel_1/collision.obj", size=200, sha256=sha(MESH)),
        asset_at("more_carrot/010_toy bear_1/textured.glb", blob=BEAR[:8], stand_in=sha(b"grey")),
        asset_at("more_plate/008_pizza_1/textured.glb", reduced=sha(glb("512"))),
        asset_at("more_table/imgs/001.png", pixels=sha(PICTURE.tobytes())),
    )
    objects = Collection(
        name="objects", root="rl4vla", folder="", origin="", licence="", assets=models
    )
    server.files = {
        "rl/more_carrot/002_kitchen%20shovel_1/collision.obj": MESH,
        "rl/more_carrot/010_toy%20bear_1/textured.glb": BIG,
        "rl/more_plate/008_pizza_1/textured.glb": glb("2048"),
        "rl/more_table/imgs/001.png": png(PICTURE),
        "robot.zip": _zip(
            {f"ManiSkill-WidowX250S-0.2.0/{path}": data for path, data in ROBOT.items()}
            | {"ManiSkill-WidowX250S-0.2.0/README.md": b"read"}
        ),
    }
    return Catalog(
        mirrors={"github": server.base + "rl/", "hub": server.base + "hub/"},
        collections=(_collection(server), objects),
    )


@pytest.fixture
def folders(tmp_path: Path) -> AssetFolders:
    return AssetFolders(maniskill=tmp_path / "data", rl4vla=tmp_path / "own")


def _fetch(folders: AssetFolders, catalog: Catalog) -> list[str]:
    started: list[str] = []

    def show(number: int, item: Download) -> downloads.Report:
        assert number == len(started) + 1
        started.append(item.label)
        return lambda received, total: None

    fetch(needed_downloads(folders, catalog=catalog), show)
    return started


def test_fetches_what_is_missing_and_nothing_twice(
    server: Server, catalog: Catalog, folders: AssetFolders, tmp_path: Path
) -> None:
    assert len(_fetch(folders, catalog)) == 5
    states = [found.state for found in inspect_all(folders, catalog)]
    assert states == [State.OK] * 4 + [State.UNKNOWN, State.OK]
    assert files_in(tmp_path) == {
        *(f"data/robots/widowx/{path}" for path in ROBOT),  # no README, no archive, no .partial
        *(f"own/{asset.path}" for asset in catalog.collections[1].assets),
    }
    assert needed_downloads(folders, catalog=catalog) == []
    (folders.rl4vla / "more_table/imgs/001.png").write_bytes(b"damaged")
    (folders.rl4vla / "more_plate/008_pizza_1/textured.glb").write_bytes(glb("512"))
    again = ["more_plate/008_pizza_1/textured.glb", "more_table/imgs/001.png"]
    assert _fetch(folders, catalog) == again
    assert needed_downloads(folders, catalog=catalog) == []


def test_progress_counts_to_the_whole(server: Server, tmp_path: Path) -> None:
    server.files["a"] = bytes(200_000)
    told: list[tuple[int, int | None]] = []
    download(
        server.base + "a",
        tmp_path / "a",
        fault=lambda file: "",
        resume=False,
        report=lambda received, total: told.append((received, total)),
    )
    assert told[-1] == (200_000, 200_000)
    assert len(told) > 1


class _Endless(BaseHTTPRequestHandler):
    """Sends as much as is taken, and says what it likes about how much that is."""

    length: str | None = None

    def do_GET(self) -> None:
        self.send_response(200)
        if self.length is not None:
            self.send_header("Content-Length", self.length)
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                self.wfile.write(bytes(100_000))

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.parametrize("length", [None, "x", "-5", "1000000000000000"])
def test_a_server_that_does_not_stop_is_left(length: str | None, tmp_path: Path) -> None:
    handler = type("Handler", (_Endless,), {"length": length})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as endless:
        threading.Thread(target=endless.serve_forever, args=(0.01,), daemon=True).start()
        told: list[int] = []
        with pytest.raises(DownloadError, match="more than the 300,000 bytes it may have"):
            download(
                f"http://127.0.0.1:{endless.server_port}/a",
                tmp_path / "a",
                fault=lambda file: "",
                resume=True,
                limit=300_000,
                report=lambda received, total: told.append(received),
            )
        endless.shutdown()
    assert max(told, default=0) <= 300_000
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_known_size_may_not_be_much_larger(
    server: Server, catalog: Catalog, folders: AssetFolders
) -> None:
    server.files["rl/more_carrot/002_kitchen%20shovel_1/collision.obj"] = bytes(2 << 20)
    with pytest.raises(UserError, match=r"more than the 1,04\d,\d+ bytes it may have"):
        _fetch(folders, catalog)


def test_a_cut_connection_is_continued(
    server: Server, catalog: Catalog, folders: AssetFolders
) -> None:
    path = "rl/more_carrot/002_kitchen%20shovel_1/collision.obj"
    server.cut[path] = [70, 150, 200]
    _fetch(folders, catalog)
    asked = [wanted for name, wanted in server.asked if name == path]
    assert asked == [None, "bytes=70-", "bytes=150-"]
    assert inspect_all(folders, catalog)[2].state is State.OK


def test_what_came_before_an_interruption_is_continued(server: Server, tmp_path: Path) -> None:
    server.files["a"] = bytes(range(100))
    (tmp_path / "a.partial").write_bytes(bytes(range(40)))
    fault = _told_by(bytes(range(100)))
    download(server.base + "a", tmp_path / "a", fault=fault, resume=True)
    assert server.asked == [("a", "bytes=40-")]
    assert (tmp_path / "a").read_bytes() == bytes(range(100))


def _told_by(right: bytes) -> Any:
    return lambda file: "" if file.read_bytes() == right else "wrong"


@pytest.mark.parametrize("left", [b"x" * 40, b"x" * 100, b"x" * 400])
def test_pieces_of_another_file_are_thrown_away(
    server: Server, tmp_path: Path, left: bytes
) -> None:
    server.files["a"] = right = bytes(range(100))
    (tmp_path / "a.partial").write_bytes(left)
    download(server.base + "a", tmp_path / "a", fault=_told_by(right), resume=True)
    assert (tmp_path / "a").read_bytes() == right
    assert server.asked[-1] == ("a", None)


def test_a_server_without_ranges_starts_over(server: Server, tmp_path: Path) -> None:
    server.files["a"], server.ranges = bytes(range(100)), False
    (tmp_path / "a.partial").write_bytes(bytes(40))
    download(server.base + "a", tmp_path / "a", fault=_told_by(bytes(range(100))), resume=True)
    assert len(server.asked) == 1


def test_files_without_a_checksum_are_never_pieced_together(
    server: Server, catalog: Catalog, folders: AssetFolders
) -> None:
    path = "rl/more_plate/008_pizza_1/textured.glb"
    server.cut[path] = [30, 50]
    _fetch(folders, catalog)
    assert [wanted for name, wanted in server.asked if name == path] == [None, None, None]


def test_a_busy_server_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.files["a"], server.failures["a"] = b"mesh", [503, 429]
    download(server.base + "a", tmp_path / "a", fault=_told_by(b"mesh"), resume=False)
    assert len(server.asked) == 3


def test_gives_up_after_three_attempts(server: Server, tmp_path: Path) -> None:
    server.files["a"], server.failures["a"] = b"mesh", [503] * 9
    with pytest.raises(DownloadError, match="503") as refusal:
        download(server.base + "a", tmp_path / "a", fault=_told_by(b"mesh"), resume=False)
    assert len(server.asked) == 3
    assert not refusal.value.unreachable


@pytest.mark.parametrize(
    ("name", "sent", "complaint"),
    [
        ("more_carrot/002_kitchen%20shovel_1/collision.obj", MESH[:-1] + b"x", "SHA-256"),
        ("more_carrot/002_kitchen%20shovel_1/collision.obj", b"<html>", "6 bytes instead of 200"),
        ("more_carrot/010_toy%20bear_1/textured.glb", glb("boar"), "not the original"),
        ("more_plate/008_pizza_1/textured.glb", b"<html>", "not a binary glTF"),
        ("more_plate/008_pizza_1/textured.glb", glb("512"), "at most 512"),
        ("more_table/imgs/001.png", png(PICTURE + 1), "another picture"),
        ("robot.zip", b"<html>", "not a complete zip"),
    ],
)
def test_the_wrong_file_never_takes_its_place(
    server: Server,
    catalog: Catalog,
    folders: AssetFolders,
    tmp_path: Path,
    name: str,
    sent: bytes,
    complaint: str,
) -> None:
    path = name if name == "robot.zip" else f"rl/{name}"
    server.files[path] = sent
    with pytest.raises(UserError, match=re.escape(complaint)) as refusal:
        _fetch(folders, catalog)
    assert "\n" not in str(refusal.value)
    assert [asked for asked, _ in server.asked].count(path) == 1  # again would be the same
    count = len(ROBOT) + len(catalog.collections[1].assets)
    lost = len(ROBOT) if name == "robot.zip" else 1
    assert len(files_in(tmp_path)) == count - lost  # all others came, and nothing lies around


def test_what_is_here_stays_until_something_better_has_come(
    server: Server, catalog: Catalog, folders: AssetFolders
) -> None:
    kept = folders.rl4vla / "more_plate/008_pizza_1/textured.glb"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(glb("512"))
    del server.files["rl/more_plate/008_pizza_1/textured.glb"]
    with pytest.raises(UserError, match=r"404.*`roadvla assets check`"):
        _fetch(folders, catalog)
    assert kept.read_bytes() == glb("512")


def test_without_a_network_it_ends_in_one_line(
    server: Server, catalog: Catalog, folders: AssetFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.close()
    slept: list[float] = []
    monkeypatch.setattr(downloads.time, "sleep", slept.append)
    with pytest.raises(UserError, match=r"refused.*nor 4 more.*without a network") as refusal:
        _fetch(folders, catalog)
    assert str(folders.maniskill) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert len(slept) == 3  # one server, asked three times; its other files are not tried


def test_the_hubs_endpoint_is_honoured(
    server: Server, catalog: Catalog, folders: AssetFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://hf-mirror.example/")
    hub = replace(catalog, mirrors={"hub": "https://huggingface.co/datasets/x/carrot/"})
    urls = [item.url for item in needed_downloads(folders, mirror="hub", catalog=hub)]
    assert urls[0] == server.base + "robot.zip"
    assert urls[1].startswith(
        "https://hf-mirror.example/datasets/x/carrot/more_carrot/002_kitchen%20"
    )


def test_only_https_beyond_this_machine(server: Server, tmp_path: Path) -> None:
    server.redirects["a"] = "http://example.invalid/a"
    for url in ("http://example.invalid/a", "file:///etc/passwd", server.base + "a"):
        with pytest.raises(DownloadError, match="not an https address"):
            download(url, tmp_path / "a", fault=lambda file: "", resume=False)
    assert files_in(tmp_path) == set()


# Archives


def _top(files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"widowx/{path}": data for path, data in files.items()}


def _with_archive(catalog: Catalog, server: Server, data: bytes, *, known: bool) -> Catalog:
    server.files["robot.zip"] = data
    group = _collection(server, checksum=sha(data) if known else None)
    return replace(catalog, collections=(group,))


def test_a_verified_archive_is_unpacked_whole_around_what_is_there(
    server: Server, catalog: Catalog, folders: AssetFolders
) -> None:
    robot = folders.maniskill / "robots/widowx"
    (robot / "meshes").mkdir(parents=True)
    (robot / "README.md").write_text("my own")
    (robot / "meshes/base.stl").write_bytes(b"damaged")
    more = {"README.md": b"theirs", "custom/more.json": b"{}"}
    data = _zip(_top(ROBOT | more) | {"__MACOSX/junk": b"junk"})
    _fetch(folders, _with_archive(catalog, server, data, known=True))
    assert (robot / "README.md").read_text() == "my own"
    assert (robot / "meshes/base.stl").read_bytes() == ROBOT["meshes/base.stl"]
    assert files_in(folders.maniskill) == {
        f"robots/widowx/{path}" for path in (*ROBOT, "README.md", "custom/more.json")
    }


def test_an_archive_with_a_wrong_checksum_is_not_unpacked(
    server: Server, catalog: Catalog, folders: AssetFolders, tmp_path: Path
) -> None:
    small = _with_archive(catalog, server, _zip(_top(ROBOT)), known=True)
    server.files["robot.zip"] = _zip(_top(ROBOT | {"x": b"x"}))
    with pytest.raises(UserError, match="its SHA-256 is not"):
        _fetch(folders, small)
    assert files_in(tmp_path) == set()


def _zip_with(name: str, mode: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, data in _top(ROBOT).items():
            archive.writestr(path, data)
        member = zipfile.ZipInfo(name)
        member.external_attr = mode << 16
        archive.writestr(member, b"/etc/passwd")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (_zip_with("widowx/../../../../evil", 0o644), "leads out"),
        (_zip_with("widowx//tmp/evil", 0o644), "leads out"),
        (_zip_with("widowx/meshes/link", stat.S_IFLNK | 0o777), "is a link"),
        (_zip(_top(ROBOT | {"wx250s.urdf": b"<evil/>"})), "7 bytes instead of 8"),
        (_zip(_top({"wx250s.urdf": ROBOT["wx250s.urdf"]})), "lacks robots/widowx/meshes/base.stl"),
        (_zip({"other": b""}), "lacks"),
    ],
    ids=["up", "absolute", "link", "wrong", "lacking", "other"],
)
@pytest.mark.parametrize("known", [True, False])
def test_bad_archives_are_refused(
    server: Server,
    catalog: Catalog,
    folders: AssetFolders,
    tmp_path: Path,
    data: bytes,
    complaint: str,
    known: bool,
) -> None:
    with pytest.raises(UserError, match=re.escape(complaint)):
        _fetch(folders, _with_archive(catalog, server, data, known=known))
    good = {f"data/robots/widowx/{path}" for path in ROBOT}
    assert files_in(tmp_path) <= good
    for path in files_in(tmp_path):
        assert (tmp_path / path).read_bytes() == ROBOT[path.removeprefix("data/robots/widowx/")]


def test_an_archive_that_came_before_is_not_downloaded_again(
    server: Server, catalog: Catalog, folders: AssetFolders
) -> None:
    small = _with_archive(catalog, server, _zip(_top(ROBOT)), known=True)
    file = folders.maniskill / "robots/widowx.zip"
    file.parent.mkdir(parents=True)
    file.write_bytes(server.files["robot.zip"])
    _fetch(folders, small)
    assert server.asked == []
    assert needed_downloads(folders, catalog=small) == []


def test_fetch_command(
    server: Server,
    catalog: Catalog,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for module in ("fetch", "inspection"):
        monkeypatch.setattr(f"roadvla.envs.maniskill.{module}.read_catalog", lambda: catalog)
    nowhere = point_nowhere(monkeypatch, tmp_path)
    assets("fetch")
    said = capsys.readouterr().out
    assert f"robot        2 ok  in {nowhere}" in said
    assert "3 ok, 1 not verified" in said
