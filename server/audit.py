"""The server's audit log: what is noted, and how it keeps up with the database.

What people and sites do is noted within the transaction that does it, durably and before it counts. What a run does
stands in the database's events, written with its commits; the log takes each event over once, in order, and after a
crash those that it lacks, so a commit costs no second trip to the disk. What sites are asked is in the log before it is
offered, and on the disk before anything that comes of it is committed.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from consortium.protocol import audit, chain, trust
from consortium.protocol.audit import FOLDER, Audit, name_at_server
from consortium.protocol.chain import Head
from consortium.protocol.errors import ConsortiumError, IntegrityError
from consortium.server.archive import Archive
from consortium.server.federation import Federation
from consortium.server.offers import Offer

Note = Callable[[str, Mapping[str, Any]], object]
"""Writes an entry: its kind and its body; it is durable when it returns."""
MOST_SITES = 400
"""Sites whose instructions stand in one entry."""
MOST_REASONS = 64
"""Different reasons for which doors refuse, within `COUNTED` seconds."""
COUNTED = 60.0
"""Seconds over which refusals are counted before they are noted."""
BEGUN, KEYS, STARTED = "begun", "keys", "started"

_log = logging.getLogger(__name__)


def open_audit(federation: Federation, clock: Callable[[], float] = time.time) -> Audit:
    """The log of a server's folder. A new one begins with the keys that sign it, as the root states them."""
    found = Audit(
        federation.folder / FOLDER,
        name_at_server(federation.config.name, federation.root_fingerprint),
        lambda: federation.instruction_key,
        lambda: _trust(federation).keys,
        clock,
    )
    if not found.head.sequence:
        about = {"federation": federation.config.name, "version": version("consortium")}
        found.note(BEGUN, {**about, "epoch": federation.epoch, "trust": federation.trust()})
    return found


def _trust(federation: Federation) -> trust.Trust:
    return trust.verified(federation.trust(), federation.root, federation.config.name)


class Keeper:
    """The log of a running server. For any number of threads. archive: whose events it takes over."""

    def __init__(
        self, federation: Federation, archive: Archive, clock: Callable[[], float] = time.time
    ) -> None:
        self.log = open_audit(federation, clock)
        self._federation, self._archive = federation, archive
        self.site_head: Callable[[str], str] = lambda site: ""
        """Where a site's audit log ended when it answered last."""
        self._lock = threading.Lock()
        self._refused: dict[tuple[str, str], int] = {}
        self._since = time.monotonic()
        self._wanted, self._ended = threading.Event(), False
        last = self._last()
        self._event = int(last.get("event", 0))
        if int(last.get("serial", 0)) != federation.trust_serial:
            self.keys()
        if int(last.get("epoch", 0)) != federation.epoch:
            self._event = self._newest()  # what came after the backup was lost with its database
            self.log.note("restored", {"epoch": federation.epoch, "event": self._event})
        threading.Thread(target=self._flushing, name="audit", daemon=True).start()

    def start(self) -> None:
        """The server starts: what the log lacks of the database comes first."""
        self.follow()
        about = {"version": version("consortium"), "epoch": self._federation.epoch, "event": self._event}
        self.log.note(STARTED, {**about, "serial": self._federation.trust_serial})

    def stop(self) -> None:
        """The server ends."""
        self.follow()
        try:
            self.count()
            self.log.note("stopped", {})
        except ConsortiumError as error:  # a full disk must not keep a server from its end
            _log.error("%s", error)
        self._ended = True
        self._wanted.set()

    def note(self, kind: str, body: Mapping[str, Any]) -> Head:
        """Write an entry; it is durable when this returns."""
        return self.log.note(kind, body)

    def keys(self) -> None:
        """The keys that sign have changed: say so as the root does."""
        serial = self._federation.trust_serial
        self.log.note(KEYS, {"trust": self._federation.trust(), "serial": serial})

    def flush(self) -> None:
        """What was asked, and every event, is on the disk when this returns."""
        self.log.flush()

    def follow(self) -> None:
        """Take over the events that the log lacks. What cannot be written now comes later, and nothing is asked until
        then."""
        with self._lock:
            try:
                for row in self._archive.store.rows(
                    "SELECT id, run, at, document FROM events WHERE id > ? ORDER BY id", self._event
                ):
                    document = json.loads(row["document"])
                    kind = str(document.pop("kind"))
                    body = {"run": row["run"], "event": row["id"], "happened": row["at"], **document}
                    if kind == "round":
                        body["heads"] = {site: self.site_head(site) for site in document.get("admitted", ())}
                    self.log.note(kind, body, durable=False)
                    self._event = int(row["id"])
            except ConsortiumError as error:
                _log.error("%s", error)

    def asked(self, run: str, offers: Sequence[Offer]) -> None:
        """A run is about to ask sites: what, and the signature that each gets.

        Raises:
            ConsortiumError: it cannot be written; then nothing may be asked.
        """
        self.follow()
        for start in range(0, len(offers), MOST_SITES):
            some = offers[start : start + MOST_SITES]
            self.log.note("asked", instructions(run, some), durable=False)
        self._wanted.set()

    def refused(self, door: str, why: str) -> None:
        """A door has refused somebody: it is counted, so that nobody can fill the log."""
        with self._lock:
            key = (door, why)
            if key not in self._refused and len(self._refused) >= MOST_REASONS:
                key = (door, "other")
            self._refused[key] = self._refused.get(key, 0) + 1

    def keep_house(self) -> None:
        """Note what was counted, when it is time, and flush."""
        if time.monotonic() - self._since > COUNTED:
            self.count()
        self.flush()

    def count(self) -> None:
        """Note what was counted."""
        with self._lock:
            counted, self._refused = self._refused, {}
            seconds, self._since = time.monotonic() - self._since, time.monotonic()
        for (door, why), times in sorted(counted.items()):
            about = {"door": door, "why": why, "times": times, "within": round(seconds, 1)}
            self.log.note("refused", about, durable=False)

    def _flushing(self) -> None:
        """What was asked reaches the disk while the sites work."""
        while self._wanted.wait() and not self._ended:
            self._wanted.clear()
            try:
                self.log.flush()
            except ConsortiumError as error:
                _log.error("%s", error)  # the next commit says so again

    def _last(self) -> dict[str, Any]:
        """The last event that was taken over, the last serial of the keys, and the last epoch."""
        found: dict[str, Any] = {}
        for entry in self.log.backwards():
            body = entry.body
            if "event" in body:
                found.setdefault("event", body["event"])
            if "serial" in body:
                found.setdefault("serial", body["serial"])
            if entry.kind in (BEGUN, "restored", STARTED):
                found.setdefault("epoch", body["epoch"])
            if entry.kind == BEGUN:
                found.setdefault("serial", _serial(body["trust"]))
            if len(found) == 3:
                break
        return found

    def _newest(self) -> int:
        row = self._archive.store.row("SELECT COALESCE(MAX(id), 0) AS id FROM events")
        return int(row["id"]) if row is not None else 0


