"""What a run is made from beside its settings, noted so that it goes on with the same.

A reference critic may be named as a run, whose latest checkpoint is meant: another one, once that
run has gone on. Demonstrations may be collected anew under the same name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from roadvla.errors import UserError
from roadvla.train.checkpoint import policy_folder
from roadvla.train.config import Experiment
from roadvla.train.demonstrations import demonstration_files
from roadvla.train.manifest import MANIFEST, STATE, seal
from roadvla.train.run_folder import load_sources

Sources = dict[str, dict[str, str]]


def sources_now(experiment: Experiment) -> Sources:
    """Identify what the paths in the settings lead to at this moment.

    Returns:
        By setting: ``found``, the file or folder that is meant, and ``digest`` of what it holds.

    Raises:
        UserError: If a path leads nowhere.
    """
    found: Sources = {}
    critic, demonstrations = experiment.algorithm.reference_critic, experiment.demonstrations
    if critic is not None:
        folder = policy_folder(Path(critic))
        is_checkpoint = (folder / MANIFEST).exists() or (folder / STATE).exists()
        digest = f"{seal(folder):015x}" if is_checkpoint else _digest(_files(folder))
        found["reference_critic"] = {"found": folder.name, "digest": digest}
    if demonstrations is not None:
        files = demonstration_files(Path(demonstrations))
        found["demonstrations"] = {"found": Path(demonstrations).name, "digest": _digest(files)}
    return found


def check_sources(experiment: Experiment) -> None:
    """Refuse to go on with a run if what it is made from is no longer the same.

    Raises:
        UserError: If something differs; it is named. Runs that did not note it are taken on trust.
    """
    folder = Path(experiment.output)
    recorded = load_sources(folder)
    if not recorded:
        return
    paths = {
        "reference_critic": experiment.algorithm.reference_critic,
        "demonstrations": experiment.demonstrations,
    }
    for name, now in sources_now(experiment).items():
        then = recorded.get(name, now)
        if then.get("digest") != now["digest"]:
            raise UserError(
                f"cannot resume {folder}: {name} {paths[name]} is no longer what the run began "
                f"with, it was {then.get('found')} and is {now['found']} with other content: put "
                f"it back, or start a new run with --init"
            )


def _files(folder: Path) -> list[Path]:
    """What a policy consists of; a lock or a log beside it does not count."""
    return sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))


def _digest(files: Iterable[Path]) -> str:
    whole = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return whole.hexdigest()[:15]
