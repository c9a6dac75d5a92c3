"""Names, shapes and random values of the tensors of a tiny OpenVLA checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from roadvla.errors import UserError
from roadvla.policy.action_tokens import LAST_TOKEN_ID, NUM_BINS

VOCABULARY = 32064
"""Rows of the embedding: Llama-2's 32000 and 64 more, for padding."""

_PATCH = 14
_REGISTERS = 4
_MLP = {"dino": 4.0, "siglip": 3.7362}
# Logits of the action bins get a spread of about 1.5, an entropy of about 4.4 of 5.5 nats; other
# tokens stay below them, so that greedy decoding over the whole vocabulary gives actions too.
_ACTION_SPREAD = 1.5
_OTHER_SPREAD = 0.3


@dataclass(frozen=True, kw_only=True)
class TinyTower:
    """Sizes of a vision tower.

    Attributes:
        width: Channels.
        depth: Blocks stored; the last one is never used.
        heads: Attention heads.
    """

    width: int
    depth: int
    heads: int

    def __post_init__(self) -> None:
        """Refuse sizes that do not divide."""
        if min(self.width, self.heads) < 1 or self.depth < 2 or self.width % self.heads:
            raise UserError(
                f"vision tower of width {self.width}, depth {self.depth}, {self.heads} heads: the "
                f"heads must divide the width, and at least 2 blocks are needed"
            )


@dataclass(frozen=True, kw_only=True)
class TinySizes:
    """Sizes of a tiny checkpoint; the vocabulary keeps its 32064 rows, for action ids are fixed.

    Attributes:
        dino: First tower, left out if ``single_tower``.
        siglip: Second tower.
        hidden: Width of the language model.
        intermediate: Hidden channels of its MLPs.
        layers: Decoder layers.
        heads: Attention heads.
        kv_heads: Key-value heads; fewer make grouped-query attention.
        rms_norm_eps: Written to the configuration unless ``None``, as in openvla-7b: then 1e-6.
        single_tower: SigLIP alone, a projector of two layers and Vicuna's prompt: openvla-v01.
        image_size: Side of the square that the towers read; 224 in every real checkpoint.
        shards: Weight files; more than one makes an index.
    """

    dino: TinyTower = TinyTower(width=48, depth=3, heads=4)
    siglip: TinyTower = TinyTower(width=40, depth=4, heads=2)
    hidden: int = 64
    intermediate: int = 176
    layers: int = 2
    heads: int = 4
    kv_heads: int = 4
    rms_norm_eps: float | None = None
    single_tower: bool = False
    image_size: int = 224
    shards: int = 1

    def __post_init__(self) -> None:
        """Refuse sizes that do not divide."""
        if min(self.hidden, self.intermediate, self.layers, self.heads, self.kv_heads) < 1:
            raise UserError("every size of the language model must be at least 1")
        if self.hidden % (2 * self.heads) or self.heads % self.kv_heads:
            raise UserError(
                f"hidden {self.hidden} must be an even multiple of {self.heads} heads, and those a "
                f"multiple of {self.kv_heads} kv_heads"
            )
        if self.image_size < _PATCH or self.image_size % _PATCH:
            raise UserError(f"image_size {self.image_size} must be a multiple of {_PATCH}")
        if not 1 <= self.shards <= 99:
            raise UserError(f"shards is {self.shards}: choose 1 to 99")

    @property
    def towers(self) -> dict[str, TinyTower]:
        """Towers by kind, in the order of their channels."""
        second = {"siglip": self.siglip}
        return second if self.single_tower else {"dino": self.dino} | second


