"""The Llama decoder's passes: over a whole sequence, at some positions only, and one step.

The layers are those of ``transformers``; the attention is called here, so that the key-value cache
is a plain tensor of fixed shape, and the last layer computes only the positions that are read.
Sequences are padded on the right: causal attention keeps the pads from everything that is read, so
no mask is needed over a whole sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer


@dataclass(frozen=True)
class Heads:
    """Attention heads of a layer.

    Attributes:
        query: Query heads.
        shared: Key-value heads; fewer than query heads in grouped-query attention.
        dim: Channels of each.
    """

    query: int
    shared: int
    dim: int

    def attend(
        self,
        q: Float[Tensor, "B h Q d"],
        k: Float[Tensor, "B g S d"],
        v: Float[Tensor, "B g S d"],
        mask: Bool[Tensor, "B 1 Q S"] | None,
    ) -> Float[Tensor, "B Q E"]:
        """Attend causally, or where the mask is true, and join the heads."""
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.query != self.shared
        )
        return mixed.transpose(1, 2).flatten(2)


Rotation = tuple[Float[Tensor, "#B S d"], Float[Tensor, "#B S d"]]
"""Cosine and sine of the rotary position embedding."""


def run_layer(
    layer: LlamaDecoderLayer, x: Float[Tensor, "B S H"], rotation: Rotation, heads: Heads
) -> tuple[Float[Tensor, "B S H"], Float[Tensor, "B g S d"], Float[Tensor, "B g S d"]]:
    """Run a layer over a whole sequence; return its output, keys and values."""
    normed = layer.input_layernorm(x)
    q, (k, v) = _queries(layer, normed, rotation, heads), _shared(layer, normed, rotation, heads)
    x = x + layer.self_attn.o_proj(heads.attend(q, k, v, None))
    return _feed_forward(layer, x), k, v


def run_layer_at(
    layer: LlamaDecoderLayer,
    x: Float[Tensor, "B S H"],
    positions: Int[Tensor, "B Q"],
    rotation: Rotation,
    heads: Heads,
) -> tuple[Float[Tensor, "B Q H"], Float[Tensor, "B g S d"], Float[Tensor, "B g S d"]]:
    """Run a layer for a few positions of a sequence; keys and values are those of all.

    For the last layer: nothing else of its output is read.
    """
    normed = layer.input_layernorm(x)
    k, v = _shared(layer, normed, rotation, heads)
    turned = (_rotation_at(rotation[0], positions), _rotation_at(rotation[1], positions))
    q = _queries(layer, _take(normed, positions), turned, heads)
    seen = torch.arange(x.shape[1], device=x.device) <= positions.unsqueeze(-1)
    out = layer.self_attn.o_proj(heads.attend(q, k, v, seen.unsqueeze(1)))
    return _feed_forward(layer, _take(x, positions) + out), k, v


def step_layer(
    layer: LlamaDecoderLayer,
    x: Float[Tensor, "B 1 H"],
    column: Int[Tensor, "B 1"],
    rotation: Rotation,
    heads: Heads,
    cache: Float[Tensor, "2 B g M d"],
    seen: Bool[Tensor, "B 1 1 M"],
) -> Float[Tensor, "B 1 H"]:
    """Run a layer for one more token, whose keys and values enter the cache at ``column``.

    Args:
        layer: Of the decoder.
        x: The token's state.
        column: Where in the sequence it stands, per row.
        rotation: At that position.
        heads: Of the layer.
        cache: Keys and values; written in place.
        seen: Columns up to and including ``column``.
    """
    normed = layer.input_layernorm(x)
    k, v = _shared(layer, normed, rotation, heads)
    where = column[:, :, None, None].expand(-1, k.shape[1], 1, k.shape[3])
    cache[0].scatter_(2, where, k)
    cache[1].scatter_(2, where, v)
    q = _queries(layer, normed, rotation, heads)
    x = x + layer.self_attn.o_proj(heads.attend(q, cache[0], cache[1], seen))
    return _feed_forward(layer, x)


def _feed_forward(layer: LlamaDecoderLayer, x: Float[Tensor, "B S H"]) -> Float[Tensor, "B S H"]:
    return x + layer.mlp(layer.post_attention_layernorm(x))


def _queries(
    layer: LlamaDecoderLayer, normed: Tensor, rotation: Rotation, heads: Heads
) -> Float[Tensor, "B h S d"]:
    q = layer.self_attn.q_proj(normed).unflatten(-1, (heads.query, heads.dim)).transpose(1, 2)
    return _rotate(q, rotation)


def _shared(
    layer: LlamaDecoderLayer, normed: Tensor, rotation: Rotation, heads: Heads
) -> tuple[Float[Tensor, "B g S d"], Float[Tensor, "B g S d"]]:
    shape = (heads.shared, heads.dim)
    k = layer.self_attn.k_proj(normed).unflatten(-1, shape).transpose(1, 2)
    v = layer.self_attn.v_proj(normed).unflatten(-1, shape).transpose(1, 2)
    return _rotate(k, rotation), v


def _rotate(x: Float[Tensor, "B h S d"], rotation: Rotation) -> Float[Tensor, "B h S d"]:
    """Turn each pair (i, i + d/2) of channels by its position's angle."""
    cos, sin = rotation[0].unsqueeze(1), rotation[1].unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _rotation_at(part: Float[Tensor, "#B S d"], positions: Int[Tensor, "B Q"]) -> Tensor:
    return part[0][positions]


def _take(x: Float[Tensor, "B S H"], positions: Int[Tensor, "B Q"]) -> Float[Tensor, "B Q H"]:
    return x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
