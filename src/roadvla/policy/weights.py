"""Policies on disk: a folder with its weights and ``policy.json``, which says what they are.

A tiny policy's weights are in ``policy.safetensors``; an OpenVLA's folder is described in
``openvla/policy.py``.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from roadvla.errors import UserError
from roadvla.files import MAX_JSON, MAX_TENSORS, parse_json, read_bytes, write_whole
from roadvla.policy.action_tokens import NUM_TOKENS, NormStats
from roadvla.policy.base import Policy
from roadvla.policy.tiny import TinyArchitecture, TinyVLA
from roadvla.tensors import parse_tensors

FORMAT = 1
WEIGHTS_NAME = "policy.safetensors"
DESCRIPTION_NAME = "policy.json"
ADAPTER_NAME = "adapter_config.json"
KINDS = ("tiny", "openvla")
BACKBONE_FOLDER = Path(__file__).parent / "weights" / "tiny-backbone"

_MOST_LAYERS = 1024
"""Even to outline a layer takes milliseconds."""


def save_policy(policy: TinyVLA, folder: Path) -> None:
    """Write a tiny policy's weights and description into a folder, which is made if need be.

    Each file appears whole or not at all. The description comes last and holds the checksum of the
    weights, so a save cut off between the two is noticed when it is loaded.
    """
    folder = Path(folder)
    state = {
        name: weight.detach().cpu().contiguous() for name, weight in policy.state_dict().items()
    }
    data = save(state)
    description = {
        "format": FORMAT,
        "kind": "tiny",
        "architecture": asdict(policy.architecture),
        "norm_stats": policy.norm_stats.to_dict(),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / WEIGHTS_NAME, data)
    write_whole(folder / DESCRIPTION_NAME, (json.dumps(description, indent=2) + "\n").encode())


def load_policy(folder: Path, device: torch.device | str = "cpu") -> Policy:
    """Read a policy of whatever kind from its folder, to be run as it was trained.

    Args:
        folder: Holds ``policy.json``, or an OpenVLA adapter in RL4VLA's layout.
        device: Where it goes.

    Raises:
        UserError: If anything is missing, damaged, or made for another program or architecture, or
            packages that the kind needs are not installed.
    """
    folder = Path(folder)
    if policy_kind(folder) == "tiny":
        return load_tiny(folder, device)
    from roadvla.policy.openvla.policy import load_openvla

    return load_openvla(folder, device)


def policy_kind(folder: Path) -> str:
    """Say what kind of policy a folder holds, one of ``KINDS``; nothing but its name is read.

    Raises:
        UserError: If it holds none, or one that this version does not know.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no policy at {folder}: expected a folder holding {DESCRIPTION_NAME}")
    if not (folder / DESCRIPTION_NAME).exists() and (folder / ADAPTER_NAME).is_file():
        return "openvla"  # RL4VLA's folders hold an adapter without a description
    return _read_description(folder / DESCRIPTION_NAME)["kind"]


def load_tiny(folder: Path, device: torch.device | str = "cpu") -> TinyVLA:
    """Read a tiny policy that ``save_policy`` wrote; its vision tower is frozen.

    Raises:
        UserError: If anything is missing, damaged, or made for another program or architecture.
    """
    folder = Path(folder)
    if (kind := policy_kind(folder)) != "tiny":
        raise UserError(f"{folder} holds a policy of kind {kind!r}: pass --policy {kind}")
    description = _read_description(folder / DESCRIPTION_NAME)
    architecture = _read_architecture(description, folder)
    stats = NormStats.from_dict(_entry(description, "norm_stats", dict, folder))
    if len(stats.q01) != NUM_TOKENS:
        raise UserError(
            f"{folder / DESCRIPTION_NAME}: norm_stats has {len(stats.q01)} dimensions, "
            f"an action has {NUM_TOKENS}; use the file the policy was saved with"
        )
    state = _read_weights(folder / WEIGHTS_NAME, _entry(description, "sha256", str, folder))
    with torch.device("meta"):  # no memory is asked for: the sizes may be absurd
        outline = TinyVLA(architecture, stats).state_dict()
    _check_names_and_shapes(outline, state, folder / WEIGHTS_NAME)
    policy = TinyVLA(architecture, stats)
    policy.load_state_dict(state)
    return policy.to(device)


