"""A served policy, used like one that is here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any, NoReturn

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI
from websockets.sync.client import connect

from roadvla.errors import UserError
from roadvla.policy.action_tokens import NormStats
from roadvla.policy.sampling import draw_uniform
from roadvla.serving.messages import MAX_BYTES, PROTOCOL, MessageError, pack, unpack
from roadvla.types import Observation, PolicyOutput

SCHEME = "remote://"
_OPEN_SECONDS = 10.0
_ANSWER_SECONDS = 300.0
_OTHER_BYTES = 500_000
"""Of a message that are no frame: texts and numbers."""


class RemotePolicy:
    """Asks a server for actions; it can act, but not be trained.

    Args:
        address: ``remote://HOST:PORT``.
        token: What the server wants to see, if it does.

    Attributes:
        about: What the server says of its policy.

    Raises:
        UserError: If there is no server, or one of another kind.
    """

    num_bins = 256

    def __init__(self, address: str, token: str | None = None) -> None:
        self._address = address
        headers = {"Authorization": f"Bearer {token}"} if token else None
        self._open = ExitStack()
        try:
            opening = connect(
                f"ws://{address.removeprefix(SCHEME)}",
                additional_headers=headers,
                max_size=MAX_BYTES,
                compression=None,
                open_timeout=_OPEN_SECONDS,
                proxy=None,
            )
            self._socket = self._open.enter_context(opening)
            greeting = self._socket.recv(timeout=_OPEN_SECONDS)
        except (OSError, TimeoutError, InvalidHandshake, InvalidURI, ConnectionClosed) as error:
            raise UserError(
                f"no policy server answers at {address} ({error}): start one with `roadvla serve "
                f"CHECKPOINT`, and set ROADVLA_TOKEN if it wants a token"
            ) from error
        try:
            self.about = unpack(greeting if isinstance(greeting, bytes) else b"")
            self._stats = NormStats.from_dict(self.about["norm_stats"])
            self.num_tokens = len(self._stats.q01)
            version = self.about["protocol"]
            self._rows = int(self.about["max_batch"])
        except (MessageError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{address} is no policy server of roadvla ({error})") from error
        if version != PROTOCOL or self._rows < 1:
            raise UserError(
                f"{address} speaks version {version} of the protocol, this is {PROTOCOL}: use the "
                f"same version of roadvla on both sides"
            )
        self._texts: list[str] = []

    def tokenize(self, instructions: Sequence[str]) -> Int[Tensor, "B 1"]:
        """Number the instructions; the server is sent the texts."""
        self._texts = list(instructions)
        return torch.arange(len(self._texts)).unsqueeze(1)

    def act(
        self,
        observation: Observation,
        *,
        temperature: float,
        generator: torch.Generator | None = None,
        uniform: Float[Tensor, "N K"] | None = None,
        keep_logits: bool = False,
    ) -> PolicyOutput:
        """Let the server sample, by numbers that are drawn here.

        Raises:
            UserError: If the server refuses, or is gone.
            ValueError: If logits are asked for.
        """
        if keep_logits:
            raise ValueError("a served policy does not give its logits")
        count, device = len(observation.image), observation.image.device
        if uniform is None:
            uniform = draw_uniform(count, self.num_tokens, generator)
        image, noise = observation.image.cpu().numpy(), uniform.cpu().numpy()
        texts = [self._texts[number] for number in observation.prompt[:, 0].tolist()]
        size = max(1, min(self._rows, (MAX_BYTES - _OTHER_BYTES) // image[0].nbytes))
        answers = [
            self._ask(image[rows], texts[rows], noise[rows], temperature)
            for rows in (slice(at, at + size) for at in range(0, count, size))
        ]
        tokens, log_probs, value = (
            torch.from_numpy(np.concatenate([answer[name] for answer in answers])).to(device)
            for name in ("action_tokens", "log_probs", "value")
        )
        return PolicyOutput(action_tokens=tokens, log_probs=log_probs, value=value)

    def decode(self, action_tokens: Int[Tensor, "*N K"]) -> Float[Tensor, "*N K"]:
        """Bins to actions, by the statistics that the server named."""
        return self._stats.decode(action_tokens)

    def encode(self, action: Float[Tensor, "*N K"]) -> Int[Tensor, "*N K"]:
        """Actions to bins."""
        return self._stats.encode(action)

    def evaluate(self, observation: Observation, action_tokens: Tensor) -> NoReturn:
        """Not over a wire."""
        raise NotImplementedError("a served policy cannot be trained")

    def value(self, observation: Observation) -> NoReturn:
        """Not over a wire."""
        raise NotImplementedError("a served policy is no critic")

    def shares_vision(self, other: object) -> bool:
        """Never."""
        return False

    def policy_parameters(self) -> Iterable[nn.Parameter]:
        """None are here."""
        return ()

    def value_parameters(self) -> Iterable[nn.Parameter]:
        """None are here."""
        return ()

    def close(self) -> None:
        """Leave; doing it twice is harmless."""
        self._open.close()

    def _ask(
        self, image: np.ndarray, texts: list[str], noise: np.ndarray, temperature: float
    ) -> dict[str, Any]:
        message = {
            "observation/image": image,
            "prompt": texts,
            "uniform": noise,
            "temperature": temperature,
        }
        try:
            self._socket.send(pack(message))
            answer = self._socket.recv(timeout=_ANSWER_SECONDS)
        except (ConnectionClosed, TimeoutError, OSError) as error:
            raise UserError(f"the policy server at {self._address} is gone ({error})") from error
        if isinstance(answer, str):
            raise UserError(f"the policy server at {self._address} says: {answer}")
        return unpack(answer)
