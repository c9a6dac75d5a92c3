"""Which temperatures actions are sampled at."""

from __future__ import annotations

from roadvla.errors import UserError

MIN_TEMPERATURE = 1e-3
"""Next to 0, which is greedy. Logits divided by much less leave the range of float32; at this one,
a logit that is 0.01 smaller than another makes a token 20,000 times less likely."""


def check_temperature(value: float, *, most: float = float("inf"), greedy: bool = True) -> None:
    """Refuse a temperature that nothing can be sampled at.

    Args:
        value: The temperature.
        most: Largest that is allowed; it must be finite in any case.
        greedy: Whether 0 is allowed.

    Raises:
        UserError: If it is negative, no number, infinite, too large, or too close to 0.
    """
    if (value == 0 and greedy) or (MIN_TEMPERATURE <= value <= most and value < float("inf")):
        return
    zero = "0 (greedy) or " if greedy else ""
    end = f"to {most:g}" if most < float("inf") else "or more"
    raise UserError(f"temperature is {value}: expected {zero}{MIN_TEMPERATURE:g} {end}")
