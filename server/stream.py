"""One accepted connection: bytes in and out over TLS, with every wait bounded in time.

The socket blocks, so that OpenSSL reads and writes without Python in between. Whoever owns the stream says by when what
it does has to be done (`until`); the listener's reaper shuts the socket down when that moment has passed, and the owner
sees `PeerGone`. One mechanism so bounds handshakes, headers, bodies and answers, also against a peer that sends a byte
now and then or nothing but TLS messages without content.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
import time

from consortium.server.sockets import reset

PACE = 16 * 1024
"""Bytes, one TLS record, of a body that must come within each `stall` seconds."""
SENT = 64 * 1024
"""Bytes of an answer that must be taken within each `stall` seconds: OpenSSL comes back when all of them are."""
HELD = 16 * 1024
"""Bytes that are taken off a connection ahead of need."""
PIECE = 1 << 20
"""Bytes that are asked of OpenSSL at once."""

_GONE = select.POLLRDHUP | select.POLLHUP | select.POLLERR


class PeerGone(Exception):  # noqa: N818 - it is no error: peers come and go
    """The peer closed the connection, broke it, was cut off, or used up its time."""


class Stream:
    """One connection. Its methods are for the thread that owns it; `cut` is for any.

    stall: seconds that `PACE` bytes of a body, or `SENT` of an answer, may take. address: of the peer. peer: the name
    that it was admitted under.
    until: when (`time.monotonic`) the reaper cuts the connection, None for never; `limit` bounds it further.
    busy: a request is under way. resting: none is, or it waits for something to tell the peer.
    """

    def __init__(self, connection: socket.socket, address: str, stall: float) -> None:
        self.address = address
        self.peer: str | None = None
        self.until: float | None = None
        self.limit: float | None = None
        self.busy, self.resting = False, True
        self.was_cut = False
        self._socket = connection
        self._tls: ssl.SSLSocket | None = None
        self._stall = stall
        self._held = bytearray()
        self._spent, self._moved = 0.0, 0
        self._lock = threading.Lock()
        self._closed = self._resetting = False

    def secure(self, context: ssl.SSLContext) -> bytes | None:
        """The TLS handshake; the peer's certificate (DER), or None where it showed none.

        Raises:
            OSError: it failed; an `ssl.SSLError` says why.
        """
        with self._lock:
            self._tls = context.wrap_socket(self._socket, server_side=True, do_handshake_on_connect=False)
            self._socket = self._tls
        self._tls.do_handshake()
        return self._tls.getpeercert(binary_form=True)

    def allow(self, seconds: float) -> None:
        """From now on, so many seconds for what follows."""
        until = time.monotonic() + seconds
        self.until = until if self.limit is None else min(until, self.limit)

    def late(self, now: float) -> bool:
        """Whether the time is over. From any thread."""
        until = self.until
        return until is not None and until < now and not self.was_cut

    def some(self, most: int) -> bytes:
        """What is there, at least a byte, or b"" when the peer closed. Bounded by `until` alone.

        Raises:
            PeerGone: the connection broke.
        """
        if self._held:
            taken = bytes(self._held[:most])
            del self._held[:most]
            return taken
        assert self._tls is not None
        try:
            return self._tls.recv(most)
        except OSError as error:
            raise PeerGone(_reason(error)) from error

    def unread(self, data: bytes) -> None:
        """Give back what belongs to whoever reads next."""
        self._held[:0] = data

    def fill(self, view: memoryview) -> None:
        """Read exactly `len(view)` bytes.

        Raises:
            PeerGone: the connection ended or broke before, or `PACE` bytes took longer than `stall` seconds.
        """
        count = min(len(view), len(self._held))
        view[:count] = self._held[:count]
        del self._held[:count]
        begun = time.monotonic() - self._spent
        self.allow(self._stall - self._spent)
        while count < len(view):
            got = self._receive(view[count : count + PIECE])
            count += got
            self._moved += got
            if self._moved >= PACE:
                self._moved, begun = 0, time.monotonic()
                self.allow(self._stall)
        self.until = None
        self._spent = time.monotonic() - begun

    def _receive(self, view: memoryview) -> int:
        assert self._tls is not None
        try:
            count = self._tls.recv_into(view)
        except OSError as error:
            raise PeerGone(_reason(error)) from error
        if not count:
            raise PeerGone("the peer closed the connection")
        return count

    def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of it.

        Raises:
            PeerGone: the peer is gone, or did not take `SENT` bytes within `stall` seconds.
        """
        assert self._tls is not None
        view, sent = memoryview(data).cast("B"), 0
        while sent < len(view):
            self.allow(self._stall)
            try:
                sent += self._tls.send(view[sent : sent + SENT])
            except OSError as error:
                raise PeerGone(_reason(error)) from error
        self.until = None

    def wait(self, fd: int, seconds: float, ending: int) -> bool:
        """Wait until `fd` is readable: True. False when the time is over, or `ending` is readable.

        Raises:
            PeerGone: the peer closed the connection meanwhile.
        """
        assert self._tls is not None
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        poller.register(ending, select.POLLIN)
        end = time.monotonic() + seconds
        self._tls.settimeout(0.0)
        self.resting = True
        self.until = end + 1.0  # a flood of TLS messages without content does not prolong it
        try:
            while True:
                readable = select.POLLIN if self._look() else 0
                poller.register(self._tls, readable | select.POLLRDHUP)
                ready = dict(poller.poll(max(0.0, (end - time.monotonic()) * 1000)))
                if ready.get(self._tls.fileno(), 0) & _GONE:
                    raise PeerGone("the peer closed the connection")
                if fd in ready:
                    return True
                if ending in ready or time.monotonic() >= end:
                    return False
        finally:
            self.resting, self.until = False, None
            self._tls.settimeout(None)

    def _look(self) -> bool:
        """Take what is there without waiting; whether there is room for more. PeerGone at the connection's end."""
        assert self._tls is not None
        while len(self._held) < HELD:
            try:
                data = self._tls.recv(HELD - len(self._held))
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return True
            except OSError as error:
                raise PeerGone(_reason(error)) from error
            if not data:
                raise PeerGone("the peer closed the connection")
            self._held += data
        return False

    def cut(self, *, resetting: bool = False) -> None:
        """End the connection now; whatever its thread does with it fails. From any thread.

        resetting: what was sent and not yet taken is dropped, too.
        """
        with self._lock:
            self.was_cut, self._resetting = True, self._resetting or resetting
            if not self._closed:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def part(self, seconds: float) -> None:
        """Say goodbye, and throw away what the peer still sends for a while, so that it gets to read the answer."""
        assert self._tls is not None
        self.limit = None
        self.allow(seconds)
        with contextlib.suppress(OSError, ValueError):
            self._tls.settimeout(0.0)
            self._tls.unwrap()  # sends close_notify; the peer's own is not waited for
        with contextlib.suppress(OSError):
            self._socket.settimeout(None)
            socket.socket.shutdown(self._socket, socket.SHUT_WR)
            scratch = bytearray(4 * PACE)
            while socket.socket.recv_into(self._socket, scratch):
                pass

    def close(self) -> None:
        """Give the descriptor back."""
        with self._lock:
            self._closed = True
            if self._resetting:
                reset(self._socket)
            else:
                self._socket.close()


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or type(error).__name__}"
    return error.strerror or type(error).__name__
