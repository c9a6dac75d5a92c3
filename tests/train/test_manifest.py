from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoint import FORMAT_1, SETTINGS, save, trained

from probes import load_table
from roadvla.errors import UserError
from roadvla.train.checkpoint import (
    Progress,
    good_checkpoint,
    latest_checkpoint,
    read_progress,
    restore_optimizer,
)
from roadvla.train.listed import DamagedError
from roadvla.train.manifest import FORMAT, seal, verify
from roadvla.train.update import make_optimizer
from sealing import reseal, sealed_by

STORED = ("policy.json", "policy.safetensors", "state.json")
FILES = (
    "manifest.json",
    "optimizer.safetensors",
    "policy.json",
    "policy.safetensors",
    "state.json",
)


def two(root):
    state = trained()
    return save(root, state, 1), save(root, state, 2)


def flip(path, at=-5):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def test_the_manifest_lists_every_other_file(tmp_path):
    _, folder = two(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == FORMAT == 2
    assert tuple(sorted([*manifest["files"], "manifest.json"])) == FILES
    assert tuple(sorted(path.name for path in folder.iterdir())) == FILES
    verify(folder)


@pytest.mark.parametrize("damage", ["flip", "shorten", "empty", "remove"])
@pytest.mark.parametrize("name", FILES)
def test_any_damage_is_told_and_the_one_before_is_used(tmp_path, name, damage):
    before, newest = two(tmp_path)
    path = newest / name
    if damage == "flip":
        flip(path)
    elif damage == "remove":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-3] if damage == "shorten" else b"")
    with pytest.raises(DamagedError, match=name.replace(".", r"\.")):
        verify(newest)
    found, passed_over = good_checkpoint(tmp_path)
    assert found == before
    assert name in passed_over
    assert "iteration_000002" in passed_over
    if damage == "shorten" and name != "manifest.json":
        assert re.search(r"it has \d+ bytes, not \d+", passed_over)
    assert latest_checkpoint(tmp_path) == before  # mended: who evaluates the run gets this one


def test_no_flipped_bit_of_the_manifest_goes_unnoticed(tmp_path):
    _, newest = two(tmp_path)
    path = newest / "manifest.json"
    for at in range(0, path.stat().st_size, 3):
        flip(path, at)
        with pytest.raises(DamagedError, match=r"manifest\.json"):
            verify(newest)
        flip(path, at)
    verify(newest)


def test_a_checkpoint_that_is_gone_is_told(tmp_path):
    before, newest = two(tmp_path)
    shutil.rmtree(newest)
    found, passed_over = good_checkpoint(tmp_path)
    assert found == before
    assert "iteration_000002" in passed_over


@pytest.mark.parametrize("text", ["", "[]", '{"folder": 3}', None])
def test_a_damaged_pointer_is_mended_and_told(tmp_path, text):
    _, newest = two(tmp_path)
    if text is None:
        (tmp_path / "latest.json").unlink()
    else:
        (tmp_path / "latest.json").write_text(text)
    found, passed_over = good_checkpoint(tmp_path)
    assert found == latest_checkpoint(tmp_path) == newest
    assert ("latest.json" in passed_over) == (text is not None)
    assert good_checkpoint(tmp_path) == (newest, "")


def test_a_checkpoint_put_in_place_but_not_yet_named_is_used(tmp_path):
    _, newest = two(tmp_path)
    (tmp_path / "latest.json").write_text('{"iteration": 1, "folder": "iteration_000001"}')
    assert good_checkpoint(tmp_path) == (newest, "")


def test_with_none_left_the_run_is_not_begun_again_in_silence(tmp_path):
    for folder in two(tmp_path):
        flip(folder / "policy.safetensors")
    with pytest.raises(UserError, match=r"no checkpoint that can be used.*000002.*000001") as error:
        good_checkpoint(tmp_path)
    assert not isinstance(error.value, DamagedError)


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert good_checkpoint(tmp_path / "checkpoints") == (None, "")


def test_a_newer_format_is_refused_and_not_taken_for_damage(tmp_path, monkeypatch):
    monkeypatch.setattr("roadvla.train.manifest.FORMAT", 3)
    two(tmp_path)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"format 3.*newer roadvla") as error:
        good_checkpoint(tmp_path)
    assert not isinstance(error.value, DamagedError)


