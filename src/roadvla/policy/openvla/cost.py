"""Parameters and FLOPs of an OpenVLA, from its sizes alone (docs/cost.md derives each formula).

Nothing here loads a weight. A linear layer, and a patch embedding, is a pair (inputs, outputs);
everything counted follows from the list of those pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from roadvla.policy.action_tokens import NUM_BINS, NUM_TOKENS
from roadvla.policy.openvla.architecture import Architecture, Tower

Pair = tuple[int, int]

VALUE_HEAD_WIDTHS = (512, 128, 1)

OPENVLA_7B = Architecture(
    towers=(
        Tower(
            width=1024,
            depth=23,
            heads=16,
            mlp=4096,
            patch=14,
            patches=256,
            registers=4,
            class_token=True,
            layer_scale=True,
            packed=True,
        ),
        Tower(
            width=1152,
            depth=26,
            heads=16,
            mlp=4304,
            patch=14,
            patches=256,
            registers=0,
            class_token=False,
            layer_scale=False,
            packed=True,
        ),
    ),
    image_size=224,
    text={
        "vocab_size": 32064,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "pad_token_id": 32000,
    },
    prompt_style="openvla",
    norm_stats={},
)
"""``openvla/openvla-7b``: DINOv2-L, SigLIP-so400m, Llama-2-7B."""


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """How many numbers a checkpoint holds, part by part.

    Attributes:
        towers: Each vision tower as stored, dead weights included.
        dead: Of those, weights that never influence the output; they are not loaded.
        projector: Patch features to the decoder's width.
        language_model: Decoder with both embeddings.
        value_head: The critic, stored beside the checkpoint.
    """

    towers: tuple[int, ...]
    dead: int
    projector: int
    language_model: int
    value_head: int

    @property
    def stored(self) -> int:
        """The checkpoint, without the value head."""
        return sum(self.towers) + self.projector + self.language_model

    @property
    def loaded(self) -> int:
        """The frozen base in memory."""
        return self.stored - self.dead


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a forward pass; a multiplication with its addition is two.

    Attributes:
        base: Frozen linear layers.
        adapters: LoRA's two small layers beside each.
        attention: Scores and mixing.
    """

    base: int
    adapters: int
    attention: int

    def __add__(self, other: Flops) -> Flops:
        """Both, one after the other."""
        return Flops(
            self.base + other.base,
            self.adapters + other.adapters,
            self.attention + other.attention,
        )

    def __mul__(self, times: int) -> Flops:
        """The same this many times."""
        return Flops(self.base * times, self.adapters * times, self.attention * times)

    @property
    def forward(self) -> int:
        """The pass itself."""
        return self.base + self.adapters + self.attention

    @property
    def backward(self) -> float:
        """Its backward pass.

        The frozen layers pass the gradient of their input on (1 ×), adapters take that of their
        weights too (2 ×), and flash attention computes five products for its two (2.5 ×).
        """
        return self.base + 2 * self.adapters + 2.5 * self.attention


def parameters(architecture: Architecture) -> Parameters:
    """Count the weights of a checkpoint and of the value head."""
    towers = architecture.towers
    dead = tuple(_dead_parameters(tower) for tower in towers)
    text, hidden = architecture.text, architecture.hidden
    layers = text["num_hidden_layers"]
    layer = _weights(decoder_layer(architecture).values()) + 2 * hidden
    head = [(hidden, VALUE_HEAD_WIDTHS[0]), VALUE_HEAD_WIDTHS[:2], VALUE_HEAD_WIDTHS[1:]]
    return Parameters(
        towers=tuple(
            _live_parameters(tower) + lost for tower, lost in zip(towers, dead, strict=True)
        ),
        dead=sum(dead),
        projector=_weights(projector_layers(architecture), biased=True),
        language_model=layers * layer + 2 * text["vocab_size"] * hidden + hidden,
        value_head=_weights(head, biased=True) - 1,  # its last layer has no bias
    )


