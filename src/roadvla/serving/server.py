"""``roadvla serve``: a policy for robots and other simulators, over WebSocket.

The conversation is openpi's: on connecting the client is sent a map about the policy; then each of
its messages is answered by one, a map of arrays or, if something is wrong, a text. ``/healthz``
answers plain HTTP.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import signal
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import torch
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response

from roadvla.errors import UserError
from roadvla.policy.base import Policy
from roadvla.serving.batching import Batcher
from roadvla.serving.messages import (
    MAX_BYTES,
    PROTOCOL,
    MessageError,
    pack,
    read_request,
    unpack,
)
from roadvla.serving.notices import Warnings
from roadvla.serving.settings import Serving
from roadvla.serving.sockets import BACKLOG, Sockets, allow_files

_OPEN_SECONDS = 5.0
"""Longest time that a client may take to say what it wants."""
_SEND_SECONDS = 20.0
"""Longest time that a client may take to accept an answer."""


class PolicyServer:
    """Serves one policy in the running event loop; use it as an async context.

    Args:
        policy: Used by the server alone from now on.
        about: What clients are told on connecting.
        settings: How it is served.
        token: What clients must present, if they must.

    Attributes:
        warnings: Where it says what strangers, or the policy, do wrong.

    Raises:
        UserError: If others than this machine could connect and there is no token.
    """

    def __init__(
        self,
        policy: Policy,
        about: Mapping[str, Any],
        settings: Serving,
        token: str | None = None,
    ) -> None:
        if token is None and not _is_loopback(settings.host):
            raise UserError(
                f"host {settings.host!r} lets others than this machine connect: pass --token-file "
                f"with a file that holds a secret, or serve on 127.0.0.1"
            )
        self._policy, self._settings, self._token = policy, settings, token
        self._greeting = pack({**about, "protocol": PROTOCOL, "max_batch": settings.max_batch})
        self._sockets, self.warnings = Sockets(), Warnings()
        self._batcher: Batcher | None = None
        self._server: Server | None = None

    @property
    def port(self) -> int:
        """Where it listens.

        Raises:
            RuntimeError: Before it does.
        """
        if self._server is None:
            raise RuntimeError("the server is not running")
        return next(iter(self._server.sockets)).getsockname()[1]

    async def __aenter__(self) -> PolicyServer:
        """Start to listen.

        Raises:
            UserError: If the address cannot be used, or the process may not open enough files.
        """
        settings = self._settings
        allow_files(settings.max_clients)
        try:
            self._server = await serve(
                self._converse,
                settings.host,
                settings.port,
                process_request=self._admit,
                max_size=MAX_BYTES,
                max_queue=1,
                compression=None,
                server_header=None,
                create_connection=self._sockets.counted(),
                open_timeout=_OPEN_SECONDS,
                logger=self.warnings.logger(),
                backlog=BACKLOG,
            )
        except OSError as error:
            raise UserError(
                f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}; "
                f"choose another --port or --host"
            ) from error
        self._batcher = Batcher(
            self._policy,
            torch.device(settings.device),
            max_rows=settings.max_batch,
            max_wait=settings.max_wait_ms / 1e3,
            max_waiting=settings.max_waiting,
            seed=settings.seed,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close all connections and finish what is queued."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
        if self._batcher is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._batcher.close)

    def _admit(self, connection: ServerConnection, request: HttpRequest) -> Response | None:
        """Answer the health check, and let in who may come in."""
        if request.path == "/healthz":
            return connection.respond(HTTPStatus.OK, "OK\n")
        if self._token is not None and not _presents(request, self._token):
            return connection.respond(HTTPStatus.UNAUTHORIZED, "a token is needed\n")
        if self._sockets.in_conversation() >= self._settings.max_clients:
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "too many clients\n")
        return None

    async def _converse(self, connection: ServerConnection) -> None:
        """Answer one client's messages, one after the other, until it leaves."""
        try:
            await connection.send(self._greeting)
            async for message in connection:
                answer = await self._respond(message)
                await asyncio.wait_for(connection.send(answer), _SEND_SECONDS)
        except (ConnectionClosed, TimeoutError):
            pass  # it left, or does not listen

    async def _respond(self, message: str | bytes) -> str | bytes:
        assert self._batcher is not None
        try:
            if isinstance(message, str):
                raise MessageError("a text came: expected a binary message in msgpack")
            request = read_request(
                unpack(message),
                tokens=self._policy.num_tokens,
                rows=self._settings.max_batch,
                temperature=self._settings.temperature,
            )
            return pack(await asyncio.wrap_future(self._batcher.submit(request)))
        except UserError as error:
            return f"error: {error}"
        except Exception as error:
            self.warnings.warn(f"a request failed: {error!r}")
            return f"error: the policy failed on this request ({type(error).__name__})"


def run_server(server: PolicyServer, *, announce: Any) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Args:
        server: Not started yet.
        announce: Called with the port once it listens.
    """

    async def until_stopped() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(server.warnings.of_loop)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        async with server:
            announce(server.port)
            await stop.wait()

    asyncio.run(until_stopped())


def _presents(request: HttpRequest, token: str) -> bool:
    kind, _, value = request.headers.get("Authorization", "").partition(" ")
    known = kind.lower() in ("bearer", "api-key")
    return hmac.compare_digest(value.encode(), token.encode()) and known


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
