"""OpenVLA checkpoints in HF format: found, checked, fingerprinted, and read into a module.

Only safetensors are read; nothing is ever unpickled, and no code of the checkpoint runs.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from roadvla.errors import UserError
from roadvla.policy.openvla.architecture import is_dead, read_architecture
from roadvla.policy.openvla.storage import Stored, damaged, first_line, read_header, read_object

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_SHARD = re.compile(r"[\w.-]{1,200}\.safetensors")
_PATTERNS = ["*.json", "*.safetensors", "tokenizer.model"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_VALUE_HEAD = "value_head."
_SPOTS, _SPOT_BYTES = 4, 1024


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose files are present and whose headers have been read; no weights yet.

    Attributes:
        source: As the user named it.
        folder: Where it lies.
        config: The parsed ``config.json``.
        files: The safetensors file of every tensor, by tensor name.
        shapes: Of every tensor.
        dtypes: Of every tensor, as stored.
    """

    source: str
    folder: Path
    config: dict[str, Any]
    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    @property
    def on_hub(self) -> bool:
        """Whether ``source`` names a repository of the hub."""
        return self.folder != Path(self.source).expanduser()


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Find a checkpoint and read its configuration and the headers of its weights.

    Args:
        source: A folder, or the hub's ``owner/name``, which is downloaded into the hub's cache.

    Raises:
        UserError: If it is missing, incomplete, damaged, or no OpenVLA in safetensors.
    """
    folder = _locate(source)
    config = _read_config(folder)
    files: dict[str, Path] = {}
    stored: dict[str, Stored] = {}
    placed = _read_index(folder)
    for path in _weight_files(folder, placed):
        for name, tensor in read_header(path).items():
            if placed.get(name, path.name) == path.name:
                files[name], stored[name] = path, tensor
    for name, file in placed.items():
        if name not in files:
            raise UserError(
                f"{folder / INDEX_NAME} says that {name} is in {file}, but it is not: take index "
                f"and shards from one download"
            )
    return Checkpoint(
        source=str(source),
        folder=folder,
        config=config,
        files=files,
        shapes={name: tensor.shape for name, tensor in stored.items()},
        dtypes={name: tensor.dtype for name, tensor in stored.items()},
    )


def fingerprint(checkpoint: Checkpoint) -> str:
    """Identify a checkpoint's contents without reading all of them.

    The hash covers the configuration, names and headers of the weight files, and a few kilobytes
    spread over every tensor; merging an adapter changes every layer it adapts, so that shows.

    Returns:
        SHA-256, hexadecimal.
    """
    digest = hashlib.sha256((checkpoint.folder / CONFIG_NAME).read_bytes())
    for path in weight_files(checkpoint):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        header = read_header(path)
        with path.open("rb") as file:
            for name, tensor in sorted(header.items()):
                digest.update(f"{name} {tensor.dtype} {tensor.shape} {tensor.start}\n".encode())
                room = max(tensor.size - _SPOT_BYTES, 0)
                for spot in range(_SPOTS):
                    file.seek(tensor.start + room * spot // (_SPOTS - 1))
                    digest.update(file.read(min(_SPOT_BYTES, tensor.size)))
    return digest.hexdigest()


def locator(checkpoint: Checkpoint) -> str:
    """Name a checkpoint so that it is found from any directory: hub id, or absolute path."""
    return checkpoint.source if checkpoint.on_hub else str(checkpoint.folder.resolve())


def weight_files(checkpoint: Checkpoint) -> list[Path]:
    """List the safetensors files that hold the weights, by name."""
    return sorted(set(checkpoint.files.values()))


def load_weights(
    checkpoint: Checkpoint,
    module: nn.Module,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    keep_float32: Callable[[str], bool],
) -> None:
    """Put a checkpoint's weights into a module, one tensor after the other.

    The module may lie on the meta device: each of its tensors is replaced by one on ``device``, so
    there is never a second copy. Rotary frequencies and the dead weights of the vision towers are
    left out, and so is a value head that the checkpoint does not have.

    Args:
        checkpoint: From ``open_checkpoint``.
        module: With the checkpoint's names; ``requires_grad`` stays as it is.
        dtype: The weights are cast to it.
        device: Where they go.
        keep_float32: Names for which float32 is used instead.

    Raises:
        UserError: If names or shapes differ, a file is damaged, there is no such device, or its
            memory runs out.
    """
    _check_device(device)
    wanted = module.state_dict(keep_vars=True)
    if not any(name.startswith(_VALUE_HEAD) for name in checkpoint.files):
        wanted = {name: own for name, own in wanted.items() if not name.startswith(_VALUE_HEAD)}
    _check_fit(checkpoint, {name: tuple(own.shape) for name, own in wanted.items()})
    for path in weight_files(checkpoint):
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    if name in wanted and checkpoint.files[name] == path:
                        to = torch.float32 if keep_float32(name) else dtype
                        # A copy: the tensor read still leans on the file.
                        tensor = file.get_tensor(name).to(to, copy=True)
                        _place(module, name, tensor, wanted[name].requires_grad)
        except SafetensorError as error:
            raise damaged(path, error) from error
        except torch.OutOfMemoryError as error:
            needed = sum(own.numel() for own in wanted.values()) * dtype.itemsize / 1e9
            raise UserError(
                f"{checkpoint.source} does not fit into the memory of {device}: its weights take "
                f"{needed:.1f} GB in {str(dtype).removeprefix('torch.')}"
            ) from error


def _check_device(device: torch.device | str) -> None:
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"unknown device {device!r}: use 'cpu' or 'cuda'") from error
    count = torch.cuda.device_count()
    if place.type == "cuda" and (place.index or 0) >= count:
        raise UserError(
            f"device {str(place)!r} is not here, PyTorch sees {count} CUDA devices: use 'cpu'"
            + (f" or 'cuda:0' to 'cuda:{count - 1}'" if count else "")
        )


def _locate(source: str | Path) -> Path:
    try:
        folder = Path(source).expanduser()
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, a user that is unknown
        raise UserError(f"no checkpoint at {str(source)[:200]}: {error}"[:400]) from error
    if is_folder:
        return folder
    if exists:
        raise UserError(f"{source} is a file: pass the folder of an HF-format OpenVLA checkpoint")
    if isinstance(source, Path) or not _HUB_ID.fullmatch(source):
        raise UserError(
            f"no checkpoint at {source}: expected a folder, or a hub id like openvla/openvla-7b"
        )
    return _download(source)


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # The configuration first: the weights of something else would be gigabytes in vain.
        folder = Path(snapshot_download(repository, allow_patterns=[CONFIG_NAME]))
        if (folder / CONFIG_NAME).is_file():
            _read_config(folder)
        return Path(snapshot_download(repository, allow_patterns=_PATTERNS))
    except UserError:
        raise
    except Exception as error:  # the client's transport errors share no public base class
        raise UserError(
            f"there is no folder {repository}, and the hub's {repository} cannot be had "
            f"({_why(error)}): download it where there is network and access, and pass the folder"
        ) from error


def _why(error: Exception) -> str:
    causes = {
        "GatedRepoError": "access to it must be asked for on its page",
        "RepositoryNotFoundError": "no such repository, or it is private",
        "LocalEntryNotFoundError": "no connection, and not in the cache",
        "IncompleteSnapshotError": "no connection, and not completely in the cache",
        "OfflineModeIsEnabled": "offline mode is on",
    }
    return causes.get(type(error).__name__) or first_line(error)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        hint = "pass the folder of an HF-format OpenVLA checkpoint"
        if (folder / "adapter_config.json").is_file():
            hint = "it holds an adapter, so pass the checkpoint that the adapter belongs to"
        raise UserError(f"{folder} has no {CONFIG_NAME}: {hint}")
    config = read_object(path)
    kind = config.get("model_type")
    if kind != "openvla":
        raise UserError(
            f"{path} has model_type {kind!r}, expected 'openvla': use such a checkpoint"
        )
    return config


def _read_index(folder: Path) -> dict[str, str]:
    """Map tensor names to shards; empty if the weights are one file."""
    path = folder / INDEX_NAME
    if (folder / WEIGHTS_NAME).is_file() or not path.is_file():
        return {}
    placed = read_object(path).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise UserError(f"{path} has no weight_map: copy it again")
    for file in placed.values():
        if not isinstance(file, str) or _SHARD.fullmatch(file) is None:
            raise UserError(f"{path} names the shard {file!r}: a file beside it is expected")
    return placed


def _weight_files(folder: Path, placed: dict[str, str]) -> list[Path]:
    shards = sorted(set(placed.values())) or [WEIGHTS_NAME]
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if placed and missing:
        raise UserError(
            f"{folder} lacks {_listed(missing)} ({len(missing)} of {len(shards)} shards named by "
            f"{INDEX_NAME}): download the rest"
        )
    if missing:
        raise UserError(f"{folder} has no {WEIGHTS_NAME}{_other_weights(folder)}")
    return [folder / shard for shard in shards]


def _other_weights(folder: Path) -> str:
    parts = sorted(path.name for path in folder.glob("model-*.safetensors"))
    pickled = [path for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".pt", ".pth")]
    if parts:
        return f" and no {INDEX_NAME} for {_listed(parts)}: copy the index too"
    if pickled:
        return (
            f", only {pickled[0].name}, which is pickled and can run code: convert native weights "
            f"with openvla's vla-scripts/extern/convert_openvla_weights_to_hf.py, others with "
            f"safetensors.torch.save_file(torch.load(FILE, weights_only=True), {WEIGHTS_NAME!r})"
        )
    return f" and no {INDEX_NAME}: copy the weights there"


def _check_fit(checkpoint: Checkpoint, wanted: dict[str, tuple[int, ...]]) -> None:
    shapes = checkpoint.shapes
    missing = sorted(wanted.keys() - shapes.keys())
    unexpected = sorted(name for name in shapes.keys() - wanted.keys() if not _is_rotary(name))
    if unexpected:
        source = str(checkpoint.folder / CONFIG_NAME)
        architecture = read_architecture(checkpoint.config, shapes, source)
        unexpected = [name for name in unexpected if not is_dead(name, architecture)]
    wrong = [
        f"{name} is {shapes[name]}, expected {shape}"
        for name, shape in sorted(wanted.items())
        if name in shapes and shapes[name] != shape
    ]
    found = [
        f"{len(names)} {kind}: {_listed(names)}"
        for kind, names in (
            ("missing", _with_closest(missing, unexpected, shapes)),
            ("unexpected", _with_closest(unexpected, missing, wanted)),
            ("of another shape", wrong),
        )
        if names
    ]
    if found:
        raise UserError(
            f"the weights of {checkpoint.source} are not those of an OpenVLA of its {CONFIG_NAME}; "
            f"{'; '.join(found)}: use the {CONFIG_NAME} that the weights were saved with"
        )


def _is_rotary(name: str) -> bool:
    return name.endswith("rotary_emb.inv_freq")


def _with_closest(names: list[str], odd: list[str], known: Iterable[str]) -> list[str]:
    """Add the likeliest counterpart to the first names: an odd one, else any."""
    shown = []
    for name in names[:4]:
        close = difflib.get_close_matches(name, odd, n=1) or difflib.get_close_matches(
            name, list(known), n=1
        )
        shown.append(f"{name} (closest: {close[0]})" if close else name)
    return shown + names[4:]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _place(module: nn.Module, name: str, tensor: Tensor, requires_grad: bool) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=requires_grad))
    else:
        setattr(owner, leaf, tensor)
