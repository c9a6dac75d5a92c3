"""Assets: the catalogue names all of them, and what is wrong with one is noticed."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from ms_made_assets import BEAR, asset_at, glb, png, point_nowhere, sha
from ms_recorded import ASSETS, SHARED, needs_assets

from roadvla.envs.maniskill.assets import COLLISION, VISUALS, AssetFolders, asset_folders, require
from roadvla.envs.maniskill.catalog import Asset, read_catalog
from roadvla.envs.maniskill.inspection import (
    State,
    count_states,
    inspect,
    inspect_all,
    stand_ins_in,
)
from roadvla.envs.maniskill.objects import OBJECTS, RECEPTACLES, TABLES, TEXTURES
from roadvla.errors import FailedCheckError, UserError
from roadvla.experiments.asset_commands import assets

PACK = AssetFolders(maniskill=ASSETS.parents[1], rl4vla=ASSETS)


def test_every_model_and_picture_is_in_the_catalogue() -> None:
    paths = {asset.path for asset in read_catalog().assets if asset.root == "rl4vla"}
    for folder, models in (("more_carrot", OBJECTS), ("more_plate", RECEPTACLES)):
        assert f"{folder}/model_db.json" in paths
        for model in models:
            assert f"{folder}/{model.folder}/{COLLISION}" in paths
            assert paths & {f"{folder}/{model.folder}/{name}" for name in VISUALS}
    assert {f"more_table/imgs/{name}" for name in TABLES} <= paths
    assert {f"more_table/textures/{name}" for name in TEXTURES} <= paths
    assert "more_table/model_db.json" in paths


def test_robot_and_stage_are_where_the_scene_looks(tmp_path: Path) -> None:
    folders = AssetFolders(maniskill=tmp_path / "m", rl4vla=tmp_path / "r")
    places = [asset.below(folders) for asset in read_catalog().assets]
    assert len(places) == len(set(places)) == 166
    assert {folders.robot, folders.stage} <= set(places)


@needs_assets
def test_files_that_meshes_refer_to_are_in_the_catalogue() -> None:
    known = {asset.below(PACK).resolve() for asset in read_catalog().assets}
    wanted = []
    for path in known:
        if path.suffix == ".urdf":
            wanted += [
                path.parent / name for name in re.findall(r'filename="([^"]+)"', _text(path))
            ]
        if path.suffix == ".mtl" and path.stem != "collision":  # those are not seen
            wanted += [path.parent / name for name in re.findall(r"map_\w+ (\S+)", _text(path))]
        if path.suffix == ".dae":
            images = re.findall(r"<init_from>([^<]+\.png)</init_from>", _text(path))
            wanted += [path.parent / name for name in images]
    assert len(wanted) == 22 + 10 + 2  # of the URDF, the robot's meshes, and two models' meshes
    assert {path.resolve() for path in wanted} <= known


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


@needs_assets
def test_checksums_are_those_of_the_test_pack() -> None:
    lines = (SHARED / "assets" / "SHA256SUMS").read_text().splitlines()
    sums = {line.split("  ", 1)[1]: line.split()[0] for line in lines}
    for asset in read_catalog().assets:
        there = sums["./" + asset.below(PACK).relative_to(SHARED / "assets").as_posix()]
        known = {asset.sha256, asset.reduced, asset.stand_in} - {None}
        assert known == {there} or asset.pixels


@needs_assets
def test_the_test_pack_is_told_from_the_originals() -> None:
    found = inspect_all(PACK)
    assert count_states(found) == "142 ok, 20 reduced copy, 4 stand-in"
    assert [item.asset.path for item in stand_ins_in(PACK)] == [
        item.asset.path for item in found if item.state is State.STAND_IN
    ]


def test_archives_are_those_that_maniskill_downloads() -> None:
    sources = pytest.importorskip("mani_skill.utils.assets.data").DATA_SOURCES
    archives = [group for group in read_catalog().collections if group.archive]
    assert [group.uid for group in archives] == ["widowx250s", "bridge_v2_real2sim"]
    for group in archives:
        source = sources[group.uid]
        assert (group.archive, group.folder) == (source.url, source.target_path)
        assert group.archive_sha256 == source.checksum


def test_a_catalogue_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    row = {"name": "x", "root": "rl4vla", "folder": "", "origin": "", "licence": ""}
    for path in ("../up.obj", "/etc/passwd", "a/../../up.obj", "a\\b.obj"):
        file = tmp_path / f"{hashlib.md5(path.encode()).hexdigest()}.json"
        rows = [row | {"files": [{"path": path}]}]
        file.write_text(json.dumps({"mirrors": {}, "collections": rows}))
        with pytest.raises(UserError, match="leads out"):
            read_catalog(file)


# What is found


def _state(asset: Asset, data: bytes, tmp_path: Path) -> tuple[State, str]:
    path = tmp_path / "file"
    path.write_bytes(data)
    found = inspect(asset, path)
    return found.state, found.note


def test_missing(tmp_path: Path) -> None:
    assert inspect(asset_at("a.obj", size=1, sha256="0"), tmp_path / "a.obj").state is State.MISSING
    (tmp_path / "a.obj").mkdir()
    assert inspect(asset_at("a.obj", size=1, sha256="0"), tmp_path / "a.obj").state is State.MISSING


def test_files_with_a_checksum(tmp_path: Path) -> None:
    asset = asset_at("a.obj", size=4, sha256=sha(b"mesh"))
    assert _state(asset, b"mesh", tmp_path) == (State.OK, "")
    assert _state(asset, b"mess", tmp_path)[0] is State.DAMAGED
    assert _state(asset, b"mes", tmp_path) == (State.DAMAGED, "3 bytes instead of 4")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n"
    assert "Git LFS" in _state(asset, pointer, tmp_path)[1]


def test_meshes_known_by_their_form(tmp_path: Path) -> None:
    copy, plain = glb("512"), glb("grey")
    asset = asset_at("a/textured.glb", reduced=sha(copy), stand_in=sha(plain))
    assert _state(asset, copy, tmp_path)[0] is State.REDUCED
    assert _state(asset, plain, tmp_path)[0] is State.STAND_IN
    assert _state(asset, glb("whole"), tmp_path)[0] is State.UNKNOWN
    assert _state(asset, b"", tmp_path)[0] is State.DAMAGED
    assert _state(asset, b"<html>", tmp_path)[0] is State.DAMAGED
    assert _state(asset, copy[:-1], tmp_path)[0] is State.DAMAGED
    assert _state(asset, copy + b" ", tmp_path)[0] is State.DAMAGED
    assert _state(asset, copy.replace(b"meshes", b"muddle"), tmp_path)[0] is State.DAMAGED
    assert _state(asset, copy.replace(b'{"asset', b'["asset'), tmp_path)[0] is State.DAMAGED
    assert "Git LFS" in _state(asset, b"version https://git-lfs", tmp_path)[1]


def test_meshes_known_by_their_git_object(tmp_path: Path) -> None:
    asset = asset_at("a/textured.glb", blob=BEAR[:8])
    assert _state(asset, glb("bear"), tmp_path) == (State.OK, "")
    state, note = _state(asset, glb("boar"), tmp_path)
    assert state is State.UNKNOWN
    assert BEAR[:8] in note


def test_pictures_are_known_by_their_pixels(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    asset = asset_at("more_table/imgs/a.png", pixels=sha(values.tobytes()))
    alpha = np.full((6, 8, 1), 7, np.uint8)
    whole = png(values, compress_level=1)
    assert _state(asset, whole, tmp_path) == (State.OK, "")
    assert _state(asset, png(np.concatenate([values, alpha], axis=2)), tmp_path)[0] is State.OK
    assert _state(asset, whole[: len(whole) // 2], tmp_path)[0] is State.DAMAGED
    values[3, 4, 1] ^= 1
    state, note = _state(asset, png(values), tmp_path)
    assert (state, note) == (State.DAMAGED, "another picture than the original")


def test_require_says_how_to_get_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"`roadvla assets fetch`.*--stand-ins"):
        require(tmp_path / "textured.glb")
    with pytest.raises(UserError, match=r"`roadvla assets fetch`") as refusal:
        require(tmp_path / COLLISION)
    assert "--stand-ins" not in str(refusal.value)  # nothing stands in for it
    (tmp_path / COLLISION).touch()
    assert require(tmp_path / COLLISION) == tmp_path / COLLISION


def test_folders_follow_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MS_ASSET_DIR", str(tmp_path / "ms"))
    monkeypatch.delenv("ROADVLA_ASSETS", raising=False)
    assert asset_folders().rl4vla == tmp_path / "ms" / "data" / "tasks" / "rl4vla"
    monkeypatch.setenv("ROADVLA_ASSETS", str(tmp_path / "own"))
    assert asset_folders().rl4vla == tmp_path / "own"
    assert asset_folders().maniskill == tmp_path / "ms" / "data"


def test_list_names_sources_licences_and_checksums(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = point_nowhere(monkeypatch, tmp_path)
    assets("list")
    said = capsys.readouterr().out
    for group in read_catalog().collections:
        assert f"{group.name}: {nowhere}" in said
        assert group.licence in said
    assert "github.com/haosulab" in said
    assert "55f966d6bf721342518ff8609cc1388cc4e80ef9" in said
    assert "sha256" not in said
    assets("list", files=True)
    said = capsys.readouterr().out
    for asset in read_catalog().assets:
        assert asset.path in said
        assert (asset.checksum or "no checksum known") in said


def test_check_refuses_an_empty_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = point_nowhere(monkeypatch, tmp_path)
    with pytest.raises(FailedCheckError, match=r"166 missing.*roadvla assets fetch"):
        assets("check")
    said = capsys.readouterr().out
    assert said.count("no such file") == 10
    assert not nowhere.exists()


@needs_assets
def test_check_of_the_test_pack_names_its_stand_ins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MS_ASSET_DIR", str(SHARED / "assets"))
    monkeypatch.delenv("ROADVLA_ASSETS", raising=False)
    assets("check")
    said = capsys.readouterr().out
    assert said.count("\nstand-in: ") == 4
    assert "20 reduced copy, 4 stand-in: frames and results with these are not" in said
    assets("check", files=True)
    assert capsys.readouterr().out.count("ok: ") == 142
