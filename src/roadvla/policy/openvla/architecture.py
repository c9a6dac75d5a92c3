"""What a checkpoint's configuration and tensor shapes say the network is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from roadvla.errors import UserError
from roadvla.policy.action_tokens import LAST_TOKEN_ID, NUM_BINS, NUM_TOKENS
from roadvla.policy.openvla.fields import check_text, is_count, read_list, read_object

TOWERS = ("featurizer", "fused_featurizer")
"""Names of the vision towers in a checkpoint, in the order of their channels."""

_HEADS = {
    "vit_large_patch14_reg4_dinov2.lvd142m": 16,
    "vit_so400m_patch14_siglip_224": 16,
    "vit_so400m_patch14_siglip_384": 16,
}
# OpenVLA's export leaves these out of ``text_config`` and so means the defaults of the transformers
# release that it was made with. Meta's own Llama-2 files differ (1e-5, 4096).
_TEXT_DEFAULTS: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
}

PromptStyle = Literal["openvla", "openvla-v01"]


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A vision transformer, pre-norm, without its last block: features are taken before it.

    Attributes:
        width: Channels of the residual stream.
        depth: Blocks that are run: one fewer than the checkpoint holds.
        heads: Attention heads.
        mlp: Hidden channels of the block's MLP.
        patch: Side of a patch, pixels.
        patches: Number of patches, a square.
        registers: Register tokens after the class token.
        class_token: Whether there is a class token.
        layer_scale: Whether each branch is scaled per channel.
        packed: Whether queries, keys and values come from one layer.
    """

    width: int
    depth: int
    heads: int
    mlp: int
    patch: int
    patches: int
    registers: int
    class_token: bool
    layer_scale: bool
    packed: bool


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """An OpenVLA network.

    Attributes:
        towers: One (SigLIP) or two (DINOv2, SigLIP).
        image_size: Side of the frames that the towers see, pixels.
        text: Fields of ``LlamaConfig``, complete.
        prompt_style: Whose prompt the checkpoint was trained with.
        norm_stats: ``norm_stats`` of the configuration.
    """

    towers: tuple[Tower, ...]
    image_size: int
    text: dict[str, Any]
    prompt_style: PromptStyle
    norm_stats: dict[str, Any]

    @property
    def vision_width(self) -> int:
        """Channels of the patch features, all towers together."""
        return sum(tower.width for tower in self.towers)

    @property
    def patches(self) -> int:
        """Patch embeddings in the language model's sequence."""
        return self.towers[0].patches

    @property
    def hidden(self) -> int:
        """Width of the language model."""
        return self.text["hidden_size"]

    @property
    def head_dim(self) -> int:
        """Channels of one attention head of the language model."""
        return self.text.get("head_dim") or self.hidden // self.text["num_attention_heads"]

    @property
    def pad_token_id(self) -> int:
        """Token that fills short prompts up; it has an embedding, but nothing ever sees it."""
        return self.text["pad_token_id"]

    @property
    def max_prompt(self) -> int:
        """Longest prompt in tokens that leaves room for patches and action."""
        return self.text["max_position_embeddings"] - self.patches - NUM_TOKENS


def read_architecture(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], source: str
) -> Architecture:
    """Derive the network from ``config.json`` and the shapes of the tensors.

    Sizes come from the tensors wherever they show; the configuration adds what they do not: heads,
    norm ε, positions.

    Args:
        config: The parsed ``config.json``.
        shapes: Of every tensor of the checkpoint, by name.
        source: Named in errors.

    Raises:
        UserError: If the checkpoint is not an OpenVLA that this code computes.
    """
    towers = _read_towers(config, shapes, source)
    sizes = _image_sizes(config, len(towers), source)
    if len(set(sizes)) != 1:
        raise UserError(f"{source}: image_sizes is {sizes}; towers with one common size are needed")
    for name, tower in zip(TOWERS, towers, strict=False):
        if (sizes[0] // tower.patch) ** 2 != tower.patches:
            raise UserError(
                f"{source}: {name} has {tower.patches} patch positions, but image_sizes {sizes[0]} "
                f"with patches of {tower.patch} make {(sizes[0] // tower.patch) ** 2}: use the "
                f"config.json that the weights were saved with"
            )
    if len({tower.patches for tower in towers}) != 1:
        raise UserError(f"{source}: the towers have different numbers of patches")
    return Architecture(
        towers=towers,
        image_size=int(sizes[0]),
        text=_read_text(config, shapes, source),
        prompt_style="openvla-v01" if _is_v01(config) else "openvla",
        norm_stats=read_object(config, "norm_stats", source),
    )


def is_dead(name: str, architecture: Architecture) -> bool:
    """Whether a checkpoint's tensor never influences the output.

    Features are taken before the last block, so that block, each tower's final norm and SigLIP's
    attention pooling are stored but unused.
    """
    for tower_name, tower in zip(TOWERS, architecture.towers, strict=False):
        prefix = f"vision_backbone.{tower_name}."
        rest = name.removeprefix(prefix)
        dead = ("norm.", "attn_pool.", f"blocks.{tower.depth}.")
        if rest != name and rest.startswith(dead):
            return True
    return False


def _read_towers(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], source: str
) -> tuple[Tower, ...]:
    fused = f"vision_backbone.{TOWERS[1]}.pos_embed" in shapes
    names = TOWERS if fused else TOWERS[:1]
    ids = read_list(config, "timm_model_ids", str, source)
    overrides = read_list(config, "timm_override_act_layers", object, source)
    if len(ids) != len(names):
        raise UserError(
            f"{source}: timm_model_ids is {ids}, but the weights hold {len(names)} vision "
            f"tower{'s' * fused}: use the config.json that the weights were saved with"
        )
    if any(overrides):
        raise UserError(
            f"{source}: timm_override_act_layers is {overrides}; only towers with their own GELU "
            f"are supported (as in openvla-7b)"
        )
    sizes = read_list(config, "timm_model_kwargs", dict, source) or [{}] * len(names)
    if len(sizes) != len(names):
        raise UserError(f"{source}: timm_model_kwargs has {len(sizes)} entries, not {len(names)}")
    return tuple(
        _read_tower(f"vision_backbone.{name}.", shapes, heads=_heads(ids[i], sizes[i], source))
        for i, name in enumerate(names)
    )


