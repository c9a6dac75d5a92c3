"""A run's folder: created, guarded against overwriting, and read again."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from roadvla.errors import UserError
from roadvla.evaluation.machine import describe_machine
from roadvla.files import read_json, write_whole
from roadvla.train.checkpoint import is_base, policy_folder
from roadvla.train.config import Experiment
from roadvla.train.diagnosis import FOLDER as DIAGNOSIS
from roadvla.train.launched import launch_id
from roadvla.train.notes import NOTES
from roadvla.train.serialize import difference, from_dict, setting, to_dict

CONFIG = "config.json"
DEMONSTRATIONS = "demonstrations.safetensors"
HISTORY = "warmup.json"
_ADAPTER_PARTS = ("adapter_config.json", "adapter_model.safetensors", "value_head.safetensors")
_POLICY_PARTS = (
    *("policy.json", "policy.safetensors", *_ADAPTER_PARTS, "dataset_statistics.json"),
    *(HISTORY, DEMONSTRATIONS),
)
_RUN_PARTS = (
    *("metrics.jsonl", "metrics.partial", "tensorboard", "checkpoints", "evaluation", NOTES),
    DIAGNOSIS,
)
_PARTS = (*_POLICY_PARTS, *_RUN_PARTS, CONFIG)
_WITH_CRITIC = ("ppo", "road")
_ABOUT = ("roadvla_version", "command", "started", "machine")
_LAUNCH = "launch"
_SOURCES = "sources"
_BESIDE = (*_ABOUT, _LAUNCH, _SOURCES)
"""What a run's configuration holds beside the settings."""


def resume_command(folder: Path) -> str:
    """Say what to type to go on with a run."""
    return f"roadvla train --resume {shlex.quote(str(folder))}"


def about(device: str) -> dict[str, str]:
    """Say what made a result: version, command, start (ISO 8601, UTC) and machine."""
    started = datetime.now(UTC).isoformat(timespec="seconds")
    values = (version("roadvla"), shlex.join(sys.argv), started, describe_machine(device))
    return dict(zip(_ABOUT, values, strict=True))


def check_claimable(folder: Path, *, force: bool, sources: Iterable[str | None] = ()) -> None:
    """Refuse a folder that holds a run, a warm-up or a policy, and change nothing.

    Args:
        folder: Where something new is to be written.
        force: Whether what is there may be replaced.
        sources: Paths that the new thing is made from; they must not be replaced by it.

    Raises:
        UserError: If the folder is taken or cannot be written, or a source lies in what would be
            removed. A base checkpoint is never replaced.
    """
    held = _held(folder)
    if is_base(folder):
        raise UserError(f"{folder} holds a base checkpoint: choose another --output")
    if held and not force:
        if any(part.name in _POLICY_PARTS for part in held):
            raise UserError(
                f"{folder} already holds a warm-up or another policy: choose another --output, or "
                f"pass --force to replace it"
            )
        raise UserError(
            f"{folder} already holds a run: choose another --output, pass --force to replace it, "
            f"or go on with `{resume_command(folder)}`"
        )
    for source in sources:
        if held and source is not None and Path(source).resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"{source} lies in {folder}, which --force would remove: choose another"
            )
    _check_writable(folder)


def claim_folder(folder: Path, *, force: bool, sources: Iterable[str | None] = ()) -> None:
    """Make a folder that holds no run, no warm-up and no policy; other files in it stay.

    Args:
        folder: Made if need be.
        force: Whether a run, a warm-up or a policy that is already there is removed.
        sources: Paths that the new content is made from; they must not be removed.

    Raises:
        UserError: If the folder is taken, or cannot be written.
    """
    check_claimable(folder, force=force, sources=sources)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        clear_folder(folder)
    except OSError as error:
        raise _unwritable(folder, error) from error


