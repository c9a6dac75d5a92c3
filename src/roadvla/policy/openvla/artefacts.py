"""What training leaves beside a base checkpoint: adapter folders, value heads, statistics.

Reads this program's folders and RL4VLA's (``adapter_config.json`` and
``adapter_model.safetensors`` of peft, ``dataset_statistics.json``). Nothing is unpickled: of
RL4VLA's ``training_state.pt`` the value head is converted once, by who trusts it (docs/openvla.md).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from roadvla.errors import UserError
from roadvla.files import MAX_TENSORS, read_bytes, write_whole
from roadvla.policy.openvla.storage import damaged, read_object, to_json
from roadvla.tensors import parse_tensors

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
VALUE_HEAD_NAME = "value_head.safetensors"
STATISTICS_NAME = "dataset_statistics.json"
STATE_NAME = "training_state.pt"

_ROOT = "base_model.model."
_VALUE_HEAD = "value_head."
_MERGED = "merge it into its base with the code that trained it, and pass the merged checkpoint"
_ONLY_OFF = (
    *("use_rslora", "use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save"),
    *("fan_in_fan_out", "layer_replication", "target_parameters", "trainable_token_indices"),
    *("use_qalora", "alora_invocation_tokens", "arrow_config"),
)
# These change the base weights too, so A and B alone do not say what was trained.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])(?:\.[^.]+)?\.weight")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A LoRA adapter and what comes with it, on the CPU.

    Attributes:
        rank: r, the same for all modules.
        alpha: α; B·A is scaled by α/r.
        modules: A and B in float32 by module name, as in the HF checkpoint (without peft's
            ``base_model.model.``). A of a convolution is 4-d, of a linear layer 2-d.
        base: The checkpoint it belongs to, as recorded.
        value_head: By name without prefix (``head_l1.weight``), if there is one.
        norm_stats: Statistics that replace those of the checkpoint, if there are any.
    """

    rank: int
    alpha: float
    modules: dict[str, tuple[Tensor, Tensor]]
    base: str | None
    value_head: dict[str, Tensor] | None
    norm_stats: dict[str, Any] | None


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter folder, RL4VLA's or this program's.

    All modules are returned, also those that this program never computes (the last block of a
    vision tower, SigLIP's pooling).

    Raises:
        UserError: If something is missing, damaged, pickled, or no plain LoRA.
    """
    folder = Path(folder)
    config = _read_config(folder)
    return Adapter(
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        modules=_read_modules(folder, config["r"]),
        base=config.get("base_model_name_or_path") or None,
        value_head=read_value_head(folder),
        norm_stats=read_statistics(folder),
    )


def read_value_head(folder: Path) -> dict[str, Tensor] | None:
    """Read the value head that lies beside a checkpoint or an adapter; ``None`` without one.

    RL4VLA's ``training_state.pt`` is never read. Where it lies alone it is refused, not passed
    over: training would go on with a fresh head.

    Returns:
        float32 weights by name, without the prefix ``value_head.``.

    Raises:
        UserError: If the file is damaged or holds something else, or is still to be converted.
    """
    folder = Path(folder)
    path = folder / VALUE_HEAD_NAME
    if not path.is_file():
        if (folder / STATE_NAME).is_file():
            raise UserError(
                f"{folder / STATE_NAME} is pickled, which can run code, and is never read: if you "
                f"trust it, convert its value head once to {VALUE_HEAD_NAME} as docs/openvla.md "
                f"shows; to start with a fresh one, move it away"
            )
        return None
    tensors = _read_tensors(path)
    if not all(value.is_floating_point() for value in tensors.values()):
        raise UserError(f"{path} holds no value head: expected its weights by name")
    return {
        name.removeprefix(_VALUE_HEAD): value.to(torch.float32, copy=True)
        for name, value in tensors.items()
    }


def write_adapter(folder: Path, adapter: Adapter) -> None:
    """Write an adapter in peft's layout, its value head and statistics beside it.

    Each file appears whole or not at all; a value head or statistics of an earlier adapter go.

    Args:
        folder: Made if need be.
        adapter: Stored in float32.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{_ROOT}{module}.lora_{part}.weight": weight
        for module, pair in adapter.modules.items()
        for part, weight in zip("AB", pair, strict=True)
    }
    write_whole(folder / WEIGHTS_NAME, _to_bytes(tensors))
    write_whole(folder / CONFIG_NAME, to_json(_config_of(adapter)))
    _write_or_remove(
        folder / STATISTICS_NAME,
        None if adapter.norm_stats is None else to_json(adapter.norm_stats),
    )
    write_value_head(folder, adapter.value_head)


