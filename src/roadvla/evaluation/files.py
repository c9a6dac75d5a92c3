"""Evaluations and their films as files: JSON and npz, without pickle, written atomically."""

from __future__ import annotations

import json
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from roadvla.errors import UserError
from roadvla.evaluation.evaluate import SPLITS, Evaluation, Film
from roadvla.evaluation.failures import EVENTS, check_modes
from roadvla.files import check_plain, read_json, sync_folder, written_beside

_MAX_FILM = 2 << 30
# NumPy parses an array's header as Python, and zipfile what it finds: either fails in many ways.
_NO_FILM = (
    *(OSError, LookupError, ValueError, TypeError, EOFError, MemoryError, NotImplementedError),
    *(OverflowError, RecursionError, zipfile.BadZipFile, zlib.error, SyntaxError, struct.error),
    tokenize.TokenError,
)
_FILM = {"frames": ("u", 5), "success": ("b", 1), "instructions": ("U", 1), "episode_ids": ("i", 1)}
"""Arrays of a film: kind of their entries, dimensions."""
_AGAIN = "run `roadvla eval` again to replace it"
_DERIVED = ("success_rate", "success_low", "success_high", "success_once_rate", "grasp_rate")
_OUTCOMES = ("success", "success_once", "grasped")
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "env": str,
    "split": str,
    "sim": str,
    "checkpoint": (str, type(None)),
    "temperature": (int, float),
    "episodes": int,
    "horizon": int,
    "seed": int,
    **dict.fromkeys(_DERIVED, (int, float)),
    "per_episode": dict,
    "iteration": (int, type(None)),
    "env_steps": (int, type(None)),
    "seconds": (int, float),
    "machine": str,
    "date": str,
    "torch": str,
    "simulator": dict,
    "modes": list,
    "events": dict,
    "judged_by": str,
}
_LATER: dict[str, Any] = {"simulator": {}, "modes": [], "events": {}, "judged_by": ""}
"""Fields that files of earlier versions lack, and what they mean there."""


def evaluation_path(folder: Path, env: str, split: str) -> Path:
    """Name the file of an evaluation inside a run's ``evaluation`` folder."""
    return folder / f"{env}_{split}.json"


def film_path(evaluation_file: Path) -> Path:
    """Name the film that belongs to an evaluation file."""
    return evaluation_file.with_name(f"{evaluation_file.stem}_frames.npz")


def write_evaluation(evaluation: Evaluation, folder: Path) -> Path:
    """Write the evaluation, and its film if it has one, replacing an earlier one of the same set.

    Returns:
        The JSON file.

    Raises:
        UserError: If the folder cannot be written.
    """
    path = evaluation_path(folder, evaluation.env, evaluation.split)
    text = json.dumps(_to_json(evaluation), indent=1, allow_nan=False) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as written:
            numbers = written.enter_context(
                written_beside(path, lambda file: file.write(text.encode()))
            )
            film, frames = evaluation.film, None
            if film is not None:
                frames = written.enter_context(
                    written_beside(film_path(path), lambda file: _save_film(file, film))
                )
            # Cut off here, numbers never stand beside another evaluation's film or without theirs:
            # there are none, so they are measured again.
            if frames is not None or film_path(path).exists():
                path.unlink(missing_ok=True)
            film_path(path).unlink(missing_ok=True)
            if frames is not None:
                frames.replace(film_path(path))
            numbers.replace(path)
            sync_folder(folder)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another folder"
        ) from error
    return path


def read_evaluation(path: Path) -> Evaluation:
    """Read an evaluation without its film, refusing a file whose numbers do not fit together.

    Raises:
        UserError: If the file is missing, damaged or inconsistent.
    """
    try:
        data = read_json(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); {_AGAIN}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} does not hold an evaluation; {_AGAIN}")
    data = {**_LATER, **data}
    for name, kind in _FIELDS.items():
        value = data.get(name, _MISSING)
        if not isinstance(value, kind) or isinstance(value, bool):
            found = "missing" if value is _MISSING else f"{value!r:.40}"
            raise UserError(f"{path}: field {name!r} is {found}; {_AGAIN}")
    if data["split"] not in SPLITS:
        raise UserError(f"{path}: split is {data['split']!r}, not 'train' or 'test'; {_AGAIN}")
    outcomes = _read_outcomes(path, data)
    evaluation = _from_json(data, {**outcomes, **_read_events(path, data, outcomes)})
    for name in _DERIVED:
        if not math.isclose(data[name], getattr(evaluation, name), abs_tol=1e-9):
            raise UserError(f"{path}: {name} is {data[name]}, its episodes say otherwise; {_AGAIN}")
    return evaluation


def find_evaluation(folder: Path, env: str, split: str) -> Evaluation | None:
    """Read a set's evaluation if there is a sound one; a damaged one counts as none."""
    try:
        return read_evaluation(evaluation_path(folder, env, split))
    except UserError:
        return None


def count_filmed(folder: Path, env: str, split: str) -> int:
    """Count the episodes that a set's film shows: 0 if there is no sound film."""
    try:
        return len(read_film(film_path(evaluation_path(folder, env, split))).episode_ids)
    except UserError:
        return 0


def lost_by(
    found: Evaluation, *, sim: str, episodes: int, temperature: float, iteration: int | None
) -> str:
    """Say what a stored evaluation has that a new one would not: ``""`` if nothing is lost.

    Args:
        found: The stored one.
        sim: Simulator of the new one.
        episodes: Of the new one.
        temperature: Of the new one.
        iteration: Of the policy that the new one measures; ``None`` if it is no checkpoint.
    """
    if found.sim != sim:
        return f"the simulator {found.sim}, not {sim}"
    if found.iteration != iteration:
        return f"iteration {found.iteration}, not {iteration}"
    if found.temperature != temperature:
        return f"temperature {found.temperature:g}, not {temperature:g}"
    if found.episodes > episodes:
        return f"{found.episodes} episodes, not {episodes}"
    return ""


