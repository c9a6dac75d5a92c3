"""Bytes an OpenVLA run needs, from the network's sizes alone (docs/cost.md derives each formula).

What autograd keeps is listed per block, as the native network saves it: the base is frozen, so a
linear layer's input is kept for its adapter only. ``mixed`` means a bfloat16 base and bfloat16
activations with float32 adapters under autocast, else everything is float32.
"""

from __future__ import annotations

from dataclasses import dataclass

from roadvla.policy.action_tokens import NUM_TOKENS
from roadvla.policy.openvla.architecture import Architecture, Tower
from roadvla.policy.openvla.cost import (
    adapter_parameters,
    decoder_layer,
    parameters,
    prefill_tokens,
    projector_layers,
    tower_block,
    tower_tokens,
    training_tokens,
)

_FLOAT32 = 4


@dataclass(frozen=True, kw_only=True)
class Resident:
    """Bytes that stay, whatever the batch.

    Attributes:
        base: Frozen weights, without the dead ones.
        adapters: LoRA and the value head, float32.
        gradients: Of those.
        moments: AdamW's two.
        casts: Adapters in bfloat16, which autocast keeps for the backward pass.
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


def resident(
    architecture: Architecture, rank: int, *, lm_head: bool = True, mixed: bool = True
) -> Resident:
    """Bytes of weights, gradients and optimiser state.

    Args:
        architecture: Sizes.
        rank: Of the adapters.
        lm_head: Whether the output layer has one.
        mixed: Precision.
    """
    counts = parameters(architecture)
    adapters = adapter_parameters(architecture, rank, lm_head=lm_head)
    trained = _FLOAT32 * (adapters + counts.value_head)
    return Resident(
        base=counts.loaded * _width(mixed),
        adapters=trained,
        gradients=trained,
        moments=2 * trained,
        casts=2 * adapters if mixed else 0,
    )


def cache_bytes(architecture: Architecture, prompt: int, *, mixed: bool = True) -> int:
    """Bytes of keys and values of one observation: all positions that an action ever attends to."""
    text = architecture.text
    channels = text["num_key_value_heads"] * architecture.head_dim
    positions = training_tokens(architecture, prompt)
    return 2 * text["num_hidden_layers"] * positions * channels * _width(mixed)


def saved_bytes(
    architecture: Architecture,
    prompt: int,
    rank: int,
    *,
    checkpointing: bool = False,
    mixed: bool = True,
) -> int:
    """Bytes of one sample's activations that the backward pass needs, at their peak.

    With checkpointing: the input of every block but the decoder's last, and one block's
    activations at a time.

    Args:
        architecture: Sizes.
        prompt: Tokens of the prompt.
        rank: Of the adapters.
        checkpointing: Whether blocks recompute their activations.
        mixed: Precision.
    """
    tokens, width = training_tokens(architecture, prompt), _width(mixed)
    layers = architecture.text["num_hidden_layers"] - 1
    layer = tokens * _layer_saved(architecture, rank, mixed)
    blocks = [(tower_tokens(t), t.depth, t.width, _block_saved(t, rank, mixed)) for t in architecture.towers]
    fixed = _ends_saved(architecture, tokens, rank, mixed)
    if not checkpointing:
        return fixed + layers * layer + sum(n * depth * each for n, depth, _, each in blocks)
    inputs = layers * tokens * architecture.hidden * width
    inputs += sum(n * depth * channels * width for n, depth, channels, _ in blocks)
    return fixed + inputs + max(layer, *(n * each for n, _, _, each in blocks))


def working_bytes(architecture: Architecture, tokens: int, *, mixed: bool = True) -> int:
    raise NotImplementedError


def _width(mixed: bool) -> int:
    return 2 if mixed else _FLOAT32


def _block_saved(tower: Tower, rank: int, mixed: bool) -> int:
    """Bytes per position of a vision block."""
    a, width, mlp = _width(mixed), tower.width, tower.mlp
    adapted = tower_block(tower)
    norms = 2 * (_FLOAT32 * width + 8)
    attention = a * 4 * width + _FLOAT32 * tower.heads
    inputs = a * 2 * width
    if mixed:
        inputs += a * width * (1 if tower.packed else 3)
    mlp_ = a * 2 * mlp
    return norms + attention + inputs + mlp_ + a * rank * len(adapted)


def _layer_saved(architecture: Architecture, rank: int, mixed: bool) -> int:
    """Bytes per position of a decoder layer."""
    a, text, hidden = _width(mixed), architecture.text, architecture.hidden
    pairs = decoder_layer(architecture)
    queries, shared, inner = pairs["q_proj"][1], pairs["k_proj"][1], text["intermediate_size"]
    norms = 2 * _FLOAT32 * (hidden + 1)
    attention = a * 2 * (queries + shared) + _FLOAT32 * text["num_attention_heads"]
    inputs = a * ((5 * hidden + queries) if mixed else 2 * hidden) + a * inner
    return norms + attention + inputs + a * 3 * inner + a * rank * len(pairs)


def _ends_saved(architecture: Architecture, tokens: int, rank: int, mixed: bool) -> int:
    """Patch embeddings, projector, last layer and head."""
    a, hidden = _width(mixed), architecture.hidden
    patches = architecture.patches
    pixels = sum(a * patches * (3 * t.patch**2 + rank) for t in architecture.towers)
    pairs = projector_layers(architecture)
    proj = a * patches * (sum(i for i, _ in pairs) + sum(o for _, o in pairs[:-1]) + rank * len(pairs))
    shared = decoder_layer(architecture)["k_proj"][1]
    last = tokens * (_FLOAT32 * (hidden + 1) + a * hidden * (2 if mixed else 1) + a * 2 * shared + 2 * a * rank)
    last += NUM_TOKENS * _layer_saved(architecture, rank, mixed)
    return pixels + proj + last
