"""uvicorn's HTTP protocol, with an end to patience: a request's head has a size and a time to come in."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS = 10.0
"""From connecting, or from a head's first byte, to its end."""
MAX_HEAD = 1 << 15
"""Bytes; what of a body comes in the same piece counts too, and a piece has at most 256 KiB."""
_PIECE = 1 << 18
_CLOSING = 0.2
"""Seconds."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    _timer: asyncio.TimerHandle | None = None
    _in_head = True
    _bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first head."""
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self._stop()
        super().connection_lost(exc)

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
            self._wait()

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._in_head = False
        self._stop()
        super().on_headers_complete()

    def _wait(self) -> None:
        self._stop()
        self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
