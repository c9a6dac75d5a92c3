"""A run's folder: created, guarded against overwriting, and read again."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from roadvla.errors import UserError
from roadvla.evaluation.machine import describe_machine
from roadvla.train.config import Experiment
from roadvla.train.serialize import difference, from_dict, setting, to_dict

CONFIG = "config.json"
_PARTS = (CONFIG, "metrics.jsonl", "metrics.partial", "tensorboard", "checkpoints", "evaluation")
_ABOUT = ("roadvla_version", "command", "started", "machine")


def resume_command(folder: Path) -> str:
    """Say what to type to go on with a run."""
    return f"roadvla train --resume {shlex.quote(str(folder))}"


def about(device: str) -> dict[str, str]:
    """Say what made a result: version, command, start (ISO 8601, UTC) and machine."""
    started = datetime.now(UTC).isoformat(timespec="seconds")
    values = (version("roadvla"), shlex.join(sys.argv), started, describe_machine(device))
    return dict(zip(_ABOUT, values, strict=True))


def create_run_folder(experiment: Experiment, *, force: bool) -> Path:
    """Make an empty run folder with the resolved configuration in it.

    Args:
        experiment: What will run.
        force: Whether a run that is already there may be removed; other files stay.

    Raises:
        UserError: If it already holds a run, or cannot be written.
    """
    folder = Path(experiment.output)
    held = [folder / part for part in _PARTS if (folder / part).exists()]
    if held and not force:
        raise UserError(
            f"{folder} already holds a run: choose another --output, pass --force to replace it, "
            f"or go on with `{resume_command(folder)}`"
        )
    for source in (experiment.init, experiment.algorithm.reference_critic):
        if held and source is not None and Path(source).resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"{source} lies in {folder}, which --force would remove: choose another"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for part in held:
            shutil.rmtree(part) if part.is_dir() else part.unlink()
        text = json.dumps({**to_dict(experiment), **about(experiment.device)}, indent=1) + "\n"
        (folder / CONFIG).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror or error}; free space or choose another "
            f"--output"
        ) from error
    return folder


def load_experiment(folder: Path) -> Experiment:
    """Read the configuration a run was started with.

    Args:
        folder: The run; it may have been moved since, the result names where it is now.

    Raises:
        UserError: If there is none, or it is damaged.
    """
    path = folder / CONFIG
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no run ({CONFIG} is missing): check the path") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): start a new run") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} does not hold a configuration: start a new run")
    settings = {name: value for name, value in data.items() if name not in _ABOUT}
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