def _image_sizes(config: Mapping[str, Any], towers: int, source: str) -> list[int]:
    given = config.get("image_sizes")
    sizes = [given] * towers if isinstance(given, int) else None
    sizes = sizes or read_list(config, "image_sizes", int, source) or [224] * towers
    if not all(map(is_count, sizes)):
        raise UserError(f"{source}: image_sizes is {given!r}; positive numbers are needed")
    return sizes


def _read_tower(prefix: str, shapes: Mapping[str, tuple[int, ...]], *, heads: int) -> Tower:
    def shape(name: str) -> tuple[int, ...]:
        try:
            return shapes[prefix + name]
        except KeyError:
            raise UserError(
                f"the checkpoint has no {prefix}{name}: it is incomplete, or no OpenVLA"
            ) from None

    blocks = {
        name.removeprefix(f"{prefix}blocks.").split(".")[0]
        for name in shapes
        if name.startswith(f"{prefix}blocks.")
    }
    if len(blocks) < 2:
        raise UserError(f"the checkpoint's {prefix}blocks are {len(blocks)}; at least 2 are needed")
    if len(shape("pos_embed")) != 3:
        raise UserError(f"{prefix}pos_embed is {shape('pos_embed')}; 1 x patches x width is needed")
    _, patches, width = shape("pos_embed")
    if width % heads:
        raise UserError(f"{prefix}pos_embed is {width} wide, no multiple of its {heads} heads")
    first = f"{prefix}blocks.0."
    return Tower(
        width=width,
        depth=len(blocks) - 1,
        heads=heads,
        mlp=shape("blocks.0.mlp.fc1.weight")[0],
        patch=shape("patch_embed.proj.weight")[-1],
        patches=patches,
        registers=shapes[f"{prefix}reg_token"][1] if f"{prefix}reg_token" in shapes else 0,
        class_token=f"{prefix}cls_token" in shapes,
        layer_scale=f"{first}ls1.scale_factor" in shapes,
        packed=f"{first}attn.q_proj.weight" not in shapes,
    )


def _heads(timm_id: str, sizes: Mapping[str, Any], source: str) -> int:
    heads = sizes.get("num_heads", _HEADS.get(timm_id))
    if heads is None:
        raise UserError(
            f"{source}: vision tower {timm_id!r} is not supported; known are {', '.join(_HEADS)}"
        )
    if not is_count(heads):
        raise UserError(f"{source}: num_heads is {heads!r}; a positive number is needed")
    return heads


def _read_text(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], source: str
) -> dict[str, Any]:
    fields = read_object(config, "text_config", source)
    given = {name: value for name, value in fields.items() if value != {}}
    text = {**_TEXT_DEFAULTS, **given}
    text.setdefault("num_key_value_heads", text["num_attention_heads"])
    if text["num_key_value_heads"] is None:
        text["num_key_value_heads"] = text["num_attention_heads"]
    if text["hidden_act"] != "silu" or text.get("model_type", "llama") != "llama":
        raise UserError(
            f"{source}: the language model is {text.get('model_type')!r} with "
            f"{text['hidden_act']!r}; a Llama with 'silu' is needed"
        )
    if text.get("tie_word_embeddings"):
        raise UserError(f"{source}: tied word embeddings are not supported; OpenVLA unties them")
    embedding = shapes.get("language_model.model.embed_tokens.weight")
    if embedding is None:
        raise UserError(
            f"{source}: language_model.model.embed_tokens.weight is missing: the checkpoint is "
            f"incomplete, or no OpenVLA"
        )
    text.setdefault("vocab_size", embedding[0])
    padding = config.get("pad_to_multiple_of") or 64
    if text.get("pad_token_id") is None:
        given_pad = config.get("pad_token_id")
        text["pad_token_id"] = LAST_TOKEN_ID + 1 if given_pad is None else given_pad
    check_text(text, source)
    bins = config.get("n_action_bins", NUM_BINS)
    if padding != text["vocab_size"] - 1 - LAST_TOKEN_ID or bins != NUM_BINS:
        raise UserError(
            f"{source}: vocab_size {text['vocab_size']}, pad_to_multiple_of {padding} and "
            f"n_action_bins {bins} are not OpenVLA's 32064, 64 and 256: action tokens would "
            f"mean something else"
        )
    return text


def _is_v01(config: Mapping[str, Any]) -> bool:
    """openvla-v01 was trained on Vicuna, in a chat's words; openvla-7b on plain Llama-2."""
    return "vicuna" in str(config.get("llm_backbone_id", "")).lower()
