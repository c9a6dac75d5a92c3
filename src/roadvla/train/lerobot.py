"""Demonstrations as a LeRobot dataset, format v3.0, for tools that read that.

v3.0 is what LeRobot reads since its version 0.4 (2025), and all that it reads: it refuses v2.1. For
tools that still want that, there are converters from v3.0 back to it. The layout:

    meta/info.json                             features, rates, totals
    meta/stats.json                            of each feature over all frames
    meta/tasks.parquet                         instructions; a pandas index of them
    meta/episodes/chunk-000/file-000.parquet   where each episode lies, and its own statistics
    data/chunk-000/file-000.parquet            frames, one row group per episode, ~100 MB a file
    README.md                                  a dataset card

Frames are PNG inside the parquet files (dtype ``image``): lossless, and read without a video
decoder. LeRobot itself is not needed to write it, only pyarrow. There is no ``observation.state``,
for demonstrations have none. Steps that a collection has left out leave no gap in the timestamps.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from roadvla.errors import UserError
from roadvla.train.demonstrations import Demonstrations, demonstration_files, load_demonstrations
from roadvla.train.lerobot_stats import Stats, count_levels, of_levels, of_numbers
from roadvla.train.lerobot_tables import (
    ACTION,
    CAMERA,
    CHUNK,
    DATA,
    FILE_MB,
    INDICES,
    DataFiles,
    parquet,
    write_episodes,
    write_tasks,
)
from roadvla.train.progress import Display

VERSION = "v3.0"
FPS = 5
"""Control steps per second of the WidowX; the tabletop has no clock and takes the same."""
_INFO, _STATS, _CARD = "meta/info.json", "meta/stats.json", "README.md"
_VIDEO_MB = 200


@dataclass
class _Totals:
    """What is known of the episodes written so far."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    tasks: dict[str, int] = field(default_factory=dict)
    numbers: dict[str, list[np.ndarray]] = field(default_factory=dict)
    levels: np.ndarray | None = None
    frames: int = 0


