"""A founded federation whose enrolment and site doors are open on loopback, without runs: real TLS, real SQLite."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from consortium.protocol.joincode import JoinCode
from consortium.server.approvals import Approvals
from consortium.server.archive import Archive
from consortium.server.audit import open_audit
from consortium.server.enrolment import Enrolment
from consortium.server.exchange import Exchange
from consortium.server.federation import Federation
from consortium.server.heads import SiteLogs
from consortium.server.listener import Caps, Listener, Request, Response
from consortium.server.roster import Roster
from consortium.server.site_door import SiteDoor
from consortium.server.store import Store

HOST = "127.0.0.1"
Wrap = Callable[[Callable[[Request], Response]], Callable[[Request], Response]]


@dataclass
class Clock:
    """Seconds since the epoch; may be moved ahead."""

    ahead: float = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


@dataclass
class Doors:
    """The parts of a running server that have to do with who belongs to it."""

    federation: Federation
    store: Store
    roster: Roster
    site: Listener
    enrolment: Listener
    clock: Clock = field(default_factory=Clock)
    logs: SiteLogs | None = None

    def code(self, site: str, seconds: float = 3600.0) -> str:
        """Invite a site; its join code."""
        return self.code_with(site, self.roster.invite(site, seconds)[0])

    def code_with(self, site: str, secret: str, root: str = "") -> str:
        """A code of this federation's doors with any secret."""
        name, pinned = self.federation.config.name, root or self.federation.root_fingerprint
        return JoinCode(name, site, HOST, self.site.port, self.enrolment.port, pinned, secret).text()

    def certificates(self) -> int:
        """How many certificates were handed out."""
        return len(self.store.rows("SELECT 1 FROM certificates"))


def found(folder: Path, name: str = "lung", now: float | None = None) -> Federation:
    """A new federation on loopback."""
    return Federation.init(
        folder, name=name, host=HOST, port=0, admin_port=0, enrol_port=0, bind=HOST, now=now or time.time()
    )


@contextmanager
def open_doors(
    folder: Path, name: str = "lung", wrap: Wrap = lambda handler: handler, log: bool = False
) -> Iterator[Doors]:
    """Found a federation in `folder` and open its doors. wrap: goes around the enrolment door's handler. log: whether
    there is an audit log, and heads of logs are exchanged."""
    federation, clock = found(folder, name), Clock()
    store = Store(folder / "consortium.db")
    roster = Roster(store, clock)
    archive = Archive(store, folder / "checkpoints")
    exchange = Exchange(lambda header: b"", folder / "spool", roster.is_member)
    approvals = Approvals(store, roster, name, clock)
    logs = None
    if log:
        own = open_audit(federation)
        logs = SiteLogs(store, federation, own, approvals, own.note)
    site_door = SiteDoor(federation, roster, archive, exchange, approvals, logs)
    site = Listener(HOST, 0, federation.site_context, site_door.handle, Caps(), roster.admit)
    enrolment = Listener(HOST, 0, federation.open_context, wrap(Enrolment(federation, roster).handle), Caps())
    site.start()
    enrolment.start()
    try:
        yield Doors(federation, store, roster, site, enrolment, clock, logs)
    finally:
        site.stop(1.0)
        enrolment.stop(1.0)
        store.close()
