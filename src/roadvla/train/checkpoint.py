"""Checkpoints: everything a run needs to go on as if it had never stopped, written atomically.

A checkpoint is a folder ``iteration_NNNNNN`` with the policy (``policy.json`` and its weights, of
an OpenVLA adapter and value head alone), ``optimizer.safetensors`` (AdamW's moments by parameter
name, the state of the random generator, and what else the run has learned), ``state.json``
(counters and the configuration's fingerprint) and ``manifest.json`` (size and checksum of each of
them). ``latest.json`` beside the folders names the last complete one; the one before it is kept
too, to fall back on.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from roadvla.errors import UserError
from roadvla.files import MAX_JSON, MAX_TENSORS, parse_json, read_json, sync_folder
from roadvla.policy.base import Policy
from roadvla.tensors import parse_tensors
from roadvla.train.listed import ELSEWHERE, OPTIMIZER, STATE, DamagedError, read_listed
from roadvla.train.manifest import (
    FORMAT,
    as_json,
    read_files,
    read_object,
    verify,
    write_manifest,
    write_synced,
)
from roadvla.train.moments import GENERATOR, STEP, put_generator, take_moments

_MEMORY = "memory:"
_LATEST = "latest.json"
_KEPT = 2
"""The last checkpoint, and the one to fall back on should it be damaged."""


@runtime_checkable
class _Learner(Protocol):
    def restore(self, tensors: Mapping[str, Tensor]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run has come.

    Attributes:
        iteration: Iterations completed.
        env_steps: Environment steps taken; for ``sft``, demonstrated steps drawn.
        episodes: Training episodes used, for the next ids.
        config: Fingerprint of the experiment.
    """

    iteration: int
    env_steps: int
    episodes: int
    config: str


