"""The parquet tables of a LeRobot dataset, see ``roadvla.train.lerobot``."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from roadvla.errors import UserError

CAMERA = "observation.images.third_person"
ACTION = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")
INDICES = ("frame_index", "episode_index", "index", "task_index")
DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
EPISODES = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
TASKS = "meta/tasks.parquet"
CHUNK = 1000
"""Files in a folder."""
FILE_MB = 100

_COMPRESS = 1
"""Level of zlib: at 6 a frame of ManiSkill's is a tenth smaller and takes three times as long."""


def parquet() -> tuple[ModuleType, ModuleType]:
    """Import pyarrow and its parquet module.

    Raises:
        UserError: If they are not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            "the export to LeRobot needs pyarrow, which is missing: pip install 'roadvla[lerobot]'"
        ) from error
    return pyarrow, pyarrow.parquet


class DataFiles:
    """The parquet files with frames, each begun when the one before it is full."""

    def __init__(self, root: Path) -> None:
        self._root, self._number, self._size = root, -1, 0
        self._writer: Any = None

    def add(
        self,
        image: UInt8[np.ndarray, "S H W 3"],
        action: Float[np.ndarray, "S 7"],
        columns: dict[str, Float[np.ndarray, " S"] | Int[np.ndarray, " S"]],
    ) -> tuple[int, int]:
        """Write one episode as a row group and say in which chunk and file it is."""
        pa, pq = parquet()
        frames = [
            {"bytes": _png(frame), "path": f"frame-{order:06d}.png"}
            for order, frame in enumerate(image)
        ]
        size, schema = sum(len(frame["bytes"]) for frame in frames), frame_schema()
        if self._writer is None or self._size + size > FILE_MB * 2**20:
            self.close()
            self._number, self._size = self._number + 1, 0
            chunk, file = divmod(self._number, CHUNK)
            path = self._root / DATA.format(chunk_index=chunk, file_index=file)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(path, schema, use_dictionary=False)
        flat = pa.array(action.ravel(), pa.float32())
        arrays = {
            CAMERA: pa.array(frames, schema.field(CAMERA).type),
            "action": pa.FixedSizeListArray.from_arrays(flat, len(ACTION)),
            **{name: pa.array(column) for name, column in columns.items()},
        }
        self._writer.write_table(pa.table(arrays, schema=schema))
        self._size += size
        return divmod(self._number, CHUNK)

    def close(self) -> None:
        """End the last file."""
        if self._writer is not None:
            self._writer.close()


def _png(frame: UInt8[np.ndarray, "H W 3"]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG", compress_level=_COMPRESS)
    return buffer.getvalue()


def frame_schema() -> Any:
    """Columns of the frames, with what Hugging Face's ``datasets`` needs to see images in them."""
    pa, _ = parquet()
    known: dict[str, Any] = {
        CAMERA: {"_type": "Image"},
        "action": {
            "feature": {"dtype": "float32", "_type": "Value"},
            "length": len(ACTION),
            "_type": "Sequence",
        },
        "timestamp": {"dtype": "float32", "_type": "Value"},
        **{name: {"dtype": "int64", "_type": "Value"} for name in INDICES},
    }
    return pa.schema(
        [
            (CAMERA, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("action", pa.list_(pa.float32(), len(ACTION))),
            ("timestamp", pa.float32()),
            *((name, pa.int64()) for name in INDICES),
        ],
        metadata={"huggingface": json.dumps({"info": {"features": known}})},
    )


def write_tasks(root: Path, tasks: dict[str, int]) -> None:
    """Write the instructions as pandas would write a table with them as its index."""
    pa, pq = parquet()
    about = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [
            _pandas_column("task_index", "int64", "int64"),
            _pandas_column("task", "unicode", "object"),
        ],
        "pandas_version": "2.0.0",
    }
    schema = pa.schema(
        [("task_index", pa.int64()), ("task", pa.string())], metadata={"pandas": json.dumps(about)}
    )
    columns = {"task_index": list(tasks.values()), "task": list(tasks)}
    (root / TASKS).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=schema), root / TASKS)


def _pandas_column(name: str, kind: str, dtype: str) -> dict[str, Any]:
    return {
        "name": name,
        "field_name": name,
        "pandas_type": kind,
        "numpy_type": dtype,
        "metadata": None,
    }


def write_episodes(root: Path, rows: list[dict[str, Any]]) -> None:
    """Write where each episode lies, and its statistics."""
    pa, pq = parquet()
    path = root / EPISODES.format(chunk_index=0, file_index=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
