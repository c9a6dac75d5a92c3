"""Actions as tokens: OpenVLA's 256 bins, its token ids, and its normalization statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from roadvla.errors import UserError

NUM_BINS = 256
"""V: edges of the uniform grid on [-1, 1], and so the number of distinct tokens."""

NUM_TOKENS = 7
"""K: Δx Δy Δz, Δroll Δpitch Δyaw, gripper."""

LAST_TOKEN_ID = 31999
"""Language-model token id of bin 0; ids descend as the action ascends."""

_EDGES = torch.from_numpy(np.linspace(-1.0, 1.0, NUM_BINS))


def encode_bins(normalized: Float[Tensor, "*N"]) -> Int[Tensor, "*N"]:
    """Bin of each normalized action value: edge[bin] ≤ a < edge[bin + 1].

    Comparisons run in float64, so a float32 value a hair below an edge stays below it. Exactly +1
    alone falls into the last bin, 255; the centre it decodes to is that of bin 254.

    Args:
        normalized: Action values, nominally in [-1, 1]; values beyond are clipped.
    """
    values = normalized.to(torch.float64).clamp(-1.0, 1.0)
    return torch.bucketize(values, _EDGES.to(values.device), right=True) - 1


def decode_bins(bins: Int[Tensor, "*N"]) -> Float64[Tensor, "*N"]:
    """Centre of each bin in [-1, 1]: -1 + (2i + 1)/255 with i = min(bin, 254)."""
    index = bins.clamp(0, NUM_BINS - 2).to(torch.float64)
    return (2.0 * index + 1.0) / (NUM_BINS - 1) - 1.0


def token_ids(bins: Int[Tensor, "*N"]) -> Int[Tensor, "*N"]:
    """Token ids of bins in the language model's vocabulary: 31999 - bin."""
    return LAST_TOKEN_ID - bins


def bins_of_token_ids(ids: Int[Tensor, "*N"]) -> Int[Tensor, "*N"]:
    """Bins of token ids; ids outside 31744..31999 are clipped to the nearest bin."""
    return (LAST_TOKEN_ID - ids).clamp(0, NUM_BINS - 1)


@dataclass(frozen=True, kw_only=True)
class NormStats:
    """Action statistics that map between units and the normalized range [-1, 1].

    Attributes:
        q01: Value that -1 stands for, per dimension: metres, radians, gripper.
        q99: Value that +1 stands for.
        mask: False where the dimension is left as it is.
    """

    q01: tuple[float, ...]
    q99: tuple[float, ...]
    mask: tuple[bool, ...]

    def __post_init__(self) -> None:
        """Reject statistics whose parts differ in length or whose range is upside down."""
        if not len(self.q01) == len(self.q99) == len(self.mask):
            raise UserError(
                f"action statistics have {len(self.q01)} q01, {len(self.q99)} q99 and "
                f"{len(self.mask)} mask entries: give one of each per action dimension"
            )
        for dimension, (low, high) in enumerate(zip(self.q01, self.q99, strict=True)):
            if not low <= high < float("inf") or low == -float("inf"):
                raise UserError(
                    f"action statistics of dimension {dimension}: q01 = {low}, q99 = {high}; "
                    "both must be finite and q01 ≤ q99"
                )

    def normalize(self, action: Float[Tensor, "*N K"]) -> Float64[Tensor, "*N K"]:
        """Map actions in units to [-1, 1]: clip(2 (a - q01)/(q99 - q01 + 1e-8) - 1, -1, 1).

        A dimension whose range is empty becomes 0; an unmasked one is only clipped.
        """
        q01, span, mask = self._tensors(action.device)
        values = action.to(torch.float64)
        scaled = 2.0 * (values - q01) / (span + 1e-8) - 1.0
        scaled = torch.where(span == 0.0, torch.zeros_like(scaled), scaled)
        return torch.where(mask, scaled, values).clamp(-1.0, 1.0)

    def unnormalize(self, normalized: Float[Tensor, "*N K"]) -> Float64[Tensor, "*N K"]:
        """Map normalized actions back to units: 0.5 (a + 1)(q99 - q01) + q01 where masked."""
        q01, span, mask = self._tensors(normalized.device)
        values = normalized.to(torch.float64)
        return torch.where(mask, 0.5 * (values + 1.0) * span + q01, values)

    def encode(self, action: Float[Tensor, "*N K"]) -> Int[Tensor, "*N K"]:
        """Bins of actions in units."""
        return encode_bins(self.normalize(action))

    def decode(self, bins: Int[Tensor, "*N K"]) -> Float[Tensor, "*N K"]:
        """Actions in units, float32, at the centres of the bins."""
        return self.unnormalize(decode_bins(bins)).to(torch.float32)

    def to_dict(self) -> dict[str, dict[str, list[float] | list[bool]]]:
        """Lay the statistics out as OpenVLA's ``norm_stats`` entries do."""
        return {
            "action": {"q01": list(self.q01), "q99": list(self.q99), "mask": list(self.mask)},
        }

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> NormStats:
        """Read one ``norm_stats`` entry; a missing mask means every dimension is normalized.

        Raises:
            UserError: If the entry has no ``action`` with ``q01`` and ``q99`` of one length.
        """
        try:
            action = entry["action"]
            q01 = tuple(float(value) for value in action["q01"])
            q99 = tuple(float(value) for value in action["q99"])
            mask = tuple(bool(value) for value in action.get("mask") or [True] * len(q01))
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(
                "action statistics are unreadable: expected "
                '{"action": {"q01": [...], "q99": [...], "mask": [...]}}'
            ) from error
        return cls(q01=q01, q99=q99, mask=mask)

    def _tensors(
        self, device: torch.device
    ) -> tuple[Float64[Tensor, " K"], Float64[Tensor, " K"], Bool[Tensor, " K"]]:
        q01 = _vector(self.q01, device)
        return q01, _vector(self.q99, device) - q01, torch.tensor(self.mask, device=device)


def _vector(values: Sequence[float], device: torch.device) -> Float64[Tensor, " K"]:
    return torch.tensor(values, dtype=torch.float64, device=device)


TABLETOP_STATS = NormStats(
    q01=(-0.04, -0.04, -0.04, -0.35, -0.35, -0.35, 0.0),
    q99=(0.04, 0.04, 0.04, 0.35, 0.35, 0.35, 1.0),
    mask=(True,) * NUM_TOKENS,
)
"""Limits of one tabletop action: ±4 cm, ±0.35 rad, gripper closed 0 to open 1."""