def test_a_damaged_one_that_was_passed_over_goes_with_the_next_save(tmp_path):
    state = trained()
    for iteration in (3, 6, 9):
        save(tmp_path, state, iteration)
    flip(tmp_path / "iteration_000009/state.json")
    assert good_checkpoint(tmp_path)[0] == tmp_path / "iteration_000006"
    save(tmp_path, state, 7)
    assert sorted(path.name for path in tmp_path.glob("*_*")) == [
        *("iteration_000006", "iteration_000007")
    ]


# Whoever changes a manifest can recompute its checksum too.

SIZED = {"size": 3, "sha256": "0" * 64}
ODD_LISTS = [
    *(None, [], "x", 3, [["a", SIZED]]),
    *({"a": None}, {"a": []}, {"a": {}}, {"a": {"size": 3}}, {"a": {"sha256": "0" * 64}}),
    *({"a": {**SIZED, "size": size}} for size in (None, -1, 0.5, True, "3", 1e300)),
    *({"a": {**SIZED, "sha256": sha}} for sha in (None, 3, "", "0" * 63, "G" * 64, "A" * 64, [])),
    {"a": {**SIZED, "mode": 0}},
    {f"f{number}": SIZED for number in range(2000)},
]
ODD_NAMES = [
    *("", ".", "..", "../a", "../../../../etc/hostname", "a/../../b", "a/..", "./a", "a//b", "a/"),
    *("/etc/hostname", "/dev/zero", "C:a", "a\\b", "..\\a", "a\x00b", "a\nb", "\x1b[2J", "é"),
    *("\ud800", "x" * 300, "a" + "/a" * 200),
]


def _resealed(folder, files, *, keep=True):
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    data["files"] = {**data["files"], **files} if keep else files
    path.write_text(json.dumps(sealed_by(data)))


def _fall_back(before, newest, says):
    for read in (verify, seal, read_progress):
        with pytest.raises(DamagedError, match=says):
            read(newest)
    found, passed_over = good_checkpoint(newest.parent)
    assert found == before
    assert "iteration_000002" in passed_over
    assert "\n" not in passed_over


@pytest.mark.parametrize("files", ODD_LISTS, ids=lambda files: repr(files)[:40])
def test_a_resealed_list_that_is_none_is_damage(tmp_path, files):
    before, newest = two(tmp_path)
    _resealed(newest, files, keep=isinstance(files, dict) and len(files) < 9)
    _fall_back(before, newest, r"manifest\.json is damaged: (it does not|the)")


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_a_resealed_name_that_leads_elsewhere_is_not_followed(tmp_path, name):
    before, newest = two(tmp_path)
    _resealed(newest, {name: SIZED})
    _fall_back(before, newest, "which is no name of a file inside")


@pytest.mark.parametrize("name", ["state.json", "optimizer.safetensors", "policy.json"])
def test_a_resealed_list_without_a_needed_file_is_damage(tmp_path, name):
    before, newest = two(tmp_path)
    data = json.loads((newest / "manifest.json").read_text())
    del data["files"][name]
    (newest / "manifest.json").write_text(json.dumps(sealed_by(data)))
    _fall_back(before, newest, f"does not list {name}")
    _resealed(newest, {}, keep=False)
    _fall_back(before, newest, "does not list state")


def test_a_resealed_list_without_weights_is_damage(tmp_path):
    before, newest = two(tmp_path)
    (newest / "policy.safetensors").unlink()
    reseal(newest)
    _fall_back(before, newest, "lists no weights of a policy")


@pytest.mark.parametrize("kind", ["link", "loop", "pipe", "folder", "device"])
def test_a_listed_file_that_is_no_plain_one_inside_is_not_opened(tmp_path, kind):
    before, newest = two(tmp_path)
    path = newest / "policy.safetensors"
    outside = tmp_path / "outside"
    outside.write_bytes(path.read_bytes())  # size and checksum agree
    path.unlink()
    if kind == "link":
        path.symlink_to(outside)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    says = {"pipe": "no plain file", "link": "leads out", "device": "leads out"}.get(kind, "")
    for read in (verify, seal):
        with pytest.raises(DamagedError, match=rf"policy\.safetensors is.*{says}"):
            read(newest)
    assert good_checkpoint(tmp_path)[0] == before


def test_a_checkpoint_s_own_folder_may_be_a_link(tmp_path):
    _, newest = two(tmp_path / "there")
    (tmp_path / "here").symlink_to(tmp_path / "there")
    verify(tmp_path / "here" / newest.name)


