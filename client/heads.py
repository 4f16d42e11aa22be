"""What this site tells the server of its logs, and whether the server's word of its own, and of ours, holds.

The server's last statement stands in the entry of every instruction, so it is durable before anything leaves; and in
`heads.json`, for whoever checks without the server.
"""

from __future__ import annotations

import json
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from consortium.client.approvals import Approvals
from consortium.client.home import Home
from consortium.protocol import heads, wire
from consortium.protocol.audit import Audit
from consortium.protocol.chain import Head
from consortium.protocol.connection import StatusError, UnreachableError
from consortium.protocol.errors import ConsortiumError, IntegrityError
from consortium.protocol.files import write_private
from consortium.protocol.heads import AUDIT, Shown
from consortium.protocol.keys import Lock
from consortium.protocol.trust import Trust

_log = logging.getLogger(__name__)


class Log(Protocol):
    """A log of the site's."""

    @property
    def head(self) -> Head: ...
    def contains(self, head: Head) -> bool: ...


class Decisions:
    """The site's decisions as a log."""

    def __init__(self, approvals: Approvals, key: Ed25519PrivateKey) -> None:
        self._approvals, self._key = approvals, key.public_key()

    @property
    def head(self) -> Head:
        found = self._approvals.entries(self._key)
        return found[-1].head if found else Head(0, "0" * 64)

    def contains(self, head: Head) -> bool:
        return any(one.head == head for one in self._approvals.entries(self._key))


class Logs:
    """For any number of threads. logs: the site's, by name; epoch: the server's, as it was seen last."""

    def __init__(
        self,
        home: Home,
        key: Ed25519PrivateKey,
        audit: Audit,
        others: Mapping[str, Log],
        epoch: Callable[[], int],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._home, self._key, self._audit, self._epoch, self._clock = home, key, audit, epoch, clock
        self._logs: dict[str, Log] = {AUDIT: audit, **others}
        self._lock = threading.Lock()
        self._lacks: tuple[str, ...] = ()
        self._sound: dict[str, Head] = {}
        self.statement: Mapping[str, Any] = {}
        """The server's last one, as it signed it."""
        self._seen: tuple[int, Head] | None = None  # the epoch, and the server's head in it
        self._kept: Mapping[str, Any] = {}
        self._told = ""
        self._load()

    def show(self, nonce: str, greeting: bool = False) -> dict[str, str]:
        """This site's statement of now. A greeting holds no head of ours: first the server says what it has seen, so
        that an older copy which has grown since is not taken for a continuation.
        """
        config = self._home.config
        with self._lock:
            seen = self._server()
            shown = Shown(
                "site", config.federation, config.site, nonce, self._clock(), self._epoch(),
                {} if greeting else {name: log.head for name, log in self._logs.items()},
                {AUDIT: seen} if seen is not None else {},
                self._lacks,
            )  # fmt: skip
        return heads.state(self._key, shown)

    def server(self) -> Head | None:
        """The server's highest head that was seen in the epoch of now."""
        with self._lock:
            return self._server()

    def read(self, document: Mapping[str, Any], trust: Trust) -> Shown:
        """What the server says. Raises IntegrityError where it is not signed by a key of the statement of keys."""
        config = self._home.config
        return heads.verified(document, trust.keys, "server", config.federation, config.site)

    def take(self, document: Mapping[str, Any], said: Shown | None, nonce: str, before: Head | None) -> None:
        """Take the server's statement of a reply. said: as `read` gave it, None where the server made none.

        before: its highest head that was seen when the request went out.

        Raises:
            IntegrityError: it is not for this request; the server's log was rolled back or forked; or the server has
                seen of a log of this site what is not in it. Nothing may be done for the server then.
        """
        try:
            self._check(document, said, nonce, before)
        except IntegrityError as error:
            if str(error) != self._told:
                try:
                    self._audit.note("refused to go on", {"why": str(error), "server": dict(document)})
                    self._told = str(error)
                except ConsortiumError as unwritten:  # the reason why nothing is done counts more
                    _log.error("%s", unwritten)
            raise
        self._told = ""

    def _check(
        self, document: Mapping[str, Any], said: Shown | None, nonce: str, before: Head | None
    ) -> None:
        if said is None:
            if before is not None:
                raise IntegrityError(
                    f"the server does not say any more where its audit log ends; this site has seen entry "
                    f"{before.sequence}. Was an older version or copy of it started? Ask its admin"
                )
            return
        if said.nonce != nonce or said.epoch != self._epoch():
            raise IntegrityError("the server's statement of its logs is none for this request")
        self._lacks = tuple(name for name, head in said.seen.items() if not self._has(name, head))
        if self._lacks:
            numbers = ", ".join(f"entry {said.seen[name].sequence} of the {name} log" for name in self._lacks)
            raise IntegrityError(
                f"{self._home.folder}: the server has seen {numbers}, which is not here: an older copy of this folder "
                "was put back, or a log was rewritten. Nothing is done until the newest copy is back in its place; "
                f"where that is lost, end the agent and type: consortium client restore --dir {self._home.folder}"
            )
        head = said.heads.get(AUDIT)
        if head is None:
            raise IntegrityError("the server does not say where its audit log ends")
        with self._lock:
            known = self._server()
            why = heads.behind(before, head)
            if not why and known is not None and known.sequence == head.sequence:
                why = heads.behind(known, head)
            if not why and said.lacks and known is not None:
                why = f"the server itself lacks entry {known.sequence}, which it has shown"
            if why:
                raise IntegrityError(
                    f"the server's audit log: {why}. Nothing is done for it; ask its admin to start the latest copy of "
                    "its folder, or to restore a backup (consortium server restore), which tells sites so"
                )
            if known is None or head.sequence >= known.sequence:
                self._seen, self.statement = (said.epoch, head), dict(document)

    def keep(self) -> None:
        """Keep the server's last statement in a file."""
        with self._lock:
            document = self.statement
        if document and document is not self._kept:
            write_private(self._home.heads_file, json.dumps(document).encode())
            self._kept = document

    def _server(self) -> Head | None:
        return self._seen[1] if self._seen is not None and self._seen[0] == self._epoch() else None

    def _has(self, name: str, head: Head) -> bool:
        log = self._logs.get(name)
        if log is None or head in (self._sound.get(name), log.head):
            return True
        if not log.contains(head):
            return False
        self._sound[name] = head
        return True

    def _load(self) -> None:
        """The server's highest head of before, from the log and the file."""
        for document in (_in_log(self._audit), _in_file(self._home)):
            if not document:
                continue
            fields = json.loads(document["statement"])
            found = int(fields["epoch"]), Head.parse(fields["heads"][AUDIT])
            if self._seen is None or (found[0], found[1].sequence) > (self._seen[0], self._seen[1].sequence):
                self._seen, self.statement = found, document


def _in_log(audit: Audit) -> dict[str, Any]:
    for entry in audit.backwards():
        if entry.kind != "refused to go on" and entry.body.get("server"):
            return dict(entry.body["server"])
    return {}


def statement_in(home: Home) -> dict[str, Any]:
    """The server's newest statement, as it signed it; empty where it made none.

    Raises:
        IntegrityError: what is kept is damaged.
    """
    return _in_file(home)


def _in_file(home: Home) -> dict[str, Any]:
    try:
        document = json.loads(home.heads_file.read_bytes())
        fields = json.loads(document["statement"])
        if int(fields["epoch"]) < 0 or not math.isfinite(float(fields["at"])):
            raise ValueError
        Head.parse(fields["heads"][AUDIT])
        return dict(document)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, IntegrityError) as error:
        raise IntegrityError(f"{home.heads_file}: is damaged; restore it from a backup") from error


