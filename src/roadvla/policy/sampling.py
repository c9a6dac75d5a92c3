"""Drawing tokens from logits."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def draw_uniform(
    count: int, tokens: int, generator: torch.Generator | None, device: torch.device | str = "cpu"
) -> Float[Tensor, "N K"]:
    """Draw one number in [0, 1) per token, all at once: what decides N sampled actions.

    Args:
        count: N.
        tokens: K.
        generator: Source; torch's own if ``None``.
        device: Of the result; with a generator the numbers are drawn on the generator's.
    """
    where = device if generator is None else generator.device
    return torch.rand(count, tokens, generator=generator, device=where).to(device)


def sample_tokens(
    logits: Float[Tensor, "N V"], uniform: Float[Tensor, " N"]
) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"]]:
    """Invert the cumulative distribution at ``uniform``; a bin of probability 0 is never drawn.

    The sums run in float64. A float32 number below 1 times the total stays below the total there,
    so the search always ends inside the range.
    """
    log_probs = logits.log_softmax(dim=-1)
    cumulative = log_probs.double().exp().cumsum(dim=-1)
    target = uniform.double() * cumulative[:, -1]
    tokens = torch.searchsorted(cumulative, target.unsqueeze(-1), right=True)
    return tokens.squeeze(-1), log_probs.gather(-1, tokens).squeeze(-1)
