"""Answers on their way to the server: sent again until they are taken, refused for good, or too late."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, Literal

from consortium.client.backoff import Backoff
from consortium.protocol import wire
from consortium.protocol.connection import Connection, StatusError
from consortium.protocol.errors import ConsortiumError
from consortium.protocol.sealed import DataKey, Sealed

IDLE = 20.0
"""Seconds after which a connection is not used again: the server may have closed it."""
TRY_AGAIN = {408, 425, 429}
"""Errors of HTTP below 500 that pass by themselves."""

Outcome = Literal["taken", "late", "refused", "expired"]

_log = logging.getLogger("consortium.agent")


@dataclass
class Letter:
    """A signed answer. content: a file that begins with the `size` bytes of its content, None where it has none; key:
    what it is encrypted under, if it is. expires: seconds since the epoch after which nobody waits for it. shown: what
    the site says of its logs, as a header."""

    nonce: str
    run: str
    header: bytes
    signature: bytes
    content: BinaryIO | None
    size: int
    key: DataKey | None
    expires: float
    shown: str = ""
    due: float = 0.0
    backoff: Backoff = field(default_factory=Backoff)

    @property
    def length(self) -> int:
        """Bytes of the whole frame."""
        return wire.PREAMBLE + len(self.header) + self.size

    def pieces(self) -> Iterator[bytes | memoryview]:
        """The frame, from its start; a piece is good until the next one is asked for."""
        yield wire.preamble(self.header, self.signature)
        if self.content is not None and self.key is not None:
            yield from Sealed(self.content.fileno(), self.key, "an answer").pieces(0, self.size)
        elif self.content is not None:
            yield from wire.pieces(self.content.fileno(), self.size)


class Outbox:
    """Sends in a thread of its own. One letter that is not taken holds no other up.

    connect: a new connection. done: called with each letter once, when nothing more becomes of it.
    """

    def __init__(
        self,
        connect: Callable[[], Connection],
        done: Callable[[Letter, Outcome, str], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._connect, self._done, self._clock = connect, done, clock
        self._news = threading.Condition()
        self._letters: list[Letter] = []
        self._ended = False
        self._connection: Connection | None = None
        self._used = 0.0
        self._thread = threading.Thread(target=self._loop, name="outbox", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def put(self, letter: Letter) -> None:
        """Send a letter as soon as can be."""
        with self._news:
            self._letters.append(letter)
            self._news.notify()

    def stop(self, seconds: float) -> None:
        """Send no more; what is under way is broken off."""
        with self._news:
            self._ended = True
            self._news.notify()
        if self._connection is not None:
            self._connection.interrupt()
        if self._thread.is_alive():
            self._thread.join(seconds)

    def reconnect(self) -> None:
        """Use a new connection for the next letter: the certificate has changed."""
        self._used = 0.0

    def _loop(self) -> None:
        while (letter := self._next()) is not None:
            try:
                outcome = self._send(letter)
            except Exception:  # noqa: BLE001 - it costs this answer only, and the thread goes on
                _log.exception("run %s: an answer cannot be sent", letter.run)
                self._used = 0.0  # the connection may be in the middle of a request
                outcome = "refused", "a fault of this program"
            if outcome is None:
                letter.due = time.monotonic() + letter.backoff.next()
                continue
            with self._news:
                self._letters.remove(letter)
            self._done(letter, *outcome)

    def _next(self) -> Letter | None:
        """The letter that is due first, once it is; None at the end."""
        with self._news:
            while not self._ended:
                letter = min(self._letters, key=lambda one: one.due, default=None)
                if letter is None:
                    self._news.wait(IDLE)
                    if self._connection is not None and time.monotonic() - self._used > IDLE:
                        self._connection.close()
                    continue
                wait = letter.due - time.monotonic()
                if wait <= 0:
                    return letter
                self._news.wait(wait)
            return None

    def _send(self, letter: Letter) -> tuple[Outcome, str] | None:
        """What became of a letter; None where it is to be tried again."""
        tried = letter.due > 0
        if tried and self._clock() > letter.expires:
            return "expired", "nobody waits for it any more"
        try:
            connection = self._open()
            reply = connection.request(
                "PUT",
                wire.ANSWERS + letter.nonce,
                body=letter.pieces(),
                length=letter.length,
                headers={wire.SHOWN: letter.shown} if letter.shown else None,
            )
            reply.document()
            self._used = time.monotonic()
            return "taken", ""
        except StatusError as error:
            self._used = 0.0  # the server may not have read the whole body
            if error.status >= 500 or error.status in TRY_AGAIN:
                return None
            if error.status == 410 and str(error).startswith(wire.LATE):
                return "late", str(error).removeprefix(wire.LATE)
            return "refused", f"{error.status}: {error}"
        except ConsortiumError as error:
            _log.debug("run %s: an answer is not sent yet: %s", letter.run, error)
            self._used = 0.0
            return None

    def _open(self) -> Connection:
        if self._connection is None or time.monotonic() - self._used > IDLE:
            if self._connection is not None:
                self._connection.close()
            self._connection = self._connect()
        return self._connection
