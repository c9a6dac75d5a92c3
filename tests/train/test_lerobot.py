"""Datasets are read back by LeRobot's own rules: ``info.json`` leads to everything else."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from roadvla.errors import UserError
from roadvla.experiments.demonstration_commands import demos
from roadvla.train import lerobot_tables
from roadvla.train.demonstrations import Demonstrations, load_demonstrations, save_demonstrations
from roadvla.train.lerobot import export_lerobot
from roadvla.train.lerobot_stats import count_levels, of_levels, of_numbers

pq = pytest.importorskip("pyarrow.parquet", reason="no pyarrow: pip install 'roadvla[lerobot]'")
pd = pytest.importorskip("pandas")

CAMERA = "observation.images.third_person"


def demonstrations(lengths=(3, 1, 4), *, seed=0, texts=None, sim="maniskill"):
    generator = torch.Generator().manual_seed(seed)
    steps = sum(lengths)
    return Demonstrations(
        image=torch.randint(0, 256, (steps, 6, 8, 3), generator=generator).to(torch.uint8),
        action=torch.randn(steps, 7, generator=generator),
        episode_index=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
        step_index=torch.cat([torch.arange(length) for length in lengths]),
        instructions=texts or ("put a on b", "ça et là", "put a on b")[: len(lengths)],
        origin={"env": "E", "sim": sim},
    )


@pytest.fixture
def source(tmp_path):
    """Two parts, five episodes, three instructions."""
    save_demonstrations(demonstrations(), tmp_path / "demos" / "part-000000.safetensors")
    more = demonstrations((2, 5), seed=1, texts=("ça et là", "lift c"))
    save_demonstrations(more, tmp_path / "demos" / "part-000002.safetensors")
    return tmp_path / "demos"


def read(folder):
    """Read what LeRobot reads: info, tasks, episodes, and frames of all data files in order."""
    info = json.loads((folder / "meta" / "info.json").read_text())
    tasks = pd.read_parquet(folder / "meta" / "tasks.parquet")
    paths = sorted((folder / "meta" / "episodes").glob("*/*.parquet"))
    episodes = [row for path in paths for row in pq.read_table(path).to_pylist()]
    frames = [
        row
        for path in sorted((folder / "data").glob("*/*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]
    return info, tasks, episodes, frames


def pixels(row):
    return np.asarray(Image.open(io.BytesIO(row[CAMERA]["bytes"])))


def test_every_frame_and_action_comes_back_exactly(source, tmp_path):
    folder = export_lerobot(source, tmp_path / "out")
    expected = load_demonstrations(source)
    info, tasks, episodes, frames = read(folder)
    assert len(frames) == len(expected.action) == info["total_frames"] == 15
    for index, row in enumerate(frames):
        assert np.array_equal(pixels(row), expected.image[index].numpy())
        assert np.array_equal(np.float32(row["action"]), expected.action[index].numpy())
        episode = int(expected.episode_index[index])
        assert row["index"] == index
        assert row["episode_index"] == episode
        assert row["frame_index"] == int(expected.step_index[index])
        assert row["timestamp"] == pytest.approx(row["frame_index"] / 5, abs=1e-6)
        # LeRobot looks a task's text up by place and its number by text.
        assert tasks.iloc[row["task_index"]].name == expected.instructions[episode]
        assert tasks.loc[expected.instructions[episode]].task_index == row["task_index"]
    assert info["total_tasks"] == len(tasks) == 3
    assert tasks.index.name == "task"
    assert info["total_episodes"] == len(episodes) == 5


def test_episodes_say_where_their_frames_are(source, tmp_path, monkeypatch):
    # the first episode is above the limit; a file that is begun takes one only while there is room
    monkeypatch.setattr(lerobot_tables, "FILE_MB", 1500 / 2**20)
    monkeypatch.setattr(lerobot_tables, "CHUNK", 2)
    folder = export_lerobot(source, tmp_path / "out")
    expected = load_demonstrations(source)
    info, _, episodes, frames = read(folder)
    assert [row["length"] for row in episodes] == [3, 1, 4, 2, 5]
    places = set()
    for number, row in enumerate(episodes):
        assert row["episode_index"] == number
        assert row["tasks"] == [expected.instructions[number]]
        start, stop = row["dataset_from_index"], row["dataset_to_index"]
        assert stop - start == row["length"]
        assert {frame["episode_index"] for frame in frames[start:stop]} == {number}
        place = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
        places.add(tuple(place.values()))
        table = pq.ParquetFile(folder / info["data_path"].format(**place))
        groups = [table.read_row_group(k) for k in range(table.num_row_groups)]
        own = [g for g in groups if g["episode_index"].to_pylist() == [number] * row["length"]]
        assert len(own) == 1
        assert (row["meta/episodes/chunk_index"], row["meta/episodes/file_index"]) == (0, 0)
    assert len(places) > 2
    assert max(place[1] for place in places) == 1
    assert max(place[0] for place in places) > 0


def test_the_head_declares_what_the_files_have(source, tmp_path):
    folder = export_lerobot(source, tmp_path / "out")
    info, _, episodes, _ = read(folder)
    assert info["codebase_version"] == "v3.0"
    assert info["fps"] == 5
    assert info["robot_type"] == "widowx"
    assert info["splits"] == {"train": "0:5"}
    assert info["video_path"] is None
    features = info["features"]
    assert features[CAMERA] == {
        "dtype": "image",
        "shape": [6, 8, 3],
        "names": ["height", "width", "channels"],
    }
    assert features["action"]["shape"] == [len(features["action"]["names"])] == [7]
    assert features["action"]["names"][-1] == "gripper"
    schema = pq.read_schema(folder / "data" / "chunk-000" / "file-000.parquet")
    assert schema.names == list(features)
    assert {name: str(schema.field(name).type) for name in features if name != CAMERA} == {
        "action": "fixed_size_list<element: float>[7]",
        "timestamp": "float",
        **dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), "int64"),
    }
    known = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert list(known) == list(features)
    assert known[CAMERA] == {"_type": "Image"}
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n")
    assert '"env": "E"' in card
    assert "5 demonstrations" in card
    assert len(episodes) == 5


def test_statistics_are_those_of_the_data(source, tmp_path):
    folder = export_lerobot(source, tmp_path / "out")
    expected = load_demonstrations(source)
    _, _, episodes, _ = read(folder)
    stats = json.loads((folder / "meta" / "stats.json").read_text())
    names = {"min", "max", "mean", "std", "count", "q01", "q10", "q50", "q90", "q99"}
    assert all(set(found) == names for found in stats.values())
    assert set(stats) == {
        *(CAMERA, "action", "timestamp"),
        *("frame_index", "episode_index", "index", "task_index"),
    }

    def check(found, image, action):
        levels = image.double().div(255).permute(3, 0, 1, 2).flatten(1).numpy()
        for name, reduce in {"min": np.min, "max": np.max, "mean": np.mean, "std": np.std}.items():
            got = np.array(found[CAMERA][name])
            assert got.shape == (3, 1, 1)
            np.testing.assert_allclose(got[:, 0, 0], reduce(levels, axis=1), atol=1e-9)
            expected = reduce(action.double().numpy(), axis=0)
            np.testing.assert_allclose(found["action"][name], expected, atol=1e-9)
        assert found[CAMERA]["count"] == found["action"]["count"] == [len(action)]
        median = np.median(action.double().numpy(), axis=0)
        np.testing.assert_allclose(found["action"]["q50"], median, atol=1e-9)

    check(stats, expected.image, expected.action)
    assert stats["index"]["max"] == [14]
    for number, row in enumerate(episodes):
        found: dict[str, dict[str, object]] = {}
        for key, value in row.items():
            if key.startswith("stats/"):
                _, name, kind = key.split("/")
                found.setdefault(name, {})[kind] = value
        assert set(found) == set(stats)
        steps = expected.episode_index == number
        check(found, expected.image[steps], expected.action[steps])


def test_levels_have_the_quantiles_of_their_pixels():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (4, 5, 6, 3)).astype(np.uint8)
    image[..., 1] //= 30
    image[..., 2] = 9
    counts = count_levels(image[:1]) + count_levels(image[1:])
    found, flat = of_levels(counts, 4), image.reshape(-1, 3) / 255
    for name, q in {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}.items():
        expected = np.quantile(flat, q, axis=0, method="inverted_cdf")
        np.testing.assert_allclose(found[name][:, 0, 0], expected)
    np.testing.assert_allclose(found["std"][2], 0, atol=1e-7)
    assert found["count"].tolist() == [4]
    one = of_numbers(np.array([[2.0, 5.0]]))
    assert one["std"].tolist() == [0, 0]
    assert one["q99"].tolist() == [2, 5]


def test_a_single_file_and_the_tabletop_are_exported_too(tmp_path):
    path = tmp_path / "demonstrations.safetensors"
    save_demonstrations(demonstrations(sim="tabletop"), path)
    for source in (path, tmp_path):
        folder = export_lerobot(source, tmp_path / "out", force=True)
        info, _, _, frames = read(folder)
        assert len(frames) == 8
        assert info["robot_type"] == "tabletop"


def test_what_is_there_is_spared_unless_it_is_a_dataset_and_forced(source, tmp_path):
    out = tmp_path / "out"
    export_lerobot(source, out)
    with pytest.raises(UserError, match=r"already holds a LeRobot dataset.*--force"):
        export_lerobot(source, out)
    (out / "data" / "chunk-000" / "file-001.parquet").write_text("of another")
    export_lerobot(source, out, force=True)
    assert len(read(out)[3]) == 15
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(UserError, match="holds something else"):
            export_lerobot(source, tmp_path / "mine", force=force)
    (out / "part-000000.safetensors").write_bytes((source / "part-000000.safetensors").read_bytes())
    with pytest.raises(UserError, match="would remove"):
        export_lerobot(out, out, force=True)
    (tmp_path / "empty").mkdir()
    assert len(read(export_lerobot(source, tmp_path / "empty"))[3]) == 15


def test_an_export_that_fails_leaves_what_was_there(source, tmp_path, monkeypatch):
    out = export_lerobot(source, tmp_path / "out")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("roadvla.train.lerobot.write_tasks", full)
        with pytest.raises(UserError, match="No space left"):
            export_lerobot(source, out, force=True)
    assert len(read(out)[3]) == 15
    path = source / "part-000002.safetensors"
    other = replace(demonstrations(), image=demonstrations().image[:, :4, :4].contiguous())
    save_demonstrations(other, path)
    with pytest.raises(UserError, match="frames of another size"):
        export_lerobot(source, out, force=True)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"part-000002\.safetensors is damaged"):
        export_lerobot(source, out, force=True)
    assert len(read(out)[3]) == 15
    assert sorted(os.listdir(tmp_path)) == ["demos", "out"]


def test_pyarrow_that_is_missing_is_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow.*pip install 'roadvla\[lerobot\]'"):
        export_lerobot(tmp_path / "gone", tmp_path / "out")


def test_the_command_exports(source, tmp_path, capsys):
    out = tmp_path / "out"
    demos(["export", str(source), "--to", "lerobot", "--output", str(out)])
    assert capsys.readouterr().out == f"{out}\n"
    assert len(read(out)[3]) == 15
    with pytest.raises(UserError, match="already holds"):
        demos(["export", str(source), "--to", "lerobot", "--output", str(out)])
    demos(["export", str(source), "--to", "lerobot", "--output", str(out), "--force"])
    with pytest.raises(UserError, match="'rlds'"):
        demos(["export", str(source), "--to", "rlds", "--output", str(out)])