def adapter_parameters(
    architecture: Architecture, rank: int, *, lm_head: bool = True, dead: bool = False
) -> int:
    """Count LoRA's parameters on every linear layer and patch embedding.

    Args:
        architecture: Of the base.
        rank: r.
        lm_head: Whether the output layer has an adapter.
        dead: Whether modules that never influence the output have one, as in RL4VLA.
    """
    pairs = [*projector_layers(architecture)]
    for tower in architecture.towers:
        pairs += [patch_embedding(tower), *tower_block(tower) * tower.depth]
        if dead:
            pairs += [*tower_block(tower), *_pooling(tower)]
    pairs += [*decoder_layer(architecture).values()] * architecture.text["num_hidden_layers"]
    if lm_head:
        pairs.append((architecture.hidden, architecture.text["vocab_size"]))
    return rank * sum(inputs + outputs for inputs, outputs in pairs)


def decoder_parameters(architecture: Architecture, rank: int) -> tuple[int, int]:
    """Count what each decoding step multiplies with: layers and action rows, and their adapters."""
    pairs = [*decoder_layer(architecture).values()] * architecture.text["num_hidden_layers"]
    pairs.append((architecture.hidden, NUM_BINS))
    return _weights(pairs), rank * sum(inputs + outputs for inputs, outputs in pairs)


def prefill_tokens(architecture: Architecture, prompt: int) -> int:
    """Positions of image and prompt."""
    return architecture.patches + prompt


def training_tokens(architecture: Architecture, prompt: int) -> int:
    """Positions of a teacher-forced pass: the last action token predicts nothing and stays out."""
    return prefill_tokens(architecture, prompt) + NUM_TOKENS - 1


def prefill_flops(architecture: Architecture, prompt: int, rank: int) -> Flops:
    """Image and prompt to the first action token's logits, and the value.

    Args:
        architecture: Sizes.
        prompt: Tokens of the prompt, BOS and 29871 included.
        rank: Of the adapters.
    """
    tokens = prefill_tokens(architecture, prompt)
    return vision_flops(architecture, rank) + decoder_flops(architecture, tokens, 1, rank)


def decode_flops(architecture: Architecture, prompt: int, rank: int) -> Flops:
    """The other K − 1 action tokens, one at a time, over a cache of fixed length."""
    seen = training_tokens(architecture, prompt)
    layer = _linear(decoder_layer(architecture).values(), rank)
    attended = Flops(0, 0, 4 * _attention_width(architecture) * seen)
    step = (layer + attended) * architecture.text["num_hidden_layers"]
    return (step + _head_flops(architecture, rank)) * (NUM_TOKENS - 1)


def training_flops(architecture: Architecture, prompt: int, rank: int) -> Flops:
    """A teacher-forced pass with logits at the K positions."""
    tokens = training_tokens(architecture, prompt)
    return vision_flops(architecture, rank) + decoder_flops(architecture, tokens, NUM_TOKENS, rank)


def update_flops(
    architecture: Architecture, prompt: int, rank: int, *, checkpointing: bool = False
) -> float:
    """Forward and backward pass of one sample; nothing needs the gradient of the pixels.

    Args:
        architecture: Sizes.
        prompt: Tokens of the prompt.
        rank: Of the adapters.
        checkpointing: Whether blocks recompute their activations.
    """
    passes = training_flops(architecture, prompt, rank)
    pixels = sum(
        2 * tower.patches * patch_embedding(tower)[0] * (tower.width + rank)
        for tower in architecture.towers
    )
    again = recomputed_flops(architecture, prompt, rank) if checkpointing else 0
    return passes.forward + passes.backward - pixels + again


def recomputed_flops(architecture: Architecture, prompt: int, rank: int) -> int:
    """What activation checkpointing computes again: all blocks but the decoder's last."""
    tokens = training_tokens(architecture, prompt)
    towers = sum((_tower_flops(tower, rank) for tower in architecture.towers), Flops(0, 0, 0))
    layers = _layer_flops(architecture, tokens, rank)
    return (towers + layers * (architecture.text["num_hidden_layers"] - 1)).forward


def vision_flops(architecture: Architecture, rank: int) -> Flops:
    """Towers and projector."""
    total = _linear(projector_layers(architecture), rank) * architecture.patches
    for tower in architecture.towers:
        total += _tower_flops(tower, rank)
        total += _linear([patch_embedding(tower)], rank) * tower.patches
    return total