def load_backbone(device: torch.device | str = "cpu") -> TinyVLA:
    """Read the pretrained tiny backbone that comes with the package.

    Raises:
        UserError: If this installation has none, or it is damaged.
    """
    if not (BACKBONE_FOLDER / DESCRIPTION_NAME).is_file():
        raise UserError(
            f"no pretrained backbone at {BACKBONE_FOLDER}: "
            "reinstall roadvla, or make one with `roadvla pretrain`"
        )
    return load_tiny(BACKBONE_FOLDER, device)


def _read_bytes(path: Path, limit: int) -> bytes:
    try:
        return read_bytes(path, limit=limit)
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing: the folder holds no complete policy; "
            "take another checkpoint or copy it again"
        ) from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): check it and try again"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is no part of a policy: {error}") from error


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description = parse_json(_read_bytes(path, MAX_JSON))
    except ValueError as error:
        raise UserError(
            f"{path} is not JSON ({error}): take another checkpoint or copy it again"
        ) from error
    if not isinstance(description, dict):
        raise UserError(f"{path} is not a policy description: expected a JSON object")
    if description.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {description.get('format')!r}, this version reads {FORMAT}: "
            "use the version of roadvla that wrote it"
        )
    if description.get("kind") not in KINDS:
        raise UserError(
            f"{path} describes a policy of kind {description.get('kind')!r}; "
            f"this version loads kinds {' and '.join(map(repr, KINDS))}"
        )
    return description


def _entry(description: dict[str, Any], name: str, kind: type, folder: Path) -> Any:
    value = description.get(name)
    if not isinstance(value, kind):
        raise UserError(
            f"{folder / DESCRIPTION_NAME}: {name!r} is missing or malformed; "
            "use the file the policy was saved with"
        )
    return value


def _read_architecture(description: dict[str, Any], folder: Path) -> TinyArchitecture:
    sizes = _entry(description, "architecture", dict, folder)
    known = {field.name for field in fields(TinyArchitecture)}
    missing, unexpected = sorted(known - sizes.keys()), sorted(sizes.keys() - known)
    if missing or unexpected:
        raise UserError(
            f"{folder / DESCRIPTION_NAME} describes another architecture"
            f"{_listed('missing', missing)}{_listed('unexpected', unexpected)}: "
            "use the version of roadvla that wrote it"
        )
    for name, value in sizes.items():
        most = _MOST_LAYERS if name in ("layers", "vision_blocks") else 1 << 16
        if type(value) is not int or not 1 <= value <= most:
            raise UserError(
                f"{folder / DESCRIPTION_NAME}: architecture {name} = {repr(value)[:40]}; "
                f"expected a whole number from 1 to {most}"
            )
    try:
        return TinyArchitecture(**sizes)
    except ValueError as error:
        raise UserError(f"{folder / DESCRIPTION_NAME}: {error}") from error


def _read_weights(path: Path, checksum: str) -> dict[str, Tensor]:
    data = _read_bytes(path, MAX_TENSORS)
    try:
        state = parse_tensors(data)
    except ValueError as error:
        raise UserError(
            f"{path} is damaged or cut short ({error}): take another checkpoint or copy it again"
        ) from error
    if hashlib.sha256(data).hexdigest() != checksum:
        raise UserError(
            f"{path} does not match the checksum in {DESCRIPTION_NAME}: it is damaged or the two "
            "files come from different saves; take another checkpoint or copy both again"
        )
    return state


def _check_names_and_shapes(
    expected: dict[str, Tensor], found: dict[str, Tensor], path: Path
) -> None:
    missing, unexpected = (
        sorted(expected.keys() - found.keys()),
        sorted(found.keys() - expected.keys()),
    )
    wrong = [
        f"{name} is {tuple(found[name].shape)} {found[name].dtype}, "
        f"expected {tuple(weight.shape)} {weight.dtype}"
        for name, weight in expected.items()
        if name in found
        and (found[name].shape != weight.shape or found[name].dtype != weight.dtype)
    ]
    if missing or unexpected or wrong:
        raise UserError(
            f"{path} holds another architecture's weights{_listed('missing', missing)}"
            f"{_listed('unexpected', unexpected)}{_listed('wrong shape', wrong)}: "
            f"use the {DESCRIPTION_NAME} it was saved with"
        )


def _listed(label: str, names: list[str]) -> str:
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"; {label}: {shown}" if names else ""
