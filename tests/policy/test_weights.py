"""Policies on disk: a bit-identical round trip, and one clear line for each kind of damage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from roadvla.errors import UserError
from roadvla.policy import (
    NormStats,
    TinyArchitecture,
    TinyVLA,
    load_backbone,
    load_policy,
    load_tiny,
    policy_kind,
    save_policy,
    weights,
)
from roadvla.types import Observation


@pytest.fixture
def folder(policy: TinyVLA, tmp_path: Path) -> Path:
    save_policy(policy, tmp_path / "saved")
    return tmp_path / "saved"


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "policy.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))


def reweigh(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the weights and repair the checksum, as another program would have written them."""
    path = folder / "policy.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    rewrite(folder, lambda d: d.update(sha256=digest))


def fails(folder: Path, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        load_policy(folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in (*parts, str(folder)):
        assert part in message


def test_round_trip_is_bit_identical(
    policy: TinyVLA, observation: Observation, folder: Path
) -> None:
    loaded = load_policy(folder)
    assert loaded.architecture == policy.architecture
    assert loaded.norm_stats == policy.norm_stats
    assert loaded.vision_frozen
    assert loaded.shares_vision(policy)
    mine, theirs = policy.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    runs = [
        p.act(observation, temperature=1.0, generator=torch.Generator().manual_seed(0))
        for p in (policy, loaded)
    ]
    assert torch.equal(runs[0].action_tokens, runs[1].action_tokens)
    assert torch.equal(runs[0].log_probs, runs[1].log_probs)


def test_another_architecture_and_statistics_come_back(tmp_path: Path) -> None:
    stats = NormStats(q01=(0.0,) * 7, q99=(0.1,) * 7, mask=(True,) * 6 + (False,))
    architecture = TinyArchitecture(width=32, heads=2, layers=1)
    save_policy(TinyVLA(architecture, stats), tmp_path)
    loaded = load_policy(tmp_path)
    assert loaded.architecture == architecture
    assert loaded.norm_stats == stats


def test_saved_files_are_small_and_nothing_else_is_left(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["policy.json", "policy.safetensors"]
    assert (folder / "policy.safetensors").stat().st_size < 2_000_000
    description = json.loads((folder / "policy.json").read_text())
    assert (description["format"], description["kind"]) == (1, "tiny")


def test_saving_twice_gives_the_same_bytes(policy: TinyVLA, folder: Path) -> None:
    before = [p.read_bytes() for p in sorted(folder.iterdir())]
    save_policy(policy, folder)
    assert before == [p.read_bytes() for p in sorted(folder.iterdir())]


def test_a_failed_save_leaves_the_old_policy(
    policy: TinyVLA, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(OSError, match="No space"):
        save_policy(TinyVLA(), folder)
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_no_folder(tmp_path: Path) -> None:
    fails(tmp_path / "nowhere", "no policy at", "policy.json")


@pytest.mark.parametrize("name", ["policy.json", "policy.safetensors"])
def test_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    fails(folder, name, "missing")


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_truncated_weights(folder: Path, keep: int) -> None:
    path = folder / "policy.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    fails(folder, "policy.safetensors", "damaged or cut short")


def test_a_flipped_bit(folder: Path) -> None:
    path = folder / "policy.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(bytes(data))
    fails(folder, "does not match the checksum")


def test_files_of_two_saves(folder: Path, tmp_path: Path) -> None:
    save_policy(TinyVLA(), tmp_path / "other")
    (tmp_path / "other" / "policy.safetensors").replace(folder / "policy.safetensors")
    fails(folder, "different saves")


@pytest.mark.parametrize("text", ["", "{", "\x00\x01", '{"format": 1'])
def test_description_is_not_json(folder: Path, text: str) -> None:
    (folder / "policy.json").write_text(text)
    fails(folder, "is not JSON")


def test_description_is_not_text(folder: Path) -> None:
    (folder / "policy.json").write_bytes(b"\xff\xfe\xfa")
    fails(folder, "is not JSON")


def test_description_is_not_an_object(folder: Path) -> None:
    (folder / "policy.json").write_text("[]")
    fails(folder, "expected a JSON object")


def test_unknown_format_and_kind(folder: Path) -> None:
    rewrite(folder, lambda d: d.update(kind="pi0"))
    fails(folder, "'pi0'", "'tiny' and 'openvla'")
    rewrite(folder, lambda d: d.update(format=2))
    fails(folder, "format 2", "reads 1")


@pytest.mark.parametrize("name", ["architecture", "norm_stats", "sha256"])
def test_missing_entry(folder: Path, name: str) -> None:
    rewrite(folder, lambda d: d.pop(name))
    fails(folder, repr(name), "missing or malformed")


def test_architecture_with_other_fields(folder: Path) -> None:
    rewrite(folder, lambda d: d["architecture"].update(depth=3))
    fails(folder, "unexpected: depth")
    rewrite(folder, lambda d: d["architecture"].pop("width"))
    fails(folder, "missing: width", "unexpected: depth")


@pytest.mark.parametrize("value", [0, -1, 1.5, "64", None, True, 10**9])
def test_architecture_with_impossible_values(folder: Path, value: object) -> None:
    rewrite(folder, lambda d: d["architecture"].update(mlp=value))
    fails(folder, "mlp", repr(value), "whole number")


def test_architecture_that_does_not_divide(folder: Path) -> None:
    rewrite(folder, lambda d: d["architecture"].update(heads=5))
    fails(folder, "not a multiple of 5 heads")


def test_weights_of_another_architecture(folder: Path) -> None:
    rewrite(folder, lambda d: d["architecture"].update(value_width=64))
    fails(folder, "wrong shape", "value_head.0.weight is (128, 64)", "expected (64, 64)")


@pytest.mark.parametrize(
    "sizes",
    [
        *({name: 1 << 16} for name in ("width", "vision_width", "layers", "vision_blocks")),
        {"image_size": 1 << 16, "patch": 1},
        {"patch": 1 << 14, "image_size": 1 << 14},
        {"queries": 1 << 16, "frequencies": 1 << 16, "mlp": 1 << 16, "vision_stem": 1 << 16},
    ],
    ids=lambda sizes: " ".join(sizes),
)
def test_absurd_sizes_are_refused_before_memory_is_asked_for(
    folder: Path, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def outlined(*arguments: Any) -> TinyVLA:
        assert torch.get_default_device().type == "meta"
        return TinyVLA(*arguments)

    monkeypatch.setattr(weights, "TinyVLA", outlined)
    rewrite(folder, lambda d: d["architecture"].update(sizes))
    fails(folder, "policy.json")


@pytest.mark.parametrize("kind", ["F8_E8M0", "F4"])
def test_weights_of_an_unknown_kind(folder: Path, kind: str) -> None:
    header = json.dumps({"x": {"dtype": kind, "shape": [4], "data_offsets": [0, 4]}}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(4)
    (folder / "policy.safetensors").write_bytes(data)
    rewrite(folder, lambda d: d.update(sha256=hashlib.sha256(data).hexdigest()))
    fails(folder, "policy.safetensors")


def test_missing_unexpected_and_mistyped_weights(folder: Path) -> None:
    reweigh(folder, lambda s: s.update(extra=torch.zeros(1)))
    fails(folder, "unexpected: extra")
    reweigh(folder, lambda s: s.pop("words"))
    fails(folder, "missing: words", "unexpected: extra")
    reweigh(folder, lambda s: s.update({"norm.bias": s["norm.bias"].double()}))
    fails(folder, "norm.bias is (64,) torch.float64")


def test_many_missing_weights_are_counted(folder: Path) -> None:
    reweigh(folder, lambda s: [s.pop(name) for name in list(s) if name.startswith("layers")])
    fails(folder, "and 20 more")


def test_statistics_of_another_robot(folder: Path) -> None:
    entry = {"action": {"q01": [0.0] * 6, "q99": [1.0] * 6, "mask": [True] * 6}}
    rewrite(folder, lambda d: d.update(norm_stats=entry))
    fails(folder, "6 dimensions", "7")


def test_backbone_comes_from_its_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "BACKBONE_FOLDER", folder)
    assert load_backbone().architecture == TinyArchitecture()
    monkeypatch.setattr(weights, "BACKBONE_FOLDER", tmp_path / "none")
    with pytest.raises(UserError, match="roadvla pretrain"):
        load_backbone()


def test_the_kind_of_a_folder(folder: Path, tmp_path: Path) -> None:
    assert policy_kind(folder) == "tiny"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert policy_kind(adapter) == "openvla"
    (adapter / "policy.json").write_text('{"format": 1, "kind": "openvla"}')
    assert policy_kind(adapter) == "openvla"
    with pytest.raises(UserError, match="holds a policy of kind 'openvla': pass --policy openvla"):
        load_tiny(adapter)
    with pytest.raises(UserError, match="no policy at"):
        policy_kind(tmp_path / "nowhere")