def decoder_flops(architecture: Architecture, tokens: int, read: int, rank: int) -> Flops:
    """The decoder over a sequence, with the last layer and the action rows at some positions only.

    Args:
        architecture: Sizes.
        tokens: Positions of the sequence.
        read: Positions whose logits are needed.
        rank: Of the adapters.
    """
    layers = decoder_layer(architecture)
    shared = [layers.pop("k_proj"), layers.pop("v_proj")]
    attended = Flops(0, 0, 4 * _attention_width(architecture) * tokens * read)
    last = _linear(shared, rank) * tokens + _linear(layers.values(), rank) * read + attended
    full = _layer_flops(architecture, tokens, rank)
    head = _head_flops(architecture, rank) * read
    return full * (architecture.text["num_hidden_layers"] - 1) + last + head


def tower_block(tower: Tower) -> list[Pair]:
    """Linear layers of a vision block."""
    width = tower.width
    attention = [(width, 3 * width)] if tower.packed else [(width, width)] * 3
    return [*attention, (width, width), (width, tower.mlp), (tower.mlp, width)]


def patch_embedding(tower: Tower) -> Pair:
    """The convolution, as a linear layer on a patch's pixels."""
    return 3 * tower.patch**2, tower.width


def projector_layers(architecture: Architecture) -> list[Pair]:
    """Linear layers of the projector: three after two towers, else two."""
    vision, hidden = architecture.vision_width, architecture.hidden
    if len(architecture.towers) == 1:
        return [(vision, hidden), (hidden, hidden)]
    return [(vision, 4 * vision), (4 * vision, hidden), (hidden, hidden)]


def decoder_layer(architecture: Architecture) -> dict[str, Pair]:
    """Linear layers of a decoder layer."""
    hidden, inner = architecture.hidden, architecture.text["intermediate_size"]
    queries = _attention_width(architecture)
    shared = architecture.text["num_key_value_heads"] * architecture.head_dim
    return {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, shared),
        "v_proj": (hidden, shared),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }


def tower_tokens(tower: Tower) -> int:
    """Positions in a tower: patches, class token and registers."""
    return tower.patches + tower.registers + tower.class_token


def _attention_width(architecture: Architecture) -> int:
    return architecture.text["num_attention_heads"] * architecture.head_dim


def _weights(pairs: Iterable[Pair], *, biased: bool = False) -> int:
    return sum(inputs * outputs + outputs * biased for inputs, outputs in pairs)


def _live_parameters(tower: Tower) -> int:
    """Everything up to and including the second to last block."""
    positions = tower.width * tower_tokens(tower)
    embedding = _weights([patch_embedding(tower)], biased=True)
    return embedding + positions + tower.depth * _block_parameters(tower)


def _dead_parameters(tower: Tower) -> int:
    """The last block, the final norm, and SigLIP's pooling with its norm and latent."""
    pooling = _pooling(tower)
    pooled = _weights(pooling, biased=True) + (3 * tower.width if pooling else 0)
    return _block_parameters(tower) + 2 * tower.width + pooled


def _block_parameters(tower: Tower) -> int:
    norms, scales = 4 * tower.width, 2 * tower.width * tower.layer_scale
    return _weights(tower_block(tower), biased=True) + norms + scales


def _pooling(tower: Tower) -> list[Pair]:
    """Linear layers of the attention pooling, which a tower without class token has (SigLIP)."""
    if tower.class_token:
        return []
    width = tower.width
    mlp = [(width, tower.mlp), (tower.mlp, width)]
    return [(width, width), (width, 2 * width), (width, width), *mlp]


def _linear(pairs: Iterable[Pair], rank: int) -> Flops:
    """Per position."""
    pairs = list(pairs)
    adapters = 2 * rank * sum(inputs + outputs for inputs, outputs in pairs)
    return Flops(2 * _weights(pairs), adapters, 0)


def _tower_flops(tower: Tower, rank: int) -> Flops:
    """All blocks of a tower that are run."""
    tokens = tower_tokens(tower)
    attended = Flops(0, 0, 4 * tower.width * tokens**2)
    return (_linear(tower_block(tower), rank) * tokens + attended) * tower.depth


def _layer_flops(architecture: Architecture, tokens: int, rank: int) -> Flops:
    """A decoder layer at all positions; causal attention computes half of the scores."""
    pairs = tokens * (tokens + 1) // 2
    attended = Flops(0, 0, 4 * _attention_width(architecture) * pairs)
    return _linear(decoder_layer(architecture).values(), rank) * tokens + attended


def _head_flops(architecture: Architecture, rank: int) -> Flops:
    """The action rows of the output layer, at one position."""
    return _linear([(architecture.hidden, NUM_BINS)], rank)
