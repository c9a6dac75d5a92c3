"""Adapters merged into their base: a checkpoint in HF format that the original OpenVLA code loads.

The base is streamed, one tensor in memory at a time. Adapted weights become W + α/r·B·A, computed
in float32; all others, those that never influence the output included, are copied bit for bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from roadvla.errors import UserError
from roadvla.files import write_whole
from roadvla.policy.openvla.artefacts import (
    STATISTICS_NAME,
    VALUE_HEAD_NAME,
    Adapter,
    read_adapter,
    write_value_head,
)
from roadvla.policy.openvla.checkpoint import (
    CONFIG_NAME,
    INDEX_NAME,
    WEIGHTS_NAME,
    Checkpoint,
    fingerprint,
    open_checkpoint,
    weight_files,
)
from roadvla.policy.openvla.policy import base_of, read_description
from roadvla.policy.openvla.storage import (
    Stored,
    byte_size,
    first_line,
    read_header,
    read_object,
    read_tensor,
    to_json,
    write_safetensors,
)
from roadvla.policy.openvla.value_head import ValueHead

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_CARRIED = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "preprocessor_config.json", "processor_config.json"),
    *("generation_config.json", STATISTICS_NAME, VALUE_HEAD_NAME, "LICENSE", "*.py"),
)


@dataclass(frozen=True, kw_only=True)
class _Merge:
    """A base, the adapter to merge into it, and the number format wanted, if not the stored one."""

    base: Checkpoint
    adapter: Adapter
    stored: dict[str, Stored]
    dtype: torch.dtype | None

    def dtype_of(self, name: str) -> torch.dtype:
        """Number format of a tensor that is written."""
        return self.dtype or self.stored[name].dtype

    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Number formats and shapes of what is written, in the order of the base."""
        return {name: (self.dtype_of(name), tensor.shape) for name, tensor in self.stored.items()}

    def produce(self, name: str) -> Tensor:
        """Read a tensor and merge what there is to merge."""
        module, _, leaf = name.rpartition(".")
        head = (self.adapter.value_head or {}).get(name.removeprefix("value_head."))
        if name.startswith("value_head.") and head is not None:
            return head.to(self.dtype_of(name))
        weight = read_tensor(self.base.files[name], self.stored[name])
        if leaf != "weight" or module not in self.adapter.modules:
            return weight.to(self.dtype_of(name))
        scale = self.adapter.alpha / self.adapter.rank
        merged = merge(weight, *self.adapter.modules[module], scale).to(self.dtype_of(name))
        if not merged.isfinite().all():
            raise UserError(
                f"the adapter makes {name} infinite or NaN: its training diverged; export an "
                f"earlier checkpoint"
            )
        return merged


def export_checkpoint(
    policy_folder: Path,
    to: Path,
    *,
    checkpoint: str | None = None,
    dtype: str | None = None,
    shard_bytes: int = 5_000_000_000,
    force: bool = False,
) -> Path:
    """Merge a policy's adapters into its base and write the result as an OpenVLA checkpoint.

    Key names are the base's. Tokenizer and preprocessor files come along, the value head lies
    beside. Python files are copied where the base's folder has them, and ``auto_map`` keeps naming
    them; where it has none, as in the hub's cache, ``auto_map`` names those on the hub, or goes.

    Args:
        policy_folder: What ``save_openvla`` wrote, or an RL4VLA adapter folder.
        to: Appears whole or not at all.
        checkpoint: The base, if it is elsewhere than the policy folder says.
        dtype: ``bfloat16`` or ``float32`` for all weights; as the base stores them if not given.
        shard_bytes: Largest weight file, unless a single tensor is larger.
        force: Replace a folder that is not empty.

    Returns:
        The folder written.

    Raises:
        UserError: If something is missing, damaged, does not fit, or cannot be written.
    """
    policy_folder, to = Path(policy_folder), Path(to)
    if dtype is not None and dtype not in _DTYPES:
        raise UserError(f"dtype is {dtype!r}: use 'bfloat16' or 'float32'")
    if shard_bytes < 1:
        raise UserError(f"shard_bytes is {shard_bytes}: at least 1 is needed")
    adapter = read_adapter(policy_folder)
    base = _open_base(policy_folder, adapter, checkpoint)
    _check_target(to, (policy_folder, base.folder), force)
    job = _Merge(
        base=base,
        adapter=adapter,
        stored={
            name: tensor
            for path in weight_files(base)
            for name, tensor in read_header(path).items()
            if base.files[name] == path
        },
        dtype=None if dtype is None else _DTYPES[dtype],
    )
    _check_fit(job, policy_folder)
    with _whole(to.resolve(), sum(byte_size(*entry) for entry in job.layout().values())) as partial:
        _write_weights(job, partial, shard_bytes)
        _write_rest(job, partial)
    return to


def stores_half(folder: Path) -> bool:
    """Whether any weight of a checkpoint is stored in fewer than 32 bits."""
    return any(dtype.itemsize < 4 for dtype in open_checkpoint(folder).dtypes.values())


def merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Add an adapter to the weight of a linear layer or a convolution: W + α/r·B·A.

    Args:
        weight: W, [out, in] or [out, in, height, width].
        a: A, [r, in] or [r, in, height, width].
        b: B, [out, r] or [out, r, 1, 1].
        scale: α/r.

    Returns:
        float32.
    """
    product = (b.flatten(1).float() @ a.flatten(1).float()).reshape(weight.shape)
    return weight.float() + scale * product


def _open_base(folder: Path, adapter: Adapter, checkpoint: str | None) -> Checkpoint:
    description = read_description(folder)
    base = open_checkpoint(base_of(folder, description, adapter, checkpoint))
    if description is not None and description.get("fingerprint") != fingerprint(base):
        raise UserError(
            f"{folder} adapts {description.get('checkpoint')!r}, whose weights are not those of "
            f"{base.source!r}: pass the --checkpoint it was trained on"
        )
    return base


def _check_target(to: Path, sources: tuple[Path, ...], force: bool) -> None:
    target = to.resolve()
    for source in (folder.resolve() for folder in sources):
        if target.is_relative_to(source) or source.is_relative_to(target):
            raise UserError(f"--to {to} and {source} lie in one another: choose a folder elsewhere")
    if to.exists() and not to.is_dir():
        raise UserError(f"--to {to} is a file: choose a folder")
    if not force and to.is_dir() and any(to.iterdir()):
        raise UserError(f"--to {to} is not empty: choose another folder, or pass --force")


def _check_fit(job: _Merge, folder: Path) -> None:
    for module, (a, b) in job.adapter.modules.items():
        shape = job.base.shapes.get(f"{module}.weight")
        delta = (b.shape[0], *a.shape[1:])
        if shape != delta:
            found = "no such layer" if shape is None else f"one of {shape}"
            raise UserError(
                f"{folder} adapts {module} with a weight of {delta}, and {job.base.source} has "
                f"{found}: pass the --checkpoint it was trained on"
            )
    if job.adapter.value_head is not None:
        hidden = job.base.shapes["language_model.model.embed_tokens.weight"][1]
        with torch.device("meta"):
            head = ValueHead(hidden)
        head.check_fit(job.adapter.value_head, str(folder))


@contextmanager
def _whole(to: Path, size: int) -> Iterator[Path]:
    """Lend a folder beside ``to`` that takes its place once it is complete."""
    partial, old = (to.with_name(f".{to.name}.{state}") for state in ("partial", "old"))
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        for left_over in (partial, old):
            shutil.rmtree(left_over, ignore_errors=True)
        free = shutil.disk_usage(to.parent).free
        if free < size:
            raise UserError(
                f"{to} needs {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: make room, or "
                f"choose another disk"
            )
        partial.mkdir()
        yield partial
        if to.exists():
            to.rename(old)
        partial.rename(to)
    except OSError as error:
        raise UserError(
            f"cannot write {to} ({error.strerror or first_line(error)}): free space or choose "
            f"another folder"
        ) from error
    finally:
        if old.exists() and not to.exists():
            old.rename(to)
        for left_over in (partial, old):
            shutil.rmtree(left_over, ignore_errors=True)


def _write_weights(job: _Merge, folder: Path, shard_bytes: int) -> None:
    layout = job.layout()
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, entry in layout.items():
        size = byte_size(*entry)
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    placed: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = WEIGHTS_NAME
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, {name: layout[name] for name in names}, job.produce)
        placed |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(byte_size(*entry) for entry in layout.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
        write_whole(folder / INDEX_NAME, to_json(index))


def _write_rest(job: _Merge, folder: Path) -> None:
    """Write the configuration, and the files that go beside the weights."""
    source = job.base.folder
    for pattern in _CARRIED:
        for path in sorted(source.glob(pattern)):
            shutil.copyfile(path, folder / path.name)
    if job.adapter.value_head is not None:
        write_value_head(folder, job.adapter.value_head)
    config = dict(job.base.config)
    if job.adapter.norm_stats is not None:
        config["norm_stats"] = job.adapter.norm_stats
        # The original code lets this file go before the configuration.
        write_whole(folder / STATISTICS_NAME, to_json(job.adapter.norm_stats))
    if job.dtype is not None:
        config = _with_dtype(config, str(job.dtype).removeprefix("torch."))
    write_whole(folder / CONFIG_NAME, to_json(config))
    for path in (*sorted(folder.glob("*_config.json")), folder / CONFIG_NAME):
        data = read_object(path)
        if isinstance(data.get("auto_map"), dict):
            write_whole(path, to_json(_with_code(data, job.base)))


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Let the fields that name the weights' number format tell the truth."""
    changed = {
        name: dtype if name in ("torch_dtype", "dtype") else value for name, value in config.items()
    }
    if isinstance(config.get("text_config"), dict):
        changed["text_config"] = _with_dtype(config["text_config"], dtype)
    return changed


def _with_code(data: Mapping[str, Any], base: Checkpoint) -> dict[str, Any]:
    """Keep of ``auto_map`` what can be found from the new folder."""
    kept: dict[str, Any] = {}
    for name, value in data["auto_map"].items():
        given = value if isinstance(value, list) else [value]
        found = [_find_code(str(item), base) if item else None for item in given]
        if any(found):
            kept[name] = found if isinstance(value, list) else found[0]
    changed = {name: value for name, value in data.items() if name != "auto_map"}
    return {**changed, "auto_map": kept} if kept else changed


def _find_code(reference: str, base: Checkpoint) -> str | None:
    """Name a class (``file.Class``) so that it is found without the base's folder."""
    if "--" in reference or (base.folder / f"{reference.split('.')[0]}.py").is_file():
        return reference
    return f"{base.source}--{reference}" if base.on_hub else None
