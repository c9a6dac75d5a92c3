"""A checkpoint of a few channels with every kind of tensor that an OpenVLA has, made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIG: dict[str, Any] = {
    "model_type": "openvla",
    "image_sizes": [28, 28],
    "timm_model_ids": [
        "vit_large_patch14_reg4_dinov2.lvd142m",
        "vit_so400m_patch14_siglip_224",
    ],
    "timm_model_kwargs": [{"num_heads": 2}, {"num_heads": 1}],
    "torch_dtype": "bfloat16",
    "text_config": {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "torch_dtype": "bfloat16",
        "vocab_size": 32064,
    },
    "norm_stats": {"toy": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7}}},
}
DEAD = (
    "vision_backbone.featurizer.blocks.1.attn.qkv.weight",
    "vision_backbone.featurizer.norm.weight",
    "vision_backbone.fused_featurizer.blocks.1.mlp.fc1.weight",
    "vision_backbone.fused_featurizer.attn_pool.q.weight",
)


def make_tensors(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Random weights under the names of the HF export."""
    shapes: dict[str, tuple[int, ...]] = {
        "projector.fc1.weight": (16, 14),
        "projector.fc1.bias": (16,),
        "language_model.model.embed_tokens.weight": (32064, 8),
        "language_model.model.layers.0.self_attn.q_proj.weight": (8, 8),
        "language_model.model.norm.weight": (8,),
        "language_model.lm_head.weight": (32064, 8),
    }
    for tower, width in (("featurizer", 8), ("fused_featurizer", 6)):
        prefix = f"vision_backbone.{tower}."
        shapes[f"{prefix}pos_embed"] = (1, 4, width)
        shapes[f"{prefix}patch_embed.proj.weight"] = (width, 3, 14, 14)
        shapes[f"{prefix}norm.weight"] = (width,)
        for block in range(2):
            shapes[f"{prefix}blocks.{block}.attn.qkv.weight"] = (3 * width, width)
            shapes[f"{prefix}blocks.{block}.mlp.fc1.weight"] = (2 * width, width)
    shapes["vision_backbone.fused_featurizer.attn_pool.q.weight"] = (6, 6)
    generator = torch.Generator().manual_seed(1)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in sorted(shapes.items())}


def write_checkpoint(
    folder: Path,
    tensors: dict[str, Tensor] | None = None,
    *,
    config: dict[str, Any] = CONFIG,
    shards: int = 1,
) -> Path:
    """Write ``config.json`` and the weights, in several files with an index if wanted."""
    tensors = make_tensors() if tensors is None else tensors
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    placed = {name: files[i % shards] for i, name in enumerate(tensors)}
    for file in files:
        save_file({n: t for n, t in tensors.items() if placed[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