def export_lerobot(source: Path, output: Path, *, force: bool = False) -> Path:
    """Write demonstrations as a LeRobot dataset; it appears whole or not at all.

    Args:
        source: What ``load_demonstrations`` reads; a collection is read part by part.
        output: Folder to write.
        force: Replace a LeRobot dataset that is there.

    Returns:
        The folder.

    Raises:
        UserError: If the demonstrations cannot be read, pyarrow is missing, the folder holds
            something else, or it cannot be written.
    """
    parquet()
    _check_free(output, source, force=force)
    files = demonstration_files(source)
    partial = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(files, partial)
        if output.exists():
            shutil.rmtree(output)
        os.replace(partial, output)
    except OSError as error:
        raise UserError(
            f"cannot write {output}: {error.strerror or error}; free space or choose another "
            f"--output"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return output


def _check_free(output: Path, source: Path, *, force: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / _INFO).is_file():
        raise UserError(f"{output} holds something else than a LeRobot dataset: choose another")
    if not force:
        raise UserError(
            f"{output} already holds a LeRobot dataset: choose another --output, or pass --force "
            f"to replace it"
        )
    if source.resolve().is_relative_to(output.resolve()):
        raise UserError(f"{source} lies in {output}, which --force would remove: choose another")


def _write(files: list[Path], root: Path) -> None:
    totals = _Totals()
    data = DataFiles(root)
    shape, origin = (0, 0, 0), {}
    try:
        with Display("exporting", len(files)) as display:
            for file in files:
                part = load_demonstrations(file)
                if totals.rows and tuple(part.image.shape[1:]) != shape:
                    raise UserError(f"{file} has frames of another size than those before it")
                shape, origin = tuple(part.image.shape[1:]), part.origin
                for number in range(len(part.instructions)):
                    _add_episode(part, number, totals, data)
                display.advance({})
    finally:
        data.close()
    features = _features(shape)
    write_tasks(root, totals.tasks)
    write_episodes(root, totals.rows)
    stats = {name: of_numbers(np.concatenate(parts)) for name, parts in totals.numbers.items()}
    if totals.levels is not None:
        stats[CAMERA] = of_levels(totals.levels, totals.frames)
    plain = {
        name: {key: value.tolist() for key, value in found.items()} for name, found in stats.items()
    }
    (root / _STATS).write_text(json.dumps(plain, indent=4), encoding="utf-8")
    info = _info(totals, features, "widowx" if origin.get("sim") == "maniskill" else "tabletop")
    (root / _INFO).write_text(json.dumps(info, indent=4), encoding="utf-8")
    (root / _CARD).write_text(_card(info, origin), encoding="utf-8")


def _add_episode(part: Demonstrations, number: int, totals: _Totals, data: DataFiles) -> None:
    """Write one episode's frames and note what there is to say about it."""
    steps = part.episode_index == number
    image, action = part.image[steps].numpy(), part.action[steps].numpy()
    length, task = len(action), part.instructions[number]
    order = np.arange(length)
    columns = {
        "timestamp": (order / FPS).astype(np.float32),
        "frame_index": order,
        "episode_index": np.full(length, len(totals.rows)),
        "index": totals.frames + order,
        "task_index": np.full(length, totals.tasks.setdefault(task, len(totals.tasks))),
    }
    chunk, file = data.add(image, action, columns)
    numbers = {"action": action, **{name: column[:, None] for name, column in columns.items()}}
    levels = count_levels(image)
    stats: dict[str, Stats] = {CAMERA: of_levels(levels, length)}
    for name, values in numbers.items():
        stats[name] = of_numbers(values)
        totals.numbers.setdefault(name, []).append(values)
    totals.rows.append(
        {
            "episode_index": len(totals.rows),
            "tasks": [task],
            "length": length,
            "data/chunk_index": chunk,
            "data/file_index": file,
            "dataset_from_index": totals.frames,
            "dataset_to_index": totals.frames + length,
            "meta/episodes/chunk_index": 0,
            "meta/episodes/file_index": 0,
            **{
                f"stats/{name}/{key}": value.tolist()
                for name, found in stats.items()
                for key, value in found.items()
            },
        }
    )
    totals.levels = levels if totals.levels is None else totals.levels + levels
    totals.frames += length


def _features(shape: tuple[int, ...]) -> dict[str, Any]:
    index = {"dtype": "int64", "shape": [1], "names": None}
    return {
        CAMERA: {
            "dtype": "image",
            "shape": list(shape),
            "names": ["height", "width", "channels"],
        },
        "action": {"dtype": "float32", "shape": [len(ACTION)], "names": list(ACTION)},
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
        **{name: dict(index) for name in INDICES},
    }


def _info(totals: _Totals, features: dict[str, Any], robot: str) -> dict[str, Any]:
    return {
        "codebase_version": VERSION,
        "robot_type": robot,
        "total_episodes": len(totals.rows),
        "total_frames": totals.frames,
        "total_tasks": len(totals.tasks),
        "chunks_size": CHUNK,
        "data_files_size_in_mb": FILE_MB,
        "video_files_size_in_mb": _VIDEO_MB,
        "fps": FPS,
        "splits": {"train": f"0:{len(totals.rows)}"},
        "data_path": DATA,
        "video_path": None,
        "features": features,
    }


def _card(info: dict[str, Any], origin: dict[str, Any]) -> str:
    """Write the card: what the hub reads from its head, and for people where the data come from."""
    return f"""---
task_categories:
- robotics
tags:
- LeRobot
configs:
- config_name: default
  data_files: data/*/*.parquet
---

{info["total_episodes"]} demonstrations of a scripted expert in simulation, {info["total_frames"]}
frames, exported by `roadvla demos export` in LeRobot's format {VERSION}. Actions: change of the
hand's position (m) and orientation (rad), gripper in [0, 1] (1 opens). Where they come from:

```json
{json.dumps(origin, indent=1)}
```
"""
