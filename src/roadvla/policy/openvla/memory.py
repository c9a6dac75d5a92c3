"""Bytes an OpenVLA run needs, from the network's sizes alone (docs/cost.md derives each formula).

What autograd keeps is listed block by block, as the native network saves it: the base is frozen, so
a linear layer's input is kept for its adapter only, once for all layers that read it. ``half``
means that base and activations are bfloat16; otherwise everything is float32.
"""

from __future__ import annotations

from dataclasses import dataclass

from roadvla.policy.action_tokens import NUM_TOKENS
from roadvla.policy.openvla.architecture import Architecture, Tower
from roadvla.policy.openvla.cost import (
    adapter_parameters,
    decoder_layer,
    decoder_parameters,
    parameters,
    patch_embedding,
    projector_layers,
    tower_block,
    tower_tokens,
    training_tokens,
)

FLOAT32 = 4
BFLOAT16 = 2


@dataclass(frozen=True, kw_only=True)
class Resident:
    """Bytes that stay in memory whatever the batch.

    Attributes:
        base: Frozen weights, without the dead ones.
        adapters: LoRA and value head, float32.
        gradients: Of those.
        moments: AdamW's two per parameter.
        casts: Copies of the adapters in bfloat16, which the backward pass needs.
    """

    base: int
    adapters: int
    gradients: int
    moments: int
    casts: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.base + self.adapters + self.gradients + self.moments + self.casts


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes of one sample's activations in an update.

    Attributes:
        kept: From the forward pass on.
        recomputed: With checkpointing, the largest block's, which exist while its gradient is
            computed; else 0.
    """

    kept: int
    recomputed: int

    @property
    def peak(self) -> int:
        """Both."""
        return self.kept + self.recomputed


def resident(
    architecture: Architecture, rank: int, *, lm_head: bool = True, half: bool = True
) -> Resident:
    """Count weights, gradients and optimiser state.

    Args:
        architecture: Sizes.
        rank: Of the adapters.
        lm_head: Whether the output layer has one.
        half: Precision.
    """
    trained = FLOAT32 * trained_parameters(architecture, rank, lm_head=lm_head)
    # The output layer's adapter is multiplied in float32.
    cast = BFLOAT16 * adapter_parameters(architecture, rank, lm_head=False)
    return Resident(
        base=parameters(architecture).loaded * _width(half),
        adapters=trained,
        gradients=trained,
        moments=2 * trained,
        casts=cast if half else 0,
    )


def trained_parameters(architecture: Architecture, rank: int, *, lm_head: bool = True) -> int:
    """Count adapters and value head."""
    adapters = adapter_parameters(architecture, rank, lm_head=lm_head)
    return adapters + parameters(architecture).value_head


def cache_bytes(architecture: Architecture, prompt: int, *, half: bool = True) -> int:
    """Keys and values of one observation, for every position that an action attends to."""
    text = architecture.text
    channels = text["num_key_value_heads"] * architecture.head_dim
    positions = training_tokens(architecture, prompt)
    return 2 * text["num_hidden_layers"] * positions * channels * _width(half)


def decode_bytes(
    architecture: Architecture, prompt: int, rank: int, batch: int, *, half: bool = True
) -> int:
    """Memory traffic of decoding K − 1 tokens: each step reads the decoder and the caches once.

    Args:
        architecture: Sizes.
        prompt: Tokens of the prompt.
        rank: Of the adapters.
        batch: Observations decoded together.
        half: Precision.
    """
    base, adapters = decoder_parameters(architecture, rank)
    weights = base * _width(half) + adapters * FLOAT32
    caches = batch * cache_bytes(architecture, prompt, half=half)
    return (NUM_TOKENS - 1) * (weights + caches)


def working_bytes(architecture: Architecture, tokens: int, *, half: bool = True) -> int:
    """Passing tensors of one observation in a pass without gradient, at their peak.

    The peak is in the MLP of a decoder layer, when nine tensors as wide as the residual stream and
    three as wide as the MLP are alive.
    """
    hidden, inner = architecture.hidden, architecture.text["intermediate_size"]
    return tokens * _width(half) * (9 * hidden + 3 * inner)


def saved_bytes(
    architecture: Architecture,
    prompt: int,
    rank: int,
    *,
    checkpointing: bool = False,
    half: bool = True,
) -> Activations:
    """Count what one sample's backward pass needs.

    With activation checkpointing each block keeps its input only, but for the decoder's last layer,
    which has little to keep.

    Args:
        architecture: Sizes.
        prompt: Tokens of the prompt.
        rank: Of the adapters.
        checkpointing: Whether blocks recompute their activations.
        half: Precision.
    """
    tokens, a = training_tokens(architecture, prompt), _width(half)
    layers = architecture.text["num_hidden_layers"] - 1
    # Of each kind of block: how many there are, the bytes of its input, and of all it keeps.
    kinds = [
        (
            tower.depth,
            tower_tokens(tower) * a * tower.width,
            tower_tokens(tower) * _block_saved(tower, rank, half),
        )
        for tower in architecture.towers
    ]
    layer = tokens * _layer_saved(architecture, rank, half)
    kinds.append((layers, tokens * a * architecture.hidden, layer))
    ends = _embedding_saved(architecture, rank, half)
    ends += _last_layer_saved(architecture, tokens, rank, half)
    if not checkpointing:
        return Activations(kept=ends + sum(n * full for n, _, full in kinds), recomputed=0)
    return Activations(
        kept=ends + sum(n * given for n, given, _ in kinds),
        recomputed=max(full for _, _, full in kinds),
    )


def _width(half: bool) -> int:
    return BFLOAT16 if half else FLOAT32


def _block_saved(tower: Tower, rank: int, half: bool) -> int:
    """Bytes per position of a vision block."""
    a, width, adapted = _width(half), tower.width, tower_block(tower)
    norms = 2 * (a * width + 2 * FLOAT32)  # inputs, means and deviations
    attention = a * (width + 4 * width)  # their input; q, k, v and output
    attention += FLOAT32 * tower.heads  # log-sum-exp
    mlp = a * (width + 2 * tower.mlp)  # inputs of fc1, GELU and fc2
    return norms + attention + mlp + a * rank * len(adapted)


def _layer_saved(architecture: Architecture, rank: int, half: bool) -> int:
    """Bytes per position of a decoder layer."""
    a, hidden, pairs = _width(half), architecture.hidden, decoder_layer(architecture)
    queries, shared = pairs["q_proj"][1], pairs["k_proj"][1]
    norms = 2 * FLOAT32 * (hidden + 1)  # inputs and 1/root mean squares, in float32
    attention = a * (hidden + 2 * (queries + shared))  # their input; q, k, v and output
    attention += FLOAT32 * architecture.text["num_attention_heads"]  # log-sum-exp
    mlp = a * (hidden + 4 * architecture.text["intermediate_size"])  # gate, SiLU, up, product
    return norms + attention + mlp + a * rank * len(pairs)


def _last_layer_saved(architecture: Architecture, tokens: int, rank: int, half: bool) -> int:
    """Bytes of the decoder's last layer: keys and values of all positions, the rest of K."""
    a, hidden = _width(half), architecture.hidden
    shared = decoder_layer(architecture)["k_proj"][1]
    norm = FLOAT32 * (hidden + 1) + a * hidden * half  # the selection of positions keeps its input
    every = norm + a * (hidden + 2 * shared + 2 * rank)
    return tokens * every + NUM_TOKENS * _layer_saved(architecture, rank, half)


def _embedding_saved(architecture: Architecture, rank: int, half: bool) -> int:
    """Bytes of patch embeddings, whose adapters compute in float32, and projector."""
    a, pairs = _width(half), projector_layers(architecture)
    pixels = sum(patch_embedding(tower)[0] + rank for tower in architecture.towers)
    inputs = sum(inputs for inputs, _ in pairs)
    bent = sum(outputs for _, outputs in pairs[:-1])  # inputs of the GELUs
    return architecture.patches * (FLOAT32 * pixels + a * (inputs + bent + rank * len(pairs)))