def save_checkpoint(
    root: Path,
    progress: Progress,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    *,
    save_policy: Callable[..., None],
    keep_all: bool = False,
    kept: Collection[int] = (),
    memory: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a checkpoint, then point ``latest.json`` at it, then drop all but the last two.

    Whatever happens on the way, the checkpoint that ``latest.json`` names is complete, and so is
    every folder called ``iteration_NNNNNN``: each appears and goes by being renamed.

    Args:
        root: The run's ``checkpoints`` folder.
        progress: Counters to store.
        policy: Its weights are stored by ``save_policy(policy, folder)``.
        optimizer: AdamW over the policy's parameters.
        generator: The run's source of randomness.
        save_policy: Writes a policy into a folder.
        keep_all: Keep the earlier checkpoints.
        kept: Iterations whose checkpoints are kept in any case.
        memory: What else the run has learned, e.g. a tree of successes.

    Raises:
        UserError: If the disk is full or the folder cannot be written.
    """
    final = checkpoint_folder(root, progress.iteration)
    temporary = root / f".{final.name}.partial"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_policy(policy, temporary)
        remembered = {f"{_MEMORY}{name}": t.cpu() for name, t in (memory or {}).items()}
        data = save({**_optimizer_tensors(policy, optimizer, generator), **remembered})
        (temporary / OPTIMIZER).write_bytes(data)
        (temporary / STATE).write_bytes(as_json({"format": FORMAT, **asdict(progress)}))
        write_manifest(temporary)
        sync_folder(temporary)
        _discard(final)
        os.replace(temporary, final)
        sync_folder(root)
        _point_at(final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot write checkpoint {final}: {reason}; the last one is intact: free space, then "
            f"go on with --resume"
        ) from error
    retire_checkpoints(root, progress.iteration, keep_all=keep_all, kept=kept)
    return final


def _point_at(folder: Path) -> None:
    """Name a checkpoint in ``latest.json``."""
    partial, number = folder.with_name(f".{_LATEST}.partial"), int(folder.name.rpartition("_")[2])
    write_synced(partial, as_json({"iteration": number, "folder": folder.name}))
    os.replace(partial, folder.with_name(_LATEST))
    sync_folder(folder.parent)


def retire_checkpoints(
    root: Path, iteration: int, *, keep_all: bool, kept: Collection[int]
) -> None:
    """Drop what is not to be kept once the checkpoint of an iteration is there.

    Args:
        root: The run's ``checkpoints`` folder.
        iteration: Of the newest checkpoint that is good.
        keep_all: As ``save_checkpoint``'s.
        kept: The same.
    """
    earlier = [number for number in _iterations(root) if number <= iteration]
    spared = {*(earlier if keep_all else earlier[:_KEPT]), *(n for n in kept if n <= iteration)}
    # A later one is of work that was lost: the run fell back behind it, for it was damaged.
    for number in _iterations(root):
        if number not in spared:
            _discard(checkpoint_folder(root, number))
    for abandoned in root.glob(".iteration_*.partial"):
        shutil.rmtree(abandoned, ignore_errors=True)


def _discard(folder: Path) -> None:
    """Remove a checkpoint; cut off half-way, what is left does not look like one."""
    if folder.is_dir():
        going = folder.with_name(f".{folder.name}.old.partial")
        shutil.rmtree(going, ignore_errors=True)
        os.replace(folder, going)
        shutil.rmtree(going, ignore_errors=True)


def _iterations(root: Path) -> list[int]:
    """Number the checkpoints that there are, the newest first."""
    numbers = (path.name.removeprefix("iteration_") for path in root.glob("iteration_*"))
    return sorted((int(number) for number in numbers if number.isdecimal()), reverse=True)


def checkpoint_folder(root: Path, iteration: int) -> Path:
    """Name the checkpoint of an iteration in a run's ``checkpoints`` folder."""
    return root / f"iteration_{iteration:06d}"


def good_checkpoint(root: Path) -> tuple[Path | None, str]:
    """Find the newest checkpoint of a run's ``checkpoints`` folder that is as it was written.

    Every file is read and compared with its recorded checksum.

    Args:
        root: The folder. Its ``latest.json`` is mended if it names something else.

    Returns:
        The checkpoint, ``None`` if the run has none yet; and why newer ones were passed over, if
        any were.

    Raises:
        UserError: If there are checkpoints and none is good, or one is of an unknown format.
    """
    try:
        named = latest_checkpoint(root)
        damaged: list[str] = []
    except DamagedError as error:
        named, damaged = None, [_reason(error)]
    for number in _iterations(root):
        folder = checkpoint_folder(root, number)
        try:
            verify(folder)
            read_progress(folder)
        except DamagedError as error:
            damaged.append(_reason(error))
            continue
        if folder != named:
            with suppress(OSError):  # on a full disk: the next save says so
                _point_at(folder)
        return folder, "; ".join(damaged)
    if damaged:
        raise UserError(
            f"{root} holds no checkpoint that can be used ({'; '.join(damaged)}): start a new run, "
            f"or delete that folder to begin this one again"
        )
    return None, ""


def _reason(error: DamagedError) -> str:
    return str(error).removesuffix(f"; {ELSEWHERE}")


def latest_checkpoint(root: Path) -> Path | None:
    """Find the last complete checkpoint of a run's ``checkpoints`` folder, if there is one.

    Raises:
        UserError: If ``latest.json`` is damaged or names a folder that is gone.
    """
    path = root / _LATEST
    if not path.exists():
        return None
    data = read_object(path)
    name = data.get("folder")
    known = isinstance(name, str) and re.fullmatch(r"iteration_\d{1,20}", name) is not None
    if not known or not (root / str(name)).is_dir():
        raise DamagedError(f"{path} names the checkpoint {name!r}, which is not there; {ELSEWHERE}")
    return root / str(name)


def policy_folder(path: Path) -> Path:
    """Resolve what people point at to the folder that holds the policy.

    Args:
        path: A policy folder, an adapter folder of RL4VLA's, a checkpoint, or a run (its last
            checkpoint is meant).

    Raises:
        UserError: If it is none of these.
    """
    if (path / "policy.json").is_file() or (path / "adapter_config.json").is_file():
        return path
    for root in (path / "checkpoints", path):
        if (found := latest_checkpoint(root)) is not None:
            return found
    if is_base(path):
        raise UserError(
            f"{path} is a base checkpoint: pass it with --policy openvla --checkpoint {path}"
        )
    what = "holds no policy.json and no checkpoints" if path.is_dir() else "is not a folder"
    if not path.is_absolute():
        what += f" (seen from {Path.cwd()})"
    raise UserError(f"{path} {what}: expected a warm-up folder, a run or a checkpoint of one")


def is_base(folder: Path) -> bool:
    """Whether a folder holds a pretrained model in HF format, not something this program made."""
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config


def read_progress(folder: Path) -> Progress:
    """Read the counters of a checkpoint.

    Raises:
        DamagedError: If ``state.json`` is missing or damaged.
        UserError: If it is of another format.
    """
    data = _read_state(folder)
    return Progress(**{name: data[name] for name in Progress.__dataclass_fields__})


def restore_optimizer(
    folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> dict[str, Tensor]:
    """Put the optimiser's moments and the generator back, bit for bit.

    Args:
        folder: A checkpoint.
        policy: Already loaded from the same checkpoint.
        optimizer: Freshly made for it.
        generator: Overwritten.

    Returns:
        What else the run had learned, as ``save_checkpoint`` was given it.

    Raises:
        DamagedError: If the file is missing, damaged, or does not fit the policy. The optimiser is
            then as it was.
    """
    path = folder / OPTIMIZER
    data = read_listed(folder, OPTIMIZER, read_files(folder)[OPTIMIZER], limit=MAX_TENSORS)
    try:
        tensors = parse_tensors(data)
    except ValueError as error:
        raise DamagedError(f"{path} is damaged ({error}); {ELSEWHERE}") from error
    remembered = [name for name in tensors if name.startswith(_MEMORY)]
    memory = {name.removeprefix(_MEMORY): tensors.pop(name) for name in remembered}
    parameters = _named(policy, optimizer)
    moments = {name: tensor for name, tensor in tensors.items() if name != GENERATOR}
    states = take_moments(moments, parameters, optimizer, path)
    put_generator(generator, tensors, path)
    for name, state in states.items():
        for moment in state.keys() - {STEP}:
            # Laid out in memory as the parameter is: the fused optimiser walks both in that order.
            empty = torch.empty_like(parameters[name], requires_grad=False)
            state[moment] = empty.copy_(state[moment])
    optimizer.load_state_dict(
        {
            "state": {index: state for index, state in enumerate(states.values()) if state},
            "param_groups": optimizer.state_dict()["param_groups"],
        }
    )
    return memory


def restore_memory(folder: Path, learner: _Learner | None, memory: Mapping[str, Tensor]) -> None:
    """Give back what ``restore_optimizer`` found beside the optimiser.

    Args:
        folder: The checkpoint, for messages.
        learner: Who had learned it; ``None`` if nobody does.
        memory: What it had learned.

    Raises:
        DamagedError: If it does not fit.
    """
    try:
        if learner is not None:
            learner.restore(memory)
    except ValueError as error:
        raise DamagedError(f"{folder} holds a damaged memory ({error}); {ELSEWHERE}") from error


def _optimizer_tensors(
    policy: Policy, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> dict[str, Tensor]:
    tensors = {GENERATOR: generator.get_state()}
    for name, parameter in _named(policy, optimizer).items():
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}.{moment}"] = value.detach().cpu().contiguous()
    return tensors


def _named(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """The optimiser's parameters by name, in its own order."""
    names = {id(p): name for name, p in cast("nn.Module", policy).named_parameters()}
    return {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}


def _read_state(folder: Path) -> dict[str, Any]:
    path = folder / STATE
    files = read_files(folder)
    if STATE in files:
        try:
            data = parse_json(read_listed(folder, STATE, files[STATE], limit=MAX_JSON))
        except ValueError as error:
            raise DamagedError(f"{path} is damaged ({error}); {ELSEWHERE}") from error
        if not isinstance(data, dict):
            raise DamagedError(f"{path} does not hold an object; {ELSEWHERE}")
    else:  # format 1 has no checksum for it
        data = read_object(path)
    for name in ("iteration", "env_steps", "episodes"):
        if type(data.get(name)) is not int or data[name] < 0:
            raise _odd_state(path, name, data, "a count")
    if not isinstance(data.get("config"), str):
        raise _odd_state(path, "config", data, "a fingerprint")
    return data


def _odd_state(path: Path, name: str, data: dict[str, Any], expected: str) -> DamagedError:
    found = repr(data.get(name))[:60]
    return DamagedError(f"{path}: {name} is {found}, expected {expected}; {ELSEWHERE}")
