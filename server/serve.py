"""The server of a federation, assembled: three doors, the roster, and the runs.

site door    9440   TLS 1.3, a client certificate of a site on the roster
enrolment    9442   open only while an invitation is outstanding
admin door   9441   loopback, tokens with roles
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from consortium.protocol.errors import ConsortiumError, InputError
from consortium.protocol.joincode import JoinCode
from consortium.protocol.keys import Lock
from consortium.protocol.memory import one_heap
from consortium.protocol.signing import INSTRUCTION, sign
from consortium.server.admin_door import AdminDoor
from consortium.server.approvals import Approvals
from consortium.server.archive import Archive
from consortium.server.audit import Keeper
from consortium.server.enrolment import Enrolment
from consortium.server.exchange import Exchange
from consortium.server.federation import CHECKPOINTS, CONFIG, Federation
from consortium.server.gating import MARGIN, Gates
from consortium.server.heads import SiteLogs
from consortium.server.kept_answers import KeptAnswers
from consortium.server.listener import Caps, Listener
from consortium.server.roster import Roster
from consortium.server.runs import Runs
from consortium.server.site_door import SiteDoor
from consortium.server.store import Store
from consortium.server.strangers import Strangers
from consortium.server.study_ledger import StudyLedger

HOUSEKEEPING = 5.0
"""Seconds between two looks at what expires."""
ENDING = 5.0
"""Seconds that requests under way have when the server ends."""
FREED = 1.0
"""Seconds that the enrolment door of before, which is closing, has to give its port back."""
ENROLMENT = Caps(pending=256, per_address=8, seconds=5.0, body_seconds=10.0)
ADMIN = Caps(pending=512, per_address=31, seconds=5.0, idle=60.0)

_log = logging.getLogger(__name__)


class Server:
    """One running server over the folder of its federation."""

    def __init__(self, federation: Federation) -> None:
        self.federation = federation
        folder = federation.folder
        self.store = Store(folder / "consortium.db")
        self.archive = Archive(self.store, folder / CHECKPOINTS, key=federation.data_key())
        self.audit = Keeper(federation, self.archive)
        self.archive.recorded, self.archive.told = self.audit.flush, self.audit.follow
        self.note, self.refused = self.audit.note, self.audit.refused
        ledger = StudyLedger(self.audit.log)
        self.archive.released, self.archive.published = ledger.note, ledger.spent
        self.archive.released_by = ledger.of_run
        self.roster = Roster(self.store, note=self.note)
        spool = folder / "spool"
        spool.mkdir(mode=0o700, exist_ok=True)
        self.exchange = Exchange(
            self._sign,
            spool,
            self.roster.is_member,
            members=self.roster.joined,
            asked=self.audit.asked,
            kept=KeptAnswers(spool, self.archive.key_of, self.roster.identity),
        )
        name = federation.config.name
        self.approvals = Approvals(self.store, self.roster, name, note=self.note)
        self.logs = SiteLogs(self.store, federation, self.audit.log, self.approvals, self.note)
        self.archive.kept_with, self.audit.site_head = self.logs.keep_with, self._site_head
        self.runs = Runs(self.archive, self.exchange, folder, name, seal=self._seal, approvals=self.approvals)
        self.gates = Gates(federation, self.archive, self.exchange, note=self.note)
        self._strangers = Strangers(self.roster.knows, folder)
        config = federation.config
        site_door = SiteDoor(
            federation, self.roster, self.archive, self.exchange, self.approvals, self.logs, self.note
        )
        self.site_door = Listener(
            config.bind, config.port, federation.site_context, site_door.handle, Caps(), self._admit
        )
        admin_door = AdminDoor(self, self.roster, self.archive, self.exchange, self.runs)
        self.admin_door = Listener(
            config.admin_bind, config.admin_port, federation.open_context, admin_door.handle, ADMIN, None
        )
        self._enrolment_handler = Enrolment(
            federation, self.roster, self._follow_invitations, refused=self.refused
        )
        self._enrolment: Listener | None = None
        self._shut = ""  # why the enrolment door, which is wanted, is not open
        self._lock = threading.RLock()
        self._ended = threading.Event()

    def start(self) -> None:
        """Open the doors, then take up unfinished runs. An enrolment port that is taken keeps nobody else from work.

        Raises:
            InputError: another port is taken.
        """
        self.audit.start()
        self.federation.renew_if_due(time.time())
        self.site_door.start()
        self.admin_door.start()
        self._try_to_follow()
        self.runs.take_up()
        threading.Thread(target=self._keep_house, name="housekeeping", daemon=True).start()

    def stop(self) -> None:
        """Close the doors and end the runs' processes; runs continue when the server is started again."""
        self._ended.set()
        self.runs.close()
        with self._lock:
            doors = [self.site_door, self.admin_door, *([self._enrolment] if self._enrolment else [])]
        for door in doors:
            door.stop(ENDING)
        self.audit.stop()
        with contextlib.suppress(ConsortiumError):  # said before: nothing can be written
            self.logs.keep()
        self.store.close()

    def _sign(self, header: bytes) -> bytes:
        return sign(self.federation.instruction_key, INSTRUCTION, header)

    def _seal(self, manifest: bytes) -> dict[str, Any]:
        self.note("sealed", {"manifest": hashlib.sha256(manifest).hexdigest()})
        return self.federation.seal(manifest)

    def _admit(self, der: bytes | None) -> str | None:
        site = self.roster.admit(der)
        if site is None:
            self.refused("site", "its certificate is not on the roster")
            self._strangers.refused(der)
        return site

    # What the admin door asks

    def status(self) -> dict[str, Any]:
        """One document about the server, its sites and its runs."""
        config = self.federation.config
        return {
            "federation": config.name,
            "version": version("consortium"),
            "root": self.federation.root_fingerprint,
            "doors": {
                "site": f"{config.bind}:{self.site_door.port}",
                "admin": f"{config.admin_bind}:{self.admin_door.port}",
                "enrolment": f"{config.bind}:{self._enrolment.port}" if self._enrolment else None,
            },
            "sites": [self._site(one) for one in self.roster.sites()],
            "runs": self.runs.list(),
        }

    def _site(self, one: dict[str, Any]) -> dict[str, Any]:
        presence = self.exchange.presence(one["name"])
        return one | {
            "connected": presence.connected,
            "paused": presence.paused,
            "seen": presence.since or None,
            "asked": self.exchange.open_for(one["name"]),
            "last_error": self._trouble(one) or self.runs.last_error(one["name"]),
        }

    def _trouble(self, one: dict[str, Any]) -> str:
        return self.logs.trouble(one["name"], one["identity"]) if one["status"] == "joined" else ""

    def _site_head(self, site: str) -> str:
        """Where a site's audit log ended when it answered last, "" where it has not said so."""
        identity = self.roster.identity(site)
        head = self.logs.head(site, identity) if identity else None
        return head.text if head is not None else ""

    def invite(self, site: str, hours: float) -> dict[str, Any]:
        """A one-time code for a site; the enrolment door opens for it.

        Raises:
            InputError: the enrolment door cannot be opened; then an earlier code of the site stays good.
        """
        config = self.federation.config
        with self._lock:
            try:
                self._open_enrolment()
            except InputError as error:
                raise InputError(
                    f"enrolment: {error} (enrol_port in {CONFIG}, then start the server again). No "
                    f"code was made and nothing has changed; afterwards type: consortium server invite {site}"
                ) from error
            try:
                secret, expires = self.roster.invite(site, hours * 3600)
            finally:
                self._follow_invitations()
        code = JoinCode(
            federation=config.name,
            site=site,
            host=config.host,
            port=self.site_door.port,
            enrol_port=self._enrolment_port(),
            root=self.federation.root_fingerprint,
            secret=secret,
        )
        return {"site": site, "code": code.text(), "expires": expires}

    def revoke(self, site: str) -> None:
        """Shut a site out at once: its certificates, its connections, what it is asked."""
        self.roster.revoke(site)
        self.exchange.drop(site, "was revoked")
        self.site_door.cut(site)
        self._follow_invitations()
        _log.info("site %s: revoked", site)

    def rotate(self, sites: bool) -> dict[str, Any]:
        """New server certificate, issuing authority and instruction key; or, for `sites`, new certificates there."""
        if sites:
            return {"renewing": self.roster.ask_renewal()}
        self.federation.rotate(time.time())
        self.audit.keys()
        return {"trust": self.federation.trust_serial}

    def gate(self, name: str, document: dict[str, Any]) -> dict[str, Any]:
        """Begin the gate of a registered version; how it stands."""
        margin, minimum = document.get("margin"), document.get("minimum")
        version = document.get("version")
        return asdict(self.gates.begin(name, version, MARGIN if margin is None else float(margin), minimum))

    def gated(self, name: str) -> dict[str, Any]:
        """How the last gate of a model stands."""
        return asdict(self.gates.stand(name))

    def _enrolment_port(self) -> int:
        with self._lock:
            return self._enrolment.port if self._enrolment else self.federation.config.enrol_port

    # Its own upkeep

    def _keep_house(self) -> None:
        advice = ""
        while not self._ended.wait(HOUSEKEEPING):
            try:
                before, advice = advice, self.federation.advice(time.time())
                if advice != before and advice:
                    _log.warning("%s", advice)
                self._try_to_follow()
                self.federation.renew_if_due(time.time())
                for run in self.archive.retire():
                    _log.info("run %s: finished long ago, its checkpoint is removed", run)
                for site in self.roster.expired():
                    self.site_door.cut(site)
                self.audit.keep_house()
                self.logs.keep()
            except ConsortiumError as error:
                _log.error("housekeeping: %s", error)

    def _try_to_follow(self) -> None:
        """As `_follow_invitations`; where the door cannot be opened that is said once, and tried again later."""
        before, self._shut = self._shut, ""
        try:
            self._follow_invitations()
        except InputError as error:
            self._shut = str(error)
            if self._shut != before:
                _log.error("enrolment door: %s; invited sites cannot join until then", error)

    def _open_enrolment(self) -> None:
        """Open the enrolment door where it is closed, by whoever holds the lock."""
        if self._enrolment is not None:
            return
        config, context = self.federation.config, self.federation.open_context
        handle = self._enrolment_handler.handle
        door = Listener(config.bind, config.enrol_port, context, handle, ENROLMENT, None)
        end = time.monotonic() + FREED
        while True:
            try:
                door.start()
                break
            except InputError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)
        self._enrolment = door
        _log.info("enrolment door: open on port %d", door.port)

    def _follow_invitations(self) -> None:
        """Open the enrolment door while an invitation is outstanding, and close it when none is."""
        with self._lock:
            wanted = self.roster.outstanding() and not self._ended.is_set()
            if wanted:
                self._open_enrolment()
            elif self._enrolment is not None:
                door, self._enrolment = self._enrolment, None
                # Not by the thread of the request that closed it: that one still answers.
                threading.Thread(target=door.stop, args=(ENDING,), daemon=True).start()
                _log.info("enrolment door: closed, no invitation is outstanding")


def serve(folder: Path, lock: Lock | None = None) -> None:
    """Run the server of a federation until SIGTERM or SIGINT.

    Raises:
        InputError: the folder holds none, another server runs over it, or a port is taken.
    """
    one_heap()
    federation = Federation.open(folder, lock)
    with _alone(folder):
        server = Server(federation)
        ended = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: ended.set())
        try:
            server.start()
            config = federation.config
            _log.info("federation %s: site door on %s:%d", config.name, config.bind, server.site_door.port)
            _log.info("admin door on %s:%d", config.admin_bind, server.admin_door.port)
            ended.wait()
            _log.info("ending")
        finally:
            server.stop()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other server runs over the same folder while the block lasts."""
    try:
        descriptor = os.open(folder / "server.lock", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConsortiumError(
            f"{folder}: cannot be written ({error.strerror}); is the disk full or read-only?"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise InputError(
            f"{folder}: a server runs over it already; see: consortium server status --dir {folder}"
        ) from error
    try:
        yield
    finally:
        os.close(descriptor)
