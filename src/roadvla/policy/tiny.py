"""The tiny VLA: an OpenVLA in miniature, 0.4 million parameters, made for CPUs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from roadvla.policy.action_tokens import NUM_BINS, NUM_TOKENS, TABLETOP_STATS, NormStats
from roadvla.policy.sampling import draw_uniform, sample_tokens
from roadvla.policy.tiny_layers import (
    MASKED,
    RESAMPLER_HEADS,
    BinTables,
    DecoderLayer,
    Resampler,
    VisionTower,
    linear,
)
from roadvla.policy.vocabulary import MAX_PROMPT, PAD, WORDS, Tokenizer
from roadvla.types import Observation, PolicyOutput


@dataclass(frozen=True, kw_only=True)
class TinyArchitecture:
    """Sizes of a tiny VLA; they decide the shape of every weight.

    Attributes:
        image_size: Side of the frames, pixels.
        patch: Side of a patch, pixels.
        vision_stem: Channels right after the patches are read.
        vision_width: D, channels of the vision features.
        vision_blocks: Residual convolution blocks.
        queries: Visual tokens.
        frequencies: Octaves of the sines and cosines of an attended place.
        width: Hidden size of the decoder.
        layers: Decoder layers.
        heads: Attention heads.
        mlp: Hidden size of the decoder's MLPs.
        value_width: Hidden size of the value head.
        vocabulary_size: Words with an embedding.
        max_prompt: Longest prompt, tokens.
    """

    image_size: int = 48
    patch: int = 4
    vision_stem: int = 64
    vision_width: int = 32
    vision_blocks: int = 2
    queries: int = 8
    frequencies: int = 4
    width: int = 64
    layers: int = 2
    heads: int = 4
    mlp: int = 256
    value_width: int = 128
    vocabulary_size: int = len(WORDS)
    max_prompt: int = MAX_PROMPT

    def __post_init__(self) -> None:
        """Reject sizes that do not divide."""
        if self.image_size % self.patch:
            raise ValueError(f"patch {self.patch} does not divide image_size {self.image_size}")
        if self.width % self.heads or self.width % RESAMPLER_HEADS:
            raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads")


class TinyVLA(nn.Module):
    """Frames and a prompt in, seven action tokens and a value out.

    The sequence is [visual tokens | prompt | act | a₁ … a₆], causal throughout: the state of
    ``act`` predicts a₁ and the value, the state of a_k predicts a_{k+1}. Prompt padding is masked
    and every part counts its own positions, so padding changes nothing.

    Args:
        architecture: Sizes.
        norm_stats: What the bins mean in metres and radians.
        detach_value: Stop the value loss at the trunk, so that it trains the value head alone.
    """

    num_tokens = NUM_TOKENS
    num_bins = NUM_BINS

    def __init__(
        self,
        architecture: TinyArchitecture | None = None,
        norm_stats: NormStats = TABLETOP_STATS,
        *,
        detach_value: bool = True,
    ) -> None:
        super().__init__()
        a = architecture or TinyArchitecture()
        self.architecture, self.norm_stats, self.detach_value = a, norm_stats, detach_value
        self.tokenizer = Tokenizer(a.vocabulary_size, a.max_prompt)
        grid = a.image_size // a.patch
        self.vision = VisionTower(
            a.image_size, a.patch, a.vision_stem, a.vision_width, a.vision_blocks
        )
        self.words = nn.Parameter(torch.randn(a.vocabulary_size, a.width) * 0.5)
        self.word_position = nn.Parameter(torch.randn(a.max_prompt, a.width) * 0.3)
        self.resampler = Resampler(grid, a.vision_width, a.width, a.queries, a.frequencies)
        self.visual_position = nn.Parameter(torch.randn(a.queries, a.width) * 0.3)
        self.action_position = nn.Parameter(torch.randn(NUM_TOKENS, a.width) * 0.3)
        self.layers = nn.ModuleList(
            DecoderLayer(a.width, a.heads, a.mlp, a.layers) for _ in range(a.layers)
        )
        self.norm = nn.LayerNorm(a.width)
        self.bins = BinTables(NUM_TOKENS, NUM_BINS, a.width)
        self.value_head = nn.Sequential(
            linear(a.width, a.value_width, gain=1.0),
            nn.GELU(),
            linear(a.value_width, 1, gain=0.2),
        )
        self.freeze_vision()

    # What the tower is: frozen (features may be kept and shared) or trained.

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.words.device

    @property
    def image_size(self) -> int:
        """Height and width of the frames that it sees; it takes no others."""
        return self.architecture.image_size

    @property
    def vision_frozen(self) -> bool:
        """Whether the vision tower takes no gradient."""
        return not self.vision.stem.weight.requires_grad

    def freeze_vision(self) -> None:
        """Stop training the vision tower; its features may then be kept and reused."""
        self.vision.requires_grad_(False)

    def unfreeze_vision(self) -> None:
        """Train the vision tower with the rest."""
        self.vision.requires_grad_(True)

    def shares_vision(self, other: object) -> bool:
        """Whether both towers are frozen and bit-equal, so that features can be exchanged."""
        if not isinstance(other, TinyVLA) or not (self.vision_frozen and other.vision_frozen):
            return False
        mine, theirs = self.vision.state_dict(), other.vision.state_dict()
        return mine.keys() == theirs.keys() and all(
            torch.equal(weight, theirs[name].to(weight.device)) for name, weight in mine.items()
        )

    def policy_parameters(self) -> Iterator[nn.Parameter]:
        """Trainable parameters but the value head's."""
        for name, parameter in self.named_parameters():
            if parameter.requires_grad and not name.startswith("value_head."):
                yield parameter

    def value_parameters(self) -> Iterator[nn.Parameter]:
        """Trainable parameters of the value head."""
        return (p for p in self.value_head.parameters() if p.requires_grad)

    # Words and actions.

    def tokenize(self, instructions: Sequence[str]) -> Int[Tensor, "B L"]:
        """Turn instructions into prompt ids on the policy's device, padded on the right with 0."""
        return self.tokenizer(instructions).to(self.device)

    def decode(self, action_tokens: Int[Tensor, "*N K"]) -> Float[Tensor, "*N K"]:
        """Bins to un-normalized actions: metres, radians, gripper in [0, 1] (1 opens)."""
        return self.norm_stats.decode(action_tokens)

    def encode(self, action: Float[Tensor, "*N K"]) -> Int[Tensor, "*N K"]:
        """Un-normalized actions to bins, clipped to the range of the statistics."""
        return self.norm_stats.encode(action)

    # The network.

    def features(self, observation: Observation) -> Float[Tensor, "N P D"]:
        """Vision features: those the observation brings, else the tower's.

        Raises:
            ValueError: If features without gradient are brought although the tower is trained.
        """
        brought = observation.vision
        if brought is not None:
            if torch.is_grad_enabled() and not (self.vision_frozen or brought.requires_grad):
                raise ValueError("observation.vision carries no gradient but the tower is trained")
            return brought
        if not self.vision_frozen:
            return self.vision(observation.image)
        with torch.no_grad():
            return self.vision(observation.image)

    def ground(
        self, observation: Observation
    ) -> tuple[Float[Tensor, "N Q E"], Float[Tensor, "N Q P"]]:
        """Visual tokens and the log-attention of each over the patches, with gradient.

        Patches run row by row from the top left. This is what pretraining can teach directly: where
        the thing that the prompt names is in the frame.
        """
        text, valid = self._embed(observation.prompt)
        visual, scores = self.resampler.look(text, valid, self.features(observation))
        return visual, scores.log_softmax(dim=-1)

    def evaluate(
        self, observation: Observation, action_tokens: Int[Tensor, "N K"]
    ) -> tuple[Float[Tensor, "N K V"], Float[Tensor, " N"]]:
        """Teacher-forced raw logits of all K positions and the value, in one pass, with gradient.

        Gradient reaches everything trainable; through the value it stops at the trunk when
        ``detach_value`` is set.
        """
        prefix, mask = self._prefix(observation)
        actions = self.bins.embed(action_tokens[:, :-1]) + self.action_position[1:]
        x = torch.cat([prefix, actions], dim=1)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            x, _, _ = layer(x, mask, NUM_TOKENS if index == last else x.shape[1])
        hidden = self.norm(x)
        return self.bins.logits(hidden), self._value(hidden[:, 0])

    def value(self, observation: Observation) -> Float[Tensor, " N"]:
        """Value alone: a prefill without any action token."""
        return self._value(self._prefill(observation, keep=False)[0])

    @torch.no_grad()
    def act(
        self,
        observation: Observation,
        *,
        temperature: float,
        generator: torch.Generator | None = None,
        uniform: Float[Tensor, "N K"] | None = None,
        keep_logits: bool = False,
    ) -> PolicyOutput:
        """Sample one action per observation, without gradient; temperature 0 is greedy.

        Tokens follow softmax(logits/temperature), by inverting its cumulative sum at one uniform
        number per token, ``uniform`` or all drawn at once from ``generator``. No top-k. The
        log-probabilities are those of that distribution; a greedy token has probability 1, so
        log-probability 0.

        Raises:
            ValueError: If the temperature is negative.
        """
        if temperature < 0.0:
            raise ValueError(f"temperature is {temperature}; it must be at least 0")
        vision = self.features(observation)
        observation = Observation(observation.image, observation.prompt, vision)
        hidden, cache, mask = self._prefill(observation, keep=True)
        count, length = hidden.shape[0], mask.shape[-1] - NUM_TOKENS + 1
        value = self._value(hidden)
        if uniform is None:
            uniform = draw_uniform(count, NUM_TOKENS, generator, hidden.device)
        tokens = torch.empty(count, NUM_TOKENS, dtype=torch.int64, device=hidden.device)
        log_probs = torch.zeros(count, NUM_TOKENS, device=hidden.device)
        logits = []
        for index in range(NUM_TOKENS):
            if index > 0:
                x = self.bins.embed_one(index - 1, tokens[:, index - 1])
                x = x + self.action_position[index]
                for layer, kept in zip(self.layers, cache, strict=True):
                    x = cast(DecoderLayer, layer).step(x, kept, length + index - 1, mask[:, :, -1])
                hidden = self.norm(x)
            scores = self.bins.logits_one(index, hidden)
            if keep_logits:
                logits.append(scores)
            if temperature == 0.0:
                tokens[:, index] = scores.argmax(dim=-1)
            else:
                sample = sample_tokens(scores / temperature, uniform[:, index])
                tokens[:, index], log_probs[:, index] = sample
        return PolicyOutput(
            action_tokens=tokens,
            log_probs=log_probs,
            value=value,
            logits=torch.stack(logits, dim=1) if keep_logits else None,
            vision=vision if self.vision_frozen else None,
        )

    def _embed(
        self, prompt: Int[Tensor, "N L"]
    ) -> tuple[Float[Tensor, "N L E"], Bool[Tensor, "N L"]]:
        text = F.embedding(prompt, self.words) + self.word_position[: prompt.shape[1]]
        return text, prompt != PAD

    def _prefix(
        self, observation: Observation
    ) -> tuple[Float[Tensor, "N S E"], Float[Tensor, "#N 1 M M"]]:
        """Embed [visual | prompt | act]; the mask already counts the K - 1 action tokens after."""
        prompt = observation.prompt
        text, valid = self._embed(prompt)
        visual = self.resampler(text, valid, self.features(observation))
        act = self.action_position[:1].expand(prompt.shape[0], 1, -1)
        prefix = torch.cat([visual + self.visual_position, text, act], dim=1)
        total = prefix.shape[1] + NUM_TOKENS - 1
        future = torch.ones(total, total, dtype=torch.bool, device=prompt.device).triu(1)
        hidden = future[None, None]
        if not bool(valid.all()):
            queries = self.architecture.queries
            padded = F.pad(~valid, (queries, NUM_TOKENS), value=False)
            hidden = hidden | padded[:, None, None]
        return prefix, hidden.to(prefix.dtype) * MASKED

    def _prefill(
        self, observation: Observation, *, keep: bool
    ) -> tuple[Float[Tensor, "N E"], list[Float[Tensor, "2 N h M d"]], Float[Tensor, "#N 1 M M"]]:
        """Run the prefix: the final state of ``act``, and caches (if kept) with room for a₁…a₆."""
        x, mask = self._prefix(observation)
        length, last = x.shape[1], len(self.layers) - 1
        cache = []
        for index, layer in enumerate(self.layers):
            x, k, v = layer(x, mask[:, :, :length, :length], 1 if index == last else length)
            if keep:
                kept = k.new_empty(2, *k.shape[:2], mask.shape[-1], k.shape[-1])
                kept[0, :, :, :length], kept[1, :, :, :length] = k, v
                cache.append(kept)
        return self.norm(x[:, -1]), cache, mask

    def _value(self, hidden: Float[Tensor, "N E"]) -> Float[Tensor, " N"]:
        return self.value_head(hidden.detach() if self.detach_value else hidden).squeeze(-1)
