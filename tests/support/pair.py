"""Both sides of one site's logs, the real ones over a real database and folders; a test hands over what travels."""

from __future__ import annotations

import secrets
from pathlib import Path

from founded import Doors

from consortium.client import joining
from consortium.client.audit import site_audit
from consortium.client.charges import ledger_in
from consortium.client.heads import Logs
from consortium.client.home import Home
from consortium.protocol.audit import FOLDER
from consortium.protocol.heads import LEDGER
from consortium.server.approvals import Approvals
from consortium.server.audit import open_audit
from consortium.server.heads import SiteLogs

SITE = "alba"


class Pair:
    """A server's side and a site's, which may be closed, changed on disk, and opened again."""

    def __init__(self, doors: Doors, site: Path) -> None:
        self.doors, self.folder = doors, site
        self.home = joining.join(doors.code(SITE), site, proxy="").home
        self.epoch = 0
        self.start_site()
        self.start_server()

    @property
    def server_folder(self) -> Path:
        return self.doors.federation.folder / FOLDER

    def start_server(self) -> None:
        self.server = open_audit(self.doors.federation)
        approvals = Approvals(self.doors.store, self.doors.roster, "lung")
        self.logs = SiteLogs(
            self.doors.store, self.doors.federation, self.server, approvals, self.server.note
        )

    def start_site(self) -> None:
        self.home = Home(self.folder)
        lock = self.home.lock()
        key = self.home.identity(lock)
        self.site = site_audit(self.home, key)
        self.ledger = ledger_in(self.home, lock)
        self.mine = Logs(self.home, key, self.site, {LEDGER: self.ledger}, lambda: self.epoch)

    def say(self, greeting: bool = False) -> str:
        """One poll: the site's statement, and the server's; what the server finds wrong. Raises what the site does."""
        nonce, before = secrets.token_hex(32), self.mine.server()
        shown = self.mine.show(nonce, greeting)
        identity = self.doors.roster.identity(SITE)
        trouble = self.logs.take(SITE, identity, shown)
        said = self.logs.said(SITE, identity, nonce)
        self.mine.take(said, self.mine.read(said, self.home.trust()), nonce, before)
        self.mine.keep()
        self.logs.keep()
        return trouble

    def work(self, rounds: int = 3) -> None:
        for _ in range(rounds):
            self.site.note("answered", {})
            self.server.note("asked", {})
            assert self.say() == ""