def instructions(run: str, offers: Sequence[Offer]) -> dict[str, Any]:
    """What sites are asked, so that each signed header can be made of it again: `instruction` is what they have in
    common, and by site stand its nonce, the last round in which it counted, and the signature (hex)."""
    common: dict[str, Any] = {}
    sites = {}
    for offer in offers:
        common = json.loads(offer.header)
        fields = common["fields"]
        own = {name: fields.pop(name) for name in ("nonce", "admitted", "site")}
        sites[offer.site] = [own["nonce"], own["admitted"], offer.signature.hex()]
    return {"run": run, "instruction": common, "sites": sites}


def _serial(document: Mapping[str, Any]) -> int:
    return int(json.loads(document["statement"])["serial"])


# Checking


def keys_in(folder: Path, federation: Federation) -> list[trust.Trust]:
    """Every statement of keys in a log that the root signed, in order."""
    found = []
    for path in audit.segments(folder):
        for line in path.read_bytes().splitlines():
            if b'"trust":' not in line:
                continue
            try:
                document = json.loads(line)["body"]["trust"]
                found.append(trust.verified(document, federation.root, federation.config.name))
            except (ValueError, KeyError, TypeError, IntegrityError):
                continue  # `verify` names a line that is not as it was written
    return found


def restores(federation: Federation) -> dict[int, int]:
    """By epoch, the entry with which it began in the log."""
    name = name_at_server(federation.config.name, federation.root_fingerprint)
    found = chain.entries(audit.segments(federation.folder / FOLDER), name)
    return {int(one.body["epoch"]): one.sequence for one in found if one.kind == "restored"}


def verify(federation: Federation, witnessed: Sequence[Head] = ()) -> Head:
    """The head of a server's log, once everything was checked, also against the heads that sites have countersigned.

    Raises:
        IntegrityError: naming the entry that is not as it was written, or is missing.
    """
    folder = federation.folder / FOLDER
    statements = keys_in(folder, federation)
    now = _trust(federation)
    head = audit.verify(
        folder,
        name_at_server(federation.config.name, federation.root_fingerprint),
        now.keys,
        witnessed,
        _every(statements),
    )
    last = max((one.serial for one in statements), default=0)
    if head.sequence and last != now.serial:
        raise IntegrityError(
            f"{folder}: entry {head.sequence + 1} is missing: the log knows the keys up to serial {last}, and serial "
            f"{now.serial} signs now: it was cut, or the server was not started since"
        )
    return head


def _every(statements: Sequence[trust.Trust]) -> list[Ed25519PublicKey]:
    return [key for one in statements for key in one.keys]
