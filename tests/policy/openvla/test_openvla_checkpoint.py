"""Checkpoints: found, checked, fingerprinted, read strictly; every mistake is one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from openvla_files import CONFIG, DEAD, make_tensors, write_checkpoint
from safetensors.torch import save_file
from torch import Tensor, nn

from roadvla.errors import UserError
from roadvla.policy.openvla.checkpoint import fingerprint, load_weights, open_checkpoint

Q_PROJ = "language_model.model.layers.0.self_attn.q_proj.weight"


def make_module(tensors: dict[str, Tensor], device: str = "meta") -> nn.Module:
    """A module tree with parameters of these names, frozen where the name says ``norm``."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        owner = root
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        empty = torch.empty(tensor.shape, device=device)
        owner.register_parameter(leaf, nn.Parameter(empty, requires_grad="norm" not in name))
    return root


def alive(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    dead = ("blocks.1.", "attn_pool", "featurizer.norm")
    return {name: t for name, t in tensors.items() if not any(word in name for word in dead)}


def load(folder: Path, module: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
    load_weights(
        open_checkpoint(folder),
        module,
        dtype=dtype,
        device="cpu",
        keep_float32=lambda name: name.startswith(("value_head.", "projector.")),
    )


def message(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


# Opening.


@pytest.mark.parametrize("shards", [1, 3])
def test_open_lists_every_tensor(tmp_path: Path, shards: int) -> None:
    tensors = make_tensors()
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "c", tensors, shards=shards))
    assert checkpoint.shapes == {name: tuple(t.shape) for name, t in tensors.items()}
    assert set(checkpoint.dtypes.values()) == {torch.bfloat16}
    assert len(set(checkpoint.files.values())) == shards
    assert checkpoint.config == CONFIG
    assert not checkpoint.on_hub


def test_open_real_names(openvla_fixture: Path) -> None:
    checkpoint = open_checkpoint(str(openvla_fixture))
    assert checkpoint.source == str(openvla_fixture)
    assert checkpoint.shapes["language_model.lm_head.weight"] == (32064, 64)


def test_open_refuses_what_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "is a file" in message(lambda: open_checkpoint(tmp_path / "file"))
    assert "expected a folder, or a hub id" in message(lambda: open_checkpoint(tmp_path / "none"))
    assert "expected a folder" in message(lambda: open_checkpoint("a/b/c"))


def test_open_refuses_another_folder(tmp_path: Path) -> None:
    assert "has no config.json" in message(lambda: open_checkpoint(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "it holds an adapter" in message(lambda: open_checkpoint(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert "not readable JSON" in message(lambda: open_checkpoint(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    assert "no JSON object" in message(lambda: open_checkpoint(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    assert "model_type 'llava', expected 'openvla'" in message(lambda: open_checkpoint(tmp_path))


def test_open_refuses_pickles_with_the_fix(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert "no model.safetensors" in message(lambda: open_checkpoint(tmp_path))
    (tmp_path / "pytorch_model.bin").touch()
    text = message(lambda: open_checkpoint(tmp_path))
    assert "pytorch_model.bin, which is pickled" in text
    assert "save_file" in text


def test_open_names_missing_shards_and_index(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    text = message(lambda: open_checkpoint(tmp_path))
    assert "lacks model-00002-of-00003.safetensors (1 of 3 shards" in text
    (tmp_path / "model.safetensors.index.json").unlink()
    assert "no model.safetensors.index.json for" in message(lambda: open_checkpoint(tmp_path))


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ({}, "has no weight_map"),
        ({"weight_map": {"a": "../a.safetensors"}}, "names the shard '../a.safetensors'"),
        ({"weight_map": {"a": 3}}, "names the shard 3"),
    ],
)
def test_open_refuses_a_malformed_index(tmp_path: Path, index: Any, expected: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert expected in message(lambda: open_checkpoint(tmp_path))


def test_open_refuses_an_index_of_other_shards(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, shards=2)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["more.weight"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    assert "says that more.weight is in" in message(lambda: open_checkpoint(tmp_path))


def test_open_refuses_damaged_weights(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path) / "model.safetensors"
    data = path.read_bytes()
    for damage in (data[:-1], data[:50], b"", b"\xff" * 100):
        path.write_bytes(damage)
        text = message(lambda: open_checkpoint(tmp_path))
        assert f"{path} is damaged or cut short" in text
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    assert "git lfs pull" in message(lambda: open_checkpoint(tmp_path))


def test_open_refuses_quantized_weights(tmp_path: Path) -> None:
    tensors = make_tensors() | {Q_PROJ: torch.zeros(8, 8, dtype=torch.int8)}
    write_checkpoint(tmp_path, tensors)
    text = message(lambda: open_checkpoint(tmp_path))
    assert f"{Q_PROJ} is stored as I8" in text
    assert "not quantized" in text


# The hub.


def test_hub_fetches_safe_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot(repository: str, *, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        return str(write_checkpoint(tmp_path / "cache"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    checkpoint = open_checkpoint("owner/some.model-7b")
    assert checkpoint.folder == tmp_path / "cache"
    assert checkpoint.on_hub
    assert asked == [
        ("owner/some.model-7b", ["config.json"]),
        ("owner/some.model-7b", ["*.json", "*.safetensors", "tokenizer.model"]),
    ]


def test_hub_stops_before_the_weights_of_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda repository, **_: asked.append(repository) or str(tmp_path),
    )
    assert "model_type 'llama'" in message(lambda: open_checkpoint("owner/model"))
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (LocalEntryNotFoundError("many\nlines"), "no connection, and not in the cache"),
        (OSError("connection\nreset"), "(connection)"),
        (RuntimeError(), "(RuntimeError)"),
    ],
)
def test_hub_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    text = message(lambda: open_checkpoint("owner/model"))
    assert expected in text
    assert "pass the folder" in text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("GatedRepoError", "access to it must be asked for"),
        ("RepositoryNotFoundError", "no such repository"),
    ],
)
def test_hub_refusals_are_named(monkeypatch: pytest.MonkeyPatch, name: str, expected: str) -> None:
    cause = getattr(huggingface_hub.errors, name)

    def fail(*_: object, **__: object) -> str:
        raise cause.__new__(cause)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert expected in message(lambda: open_checkpoint("owner/model"))


# The fingerprint.


def test_fingerprint_tells_contents_apart(tmp_path: Path) -> None:
    tensors = make_tensors()
    first = fingerprint(open_checkpoint(write_checkpoint(tmp_path / "a", tensors)))
    assert len(first) == 64
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert fingerprint(open_checkpoint(tmp_path / "b")) == first
    merged = tensors | {Q_PROJ: tensors[Q_PROJ] + 0.1}
    assert fingerprint(open_checkpoint(write_checkpoint(tmp_path / "c", merged))) != first
    other = CONFIG | {"norm_stats": {}}
    moved = write_checkpoint(tmp_path / "d", tensors, config=other)
    assert fingerprint(open_checkpoint(moved)) != first


@pytest.mark.parametrize("row", [slice(0, 1), slice(21376, 21377), slice(32063, 32064)])
def test_fingerprint_samples_large_tensors(tmp_path: Path, row: slice) -> None:
    tensors = make_tensors(torch.float32)
    first = fingerprint(open_checkpoint(write_checkpoint(tmp_path / "a", tensors)))
    tensors["language_model.lm_head.weight"][row] += 1
    second = fingerprint(open_checkpoint(write_checkpoint(tmp_path / "b", tensors)))
    assert second != first


# Loading.


@pytest.mark.parametrize("shards", [1, 3])
def test_load_casts_and_leaves_the_rest_alone(tmp_path: Path, shards: int) -> None:
    tensors = make_tensors(torch.float32)
    module = make_module(alive(tensors))
    load(write_checkpoint(tmp_path, tensors, shards=shards), module)
    for name, parameter in module.named_parameters():
        dtype = torch.float32 if name.startswith("projector.") else torch.bfloat16
        assert parameter.dtype == dtype
        assert torch.equal(parameter, tensors[name].to(dtype))
        assert parameter.requires_grad == ("norm" not in name)


def test_loaded_weights_do_not_lean_on_the_file(tmp_path: Path) -> None:
    tensors = make_tensors()
    module = make_module(alive(tensors))
    path = write_checkpoint(tmp_path, tensors) / "model.safetensors"
    load(tmp_path, module)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(module.get_parameter(Q_PROJ), tensors[Q_PROJ])


def test_load_fills_buffers(tmp_path: Path) -> None:
    tensors = make_tensors(torch.float32)
    kept = alive(tensors)
    position = "vision_backbone.featurizer.pos_embed"
    module = make_module({name: t for name, t in kept.items() if name != position})
    empty = torch.empty(tensors[position].shape, device="meta")
    module.get_submodule("vision_backbone.featurizer").register_buffer("pos_embed", empty)
    load(write_checkpoint(tmp_path, tensors), module, torch.float32)
    assert torch.equal(module.get_buffer(position), tensors[position])


def test_load_tolerates_rotary_frequencies_and_dead_weights(tmp_path: Path) -> None:
    tensors = make_tensors()
    assert set(DEAD) <= tensors.keys() - alive(tensors).keys()
    inv_freq = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
    write_checkpoint(tmp_path, tensors | {inv_freq: torch.zeros(2)})
    load(tmp_path, make_module(alive(tensors)))


def test_load_takes_a_value_head_only_if_there_is_one(tmp_path: Path) -> None:
    tensors = make_tensors()
    head = {"value_head.head_l1.weight": torch.randn(3, 8), "value_head.x": torch.randn(2)}
    module = make_module(alive(tensors) | head, device="cpu")
    before = module.get_parameter("value_head.x").clone()
    load(write_checkpoint(tmp_path / "without", tensors), module)
    assert torch.equal(module.get_parameter("value_head.x"), before)
    load(write_checkpoint(tmp_path / "with", tensors | head), module)
    assert torch.equal(module.get_parameter("value_head.x"), head["value_head.x"])
    del head["value_head.x"]
    write_checkpoint(tmp_path / "half", tensors | head)
    assert "1 missing: value_head.x" in message(lambda: load(tmp_path / "half", module))


def test_load_lists_names_with_the_closest(tmp_path: Path) -> None:
    tensors = make_tensors()
    module = make_module(alive(tensors))
    tensors["projector.0.bias"] = tensors.pop("projector.fc1.bias")
    text = message(lambda: load(write_checkpoint(tmp_path, tensors), module))
    assert "1 missing: projector.fc1.bias (closest: projector.0.bias)" in text
    assert "1 unexpected: projector.0.bias (closest: projector.fc1.bias)" in text


def test_load_counts_what_it_does_not_list(tmp_path: Path) -> None:
    tensors = make_tensors()
    module = make_module(alive(tensors))
    tensors |= {f"extra.{i}.weight": torch.zeros(1) for i in range(7)}
    text = message(lambda: load(write_checkpoint(tmp_path, tensors), module))
    assert "7 unexpected: extra.0.weight, " in text
    assert "extra.3.weight and 3 more" in text
    assert "missing" not in text


def test_load_shows_both_shapes(tmp_path: Path) -> None:
    tensors = make_tensors()
    module = make_module(alive(tensors))
    tensors[Q_PROJ] = torch.zeros(8, 9)
    text = message(lambda: load(write_checkpoint(tmp_path, tensors), module))
    assert f"1 of another shape: {Q_PROJ} is (8, 9), expected (8, 8)" in text


def test_load_notices_a_file_cut_after_it_was_opened(tmp_path: Path) -> None:
    tensors = make_tensors()
    path = write_checkpoint(tmp_path, tensors) / "model.safetensors"
    checkpoint = open_checkpoint(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])

    def run() -> None:
        load_weights(
            checkpoint,
            make_module(alive(tensors)),
            dtype=torch.float32,
            device="cpu",
            keep_float32=lambda _: False,
        )

    assert "is damaged or cut short" in message(run)


@pytest.mark.parametrize(
    ("device", "expected"), [("cuda:99", "is not here"), ("gpu", "unknown device 'gpu'")]
)
def test_load_names_a_device_that_is_not_there(tmp_path: Path, device: str, expected: str) -> None:
    tensors = make_tensors()
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors))

    def run() -> None:
        load_weights(
            checkpoint,
            make_module(alive(tensors)),
            dtype=torch.float32,
            device=device,
            keep_float32=lambda _: False,
        )

    assert expected in message(run)


def test_files_without_an_index_win(tmp_path: Path) -> None:
    # As transformers does: a whole file goes before an index beside it.
    tensors = make_tensors()
    write_checkpoint(tmp_path, tensors, shards=2)
    changed = tensors | {Q_PROJ: tensors[Q_PROJ] + 1}
    save_file(changed, tmp_path / "model.safetensors")
    module = make_module(alive(tensors))
    load(tmp_path, module)
    assert torch.equal(module.get_parameter(Q_PROJ), changed[Q_PROJ])
