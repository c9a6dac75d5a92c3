"""Parts of the tiny VLA: vision tower, prompt-conditioned resampler, decoder layer, bin tables."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

MASKED = -1e9
"""Score of a key that may not be seen: finite, so that a row without any key stays finite."""

RESAMPLER_HEADS = 4
"""Heads with which the resampler's queries read the prompt."""


def linear(inputs: int, outputs: int, gain: float = 0.5) -> nn.Linear:
    """Make a linear layer with weights of standard deviation gain/√inputs and zero bias."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=gain / math.sqrt(inputs))
    nn.init.zeros_(layer.bias)
    return layer


class VisionBlock(nn.Module):
    """Residual 3x3 convolution, GELU, 1x1 convolution, over channels-last features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.out = linear(width, width, gain=0.1)

    def forward(self, x: Float[Tensor, "N R C D"]) -> Float[Tensor, "N R C D"]:
        """Refine features of R rows by C columns of patches."""
        mixed = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.out(F.gelu(mixed))


class VisionTower(nn.Module):
    """Square RGB frames to one feature vector per patch, normalized over its channels."""

    def __init__(self, image_size: int, patch: int, stem: int, width: int, blocks: int) -> None:
        super().__init__()
        self.image_size, self.patch = image_size, patch
        self.stem = linear(patch * patch * 3, stem, gain=1.0)
        self.mix = linear(stem, width, gain=1.0)
        self.blocks = nn.ModuleList(VisionBlock(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)

    def forward(self, image: UInt8[Tensor, "N H W 3"]) -> Float[Tensor, "N P D"]:
        """Encode frames; patches run row by row from the top left.

        Raises:
            ValueError: If a frame is not the square the weights were made for.
        """
        size, patch = self.image_size, self.patch
        if image.shape[1:3] != (size, size):
            raise ValueError(
                f"frames are {tuple(image.shape[1:3])}, this policy sees {size}x{size}"
            )
        grid = size // patch
        patches = image.reshape(-1, grid, patch, grid, patch, 3).transpose(2, 3)
        pixels = patches.reshape(-1, grid, grid, patch * patch * 3).to(self.stem.weight.dtype)
        x = self.mix(F.gelu(self.stem(pixels / 127.5 - 1.0)))
        for block in self.blocks:
            x = block(x)
        return self.norm(x).flatten(1, 2)


class Resampler(nn.Module):
    """Learned queries that read the prompt, then look at the patches it speaks of.

    Each query attends over the words; what it read, passed through a small MLP, becomes a query in
    the space of the vision features, scored as (q·f + q·position)/√D·e^s against every patch f: the
    patches need no projection. The visual token is made from the attended feature and from the
    attended place, as coordinates in [-1, 1] with their sines and cosines.
    """

    coordinates: Tensor
    frequencies: Tensor

    def __init__(self, grid: int, vision: int, width: int, queries: int, frequencies: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, width) * 0.5)
        self.text_norm = nn.LayerNorm(width)
        self.text_query = linear(width, width, gain=1.0)
        self.text_key_value = linear(width, 2 * width, gain=1.0)
        self.text_out = linear(width, width, gain=1.0)
        self.query_norm = nn.LayerNorm(width)
        self.query_up = linear(width, 2 * width, gain=1.0)
        self.query_down = linear(2 * width, width)
        self.patch_norm = nn.LayerNorm(width)
        self.patch_query = linear(width, vision, gain=1.0)
        self.patch_position = nn.Parameter(torch.randn(grid * grid, vision) * 0.1)
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.out = linear(vision + 2 + 4 * frequencies, width)
        steps = (torch.arange(grid, dtype=torch.float32) + 0.5) * (2.0 / grid) - 1.0
        rows, columns = torch.meshgrid(steps, steps, indexing="ij")
        xy = torch.stack([columns.flatten(), rows.flatten()], dim=-1)
        octaves = math.pi * 2.0 ** torch.arange(frequencies, dtype=torch.float32)
        self.register_buffer("coordinates", xy, persistent=False)
        self.register_buffer("frequencies", octaves, persistent=False)

    def forward(
        self,
        text: Float[Tensor, "N L E"],
        valid: Bool[Tensor, "N L"],
        features: Float[Tensor, "N P D"],
    ) -> Float[Tensor, "N Q E"]:
        """Make the visual tokens; words where ``valid`` is False are not read."""
        return self.look(text, valid, features)[0]

    def look(
        self,
        text: Float[Tensor, "N L E"],
        valid: Bool[Tensor, "N L"],
        features: Float[Tensor, "N P D"],
    ) -> tuple[Float[Tensor, "N Q E"], Float[Tensor, "N Q P"]]:
        """Make the visual tokens, and the scores that say where each query looked."""
        query = self._read(text, valid)
        q = self.patch_query(self.patch_norm(query)) * (
            self.log_scale.exp() * self.patch_position.shape[1] ** -0.5
        )
        scores = torch.matmul(q, features.transpose(1, 2)) + F.linear(q, self.patch_position)
        attention = scores.softmax(dim=-1)
        seen = torch.matmul(attention, features)
        place = torch.matmul(attention, self.coordinates)
        phase = (place.unsqueeze(-1) * self.frequencies).flatten(-2)
        look = self.out(torch.cat([seen, place, phase.sin(), phase.cos()], dim=-1))
        return query + look, scores

    def _read(
        self, text: Float[Tensor, "N L E"], valid: Bool[Tensor, "N L"]
    ) -> Float[Tensor, "N Q E"]:
        width, heads = text.shape[-1], RESAMPLER_HEADS
        q = self.text_query(self.queries).unflatten(-1, (heads, -1)).transpose(0, 1)
        k, v = (
            self.text_key_value(self.text_norm(text))
            .unflatten(-1, (2, heads, width // heads))
            .permute(2, 0, 3, 1, 4)
        )
        scores = torch.matmul(q * (width // heads) ** -0.5, k.transpose(-1, -2))
        scores = scores.masked_fill(~valid[:, None, None], MASKED)
        read = torch.matmul(scores.softmax(dim=-1), v).transpose(1, 2).flatten(-2)
        query = self.queries + self.text_out(read)
        return query + self.query_down(F.gelu(self.query_up(self.query_norm(query))))


class DecoderLayer(nn.Module):
    """Pre-norm causal attention and MLP; keys and values can be kept for the next tokens."""

    def __init__(self, width: int, heads: int, mlp: int, layers: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        residual = 1.0 / math.sqrt(2.0 * layers)
        self.norm = nn.LayerNorm(width)
        self.qkv = linear(width, 3 * width, gain=1.0)
        self.out = linear(width, width, gain=residual)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = linear(width, mlp, gain=1.0)
        self.down = linear(mlp, width, gain=residual)

    def forward(
        self, x: Float[Tensor, "N S E"], mask: Float[Tensor, "#N 1 S S"], tail: int
    ) -> tuple[Float[Tensor, "N t E"], Float[Tensor, "N h S d"], Float[Tensor, "N h S d"]]:
        """Run the whole sequence but answer only for its last ``tail`` positions.

        Args:
            x: Hidden states.
            mask: Added to the scores: 0 where a query may look, ``MASKED`` where it may not.
            tail: How many final positions anyone will read.

        Returns:
            The new hidden states of the tail, and the keys and values of every position.
        """
        length, width = x.shape[1], x.shape[2]
        inner = self.norm(x)
        if tail == length:
            q, k, v = self.qkv(inner).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        else:
            weight, bias = self.qkv.weight, self.qkv.bias
            q = F.linear(inner[:, -tail:], weight[:width], bias[:width])
            q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            k, v = (
                F.linear(inner, weight[width:], bias[width:])
                .unflatten(-1, (2, self.heads, -1))
                .permute(2, 0, 3, 1, 4)
            )
        scores = torch.matmul(q * self.scale, k.transpose(-1, -2)) + mask[:, :, -tail:]
        mixed = torch.matmul(scores.softmax(dim=-1), v)
        x = x[:, -tail:] + self.out(mixed.transpose(1, 2).flatten(-2))
        return self._mlp(x), k, v

    def step(
        self,
        x: Float[Tensor, "N E"],
        cache: Float[Tensor, "2 N h S d"],
        length: int,
        mask: Float[Tensor, "#N 1 S"],
    ) -> Float[Tensor, "N E"]:
        """Run one more token, writing its key and value at position ``length`` of the cache."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(1)
        cache[0, :, :, length] = k
        cache[1, :, :, length] = v
        keys, values = cache[0, :, :, : length + 1], cache[1, :, :, : length + 1]
        # Elementwise, because a batched product of single rows is slower at this size.
        scores = (keys * (q * self.scale).unsqueeze(-2)).sum(dim=-1)
        attention = (scores + mask[..., : length + 1]).softmax(dim=-1)
        mixed = (attention.unsqueeze(-1) * values).sum(dim=-2)
        return self._mlp(x + self.out(mixed.flatten(1)))

    def _mlp(self, x: Float[Tensor, "*N E"]) -> Float[Tensor, "*N E"]:
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


def smooth_table(rows: int, bins: int, width: int, std: float) -> Float[Tensor, "rows bins width"]:
    """Draw random vectors that vary smoothly over the bins, so neighbouring bins start out alike.

    Each is a sum of 32 cosines over the bins whose amplitudes fall off with their frequency.
    """
    waves = torch.arange(32, dtype=torch.float32)
    place = (torch.arange(bins, dtype=torch.float32) + 0.5) / bins
    basis = torch.cos(math.pi * place[:, None] * waves)
    amplitude = 1.0 / (1.0 + 0.25 * waves)
    table = torch.einsum("vj,kjd->kvd", basis * amplitude, torch.randn(rows, 32, width))
    return table * (std / table.std())


class BinTables(nn.Module):
    """Everything indexed by bin: embeddings of tokens 1..K-1 and the linear heads of all K."""

    offsets: Tensor

    def __init__(self, tokens: int, bins: int, width: int) -> None:
        super().__init__()
        self.tokens, self.bins = tokens, bins
        embedding = smooth_table(tokens - 1, bins, width, std=0.3)
        self.embedding = nn.Parameter(embedding.flatten(0, 1))
        self.head = nn.Parameter(
            smooth_table(tokens, bins, width, std=0.02).transpose(1, 2).clone()
        )
        self.bias = nn.Parameter(torch.zeros(tokens, bins))
        self.register_buffer("offsets", torch.arange(tokens - 1) * bins, persistent=False)

    def embed(self, action_tokens: Int[Tensor, "N J"]) -> Float[Tensor, "N J E"]:
        """Embed the first J < K tokens of an action."""
        return F.embedding(action_tokens + self.offsets[: action_tokens.shape[1]], self.embedding)

    def embed_one(self, index: int, token: Int[Tensor, " N"]) -> Float[Tensor, "N E"]:
        """Embed token number ``index`` of each action."""
        return F.embedding(token + index * self.bins, self.embedding)

    def logits(self, hidden: Float[Tensor, "N K E"]) -> Float[Tensor, "N K V"]:
        """Logits of all K tokens from the K states that predict them."""
        return torch.baddbmm(self.bias[:, None], hidden.transpose(0, 1), self.head).transpose(0, 1)

    def logits_one(self, index: int, hidden: Float[Tensor, "N E"]) -> Float[Tensor, "N V"]:
        """Logits of token number ``index``."""
        return torch.addmm(self.bias[index], hidden, self.head[index])
