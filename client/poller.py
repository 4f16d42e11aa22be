"""The thread that always polls, whatever else goes on: instructions come in by it, and so do the server's notices."""

from __future__ import annotations

import logging
import secrets
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from consortium.client.audit import LONGEST
from consortium.client.backoff import Backoff
from consortium.client.hand import Hand
from consortium.client.heads import Logs
from consortium.client.home import Home
from consortium.client.inbox import Dropped, Inbox, Taken
from consortium.client.link import Link
from consortium.client.seen import Seen
from consortium.protocol import wire
from consortium.protocol.chain import Head
from consortium.protocol.connection import Connection, StatusError
from consortium.protocol.errors import ConsortiumError, IntegrityError
from consortium.protocol.heads import unpacked
from consortium.protocol.keys import Lock

SILENCE = wire.POLL_SECONDS + 20
"""Seconds without a byte after which a connection is given up."""
MODELS_EVERY = 3600.0
"""Seconds after which the server is asked about models although nothing has changed, so that its word stays good."""
MAX_HEADS = 1 << 20
"""Bytes of the server's reply to a greeting."""
RENEWING = 60.0
"""Seconds between two tries to renew the certificate."""

Renew = Callable[[Home, Lock, Connection], None]

_log = logging.getLogger("consortium.agent")


class Connector:
    """Makes connections to the site door, for any thread. Keys are decrypted once, and anew after `forget`."""

    def __init__(self, home: Home, lock: Lock) -> None:
        self._home, self._lock = home, lock
        self._tls: ssl.SSLContext | None = None

    def __call__(self) -> Connection:
        config, tls = self._home.config, self._tls
        if tls is None:
            tls = self._tls = self._home.tls_context(self._lock)
        return Connection(config.host, config.port, tls, proxy=config.proxy, timeout=SILENCE)

    def forget(self) -> None:
        """The certificate may have changed."""
        self._tls = None


