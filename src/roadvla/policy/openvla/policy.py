"""OpenVLA policies made, saved and read back.

A policy folder holds ``adapter_model.safetensors`` and ``adapter_config.json`` in peft's layout,
``value_head.safetensors``, and ``policy.json``, which names the base checkpoint. The base itself is
never copied.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from roadvla.errors import UserError
from roadvla.files import read_json, write_whole
from roadvla.policy.openvla.adapted import OpenVLAPolicy, ReferenceCritic
from roadvla.policy.openvla.adapters import LM_HEAD
from roadvla.policy.openvla.artefacts import Adapter, read_adapter, write_adapter
from roadvla.policy.openvla.checkpoint import fingerprint, locator
from roadvla.policy.openvla.model import OpenVLA
from roadvla.policy.openvla.storage import to_json
from roadvla.policy.settings import OpenVLASettings

__all__ = [
    "OpenVLAPolicy",
    "ReferenceCritic",
    "load_critic",
    "load_openvla",
    "make_openvla",
    "recorded_settings",
    "save_openvla",
]

FORMAT = 1
DESCRIPTION = "policy.json"
_HASHED = ("adapter_model.safetensors", "value_head.safetensors")
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def make_openvla(
    checkpoint: str, settings: OpenVLASettings, device: torch.device | str = "cpu"
) -> OpenVLAPolicy:
    """Build a policy to train on a base checkpoint, or continue an adapter folder.

    Args:
        checkpoint: HF-format checkpoint (folder or ``owner/name``) that gets fresh adapters; or an
            adapter folder, RL4VLA's or this program's, that names its base.
        settings: How it is run and adapted.
        device: Where it goes.

    Raises:
        UserError: If something does not load or fit.
    """
    if (Path(checkpoint) / "adapter_config.json").is_file():
        return load_openvla(Path(checkpoint), device, settings=settings)
    return OpenVLAPolicy(_base(checkpoint, settings, device), settings)


def load_openvla(
    folder: Path,
    device: torch.device | str = "cpu",
    *,
    settings: OpenVLASettings | None = None,
    checkpoint: str | None = None,
) -> OpenVLAPolicy:
    """Read a policy folder, or an adapter folder of RL4VLA's, with the base it belongs to.

    Args:
        folder: What ``save_openvla`` wrote, or ``adapter_config.json`` with its weights.
        device: Where it goes.
        settings: Replace the recorded ones; the adapters' rank and layers must agree.
        checkpoint: The base, if it is elsewhere than the folder says.

    Raises:
        UserError: If something is missing, damaged, or does not fit the base.
    """
    folder = Path(folder)
    description = read_description(folder)
    adapter = read_adapter(folder)
    base = base_of(folder, description, adapter, checkpoint)
    if settings is None:
        settings = recorded_settings(folder, adapter)
    model = _base(base, settings, device)
    if description is not None:
        _check_base(model, description, folder)
    policy = OpenVLAPolicy(model, settings, norm_stats=adapter.norm_stats)
    policy.take(adapter, str(folder))
    return policy


def load_critic(folder: Path, policy: OpenVLAPolicy) -> ReferenceCritic:
    """Read a finished run's adapter and value head as a critic on the live policy's base.

    Raises:
        UserError: If the folder holds another kind of policy, or one of another base or rank.
    """
    folder = Path(folder)
    description = read_description(folder)
    if description is not None:
        _check_base(policy.model, description, folder)
    return policy.critic(read_adapter(folder), str(folder))


def save_openvla(policy: OpenVLAPolicy, folder: Path) -> None:
    """Write adapters, value head and description into a folder, which is made if need be.

    The description comes last and holds the others' checksums, so a save cut off between the files
    is noticed when it is loaded.
    """
    folder = Path(folder)
    checkpoint = policy.model.checkpoint
    if checkpoint is None:
        raise UserError("this OpenVLA was built without a checkpoint: it cannot be saved")
    folder.mkdir(parents=True, exist_ok=True)
    write_adapter(folder, policy.give())
    description = {
        "format": FORMAT,
        "kind": "openvla",
        "checkpoint": locator(checkpoint),
        "fingerprint": fingerprint(checkpoint),
        "settings": asdict(policy.settings),
        "sha256": {name: _sha256(folder / name) for name in _HASHED},
    }
    write_whole(folder / DESCRIPTION, to_json(description))


def recorded_settings(folder: Path, adapter: Adapter | None = None) -> OpenVLASettings:
    """Read how a policy folder was trained; an adapter of RL4VLA's tells its rank and layers.

    Args:
        folder: What ``save_openvla`` wrote, or an adapter folder.
        adapter: Already read from it, if so.

    Raises:
        UserError: If it was written by another version, or is damaged.
    """
    description = read_description(folder)
    if description is None:
        adapter = adapter or read_adapter(folder)
        if adapter.alpha != int(adapter.alpha):
            raise UserError(
                f"{folder} has lora_alpha {adapter.alpha:g}, only whole numbers can be trained on: "
                f"merge it with `roadvla export {folder} --to DIR`, and pass --checkpoint DIR"
            )
        return OpenVLASettings(
            lora_rank=adapter.rank,
            lora_alpha=int(adapter.alpha),
            lora_lm_head=LM_HEAD in adapter.modules,
        )
    try:
        return OpenVLASettings(**description["settings"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder / DESCRIPTION} was written by another version of roadvla: its settings do "
            f"not fit ({error})"
        ) from error


def base_of(
    folder: Path, description: dict[str, Any] | None, adapter: Adapter, checkpoint: str | None
) -> str:
    """Say where the base of a policy folder is.

    Args:
        folder: Named in errors.
        description: Its ``policy.json``, if it has one.
        adapter: Read from it.
        checkpoint: Goes before what the folder says.

    Raises:
        UserError: If the folder names none, or one on another machine.
    """
    base = checkpoint or (description or {}).get("checkpoint") or adapter.base
    if base is None:
        raise UserError(f"{folder} does not name the checkpoint it adapts: pass --checkpoint")
    if checkpoint is None and Path(base).is_absolute() and not os.path.exists(base):
        raise UserError(
            f"{folder} adapts the checkpoint {base}, which is not here: say where it is with "
            f"--checkpoint (to train: --checkpoint BASE --init {folder})"
        )
    return str(base)


def read_description(folder: Path) -> dict[str, Any] | None:
    """Read ``policy.json`` and check the files it vouches for; ``None`` if there is none.

    Raises:
        UserError: If it is damaged or of another kind, or a file is not the one that was saved.
    """
    path = folder / DESCRIPTION
    if not path.exists():
        return None
    try:
        description = read_json(path)
        kind, form = description["kind"], description["format"]
        hashes = dict(description["sha256"]) if kind == "openvla" else {}
        if not isinstance(description.get("checkpoint"), str | None):
            raise TypeError(f"checkpoint is {description['checkpoint']!r}, expected a name")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): take another checkpoint") from error
    if (kind, form) != ("openvla", FORMAT):
        raise UserError(
            f"{path} describes a policy of kind {kind!r}, format {form!r}; an OpenVLA policy of "
            f"format {FORMAT} is needed here"
        )
    for name in _HASHED:
        if not (folder / name).is_file() or _sha256(folder / name) != hashes.get(name):
            raise UserError(
                f"{folder / name} is missing, or not the file that {DESCRIPTION} was saved with: "
                f"take another checkpoint or copy the folder again"
            )
    return description


def _base(checkpoint: str, settings: OpenVLASettings, device: torch.device | str) -> OpenVLA:
    model = OpenVLA.from_pretrained(checkpoint, dtype=_DTYPES[settings.dtype], device=device)
    model.requires_grad_(False)
    model.value_head.requires_grad_(True)
    return model


def _check_base(model: OpenVLA, description: dict[str, Any], folder: Path) -> None:
    checkpoint = model.checkpoint
    found = None if checkpoint is None else fingerprint(checkpoint)
    if checkpoint is not None and found != description.get("fingerprint"):
        raise UserError(
            f"{folder} adapts {description.get('checkpoint')!r}, whose weights are not those of "
            f"{checkpoint.source!r}: pass the --checkpoint it was trained on"
        )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
