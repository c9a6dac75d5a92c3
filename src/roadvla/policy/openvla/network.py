"""OpenVLA's passes: teacher-forced evaluation, value, and acting with a cache of fixed shape.

The sequence is ``[BOS] [patches] [rest of the prompt] [action tokens] [pads]``. Module names are
those of the HF checkpoint, so weights, adapters and gradients go by the names users know. Only the
rows of the output layer that stand for action bins are ever multiplied.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute_later
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRotaryEmbedding,
)

from roadvla.policy.action_tokens import LAST_TOKEN_ID, NUM_BINS, NUM_TOKENS, token_ids
from roadvla.policy.openvla.architecture import Architecture
from roadvla.policy.openvla.decoder import Heads, run_layer, run_layer_at, step_layer
from roadvla.policy.openvla.value_head import ValueHead
from roadvla.policy.openvla.vision import Projector, VisionBackbone
from roadvla.policy.sampling import sample_tokens
from roadvla.types import PolicyOutput

_ACTION_ROWS = slice(LAST_TOKEN_ID + 1 - NUM_BINS, LAST_TOKEN_ID + 1)


class Network(nn.Module):
    """Vision towers, projector, decoder and value head.

    Args:
        architecture: Sizes.

    Attributes:
        recompute: Keep no activations inside blocks; recompute them in the backward pass.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture, self.recompute = architecture, False
        text = architecture.text
        self.vision_backbone = VisionBackbone(architecture)
        self.projector = Projector(architecture)
        self.language_model = LlamaForCausalLM(_llama_config(text))
        self.value_head = ValueHead(architecture.hidden)
        self._heads = Heads(
            text["num_attention_heads"], text["num_key_value_heads"], architecture.head_dim
        )
        self._run_layer, self._run_layer_at, self._step_layer = run_layer, run_layer_at, step_layer

    def run_layers_by(self, call: Callable[..., Any]) -> None:
        """Let every pass over a decoder layer go through ``call(work, layer, …)``."""
        self._run_layer, self._run_layer_at, self._step_layer = (
            partial(call, work) for work in (run_layer, run_layer_at, step_layer)
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.language_model.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the base weights and the activations."""
        return self.language_model.model.norm.weight.dtype

    def compile_blocks(self) -> None:
        """Compile the blocks of towers and decoder; the first passes then take minutes."""
        self._run_layer = torch.compile(run_layer, dynamic=False)
        self._run_layer_at = torch.compile(run_layer_at, dynamic=False)
        self._step_layer = torch.compile(step_layer, dynamic=False)
        for tower in self.vision_backbone.children():
            for block in cast("nn.ModuleList", tower.blocks):
                block.compile(dynamic=False)

    def reset_rotation(self, device: torch.device | str) -> None:
        """Compute the rotary embedding's frequencies, which no checkpoint holds."""
        rotation = LlamaRotaryEmbedding(_llama_config(self.architecture.text))
        self.language_model.model.rotary_emb = rotation.to(device)

    def evaluate_on(
        self,
        pixel_values: Float[Tensor, "B C S S"],
        ids: Int[Tensor, "B L"],
        lengths: Int[Tensor, " B"],
        action_tokens: Int[Tensor, "B K"],
    ) -> tuple[Float[Tensor, "B K V"], Float[Tensor, " B"]]:
        """Evaluate with prompts that are already padded."""
        ahead = torch.arange(NUM_TOKENS, device=ids.device)
        # The last action token predicts nothing that is read, so it is not fed.
        columns = lengths.unsqueeze(1) + ahead[:-1]
        fed = F.pad(ids, (0, NUM_TOKENS - 1), value=self.architecture.pad_token_id)
        fed = fed.scatter(1, columns, token_ids(action_tokens[:, :-1].long()))
        positions = self._state_positions(lengths).unsqueeze(1) + ahead
        states, _ = self._run(self._sequence(pixel_values, fed), positions)
        return self._action_logits(states), self.value_head(states[:, 0])

    def value_on(
        self,
        pixel_values: Float[Tensor, "B C S S"],
        ids: Int[Tensor, "B L"],
        lengths: Int[Tensor, " B"],
        head: ValueHead | None = None,
    ) -> Float[Tensor, " B"]:
        """Value alone, by this model's head or another: a prefill without any action token."""
        positions = self._state_positions(lengths).unsqueeze(1)
        states, _ = self._run(self._sequence(pixel_values, ids), positions)
        return (head or self.value_head)(states[:, 0])

    @torch.no_grad()
    def act_on(
        self,
        pixel_values: Float[Tensor, "B C S S"],
        ids: Int[Tensor, "B L"],
        lengths: Int[Tensor, " B"],
        uniform: Float[Tensor, "B K"],
        *,
        temperature: float,
    ) -> PolicyOutput:
        """Act with prompts that are already padded and random numbers already drawn."""
        if temperature < 0.0:
            raise ValueError(f"temperature is {temperature}; it must be at least 0")
        position = self._state_positions(lengths).unsqueeze(1)
        x = self._sequence(pixel_values, ids)
        states, cache = self._run(x, position, room=NUM_TOKENS - 1)
        value = self.value_head(states[:, 0])
        tokens, log_probs, kept = [], [], []
        for index in range(NUM_TOKENS):
            if index > 0:
                states = self._step(tokens[-1], position + index, cache)
            scores = self._action_logits(states)[:, 0]
            token, log_prob = _choose(scores, uniform[:, index], temperature)
            tokens.append(token)
            log_probs.append(log_prob)
            kept.append(scores)
        return PolicyOutput(
            action_tokens=torch.stack(tokens, dim=1),
            log_probs=torch.stack(log_probs, dim=1),
            value=value,
            logits=torch.stack(kept, dim=1),
        )

    def _layers(self) -> list[LlamaDecoderLayer]:
        return cast("list[LlamaDecoderLayer]", list(self.language_model.model.layers))

    def _state_positions(self, lengths: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        """Column of each prompt's last token, which predicts the first action token."""
        return lengths + (self.architecture.patches - 1)

    def _sequence(
        self, pixel_values: Float[Tensor, "B C S S"], ids: Int[Tensor, "B L"]
    ) -> Float[Tensor, "B M H"]:
        """Embed image and text; the patches come right after BOS."""
        keep = self.recompute and torch.is_grad_enabled()
        pixels = pixel_values.to(self.dtype)
        patches = self.projector(self.vision_backbone(pixels, recompute=keep))
        text = self.language_model.model.embed_tokens(ids)
        return torch.cat([text[:, :1], patches.to(text.dtype), text[:, 1:]], dim=1)

    def _run(
        self, x: Float[Tensor, "B M H"], positions: Int[Tensor, "B Q"], room: int | None = None
    ) -> tuple[Float[Tensor, "B Q H"], Float[Tensor, "n 2 B g S d"]]:
        """Run the decoder: final states at ``positions``, and caches with ``room`` for more."""
        decoder, heads = self.language_model.model, self._heads
        columns = torch.arange(x.shape[1] + (room or 0), device=x.device)
        rotation = decoder.rotary_emb(x, columns[: x.shape[1]].unsqueeze(0))
        kept = 0 if room is None else len(decoder.layers)
        cache = x.new_zeros(kept, 2, len(x), heads.shared, len(columns), heads.dim)
        last = len(decoder.layers) - 1
        for index, layer in enumerate(self._layers()):
            if index == last:
                x, k, v = self._run_layer_at(layer, x, positions, rotation, heads)
            elif self.recompute and torch.is_grad_enabled():
                run = self._run_layer
                x, k, v = cast(
                    "tuple[Tensor, Tensor, Tensor]",
                    recompute_later(run, layer, x, rotation, heads, use_reentrant=False),
                )
            else:
                x, k, v = self._run_layer(layer, x, rotation, heads)
            if room is not None:
                cache[index, 0, :, :, : k.shape[2]] = k
                cache[index, 1, :, :, : v.shape[2]] = v
        return decoder.norm(x), cache

    def _step(
        self, token: Int[Tensor, " B"], column: Int[Tensor, "B 1"], cache: Tensor
    ) -> Float[Tensor, "B 1 H"]:
        """Feed one action token at ``column`` and return the state after it."""
        decoder = self.language_model.model
        x = decoder.embed_tokens(token_ids(token).unsqueeze(1))
        rotation = decoder.rotary_emb(x, column)
        seen = torch.arange(cache.shape[4], device=x.device) <= column[:, :, None, None]
        for index, layer in enumerate(self._layers()):
            x = self._step_layer(layer, x, column, rotation, self._heads, cache[index], seen)
        return decoder.norm(x)

    def _action_logits(self, states: Float[Tensor, "B Q H"]) -> Float[Tensor, "B Q V"]:
        """Apply the output layer's 256 action rows, in float32, ascending in action value."""
        head: nn.Module = self.language_model.lm_head
        adapted = isinstance(head, LoraLayer)
        base = cast("nn.Linear", cast("LoraLayer", head).get_base_layer() if adapted else head)
        x = states.float()
        logits = F.linear(x, base.weight[_ACTION_ROWS].float())
        if adapted:
            lora = cast("LoraLayer", head)
            for name in lora.active_adapters:
                a, b = (cast("nn.Linear", part[name]) for part in (lora.lora_A, lora.lora_B))
                low = F.linear(x, a.weight)
                logits = logits + lora.scaling[name] * F.linear(low, b.weight[_ACTION_ROWS])
        return logits.flip(-1)


def _choose(
    scores: Float[Tensor, "B V"], uniform: Float[Tensor, " B"], temperature: float
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    if temperature == 0.0:
        return scores.argmax(dim=-1), torch.zeros_like(uniform)
    return sample_tokens(scores / temperature, uniform)


def _llama_config(text: dict[str, Any]) -> LlamaConfig:
    """Make the decoder's configuration; the weights' own dtype is ours to choose."""
    left_out = ("model_type", "torch_dtype", "dtype")
    return LlamaConfig(**{name: value for name, value in text.items() if name not in left_out})
