"""OpenVLA's vision towers and projector: plain vision transformers, no timm.

Module names are those of the HF checkpoint. Features are the residual stream after the second to
last block, without the final norm; the last block is not built.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from roadvla.policy.openvla.architecture import TOWERS, Architecture, Tower

_NORM_EPS = 1e-6


class Attention(nn.Module):
    """Full self-attention; queries, keys and values from one packed layer or from three."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.heads, self.packed = tower.heads, tower.packed
        if tower.packed:
            self.qkv = nn.Linear(tower.width, 3 * tower.width)
        else:
            self.q_proj = nn.Linear(tower.width, tower.width)
            self.k_proj = nn.Linear(tower.width, tower.width)
            self.v_proj = nn.Linear(tower.width, tower.width)
        self.proj = nn.Linear(tower.width, tower.width)

    def forward(self, x: Float[Tensor, "B S W"]) -> Float[Tensor, "B S W"]:
        """Let every token look at every other, scores over √(channels of a head)."""
        if self.packed:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers with the exact (erf) GELU between them."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.fc1 = nn.Linear(tower.width, tower.mlp)
        self.fc2 = nn.Linear(tower.mlp, tower.width)

    def forward(self, x: Float[Tensor, "B S W"]) -> Float[Tensor, "B S W"]:
        """Widen, bend, narrow."""
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """One learned factor per channel; ``scale_factor`` is what the HF export calls it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "B S W"]) -> Float[Tensor, "B S W"]:
        """Scale each channel."""
        return x * self.scale_factor


class Block(nn.Module):
    """Attention, then MLP, each behind a norm and added to the residual stream."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        scaled = tower.layer_scale
        self.norm1 = nn.LayerNorm(tower.width, eps=_NORM_EPS)
        self.attn = Attention(tower)
        self.ls1 = LayerScale(tower.width) if scaled else nn.Identity()
        self.norm2 = nn.LayerNorm(tower.width, eps=_NORM_EPS)
        self.mlp = Mlp(tower)
        self.ls2 = LayerScale(tower.width) if scaled else nn.Identity()

    def forward(self, x: Float[Tensor, "B S W"]) -> Float[Tensor, "B S W"]:
        """Add both branches."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbedding(nn.Module):
    """Patches to tokens, row by row from the top left."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, tower.width, tower.patch, stride=tower.patch)

    def forward(self, pixels: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B P W"]:
        """Embed each patch."""
        return self.proj(pixels).flatten(2).transpose(1, 2)


class VisionTower(nn.Module):
    """A vision transformer up to its second to last block.

    Positions are added to the patches only, before the class and register tokens are put in front.
    """

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        width = tower.width
        self.patch_embed = PatchEmbedding(tower)
        self.pos_embed = nn.Parameter(torch.zeros(1, tower.patches, width))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if tower.class_token else None
        registers = torch.zeros(1, tower.registers, width)
        self.reg_token = nn.Parameter(registers) if tower.registers else None
        self.blocks = nn.ModuleList(Block(tower) for _ in range(tower.depth))

    def forward(
        self, pixels: Float[Tensor, "B 3 S S"], *, recompute: bool = False
    ) -> Float[Tensor, "B P W"]:
        """Patch features.

        Args:
            pixels: Normalized for this tower.
            recompute: Keep no activations inside the blocks; recompute them in the backward pass.
        """
        x = self.patch_embed(pixels) + self.pos_embed
        prefix = [token for token in (self.cls_token, self.reg_token) if token is not None]
        x = torch.cat([*(token.expand(len(x), -1, -1) for token in prefix), x], dim=1)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return x[:, x.shape[1] - self.pos_embed.shape[1] :]


class VisionBackbone(nn.Module):
    """One tower, or two whose features are joined channel by channel."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        for name, tower in zip(TOWERS, architecture.towers, strict=False):
            self.add_module(name, VisionTower(tower))

    def forward(
        self, pixels: Float[Tensor, "B C S S"], *, recompute: bool = False
    ) -> Float[Tensor, "B P D"]:
        """Features of each patch; three channels of ``pixels`` belong to each tower in turn."""
        parts = pixels.split(3, dim=1)
        features = [
            tower(part, recompute=recompute)
            for tower, part in zip(self.children(), parts, strict=True)
        ]
        return torch.cat(features, dim=-1)


class Projector(nn.Module):
    """Patch features to the language model's width: three layers after two towers, else two."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        vision, hidden = architecture.vision_width, architecture.hidden
        fused = len(architecture.towers) > 1
        middle = 4 * vision if fused else hidden
        self.fc1 = nn.Linear(vision, middle)
        self.fc2 = nn.Linear(middle, hidden)
        self.fc3 = nn.Linear(hidden, hidden) if fused else None

    def forward(self, features: Float[Tensor, "B P D"]) -> Float[Tensor, "B P H"]:
        """Project each patch."""
        x = self.fc2(F.gelu(self.fc1(features)))
        return x if self.fc3 is None else self.fc3(F.gelu(x))