@pytest.mark.parametrize("form", [None, "2", [], {}, True, 2.0, 0, -1, float("nan")])
def test_a_format_that_never_was_is_damage(tmp_path, form):
    before, newest = two(tmp_path)
    data = json.loads((newest / "manifest.json").read_text())
    (newest / "manifest.json").write_text(json.dumps(sealed_by({**data, "format": form})))
    _fall_back(before, newest, "manifest.json has format")
    (newest / "manifest.json").unlink()
    state = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps({**state, "format": form}))
    with pytest.raises(DamagedError, match=r"state\.json has format"):
        verify(newest)


@pytest.mark.parametrize("depth", range(200, 3000, 200))
def test_a_manifest_nested_deep_is_damage(tmp_path, depth):
    _, newest = two(tmp_path)
    (newest / "manifest.json").write_text('{"files": ' + "[" * depth + "]" * depth + "}")
    with pytest.raises(DamagedError, match=r"manifest\.json"):
        verify(newest)


@pytest.mark.parametrize(
    "sums", [3, [], "x", {"../../etc/hostname": "0" * 64}, {"/dev/zero": "0" * 64}, {"a": None}]
)
def test_odd_checksums_of_format_1_are_damage(tmp_path, sums):
    folder = Path(shutil.copytree(FORMAT_1, tmp_path / "checkpoints")) / "iteration_000006"
    (folder / "policy.json").write_text(json.dumps({"sha256": sums}))
    with pytest.raises(DamagedError, match="is damaged: "):
        verify(folder)


def test_format_1_needs_the_optimiser_and_weights(tmp_path):
    folder = Path(shutil.copytree(FORMAT_1, tmp_path / "checkpoints")) / "iteration_000006"
    (folder / "policy.safetensors").rename(tmp_path / "kept")
    with pytest.raises(DamagedError, match="holds no weights"):
        verify(folder)
    (tmp_path / "kept").rename(folder / "policy.safetensors")
    state = json.loads((folder / "state.json").read_text())
    del state["sha256"]
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(DamagedError, match=r"checksum of optimizer\.safetensors is no SHA-256"):
        verify(folder)


# Format 1, as version 0.1.0 wrote it before there was a manifest; the folder is never rewritten.


def test_a_checkpoint_of_format_1_is_restored_exactly():
    folder, passed_over = good_checkpoint(FORMAT_1)
    assert folder == FORMAT_1 / "iteration_000006"
    assert passed_over == ""
    assert not (folder / "manifest.json").exists()
    expected = Progress(iteration=6, env_steps=384, episodes=96, config="f0e96f72f7ea9bf0")
    assert read_progress(folder) == expected
    policy, generator = load_table(folder), torch.Generator()
    optimizer = make_optimizer(policy, SETTINGS)
    assert restore_optimizer(folder, policy, optimizer, generator) == {}
    written = load_file(folder / "optimizer.safetensors")
    assert torch.equal(generator.get_state(), written.pop("generator"))
    for name, parameter in policy.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq", "step"):
            restored = optimizer.state[parameter][moment]
            assert torch.equal(restored, written.pop(f"{name}.{moment}"))
            assert restored.abs().sum() > 0
    assert written == {}


@pytest.mark.parametrize("name", ["optimizer.safetensors", "state.json", "policy.json"])
def test_damage_to_a_checkpoint_of_format_1_is_noticed(tmp_path, name):
    root = Path(shutil.copytree(FORMAT_1, tmp_path / "checkpoints"))
    path = root / "iteration_000006" / name
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=f"no checkpoint that can be used.*{name}"):
        good_checkpoint(root)


def test_the_policy_s_own_checksum_is_part_of_format_1_where_it_has_one(tmp_path):
    folder = Path(shutil.copytree(FORMAT_1, tmp_path / "checkpoints")) / "iteration_000006"
    (folder / "policy.json").write_text(json.dumps({"sha256": "0" * 64}))
    with pytest.raises(DamagedError, match=r"policy\.safetensors is damaged"):
        verify(folder)
    (folder / "policy.json").write_text(json.dumps({"sha256": {"adapter.safetensors": "0" * 64}}))
    with pytest.raises(DamagedError, match=r"adapter\.safetensors is missing"):
        verify(folder)


def test_a_run_goes_on_from_format_1_and_writes_today_s(tmp_path):
    root = Path(shutil.copytree(FORMAT_1, tmp_path / "checkpoints"))
    save(root, trained(), 7)
    assert good_checkpoint(root)[0] == root / "iteration_000007"
    flip(root / "iteration_000007/optimizer.safetensors")
    assert good_checkpoint(root)[0] == root / "iteration_000006"
