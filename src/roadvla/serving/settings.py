"""How a policy is served, apart from the code that serves it."""

from __future__ import annotations

from dataclasses import dataclass

from roadvla.errors import UserError
from roadvla.policy.temperature import check_temperature

MAX_TEMPERATURE = 100.0


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How a policy is served.

    Attributes:
        host: Interface to listen on.
        port: 0 for any that is free.
        device: Where the policy lives.
        max_batch: Most frames of a pass, and of a request.
        max_wait_ms: Milliseconds that a request may wait for others to share a pass.
        max_waiting: Requests that may wait; more are told that the server is busy.
        max_clients: Connections at a time; more are refused.
        temperature: Of the sampling, unless a request says otherwise: 0 is greedy, or
            0.001 to 100.
        seed: Of the sampling, where a request does not bring its own numbers.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    device: str = "cpu"
    max_batch: int = 64
    max_wait_ms: float = 2.0
    max_waiting: int = 256
    max_clients: int = 128
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name in ("max_batch", "max_waiting", "max_clients"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: at least 1 is needed")
        for name in ("max_wait_ms", "seed"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"{name} is {getattr(self, name)}: expected 0 or more")
        check_temperature(self.temperature, most=MAX_TEMPERATURE)
        if not 0 <= self.port < 65536:
            raise UserError(f"port is {self.port}: expected 0 to 65535")
