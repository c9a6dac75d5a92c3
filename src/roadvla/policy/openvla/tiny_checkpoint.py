"""``roadvla make-tiny-openvla``: a small random OpenVLA checkpoint, complete, in HF format.

Every file and tensor that openvla-7b has is there under its own name, the unused last blocks
included; only the widths and depths are small. ``timm_model_kwargs`` in the configuration, which
real checkpoints lack, tells the head counts that no tensor shows.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from roadvla.errors import UserError
from roadvla.policy.action_tokens import NUM_BINS, TABLETOP_STATS
from roadvla.policy.openvla.preprocess import PREPROCESSOR_NAME, default_preprocessing
from roadvla.policy.openvla.prompt import TOKENIZER_NAME
from roadvla.policy.openvla.tiny_tokenizer import SIZE, make_tiny_tokenizer
from roadvla.policy.openvla.tiny_weights import (
    VOCABULARY,
    TinySizes,
    TinyTower,
    draw_tensor,
    tensor_shapes,
)

__all__ = ["TinySizes", "TinyTower", "tensor_shapes", "write_tiny_checkpoint"]

_PAD = SIZE
_TIMM = {
    "dino": "vit_large_patch14_reg4_dinov2.lvd142m",
    "siglip": "vit_so400m_patch14_siglip_224",
}
_DEFAULT_SIZES = TinySizes()


def write_tiny_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    force: bool = False,
    sizes: TinySizes = _DEFAULT_SIZES,
    norm_keys: tuple[str, ...] = ("tabletop",),
) -> Path:
    """Write a random checkpoint that every command takes in place of openvla-7b.

    The files are made beside the folder first, so a write cut off leaves no half checkpoint.

    Args:
        folder: Made if need be; must be empty without ``force``.
        seed: Of the weights.
        force: Replace the checkpoint in the folder; other files there stay.
        sizes: Widths and depths.
        norm_keys: Names under which the tabletop's action limits appear in ``norm_stats``.

    Returns:
        The folder.

    Raises:
        UserError: If the folder is a file, not empty, or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: name a folder for the checkpoint")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise UserError(f"{folder} is not empty: choose another folder, or replace it with --force")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            _write_files(made, seed, sizes, norm_keys)
            _move_files(made, folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{folder} cannot be written ({reason}): make room or choose another folder"
        ) from error
    return folder


def _write_files(folder: Path, seed: int, sizes: TinySizes, norm_keys: tuple[str, ...]) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = {name: draw_tensor(name, shape, generator) for name, shape in tensor_shapes(sizes)}
    _write_weights(folder, weights, sizes.shards)
    make_tiny_tokenizer().save(str(folder / TOKENIZER_NAME), pretty=False)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<PAD>"}
    contents = {
        "config.json": _config(sizes, norm_keys),
        "generation_config.json": {
            "_from_model_config": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": _PAD,
        },
        PREPROCESSOR_NAME: _preprocessor(sizes),
        "special_tokens_map.json": special,
        "tokenizer_config.json": special
        | {
            "add_bos_token": True,
            "add_eos_token": False,
            "model_max_length": 2048,
            "padding_side": "right",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _move_files(made: Path, folder: Path) -> None:
    """Put the new files in place of those of an earlier checkpoint, whose weights go first."""
    folder.mkdir(exist_ok=True)
    for pattern in (
        "model*.safetensors",
        "model*.safetensors.index.json",
        "value_head.safetensors",
    ):
        for old in folder.glob(pattern):
            old.unlink()
    for new in sorted(made.iterdir()):
        os.replace(new, folder / new.name)


def _write_weights(folder: Path, weights: dict[str, Tensor], shards: int) -> None:
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    total = sum(tensor.nbytes for tensor in weights.values())
    parts: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    for index, (name, tensor) in enumerate(weights.items()):
        parts[index * shards // len(weights)][name] = tensor
    index_of = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05}-of-{shards:05}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        index_of |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index_of.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _config(sizes: TinySizes, norm_keys: tuple[str, ...]) -> dict[str, Any]:
    single, towers = sizes.single_tower, sizes.towers
    eps = {} if sizes.rms_norm_eps is None else {"rms_norm_eps": sizes.rms_norm_eps}
    return {
        "architectures": ["OpenVLAForActionPrediction"],
        "model_type": "openvla",
        "arch_specifier": "no-align+gelu-mlp" if single else "no-align+fused-gelu-mlp",
        "hf_llm_id": "lmsys/vicuna-7b-v1.5" if single else "meta-llama/Llama-2-7b-hf",
        "llm_backbone_id": "vicuna-v15-7b" if single else "llama2-7b-pure",
        "llm_max_length": 2048,
        "vision_backbone_id": "siglip-vit-so400m" if single else "dinosiglip-vit-so-224px",
        "use_fused_vision_backbone": not single,
        "image_resize_strategy": "resize-naive",
        "image_sizes": [sizes.image_size] * len(towers),
        "timm_model_ids": [_TIMM[kind] for kind in towers],
        "timm_override_act_layers": [None] * len(towers),
        "timm_model_kwargs": [
            {"embed_dim": tower.width, "depth": tower.depth, "num_heads": tower.heads}
            for tower in towers.values()
        ],
        "n_action_bins": NUM_BINS,
        "norm_stats": {key: TABLETOP_STATS.to_dict() for key in norm_keys},
        "output_projector_states": False,
        "pad_to_multiple_of": VOCABULARY - SIZE,
        "pad_token_id": _PAD,
        "text_config": {
            "model_type": "llama",
            "hidden_size": sizes.hidden,
            "intermediate_size": sizes.intermediate,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "num_key_value_heads": sizes.kv_heads,
            "pad_token_id": _PAD,
            "torch_dtype": "bfloat16",
            "vocab_size": VOCABULARY,
        }
        | eps,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
    }


def _preprocessor(sizes: TinySizes) -> dict[str, Any]:
    count, side = len(sizes.towers), [sizes.image_size] * 2
    values = default_preprocessing(count, sizes.image_size)
    exact = {"dino": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])}
    plain = [exact.get(kind, ([0.5] * 3, [0.5] * 3)) for kind in sizes.towers]
    return {
        "image_processor_type": "PrismaticImageProcessor",
        "image_resize_strategy": values.strategy,
        "input_sizes": [[3, *side]] * count,
        "interpolations": ["bicubic"] * count,
        "means": [mean for mean, _ in plain],
        "stds": [std for _, std in plain],
        "tvf_crop_params": [{"output_size": side}] * count,
        "tvf_do_letterbox": False,
        "tvf_letterbox_fill": None,
        "tvf_normalize_params": [
            {"inplace": False, "mean": list(mean), "std": list(std)}
            for mean, std in zip(values.means, values.stds, strict=True)
        ],
        "tvf_resize_params": [
            {"antialias": True, "interpolation": 3, "max_size": None, "size": side}
        ]
        * count,
        "use_fused_vision_backbone": count == 2,
    }
