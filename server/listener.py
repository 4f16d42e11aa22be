"""A door of the server: TLS connections, each with a thread of its own, within caps that hold from accept on.

A thread a connection with blocking sockets, because OpenSSL, SHA-256 and the disk all run without the interpreter's
lock: models of hundreds of MB use every core. A connection counts from the moment that it is accepted, before its
handshake; it counts against all and its address until its certificate is admitted, and against its peer from then on.
What is beyond a cap is closed at once, unread. Every wait is bounded by `Caps` (`server/stream.py` says how).

Log lines name address, peer, method, path and status: never a query, a header or a body.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable

from consortium.protocol.errors import InputError, IntegrityError, RefusedError
from consortium.server.http11 import (
    BadRequest,
    BodyTooLarge,
    Head,
    Request,
    Response,
    error_response,
    json_response,
    read_head,
    write_response,
)
from consortium.server.places import Caps, Places
from consortium.server.quiet import Quiet, where
from consortium.server.sockets import bound, counted, reset
from consortium.server.stream import PeerGone, Stream

__all__ = [
    "BodyTooLarge", "Caps", "Listener", "PeerGone", "Request", "Response", "error_response", "json_response",
]  # fmt: skip

STACK = 1 << 20
"""Bytes of a thread's stack. Only touched pages take memory; JSON nested to the recursion limit needs 0.2 MB."""
TICK = 0.1
"""Seconds between two looks for connections whose time is over; also the pause when descriptors run out."""
CUTTING = 2.0
"""Seconds that connections have to end once they were cut."""
PARTING = 1.0
"""Seconds that a peer whose request was read to the end has to close, so that no reset overtakes the answer."""

_log = logging.getLogger(__name__)


