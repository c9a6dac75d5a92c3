"""Who is connected, counted from the moment a socket is accepted, not from when it has spoken.

Sockets that stay silent cost a file descriptor each, and without any left nobody gets in. Past a
bound the oldest of those that are not in conversation makes room, so a client that speaks at once
always gets its turn.
"""

from __future__ import annotations

import asyncio
import resource

from websockets.asyncio.server import ServerConnection
from websockets.protocol import State

from roadvla.errors import UserError

BACKLOG = 64
"""Most sockets that asyncio accepts at once, before it tells that there is one."""
SILENT = 4 * BACKLOG
"""Most sockets that are accepted but not in conversation: they come, are refused, or leave. Clients
that come all at once stay for up to four rounds of the event loop."""
_OTHERS = 64
"""Files that a server needs beside its sockets."""


class Sockets:
    """The sockets of one server."""

    def __init__(self) -> None:
        self._all: dict[ServerConnection, None] = {}  # in the order in which they came

    def counted(self) -> type[ServerConnection]:
        """Name the class of connections that are counted here, for websockets to make them."""
        sockets = self

        class Counted(ServerConnection):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                super().connection_made(transport)
                sockets.came(self)

            def connection_lost(self, exc: Exception | None) -> None:
                sockets.left(self)
                super().connection_lost(exc)

        return Counted

    def in_conversation(self) -> int:
        """Count the clients whose handshake is done and who have not begun to leave."""
        return sum(one.protocol.state is State.OPEN for one in self._all)

    def __len__(self) -> int:
        """Count all, silent or not."""
        return len(self._all)

    def came(self, connection: ServerConnection) -> None:
        """Count one more."""
        self._all[connection] = None
        silent = [one for one in self._all if one.protocol.state is not State.OPEN]
        if len(silent) > SILENT:
            silent[0].transport.abort()
            self.left(silent[0])

    def left(self, connection: ServerConnection) -> None:
        """Count one less; doing it twice is harmless."""
        self._all.pop(connection, None)


def allow_files(max_clients: int) -> None:
    """Make sure that a process may open as many files as its clients can make it open.

    The soft limit is raised where the hard one lets it.

    Raises:
        UserError: If there are not enough.
    """
    # A socket that was let go is closed one round of the event loop later.
    needed = max_clients + SILENT + 2 * BACKLOG + _OTHERS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(soft, hard) if resource.RLIM_INFINITY not in (soft, hard) else needed
    if most < needed:
        raise UserError(
            f"{max_clients} clients can need {needed} open files, and this process may open "
            f"{most}: raise `ulimit -n`, or pass a smaller --max-clients"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