def clear_folder(folder: Path) -> None:
    """Remove the run, the warm-up or the policy in a folder, and nothing else.

    Raises:
        OSError: If something cannot be removed.
    """
    for part in _held(folder):
        shutil.rmtree(part) if part.is_dir() and not part.is_symlink() else part.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file; it appears whole or not at all, and is on disk when this returns.

    Raises:
        UserError: If it cannot be written.
    """
    try:
        write_whole(path, f"{json.dumps(value, indent=1)}\n".encode())
    except OSError as error:
        raise _unwritable(path, error) from error


def create_run_folder(
    experiment: Experiment, *, force: bool, sources: Mapping[str, Any] | None = None
) -> Path:
    """Make an empty run folder with the resolved configuration in it.

    Args:
        experiment: What will run.
        force: Whether a run or a policy that is already there is removed; other files stay.
        sources: What it is made from, for ``load_sources``.

    Raises:
        UserError: If it already holds a run or a policy, or cannot be written.
    """
    folder = Path(experiment.output)
    claim_folder(folder, force=force, sources=sources_of(experiment))
    launch = launch_id()
    beside: dict[str, Any] = {**about(experiment.device)}
    beside |= {} if launch is None else {_LAUNCH: launch}
    beside |= {_SOURCES: dict(sources)} if sources else {}
    write_json(folder / CONFIG, {**to_dict(experiment), **beside})
    return folder


def load_sources(folder: Path) -> dict[str, dict[str, str]]:
    """Read what a run noted of what it is made from; nothing, if it noted nothing that can be read.

    Args:
        folder: Of the run.
    """
    try:
        found = read_json(folder / CONFIG)[_SOURCES]
        return {str(name): dict(source) for name, source in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def is_begun(folder: Path, launch: str | None = None) -> bool:
    """Whether a folder holds a run, or one that a certain launch began.

    Args:
        folder: Where to look.
        launch: As ``launch_id``; any will do if ``None``.
    """
    if launch is None:
        return (folder / CONFIG).exists()
    try:
        return read_json(folder / CONFIG)[_LAUNCH] == launch
    except (OSError, ValueError, KeyError, TypeError):
        return False


def sources_of(experiment: Experiment) -> tuple[str | None, ...]:
    """Name the paths that a run is made from; they must not lie in what it replaces."""
    critic = experiment.algorithm.reference_critic
    return (experiment.init, experiment.checkpoint, critic, experiment.demonstrations)


def load_experiment(folder: Path) -> Experiment:
    """Read the configuration a run was started with.

    Args:
        folder: The run; it may have been moved since, the result names where it is now.

    Raises:
        UserError: If there is none, or it is damaged.
    """
    path = folder / CONFIG
    try:
        data = read_json(path)
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no run ({CONFIG} is missing): check the path") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): start a new run") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} does not hold a configuration: start a new run")
    settings = {name: value for name, value in data.items() if name not in _BESIDE}
    return from_dict({**settings, "output": str(folder)}, source=str(path))


def check_resumable(experiment: Experiment) -> Path:
    """Refuse to go on with a run whose settings were others; only its folder may have moved.

    Raises:
        UserError: If there is no run, or a setting differs; it is named.
    """
    folder = Path(experiment.output)
    recorded = load_experiment(folder)
    for name in difference(recorded, experiment):
        if name != "output":
            raise UserError(
                f"cannot resume {folder} with {name} {setting(experiment, name)!r}: it was started "
                f"with {setting(recorded, name)!r}; use that, or start a new run with --init"
            )
    return folder


def check_critic_trained(source: Path) -> None:
    """Refuse a reference critic whose value head is known never to have learned anything.

    A folder that tells nothing about its origin is taken on trust.

    Args:
        source: A run, a checkpoint or a policy folder.

    Raises:
        UserError: If it is a warm-up, or a run without a critic, or holds no policy.
    """
    folder = policy_folder(source)
    origin = "a warm-up" if (folder / HISTORY).exists() else None
    if folder.parent.name == "checkpoints":
        algo = _recorded_algo(folder.parent.parent)
        if algo is not None and algo not in _WITH_CRITIC:
            origin = f"from a run with algo {algo!r}"
    if origin is not None:
        raise UserError(
            f"reference_critic {source} is {origin}, its value head was never trained: name a "
            f"finished PPO run"
        )


def _recorded_algo(run: Path) -> str | None:
    try:
        return str(read_json(run / CONFIG)["algorithm"]["algo"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _held(folder: Path) -> list[Path]:
    return [folder / part for part in _PARTS if os.path.lexists(folder / part)]


def _check_writable(folder: Path) -> None:
    """Refuse a folder that the system would not let this process write into, before any work."""
    found = next((path for path in (folder, *folder.absolute().parents) if path.is_dir()), folder)
    effective = os.access in os.supports_effective_ids
    if found.is_dir() and not os.access(found, os.W_OK | os.X_OK, effective_ids=effective):
        raise UserError(
            f"cannot write {folder}: {found} is read-only for this user; choose another --output"
        )


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write {path}: {error.strerror or error}; free space or choose another --output"
    )
