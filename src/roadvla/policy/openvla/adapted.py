"""OpenVLA as a policy that is trained: adapters on a frozen base, and the value head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from roadvla.errors import UserError
from roadvla.policy.action_tokens import NUM_BINS, NUM_TOKENS, NormStats
from roadvla.policy.openvla.adapters import (
    adapted_modules,
    adapter_weights,
    attach,
    load_adapter,
    switched,
)
from roadvla.policy.openvla.artefacts import Adapter
from roadvla.policy.openvla.checkpoint import locator
from roadvla.policy.openvla.model import OpenVLA
from roadvla.policy.openvla.value_head import ValueHead
from roadvla.policy.sampling import draw_uniform
from roadvla.policy.settings import OpenVLASettings
from roadvla.types import Observation, PolicyOutput

_LIVE, _REFERENCE = "policy", "reference"


class OpenVLAPolicy(nn.Module):
    """The ``Policy`` interface over an OpenVLA whose adapters and value head are trained.

    Args:
        model: Gets adapters here, fresh ones; its base is frozen.
        settings: Precision is the model's own already; the rest is applied.
        norm_stats: Action statistics of the checkpoint, if not those of its configuration.

    Raises:
        UserError: If the checkpoint has no statistics for ``settings.norm_key``.
    """

    num_tokens = NUM_TOKENS
    num_bins = NUM_BINS

    def __init__(
        self,
        model: OpenVLA,
        settings: OpenVLASettings,
        *,
        norm_stats: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if norm_stats is not None:
            model.architecture = replace(model.architecture, norm_stats=norm_stats)
        self.model, self.settings, self.custom_stats = model, settings, norm_stats
        self.norm_stats: NormStats = model.norm_stats(settings.norm_key)
        self._modules_adapted = adapted_modules(model, lm_head=settings.lora_lm_head)
        self._attach(_LIVE)
        model.recompute = settings.activation_checkpointing
        if settings.compile:
            model.compile_blocks()

    def policy_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the live adapters."""
        for name, parameter in self.model.named_parameters():
            if f".{_LIVE}." in name:
                yield parameter

    def value_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the value head."""
        return self.model.value_head.parameters()

    def shares_vision(self, other: object) -> bool:
        """Never: the towers carry adapters, so their features change."""
        return False

    def tokenize(self, instructions: Sequence[str]) -> Int[Tensor, "B L"]:
        """Prompt ids on the model's device, padded on the right with the model's pad token.

        Raises:
            UserError: If the checkpoint has no tokenizer, or an instruction is too long.
        """
        return self.model.pad([self.model.prompt_ids(text) for text in instructions])[0]

    def decode(self, action_tokens: Int[Tensor, "*N K"]) -> Float[Tensor, "*N K"]:
        """Bins to un-normalized actions, by the statistics of the chosen data set."""
        return self.norm_stats.decode(action_tokens)

    def encode(self, action: Float[Tensor, "*N K"]) -> Int[Tensor, "*N K"]:
        """Un-normalized actions to bins, clipped to the range of the statistics."""
        return self.norm_stats.encode(action)

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

        Observations go through the network ``settings.inference_batch`` at a time. The random
        numbers are drawn for all at once, so how they are split does not matter to the sampling.

        Raises:
            ValueError: If the temperature is negative.
        """
        if uniform is None:
            uniform = draw_uniform(
                len(observation.prompt), NUM_TOKENS, generator, self.model.device
            )
        outputs = [
            self.model.act_on(*self._inputs(part), random, temperature=temperature)
            for part, random in zip(
                self._parts(observation),
                uniform.split(self.settings.inference_batch),
                strict=True,
            )
        ]
        joined = {
            name: torch.cat([getattr(output, name) for output in outputs])
            for name in ("action_tokens", "log_probs", "value", *(("logits",) * keep_logits))
        }
        return PolicyOutput(**joined)

    def evaluate(
        self, observation: Observation, action_tokens: Int[Tensor, "N K"]
    ) -> tuple[Float[Tensor, "N K V"], Float[Tensor, " N"]]:
        """Teacher-forced raw logits of all K positions, and the value, with gradient."""
        return self.model.evaluate_on(*self._inputs(observation), action_tokens)

    @torch.no_grad()
    def value(self, observation: Observation) -> Float[Tensor, " N"]:
        """Value alone: a prefill without any action token; without gradient."""
        return self.value_by(observation, self.model.value_head)

    @torch.no_grad()
    def value_by(self, observation: Observation, head: ValueHead) -> Float[Tensor, " N"]:
        """Value that a head gives to the states of the active adapter."""
        return torch.cat(
            [self.model.value_on(*self._inputs(part), head) for part in self._parts(observation)]
        )

    def take(self, adapter: Adapter, source: str) -> None:
        """Continue from a stored adapter, and its value head if it brings one.

        Raises:
            UserError: If it does not fit.
        """
        self._check_fit(adapter, source)
        load_adapter(self.model, _LIVE, adapter.modules, source)
        if adapter.value_head is not None:
            self.model.value_head.load(adapter.value_head, source)

    def give(self) -> Adapter:
        """Copy the live adapter and the value head, to be stored."""
        checkpoint = self.model.checkpoint
        return Adapter(
            rank=self.settings.lora_rank,
            alpha=float(self.settings.lora_alpha),
            modules=adapter_weights(self.model, _LIVE),
            base=None if checkpoint is None else locator(checkpoint),
            value_head={
                name: weight.detach().cpu().clone()
                for name, weight in self.model.value_head.state_dict().items()
            },
            norm_stats=self.custom_stats,
        )

    def critic(self, adapter: Adapter, source: str) -> ReferenceCritic:
        """Make a frozen critic of another adapter and value head on this very base.

        Args:
            adapter: Of a finished run.
            source: Named in errors.

        Raises:
            UserError: If it does not fit, or brings no value head.
        """
        self._check_fit(adapter, source)
        if adapter.value_head is None:
            raise UserError(f"reference_critic {source} has no value head: name a PPO run")
        head = ValueHead(self.model.architecture.hidden).to(self.model.device)
        head.load(adapter.value_head, source)
        self._attach(_REFERENCE)
        load_adapter(self.model, _REFERENCE, adapter.modules, source)
        with switched(self.model, _REFERENCE, back=_LIVE):
            pass
        return ReferenceCritic(self, head.requires_grad_(False))

    def _attach(self, name: str) -> None:
        rank, alpha = self.settings.lora_rank, self.settings.lora_alpha
        attach(self.model, name, self._modules_adapted, rank=rank, alpha=alpha)

    def _check_fit(self, adapter: Adapter, source: str) -> None:
        settings = self.settings
        if (adapter.rank, adapter.alpha) != (settings.lora_rank, settings.lora_alpha):
            raise UserError(
                f"adapter {source} has rank {adapter.rank} and alpha {adapter.alpha:g}, not "
                f"{settings.lora_rank} and {settings.lora_alpha}: pass --lora-rank {adapter.rank} "
                f"--lora-alpha {adapter.alpha:g}"
            )

    def _parts(self, observation: Observation) -> Iterator[Observation]:
        size = self.settings.inference_batch
        for image, prompt in zip(
            observation.image.split(size), observation.prompt.split(size), strict=True
        ):
            yield Observation(image=image, prompt=prompt)

    def _inputs(self, observation: Observation) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels, prompt ids and their lengths."""
        pixels = self.model.preprocess(observation.image, method=self.settings.preprocess)
        pad = self.model.architecture.pad_token_id
        return pixels, observation.prompt, (observation.prompt != pad).sum(dim=1)


class ReferenceCritic:
    """A frozen critic that shares the live policy's base: its adapter is switched in per call.

    Args:
        policy: The live policy, with the reference adapter attached.
        head: The reference value head.
    """

    def __init__(self, policy: OpenVLAPolicy, head: ValueHead) -> None:
        self._policy, self._head = policy, head

    def to(self, device: torch.device) -> None:
        """Follow the policy to another device."""
        self._head = self._head.to(device)

    def value(self, observation: Observation) -> Float[Tensor, " N"]:
        """Value by the reference adapter and head, without gradient."""
        with switched(self._policy.model, _REFERENCE, back=_LIVE):
            return self._policy.value_by(observation, self._head)

    def shares_vision(self, other: object) -> bool:
        """Never: each adapter changes the towers."""
        return False