def write_value_head(folder: Path, value_head: dict[str, Tensor] | None) -> None:
    """Write ``value_head.safetensors``; remove it if there is no value head.

    Args:
        folder: Exists.
        value_head: By name without prefix.
    """
    data = None
    if value_head is not None:
        data = _to_bytes({f"{_VALUE_HEAD}{name}": weight for name, weight in value_head.items()})
    _write_or_remove(folder / VALUE_HEAD_NAME, data)


def _config_of(adapter: Adapter) -> dict[str, Any]:
    alpha = int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": adapter.base,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": "gaussian",
        "target_modules": sorted({module.rpartition(".")[2] for module in adapter.modules}),
    }


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise UserError(f"no adapter at {folder}: expected a folder holding {CONFIG_NAME}")
    config = read_object(path)
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{path} has peft_type {config.get('peft_type')!r}, only 'LORA' is supported: {_MERGED}"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise UserError(f"{path} has r {rank!r}, expected a whole number above 0: copy it again")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise UserError(
            f"{path} has lora_alpha {alpha!r}, expected a number above 0: copy it again"
        )
    on = [f"{name} {config[name]!r}" for name in _ONLY_OFF if config.get(name)]
    if config.get("bias", "none") != "none":
        on.append(f"bias {config['bias']!r}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        on.append(f"init_lora_weights {start!r}")
    if on:
        raise UserError(f"{path} has {', '.join(on)}, only plain LoRA is supported: {_MERGED}")
    return config


def _read_modules(folder: Path, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise UserError(
            f"{folder} has no {WEIGHTS_NAME}"
            + (
                ", only adapter_model.bin, which is pickled and can run code: convert it with "
                f"safetensors.torch.save_file(torch.load('adapter_model.bin', weights_only=True), "
                f"{WEIGHTS_NAME!r})"
                if pickled
                else ": copy it again"
            )
        )
    parts: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    for key, tensor in _read_tensors(path).items():
        match = _KEY.fullmatch(key.removeprefix(_ROOT))
        if match is None:
            raise UserError(
                f"{path} holds {key}, which is no weight of plain LoRA (…lora_A.weight, "
                f"…lora_B.weight): {_MERGED}"
            )
        module, part = match["module"], match["part"]
        if module in parts[part]:
            raise UserError(f"{path} holds several adapters on {module}: save one by itself")
        parts[part][module] = tensor.float()
    return _pair(parts["A"], parts["B"], rank, path)


def _pair(
    a: dict[str, Tensor], b: dict[str, Tensor], rank: int, path: Path
) -> dict[str, tuple[Tensor, Tensor]]:
    lone = sorted(a.keys() ^ b.keys())
    if lone or not a:
        raise UserError(
            f"{path} {f'has only one of A and B for {lone[0]}' if lone else 'is empty'}: copy it "
            f"again"
        )
    for module in a:
        shapes = tuple(a[module].shape), tuple(b[module].shape)
        if a[module].dim() not in (2, 4) or (shapes[0][0], *shapes[1][1:]) != (
            rank,
            rank,
            *(1,) * (a[module].dim() - 2),
        ):
            raise UserError(
                f"{path}: A and B of {module} are {shapes[0]} and {shapes[1]}, which is not rank "
                f"{rank} as {CONFIG_NAME} says: take both files from one save"
            )
    return {module: (a[module], b[module]) for module in a}


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return parse_tensors(read_bytes(path, limit=MAX_TENSORS))
    except (OSError, ValueError) as error:
        raise damaged(path, error) from error


def read_statistics(folder: Path) -> dict[str, Any] | None:
    """Read ``dataset_statistics.json``, which fine-tuned runs carry; ``None`` without one.

    Raises:
        UserError: If it is damaged.
    """
    path = folder / STATISTICS_NAME
    if not path.is_file():
        return None
    statistics = read_object(path)
    for key, entry in statistics.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("action"), dict):
            raise UserError(f"{path}: {key!r} has no action statistics: copy the file again")
    return statistics or None


def _to_bytes(tensors: dict[str, Tensor]) -> bytes:
    return save(
        {
            name: weight.detach().to("cpu", torch.float32).contiguous()
            for name, weight in tensors.items()
        },
        metadata={"format": "pt"},
    )


def _write_or_remove(path: Path, data: bytes | None) -> None:
    if data is None:
        path.unlink(missing_ok=True)
    else:
        write_whole(path, data)