@dataclass(frozen=True)
class Countersigned:
    """What the server has seen of this site's logs. asked: whether it said so now. earlier: heads of the audit log."""

    asked: bool
    seen: Mapping[str, Head]
    earlier: tuple[Head, ...] = ()


def countersigned(home: Home, lock: Lock) -> Countersigned:
    """What the server has seen, as it says now, or, where it cannot be reached, as it said last.

    Raises:
        IntegrityError: its word is not signed by it.
    """
    config, nonce = home.config, secrets.token_hex(32)
    empty = Shown("site", config.federation, config.site, nonce, time.time(), 0)
    question = {"format": wire.FORMAT, "heads": heads.state(home.identity(lock), empty), "nonce": nonce}
    try:
        connection = home.connection(lock, timeout=10.0)
        try:
            trust = home.accept_trust(connection.request("GET", wire.TRUST).document())
            reply = connection.request("POST", wire.HEADS, question).document(1 << 20)
        finally:
            connection.close()
    except UnreachableError:
        return Countersigned(False, witnessed(home))
    except StatusError as error:
        if error.status != 404:
            raise
        return Countersigned(False, witnessed(home))  # a server of a version that keeps no audit log
    said = heads.verified(
        wire.field(reply, "heads", dict), trust.keys, "server", config.federation, config.site
    )
    if said.nonce != nonce:
        raise IntegrityError("the server's statement of its logs is none for this request")
    earlier = tuple(Head.parse(str(one)) for one in wire.field(reply, "history", list))
    return Countersigned(True, said.seen, earlier)


def witnessed(home: Home) -> dict[str, Head]:
    """What the server countersigned last of this site's logs, as `heads.json` holds it.

    Raises:
        IntegrityError: it is damaged, or not signed by the server.
    """
    document, config = _in_file(home), home.config
    if not document:
        return {}
    return dict(heads.verified(document, home.trust().keys, "server", config.federation, config.site).seen)