def tensor_shapes(sizes: TinySizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of every tensor that an OpenVLA checkpoint of these sizes holds.

    Sources: names as in openvla-7b's safetensors index, unused tensors included.
    """
    for (kind, tower), place in zip(
        sizes.towers.items(), ("featurizer", "fused_featurizer"), strict=False
    ):
        for name, shape in _tower_shapes(kind, tower, sizes.image_size):
            yield f"vision_backbone.{place}.{name}", shape
    yield from _projector_shapes(sizes)
    yield from _language_shapes(sizes)


def _tower_shapes(
    kind: str, tower: TinyTower, image_size: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, mlp = tower.width, int(_MLP[kind] * tower.width)
    if kind == "dino":
        yield "cls_token", (1, 1, width)
        yield "reg_token", (1, _REGISTERS, width)
    yield "pos_embed", (1, (image_size // _PATCH) ** 2, width)
    yield from _layer("patch_embed.proj", (width, 3, _PATCH, _PATCH))
    for index in range(tower.depth):
        block = f"blocks.{index}."
        yield from _layer(f"{block}norm1", (width,))
        yield from _layer(f"{block}attn.qkv", (3 * width, width))
        yield from _layer(f"{block}attn.proj", (width, width))
        yield from _layer(f"{block}norm2", (width,))
        yield from _layer(f"{block}mlp.fc1", (mlp, width))
        yield from _layer(f"{block}mlp.fc2", (width, mlp))
        if kind == "dino":
            yield f"{block}ls1.scale_factor", (width,)
            yield f"{block}ls2.scale_factor", (width,)
    yield from _layer("norm", (width,))
    if kind == "siglip":
        yield "attn_pool.latent", (1, 1, width)
        yield from _layer("attn_pool.q", (width, width))
        yield from _layer("attn_pool.kv", (2 * width, width))
        yield from _layer("attn_pool.proj", (width, width))
        yield from _layer("attn_pool.norm", (width,))
        yield from _layer("attn_pool.mlp.fc1", (mlp, width))
        yield from _layer("attn_pool.mlp.fc2", (width, mlp))


def _projector_shapes(sizes: TinySizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    vision, hidden = sum(tower.width for tower in sizes.towers.values()), sizes.hidden
    inner = hidden if sizes.single_tower else 4 * vision
    yield from _layer("projector.fc1", (inner, vision))
    yield from _layer("projector.fc2", (hidden, inner))
    if not sizes.single_tower:
        yield from _layer("projector.fc3", (hidden, hidden))


def _language_shapes(sizes: TinySizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = sizes.hidden, sizes.intermediate
    shared = hidden // sizes.heads * sizes.kv_heads
    yield "language_model.model.embed_tokens.weight", (VOCABULARY, hidden)
    for index in range(sizes.layers):
        layer = f"language_model.model.layers.{index}."
        yield f"{layer}input_layernorm.weight", (hidden,)
        for name, width in (("q", hidden), ("k", shared), ("v", shared), ("o", hidden)):
            yield f"{layer}self_attn.{name}_proj.weight", (width, hidden)
        yield f"{layer}post_attention_layernorm.weight", (hidden,)
        yield f"{layer}mlp.gate_proj.weight", (inner, hidden)
        yield f"{layer}mlp.up_proj.weight", (inner, hidden)
        yield f"{layer}mlp.down_proj.weight", (hidden, inner)
    yield "language_model.model.norm.weight", (hidden,)
    yield "language_model.lm_head.weight", (VOCABULARY, hidden)


def _layer(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def draw_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw a tensor so that activations keep a size of about 1 and images tell apart."""
    if name.endswith("scale_factor"):
        return torch.full(shape, 0.5, dtype=torch.bfloat16)
    if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
        return torch.ones(shape, dtype=torch.bfloat16)
    values = torch.randn(shape, generator=generator)
    if name.endswith("lm_head.weight"):
        values *= _OTHER_SPREAD / math.sqrt(shape[1])
        first = LAST_TOKEN_ID + 1 - NUM_BINS
        values[first : LAST_TOKEN_ID + 1] *= _ACTION_SPREAD / _OTHER_SPREAD
    elif name.endswith(".bias"):
        values *= 0.02
    elif name.endswith((".weight", ".latent")) and "embed_tokens" not in name:
        values /= math.sqrt(math.prod(shape[1:]))
    else:
        values *= 0.5
    return values.to(torch.bfloat16)