class Poller:
    """Polls from `start` to `stop`.

    paused, kept: what the server is told. put: gets each instruction. ended: gets what is said of runs that ended.
    renew: replaces the certificate, over a connection; renewed: is called afterwards. studies: looks at what the server
    proposes, models: at those that are used here, each over a connection. note: writes to the audit log.
    logs: of the site, which are compared with the server's word before anything of a reply is taken.
    """

    def __init__(
        self,
        home: Home,
        lock: Lock,
        seen: Seen,
        hand: Hand,
        connect: Connector,
        *,
        paused: Callable[[], bool],
        kept: Callable[[], dict[str, str]],
        put: Callable[[Taken], None],
        ended: Callable[[dict[str, str]], None],
        renew: Renew | None,
        studies: Callable[[Connection], None] | None,
        models: Callable[[Connection], None] | None,
        renewed: Callable[[], None],
        note: Callable[[str, Mapping[str, Any]], object],
        logs: Logs,
        clock: Callable[[], float],
    ) -> None:
        self._home, self._lock, self._hand, self._connect, self._clock = home, lock, hand, connect, clock
        self._paused, self._kept, self._put, self._ends = paused, kept, put, ended
        self._renew, self._renewed, self._note = renew, renewed, note
        self._logs = logs
        self._studies, self._number = studies, -1
        self._models, self._model_number, self._models_at = models, "", -MODELS_EVERY
        self.inbox = Inbox(home, seen, connect, hand.has, clock)
        self.link = Link(f"{home.config.host}:{home.config.port}", clock)
        self._connection: Connection | None = None
        self._ended, self._wake = threading.Event(), threading.Event()
        self._dropping, self._dropped, self._tried = Backoff(), 0, -RENEWING
        self._thread = threading.Thread(target=self._loop, name="polls", daemon=True)

    def start(self) -> None:
        """Begin to poll."""
        self._thread.start()

    def nudge(self) -> None:
        """Break the open poll, so that the next one tells the server what is new."""
        self._wake.set()
        if self._connection is not None:
            self._connection.interrupt()

    def end(self) -> None:
        """Poll no more; returns at once."""
        self._ended.set()
        self.nudge()

    def join(self, seconds: float) -> None:
        """Wait until the thread has ended, at most so long."""
        if self._thread.is_alive():
            self._thread.join(seconds)

    def _loop(self) -> None:
        while not self._ended.is_set():
            wait = 0.0
            try:
                self._poll()
                self._dropping.reset()
                self._dropped = 0
            except Dropped as error:
                wait = self._note_dropped(error)
            except Exception as error:  # noqa: BLE001 - whatever comes from outside, the agent goes on
                wait = self._note_lost(error)
            if wait:
                self._wake.wait(wait)
            self._wake.clear()
        if self._connection is not None:
            self._connection.close()

    def _poll(self) -> None:
        """One question to the server; a new connection first asks for trust statement and epoch, which come soon."""
        if self._connection is None:
            self._connection = self._connect()
            self.inbox.refresh_trust(self._connection)
            self.inbox.refresh_epoch(self._connection)
            self._greet(self._connection)
            self.link.connected()
            self._number = -1  # what the server has seen of this site's decisions is asked anew
        kept, nonce = self._kept(), secrets.token_hex(32)
        question = {"format": wire.FORMAT, "have": self._hand.nonces(), "paused": self._paused()}
        before = self._logs.server()
        question |= {"runs": kept, "nonce": nonce, "heads": self._logs.show(nonce)}
        if self._studies is not None:
            question["studies"] = self._number
        reply = self._connection.request("POST", wire.POLL, question)
        said = reply.header(wire.SHOWN)
        try:
            self._compare(unpacked(said) if said else None, nonce, before)
        except IntegrityError:
            reply.close()
            raise
        self.link.connected()
        notice = reply.header(wire.NOTICE).split()
        if reply.status == 200 and wire.RUNS in notice:
            self._ends(self.inbox.endings(reply, nonce, kept))
        elif reply.status == 200:
            taken = self.inbox.take(reply)
            self._hand.take(taken)
            self._put(taken)
        else:
            reply.read(1)  # there is no body, and the connection is then free
            self._logs.keep()
        self._follow(notice)

    def _greet(self, connection: Connection) -> None:
        """See where the server's log ends, and what it knows of ours, before it is shown or asked anything."""
        nonce, before = secrets.token_hex(32), self._logs.server()
        question = {"format": wire.FORMAT, "heads": self._logs.show(nonce, greeting=True), "nonce": nonce}
        try:
            reply = connection.request("POST", wire.HEADS, question).document(MAX_HEADS)
            self._compare(wire.field(reply, "heads", dict), nonce, before)
        except StatusError as error:
            if error.status != 404:
                raise
            self._compare(None, nonce, before)  # a server of a version that keeps no audit log
        self._logs.keep()

    def _compare(self, document: dict[str, Any] | None, nonce: str, before: Head | None) -> None:
        said = None
        if document is not None:
            said = self.inbox.trusted(lambda trust: self._logs.read(document, trust))
        self._logs.take(document or {}, said, nonce, before)

    def _follow(self, notice: list[str]) -> None:
        """Do what the server's notice says; a certificate is renewed without it too, when it is time."""
        assert self._connection is not None
        serials = [word[6:] for word in notice if word.startswith("trust=") and word[6:].isdecimal()]
        if any(int(serial) > self.inbox.serial for serial in serials):
            self.inbox.refresh_trust(self._connection)
        numbers = [int(word[8:]) for word in notice if word.startswith("studies=") and word[8:].isdecimal()]
        if self._studies is not None and numbers and numbers[-1] != self._number:
            self._studies(self._connection)
            self._number = numbers[-1]
        self._follow_models([word for word in notice if word.startswith("models=")])
        due = "renew" in notice or self._home.renewal_due(self._clock())
        if self._renew is not None and due and time.monotonic() - self._tried > RENEWING:
            self._tried = time.monotonic()
            self._renew(self._home, self._lock, self._connection)
            _log.info("the certificate is renewed")
            self._connect.forget()
            self._renewed()
            self._connection.close()
            self._connection = None

    def _follow_models(self, words: list[str]) -> None:
        """Ask about the models that are used here where something has changed, or it is long since."""
        assert self._connection is not None
        late = time.monotonic() - self._models_at > MODELS_EVERY
        if self._models is not None and words and (words[-1] != self._model_number or late):
            self._models(self._connection)
            self._model_number, self._models_at = words[-1], time.monotonic()

    def _note_dropped(self, error: Dropped) -> float:
        """Log the first, second, fourth ... of frames that are dropped in a row; how long to wait before the next."""
        if error.nonce:
            self._hand.close(error.nonce)
        self._dropped += 1
        if self._dropped & (self._dropped - 1) == 0:
            times = f" ({self._dropped} times in a row)" if self._dropped > 1 else ""
            _log.warning("an instruction is dropped: %s%s", error, times)
            try:
                self._note("dropped", {"why": str(error)[:LONGEST], "times": self._dropped})
            except ConsortiumError as unwritten:  # nothing was done that the log would have to tell of
                _log.error("%s", unwritten)
        return self._dropping.next()

    def _note_lost(self, error: Exception) -> float:
        """The connection is no more; how long to wait before the next."""
        connection, self._connection = self._connection, None
        self._connect.forget()
        if connection is not None:
            connection.close()
        if self._ended.is_set() or self._wake.is_set():
            return 0.0  # we broke it ourselves
        if not isinstance(error, ConsortiumError | OSError):
            _log.error("a fault of this program", exc_info=error)
        return self.link.lost(error)
