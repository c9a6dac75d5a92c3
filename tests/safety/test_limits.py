"""Files that are larger than such files are: refused by their size, before they are read."""

from __future__ import annotations

import os
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_fuzz_openvla import COLLECTION, ROBOT

from roadvla.envs.maniskill.archive import unpack
from roadvla.envs.maniskill.download import DownloadError
from roadvla.errors import UserError
from roadvla.evaluation.files import read_evaluation, read_film
from roadvla.evaluation.records import read_record
from roadvla.files import MAX_JSON, MAX_METRICS, MAX_TENSORS, read_json
from roadvla.policy import load_policy
from roadvla.report.runs import read_metrics as read_reported
from roadvla.train.manifest import read_object
from roadvla.train.metrics import read_metrics
from roadvla.train.run_folder import load_experiment


@pytest.fixture
def modest() -> Iterator[None]:
    """Fail if more than a little memory is taken on the way."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def sparse(path: Path, size: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.truncate(path, size)
    return path


@pytest.mark.parametrize(
    ("name", "limit", "read"),
    [
        ("config.json", MAX_JSON, lambda path: load_experiment(path.parent)),
        ("evaluation.json", MAX_JSON, read_evaluation),
        ("record.json", MAX_JSON, read_record),
        ("manifest.json", MAX_JSON, read_object),
        ("policy.json", MAX_JSON, lambda path: load_policy(path.parent)),
        ("metrics.jsonl", MAX_METRICS, lambda path: read_metrics(path.parent)),
        ("metrics.jsonl", MAX_METRICS, read_reported),
    ],
)
@pytest.mark.usefixtures("modest")
def test_what_is_too_large_is_not_read(name, limit, read, tmp_path: Path) -> None:
    path = sparse(tmp_path / name, limit + 1)
    with pytest.raises(UserError, match=f"{limit + 1:,} bytes, more than the {limit:,}"):
        read(path)


@pytest.mark.usefixtures("modest")
def test_weights_that_are_too_large_are_not_read(tmp_path: Path) -> None:
    from roadvla.policy import BACKBONE_FOLDER

    (tmp_path / "policy.json").write_bytes((BACKBONE_FOLDER / "policy.json").read_bytes())
    sparse(tmp_path / "policy.safetensors", MAX_TENSORS + 1)
    with pytest.raises(UserError, match=r"policy.safetensors .* more than the 17,179,869,184"):
        load_policy(tmp_path)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a plain file"):
        read_json(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a plain file"):
        read_json(tmp_path)


def test_a_film_says_beforehand_how_large_it_is(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("roadvla.evaluation.files._MAX_FILM", 1000)
    path = tmp_path / "film.npz"
    np.savez_compressed(path, frames=np.zeros(2000, np.uint8))
    with pytest.raises(UserError, match=r"unpacks to 2,\d\d\d bytes, more than the 1,000"):
        read_film(path)


def test_a_file_of_an_archive_that_grows_without_end_is_not_unpacked(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("roadvla.envs.maniskill.archive._LARGEST", 1000)
    path = tmp_path / "robot.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in ROBOT.items():
            archive.writestr(f"widowx/{name}", data)
        archive.writestr("widowx/bomb", bytes(2000))
    with pytest.raises(DownloadError, match="'widowx/bomb' unpacks to 2,000 bytes: refused"):
        unpack(path, COLLECTION, tmp_path / "root")
    assert not (tmp_path / "root" / COLLECTION.folder / "bomb").exists()
