"""A served policy, used like one that is here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import NoReturn

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI
from websockets.sync.client import connect

from roadvla.errors import UserError
from roadvla.policy.action_tokens import NUM_BINS, NUM_TOKENS
from roadvla.policy.sampling import draw_uniform
from roadvla.serving.answers import read_answer, read_greeting
from roadvla.serving.messages import MAX_BYTES, MessageError, pack, unpack
from roadvla.types import Observation, PolicyOutput

SCHEME = "remote://"
_OPEN_SECONDS = 10.0
_ANSWER_SECONDS = 300.0
_OTHER_BYTES = 500_000
"""Of a message that are no frame: texts and numbers."""
_NO_SERVER = (OSError, TimeoutError, InvalidURI, ValueError, OverflowError)
"""Of addresses: hosts that are none, ports that cannot be, nobody there."""


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

    num_bins, num_tokens = NUM_BINS, NUM_TOKENS

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
        except (*_NO_SERVER, InvalidHandshake, ConnectionClosed) as error:
            self.close()
            raise UserError(
                f"no policy server answers at {address} ({error}): start one with `roadvla serve "
                f"CHECKPOINT`, and set ROADVLA_TOKEN if it wants a token"
            ) from error
        try:
            said = read_greeting(unpack(greeting if isinstance(greeting, bytes) else b""))
        except MessageError as error:
            self.close()
            raise UserError(f"{address} is no policy server for this roadvla ({error})") from error
        self.about, self._stats, self._rows = said.about, said.stats, said.rows
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
            UserError: If the server refuses, is gone, or answers something else.
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
    ) -> dict[str, np.ndarray]:
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
            said = " ".join(answer.split())[:300]
            raise UserError(f"the policy server at {self._address} says: {said}")
        try:
            return read_answer(unpack(answer), len(image))
        except MessageError as error:
            raise UserError(
                f"the policy server at {self._address} answers what cannot be used ({error})"
            ) from error