def read_film(path: Path) -> Film:
    """Read the frames recorded beside an evaluation.

    Raises:
        UserError: If the file is missing or damaged.
    """
    try:
        _check_film_size(path)
        with np.load(path, allow_pickle=False) as data:
            arrays = {name: _film_array(data, name) for name in _FILM}
        frames = arrays["frames"]
        if frames.dtype != np.uint8 or frames.shape[-1] != 3 or not frames.size:
            raise ValueError(f"its frames are {frames.dtype} {list(frames.shape)}")
        if len({len(array) for array in arrays.values()}) != 1:
            raise ValueError("its arrays do not fit together")
    except FileNotFoundError as error:
        raise UserError(f"cannot read {path}: it does not exist") from error
    except _NO_FILM as error:
        raise UserError(f"{path} is not a film ({error}); {_AGAIN}") from error
    return Film(
        frames=torch.from_numpy(frames),
        success=torch.from_numpy(arrays["success"]),
        instructions=tuple(str(text) for text in arrays["instructions"]),
        episode_ids=tuple(int(number) for number in arrays["episode_ids"]),
    )


def _film_array(data: Mapping[str, Any], name: str) -> np.ndarray:
    """Take an array of a film, of the kind that it must be: what indexes it does not look."""
    kind, dimensions = _FILM[name]
    array = data[name]  # bytes, where the archive holds something else than an array
    if not isinstance(array, np.ndarray) or array.dtype.kind != kind or array.ndim != dimensions:
        raise ValueError(f"{name} is no array of the kind that films have")
    return np.ascontiguousarray(array, array.dtype.newbyteorder("="))


def _check_film_size(path: Path) -> None:
    """Refuse what would fill the memory: an archive says beforehand how large its arrays are."""
    check_plain(path, limit=_MAX_FILM)
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > _MAX_FILM:
        raise ValueError(f"it unpacks to {size:,} bytes, more than the {_MAX_FILM:,} it may have")


_MISSING = object()


def _to_json(evaluation: Evaluation) -> dict[str, Any]:
    data = {name: getattr(evaluation, name) for name in _FIELDS if name != "per_episode"}
    outcomes = {name: [int(x) for x in getattr(evaluation, name)] for name in _OUTCOMES}
    return {**data, "per_episode": {"episode_ids": list(evaluation.episode_ids), **outcomes}}


def _from_json(data: dict[str, Any], per_episode: dict[str, Any]) -> Evaluation:
    skipped = {*_DERIVED, "per_episode", "episodes", "temperature", "seconds", "modes", "events"}
    plain = {name: data[name] for name in _FIELDS if name not in skipped}
    return Evaluation(
        **plain,
        **per_episode,
        temperature=float(data["temperature"]),
        seconds=float(data["seconds"]),
    )


def _read_outcomes(path: Path, data: dict[str, Any]) -> dict[str, Any]:
    """Check the per-episode lists against each other and against the episode count."""
    per_episode, episodes = data["per_episode"], data["episodes"]
    lists: dict[str, Any] = {}
    for name in ("episode_ids", *_OUTCOMES):
        values = per_episode.get(name)
        if not isinstance(values, list) or len(values) != episodes or episodes < 1:
            raise UserError(f"{path}: {name} does not list {episodes} episodes; {_AGAIN}")
        if not all(type(value) is int and value >= 0 for value in values):
            raise UserError(f"{path}: {name} holds something other than whole numbers; {_AGAIN}")
        lists[name] = tuple(values)
    if len(set(lists["episode_ids"])) != episodes:
        raise UserError(f"{path}: an episode id occurs twice; {_AGAIN}")
    for name in _OUTCOMES:
        if max(lists[name]) > 1:
            raise UserError(f"{path}: {name} holds something other than 0 and 1; {_AGAIN}")
        lists[name] = tuple(bool(value) for value in lists[name])
    ends = zip(lists["success"], lists["success_once"], strict=True)
    if any(last and not once for last, once in ends):
        raise UserError(f"{path}: an episode succeeded at its end but never; {_AGAIN}")
    return lists


def _read_events(path: Path, data: dict[str, Any], outcomes: dict[str, Any]) -> dict[str, Any]:
    """Check modes and events, where there are any, against the outcomes."""
    columns = {"modes": data["modes"], **data["events"]}
    if not data["modes"] and not data["events"]:
        return {"modes": (), "events": {}}
    for name, values in columns.items():
        if not isinstance(values, list) or len(values) != data["episodes"]:
            raise UserError(f"{path}: {name} does not list {data['episodes']} episodes; {_AGAIN}")
        if not all(type(value) is int and value >= 0 for value in values):
            raise UserError(f"{path}: {name} holds something other than whole numbers; {_AGAIN}")
    wrong = check_modes(data["modes"], outcomes["success"], outcomes["success_once"])
    if wrong or set(data["events"]) != set(EVENTS):
        raise UserError(f"{path}: {wrong or 'its events are not those known'}; {_AGAIN}")
    events = {name: tuple(values) for name, values in data["events"].items()}
    return {"modes": tuple(data["modes"]), "events": events}


def _save_film(file: BinaryIO, film: Film) -> None:
    np.savez_compressed(
        file,
        frames=film.frames.numpy(),
        success=film.success.numpy(),
        instructions=np.array(film.instructions, dtype=np.str_),
        episode_ids=np.array(film.episode_ids, dtype=np.int64),
    )
