"""A TCP proxy that can drop everything in silence, as a network does: no end of a connection, no error, no byte."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time

LOOK = 0.02


class TcpProxy:
    """Forwards connections to a port of the loopback until it is cut.

    What was connected when it was cut is dead for ever, and nobody is told: both ends wait. Whoever connects meanwhile
    waits to be let in, as one whose first packets are sent again; when it is mended, that goes on.
    """

    def __init__(self, port: int) -> None:
        self._to = port
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listening.getsockname()[1]
        self._cut, self._closed, self._era = False, False, 0
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Drop everything from now on."""
        self._era += 1
        self._cut = True

    def mend(self) -> None:
        """Let new connections through."""
        self._cut = False

    def close(self) -> None:
        """End it, and every connection."""
        self._closed = True
        for one in [self._listening, *self._open]:
            one.close()

    def _accept(self) -> None:
        while not self._closed:
            with contextlib.suppress(OSError, ValueError):
                if self._cut or not select.select([self._listening], [], [], LOOK)[0]:
                    time.sleep(LOOK)
                    continue
                one, _ = self._listening.accept()
                other = socket.create_connection(("127.0.0.1", self._to))
                self._open += [one, other]
                for ends in ((one, other), (other, one)):
                    threading.Thread(target=self._pump, args=(*ends, self._era), daemon=True).start()

    def _pump(self, one: socket.socket, other: socket.socket, era: int) -> None:
        with contextlib.suppress(OSError, ValueError):
            while not self._closed and era == self._era:
                if not select.select([one], [], [], LOOK)[0] or era != self._era:
                    continue
                piece = one.recv(65536)
                if not piece:
                    one.close()
                    other.close()
                    return
                other.sendall(piece)
            return  # both ends stay open, and nothing comes through
        for end in (one, other):
            end.close()