class Listener:
    """One door. host: the address to listen on. port: 0 for a free one.

    context: gives the TLS settings for each new connection, so that a renewed certificate needs no restart.
    handler: answers a request; an error of ours becomes 400 (InputError, IntegrityError) or 403 (RefusedError),
    anything else 500, without detail. admit: the name of the peer that shows this certificate (DER), None to close
    the connection before any HTTP is read; without `admit`, everybody is heard and has no name.
    """

    def __init__(
        self,
        host: str,
        port: int,
        context: Callable[[], ssl.SSLContext],
        handler: Callable[[Request], Response],
        caps: Caps,
        admit: Callable[[bytes | None], str | None] | None = None,
    ) -> None:
        self._host, self.port = host, port
        self._context, self._handler, self._caps, self._admit = context, handler, caps, admit
        self._places = Places(caps)
        self._ending = -1
        self._done = threading.Event()
        self._loops: list[threading.Thread] = []
        self._quiet = Quiet(_log)

    def start(self) -> None:
        """Listen, and answer until `stop`. Once in a listener's life.

        Raises:
            InputError: the address cannot be bound; it says why and what to do.
        """
        assert not self._loops, "a listener is started once"
        listening = bound(self._host, self.port)
        self.port = listening.getsockname()[1]
        self._ending = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        name = f"door-{self.port}"
        self._loops = [
            threading.Thread(target=self._accept, args=(listening,), name=name, daemon=True),
            threading.Thread(target=self._reap, name=f"{name}-reaper", daemon=True),
        ]
        for loop in self._loops:
            _begin(loop)

    def stop(self, seconds: float) -> None:
        """Accept no more at once; give requests under way `seconds` to end, then cut them."""
        if not self._loops or not self._places.end():
            return
        os.eventfd_write(self._ending, 1)
        end = time.monotonic() + seconds
        self._loops[0].join()
        for _ in range(2):
            _join(self._places.threads(), end)
            self._places.cut_all()
            end = time.monotonic() + CUTTING
        self._done.set()
        self._loops[1].join()
        if not len(self._places):
            os.close(self._ending)
        else:
            _log.error("port %d: %d requests did not end", self.port, len(self._places))

    def cut(self, peer: str) -> int:
        """Close all connections of an admitted peer now, whatever they are at; how many there were."""
        return self._places.cut(peer)

    def connections(self) -> int:
        """How many are open."""
        return len(self._places)

    # Accepting

    def _accept(self, listening: socket.socket) -> None:
        poller = select.poll()
        poller.register(listening, select.POLLIN)
        poller.register(self._ending, select.POLLIN)
        with listening:
            while not self._places.ended:
                poller.poll()
                try:
                    connection, address = listening.accept()
                except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                    continue
                except OSError as error:
                    self._quiet(logging.ERROR, "port %d: cannot accept: %s", self.port, error.strerror)
                    self._pause()
                    continue
                try:
                    self._take(connection, address[0])
                except Exception as error:  # noqa: BLE001 - nothing about one connection ends the door
                    connection.close()
                    _log.error("port %d: %s", self.port, where(error))

    def _take(self, connection: socket.socket, host: str) -> None:
        """Give an accepted socket a thread, or close it where a cap is reached."""
        address, key = counted(host)
        stream = Stream(connection, address, self._caps.stall)
        stream.allow(self._caps.seconds)
        thread = threading.Thread(
            target=self._serve, args=(stream,), name=f"{self.port}-{address}", daemon=True
        )
        why = self._places.enter(stream, key, thread)
        if why:
            reset(connection)
            self._quiet(logging.WARNING, "port %d: %s is turned away: %s", self.port, address, why)
            return
        try:
            _begin(thread)
        except (RuntimeError, MemoryError):
            self._forget(stream)
            self._quiet(logging.ERROR, "port %d: no thread for %s can be started", self.port, address)
            self._pause()

    def _pause(self) -> None:
        poller = select.poll()
        poller.register(self._ending, select.POLLIN)
        poller.poll(TICK * 1000)

    def _reap(self) -> None:
        """Cut every connection whose time is over."""
        while not self._done.wait(TICK):
            self._places.cut_late(time.monotonic())

    def _forget(self, stream: Stream) -> None:
        stream.close()
        self._places.leave(stream)

    # One connection

    def _serve(self, stream: Stream) -> None:
        try:
            if self._greet(stream):
                fresh = True
                while self._exchange(stream, fresh):
                    fresh = False
        except PeerGone as gone:
            _log.debug("port %d: %s %s: %s", self.port, stream.address, stream.peer or "-", gone)
        except Exception as error:  # noqa: BLE001 - a connection's fault, whatever it is, ends that connection only
            _log.error("port %d: %s: %s", self.port, stream.address, where(error))
        finally:
            self._forget(stream)

    def _greet(self, stream: Stream) -> bool:
        """Handshake and admission."""
        try:
            certificate = stream.secure(self._context())
        except (OSError, PeerGone) as error:
            reason = getattr(error, "verify_message", None) or getattr(error, "reason", None) or str(error)
            self._quiet(logging.INFO, "port %d: %s: no TLS: %s", self.port, stream.address, reason)
            return False
        while self._admit is not None:
            cuts = self._places.cuts
            peer = self._admit(certificate)
            why = "is not admitted" if peer is None else self._places.admit(stream, peer, cuts)
            if why:
                self._quiet(logging.WARNING, "port %d: %s: %s", self.port, stream.address, why)
            if why is not None:
                return not why
        return True

    def _exchange(self, stream: Stream, fresh: bool) -> bool:
        """One request and its answer; whether another may follow. fresh: it is the connection's first."""
        caps = self._caps
        if not fresh:
            quick = stream.peer is None and caps.body_seconds is not None
            stream.allow(caps.seconds if quick else caps.idle)
        try:
            head = read_head(stream, None if fresh else caps.seconds)
        except BadRequest as error:
            self._quiet(logging.INFO, "port %d: %s: %d %s", self.port, stream.address, error.status, error)
            self._say(stream, None, error_response(error.status, str(error)), keep=False)
            stream.part(caps.seconds)
            return False
        if head is None or not self._places.turn(stream, busy=True):
            return False
        self._bound_body(stream)
        request = Request(head, stream, self._ending)
        response = self._answer(request)
        self._bound_body(stream)
        keep = head.keep and request.skippable and response.status != 500 and not self._places.ended
        self._say(stream, head, response, keep=keep)
        if keep:
            request.skip()
        else:
            stream.part(caps.seconds if request.left else PARTING)
        return self._places.turn(stream, busy=False) and keep

    def _bound_body(self, stream: Stream) -> None:
        if stream.peer is None and self._caps.body_seconds is not None:
            stream.limit = time.monotonic() + self._caps.body_seconds

    def _answer(self, request: Request) -> Response:
        begun = time.monotonic()
        response = self._handled(request)
        level = logging.DEBUG if response.status < 400 else logging.INFO
        write = _log.log if request.peer or level == logging.DEBUG else self._quiet
        write(
            level, "port %d: %s %s %s %s %d, %.3f s", self.port, request.address, request.peer or "-",
            request.method, request.path, response.status, time.monotonic() - begun,
        )  # fmt: skip
        return response

    def _handled(self, request: Request) -> Response:
        try:
            return self._handler(request)
        except PeerGone:
            raise
        except BodyTooLarge as error:
            return error_response(413, str(error))
        except (InputError, IntegrityError) as error:
            return error_response(400, str(error))
        except RefusedError as error:
            return error_response(403, str(error))
        except Exception as error:  # noqa: BLE001 - whatever a handler raises costs this request only
            _log.error("%s %s: %s", request.method, request.path, where(error))
            return error_response(500, "the server failed; its log says how")

    def _say(self, stream: Stream, head: Head | None, response: Response, *, keep: bool) -> None:
        try:
            write_response(stream, head, response, keep=keep)
        finally:
            close = getattr(response.stream, "close", None)
            if close is not None:
                close()


_starting = threading.Lock()


def _begin(thread: threading.Thread) -> None:
    """Start a thread with a stack of `STACK` bytes; the setting is the process's, so it is put back at once."""
    with _starting:
        before = threading.stack_size(STACK)
        try:
            thread.start()
        finally:
            threading.stack_size(before)


def _join(threads: Iterable[threading.Thread], end: float) -> None:
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(max(0.0, end - time.monotonic()))
