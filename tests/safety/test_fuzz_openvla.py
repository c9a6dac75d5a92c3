"""Damaged and malicious OpenVLA checkpoints, adapters and archives of assets."""

from __future__ import annotations

import hashlib
import json
import tempfile
import zipfile
from pathlib import Path

import pytest
from attacks import Reader, attack

from roadvla.envs.maniskill.archive import archive_fault, unpack
from roadvla.envs.maniskill.catalog import Asset, Collection
from roadvla.envs.maniskill.download import DownloadError
from roadvla.errors import UserError
from roadvla.policy import load_policy
from roadvla.policy.openvla.policy import make_openvla, save_openvla
from roadvla.policy.openvla.preprocess import read_preprocessing
from roadvla.policy.openvla.tiny_checkpoint import write_tiny_checkpoint
from roadvla.policy.openvla.tiny_weights import TinySizes, TinyTower
from roadvla.policy.settings import OpenVLASettings

SETTINGS = OpenVLASettings(dtype="float32", lora_rank=2)
SMALL = TinySizes(
    dino=TinyTower(width=8, depth=2, heads=1),
    siglip=TinyTower(width=8, depth=2, heads=1),
    hidden=8,
    intermediate=8,
    layers=1,
    heads=1,
    kv_heads=1,
    shards=2,
)

ROBOT = {"wx250s.urdf": b"<robot/>" * 30, "meshes/base.stl": b"solid" * 90}
COLLECTION = Collection(
    name="robot",
    root="maniskill",
    folder="robots/widowx",
    origin="",
    licence="",
    assets=tuple(
        Asset(
            collection="robot",
            root="maniskill",
            path=f"robots/widowx/{name}",
            size=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
        )
        for name, data in ROBOT.items()
    ),
)


def _base(path: Path) -> None:
    make_openvla(str(path.parent), SETTINGS).tokenize(["put carrot on plate"])


def _adapter(path: Path) -> None:
    load_policy(path.parent)


def _seal_adapter(path: Path) -> None:
    description = path.with_name("policy.json")
    data = json.loads(description.read_text())
    data["sha256"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    description.write_text(json.dumps(data))


def _archive(path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as root:
        try:
            fault = archive_fault(COLLECTION, path)
            if fault:
                raise DownloadError(fault)
            unpack(path, COLLECTION, Path(root))
        except DownloadError as error:
            raise UserError(str(error)) from error
        for name, data in ROBOT.items():
            assert (Path(root) / COLLECTION.folder / name).read_bytes() == data


def _preprocessing(path: Path) -> None:
    read_preprocessing(path.parent, towers=2, image_size=224)


READERS = {
    "archive": Reader("robot.zip", _archive),
    "base preprocessor_config.json": Reader("base/preprocessor_config.json", _preprocessing),
    **{
        f"base {name}": Reader(f"base/{name}", _base)
        for name in (
            *("config.json", "tokenizer.json"),
            *("model.safetensors.index.json", "model-00001-of-00002.safetensors"),
        )
    },
    **{
        f"adapter {name}": Reader(f"adapter/{name}", _adapter)
        for name in (
            *("policy.json", "adapter_config.json", "adapter_model.safetensors"),
            *("value_head.safetensors", "dataset_statistics.json"),
        )
    },
    **{
        f"resealed adapter {name}": Reader(f"adapter/{name}", _adapter, _seal_adapter)
        for name in ("adapter_model.safetensors", "value_head.safetensors")
    },
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    base = write_tiny_checkpoint(folder / "base", sizes=SMALL)
    (folder / "adapter").mkdir()
    save_openvla(make_openvla(str(base), SETTINGS), folder / "adapter")
    statistics = json.loads((base / "config.json").read_text())["norm_stats"]
    (folder / "adapter" / "dataset_statistics.json").write_text(json.dumps(statistics))
    with zipfile.ZipFile(folder / "robot.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in ROBOT.items():
            archive.writestr(f"widowx/{name}", data)
    return folder


@pytest.mark.parametrize("name", READERS)
def test_every_damage_ends_in_an_error_or_a_load(name: str, sound: Path, tmp_path: Path) -> None:
    attack(name, READERS[name], sound, tmp_path / "files", 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_hundreds_of_damages(name: str, sound: Path, tmp_path: Path) -> None:
    found = attack(name, READERS[name], sound, tmp_path / "files", 300, seed=10)
    print(f"{name}: {found}")
