"""uvicorn's HTTP protocol, with an end to patience: a request's head has a size, and head and body a time to come in.

One look a second at all connections, in place of timers for every request, which cost as much as a small model.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS = 10.0
"""From connecting, or from a head's first byte, to its end."""
BODY_SECONDS = 30.0
"""From a head's end to that of the body."""
MAX_HEAD = 1 << 15
"""Bytes; what of a body comes in the same piece counts too, and a piece has at most 256 KiB."""
LOOK_EVERY = 1.0
_PIECE = 1 << 18
_CLOSING = 0.2
"""Seconds."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection. late: the loop's time from which what is awaited is late."""

    late = math.inf
    _in_head = True
    _bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first head."""
        super().connection_made(transport)
        self.late = self.loop.time() + HEAD_SECONDS

    def shutdown(self) -> None:
        """The program ends. A caller who rests on an open connection need not take part in closing it."""
        cycle = getattr(self, "cycle", None)  # None before the first request, whatever its type says
        idle = cycle is None or cycle.response_complete
        super().shutdown()
        if idle:
            self.loop.call_later(_CLOSING, self.transport.abort)

    def data_received(self, data: bytes) -> None:
        """Take a piece, unless the head has become too long."""
        self._bytes += len(data)
        if self._in_head and self._bytes > MAX_HEAD + _PIECE:
            self.transport.abort()
            return
        super().data_received(data)
        if self._in_head and self._bytes > MAX_HEAD:
            self.transport.abort()

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        if not self._in_head:
            self._in_head, self._bytes = True, 0
            self.late = self.loop.time() + HEAD_SECONDS

    def on_headers_complete(self) -> None:
        """The head is whole; a body may come."""
        self._in_head = False
        self.late = self.loop.time() + BODY_SECONDS
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """All has come; the answer is ours to give."""
        self.late = math.inf
        super().on_message_complete()


async def cut_off_late(connections: Iterable[object]) -> None:
    """Close the connections that let us wait too long, for as long as this runs."""
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(LOOK_EVERY)
        now = loop.time()
        for one in list(connections):
            if isinstance(one, BoundedProtocol) and one.late < now:
                one.transport.abort()
