"""Settings of an OpenVLA policy, apart from its code: they load without transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from roadvla.errors import UserError

PolicyKind = Literal["tiny", "openvla"]
Precision = Literal["bfloat16", "float32"]
Preprocess = Literal["tensor", "pil"]


@dataclass(frozen=True, kw_only=True)
class OpenVLASettings:
    """How an OpenVLA checkpoint is run and adapted.

    Attributes:
        norm_key: Entry of the checkpoint's ``norm_stats`` that actions are scaled by; ``None`` for
            the only one there is.
        dtype: Of the frozen base and the activations; adapters and value head are float32.
        lora_rank: r of the adapters.
        lora_alpha: α; the adapters' output is scaled by α/r.
        lora_lm_head: Whether the output layer is adapted too, as RL4VLA does.
        preprocess: ``tensor`` (batched, on the device, as RL4VLA rolls out) or ``pil`` (OpenVLA's
            own, bit-exact, one image after the other on the CPU).
        inference_batch: Observations per pass without gradient.
        activation_checkpointing: Recompute each block's activations in the backward pass.
        compile: Compile the blocks with ``torch.compile``.
        shard: Spread the frozen base over the processes of a run, where it does not fit one GPU.
    """

    norm_key: str | None = None
    dtype: Precision = "bfloat16"
    lora_rank: int = 32
    lora_alpha: int = 16
    lora_lm_head: bool = True
    preprocess: Preprocess = "tensor"
    inference_batch: int = 32
    activation_checkpointing: bool = False
    compile: bool = False
    shard: bool = False

    def __post_init__(self) -> None:
        """Refuse values of another type or out of range: they may come from a file."""
        for names, kind, what in (
            (("lora_rank", "lora_alpha", "inference_batch"), int, "a whole number"),
            (
                ("lora_lm_head", "activation_checkpointing", "compile", "shard"),
                bool,
                "true or false",
            ),
            (("norm_key",), (str, type(None)), "a name"),
        ):
            for name in names:
                value = getattr(self, name)
                if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                    raise UserError(f"{name} is {repr(value)[:40]}: expected {what}")
        if self.compile and self.shard:
            raise UserError("compile and shard do not go together: set one of them to false")
        for name in ("lora_rank", "lora_alpha", "inference_batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: at least 1 is needed")
        for name, choices in (
            ("dtype", ("bfloat16", "float32")),
            ("preprocess", ("tensor", "pil")),
        ):
            if getattr(self, name) not in choices:
                known = " or ".join(repr(choice) for choice in choices)
                raise UserError(f"{name} is {getattr(self, name)!r}: use {known}")
