"""The roster: which sites belong to the federation, by which invitation, under which certificates; and the tokens.

    invited -> joined -> left or revoked -> invited -> ...

A site is let in by its certificate's fingerprint, which must stand here, so a stolen issuing key opens no door. All
changes are transactions of `server/store.py`: after a crash a site has joined, or it has not.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from consortium.protocol import wire
from consortium.protocol.errors import InputError, RefusedError
from consortium.protocol.joincode import SECRET_BYTES
from consortium.server.pki import Issued
from consortium.server.store import Store

NO_ENTRY = "the code was used, has expired, or is none of this federation; ask its admin for a new one"
"""One text for every reason, so that guessing teaches nothing."""
MOST_A_DAY = 24
"""Certificates that one site is given within a day."""

_KEPT_FOR = 30 * 86400.0  # seconds that an expired certificate stays listed
_INSERT = "INSERT INTO certificates (fingerprint, site, issued, expires) VALUES (?, ?, ?, ?)"


Note = Callable[[str, Mapping[str, Any]], object]


def unnoted(kind: str, body: Mapping[str, Any]) -> None:
    """Where nobody keeps an audit log."""


Issue = Callable[[str, float], Issued]
"""Makes a certificate for the name that it is given, at that time."""


class Member(NamedTuple):
    """A site that belongs to the federation now, and its identity key (hex)."""

    site: str
    identity: str


@dataclass(frozen=True)
class Joining:
    """What a site shows to join.

    secret: the code's, hex. identity: hex of its Ed25519 key. request: SHA-256 (hex) of what it asks for, so that the
    same request can be told from another.
    """

    site: str
    secret: str = field(repr=False)
    identity: str
    request: str


class Roster:
    """Sites, invitations, certificates and tokens in the server's database. For any number of threads.

    clock: seconds since the epoch. note: writes a change to the audit log before it counts; what it raises undoes it.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = time.time, note: Note = unnoted) -> None:
        self._store, self._clock, self._note = store, clock, note
        self._renewals: dict[str, float] = {}  # sites that were asked to renew, and when
        self._lock = threading.Lock()

    # Invitations

    def invite(self, site: str, seconds: float) -> tuple[str, float]:
        """A fresh secret (hex) with which `site` may join once, and when it expires. It replaces an earlier one.

        Raises:
            InputError: the name is none.
            RefusedError: the site has joined.
        """
        wire.site_name(site)
        secret, now = secrets.token_bytes(SECRET_BYTES).hex(), self._clock()
        with self._store.transaction() as db:
            row = db.execute("SELECT status FROM sites WHERE name = ?", (site,)).fetchone()
            if row is not None and row["status"] == "joined":
                raise RefusedError(
                    f"site '{site}' has joined already; to let it join anew, first type: "
                    f"consortium server revoke {site}"
                )
            db.execute(
                "INSERT INTO sites (name, status, identity, since) VALUES (?, 'invited', '', ?) "
                "ON CONFLICT (name) DO UPDATE SET status = 'invited', since = excluded.since",
                (site, now),
            )
            db.execute(
                "INSERT OR REPLACE INTO invitations (site, secret, expires, used_by, request, chain) "
                "VALUES (?, ?, ?, '', '', '')",
                (site, _digest(secret), now + seconds),
            )
            self._note("invited", {"site": site, "expires": now + seconds})
        return secret, now + seconds

    def invited(self, site: str, secret: str) -> bool:
        """Whether a secret (hex) is that of an invitation of `site` that has not expired. Digests are compared, in
        constant time; nothing is written."""
        sql = "SELECT secret FROM invitations WHERE site = ? AND expires > ?"
        row = self._store.row(sql, site, self._clock())
        known = str(row["secret"]) if row is not None else _digest("")
        return hmac.compare_digest(known, _digest(secret)) and row is not None

    def outstanding(self) -> bool:
        """Whether an invitation can be used now: then the enrolment door is open. One that was used counts until its
        site was let in at the site door, since the answer may have been lost on its way."""
        return self._store.row("SELECT 1 FROM invitations WHERE expires > ?", self._clock()) is not None

    def join(self, joining: Joining, issue: Issue) -> str:
        """Let a site in by its invitation, and give its certificate chain (PEM).

        The very same request again gets the same chain, for a site whose connection broke. The name that `issue` is
        given is the invitation's.

        Raises:
            RefusedError: there is no such invitation, it was used or has expired, or the secret is not its; or the
                identity key is that of a site of another name.
        """
        now = self._clock()
        with self._store.transaction() as db:
            row = db.execute(
                "SELECT invitations.*, sites.status FROM invitations JOIN sites ON sites.name = invitations.site "
                "WHERE site = ?",
                (joining.site,),
            ).fetchone()
            known = row["secret"] if row is not None else _digest("")
            right = hmac.compare_digest(known, _digest(joining.secret)) and row is not None
            if right and row["used_by"] and _again(row, joining):
                return str(row["chain"])
            if not right or row["used_by"] or row["expires"] <= now or row["status"] != "invited":
                raise RefusedError(NO_ENTRY)
            site = str(row["site"])
            sql = "SELECT name FROM sites WHERE identity = ? AND name != ?"
            other = db.execute(sql, (joining.identity, site)).fetchone()
            if other is not None:  # who is left out, or revoked, by one name is not to come back by another
                raise RefusedError(
                    f"the identity key is that of site '{other['name']}'; join by a code for that name, or from a new "
                    "folder"
                )
            issued = issue(site, now)
            db.execute(
                "UPDATE invitations SET used_by = ?, request = ?, chain = ? WHERE site = ?",
                (joining.identity, joining.request, issued.chain, site),
            )
            db.execute(
                "UPDATE sites SET status = 'joined', identity = ?, since = ? WHERE name = ?",
                (joining.identity, now, site),
            )
            db.execute(_INSERT, (issued.fingerprint, site, issued.issued, issued.expires))
            about = {"site": site, "identity": joining.identity, "certificate": issued.fingerprint}
            self._note("joined", about)
        return issued.chain

    # Members

    def admit(self, der: bytes | None) -> str | None:
        """The site that a certificate (DER) of a TLS connection belongs to, or None: for the site door."""
        member = self.active_site(hashlib.sha256(der).hexdigest()) if der else None
        if member is None:
            return None
        self._arrived(member.site)
        return member.site

    def _arrived(self, site: str) -> None:
        """The site has its certificate, so the invitation that gave it is over."""
        sql = "SELECT 1 FROM invitations WHERE site = ? AND used_by != '' AND expires > ?"
        if self._store.row(sql, site, now := self._clock()):
            with self._store.transaction() as db:
                sql = "UPDATE invitations SET expires = ? WHERE site = ? AND used_by != ''"
                db.execute(sql, (now, site))

    def active_site(self, fingerprint: str) -> Member | None:
        """The site whose certificate has this SHA-256 (hex of the DER); None where it is unknown, revoked or expired,
        or the site does not belong to the federation."""
        row = self._store.row(
            "SELECT sites.name, sites.identity FROM certificates JOIN sites ON sites.name = certificates.site "
            "WHERE fingerprint = ? AND revoked IS NULL AND expires > ? AND status = 'joined'",
            fingerprint,
            self._clock(),
        )
        return Member(row["name"], row["identity"]) if row else None

    def knows(self, fingerprint: str) -> bool:
        """Whether a certificate of this SHA-256 (hex of the DER) was issued, valid still or not."""
        return self._store.row("SELECT 1 FROM certificates WHERE fingerprint = ?", fingerprint) is not None

    def is_member(self, site: str) -> bool:
        """Whether a site belongs to the federation now."""
        return bool(self.identity(site))

    def identity(self, site: str) -> str:
        """The identity key (hex) of a site that has joined, or ""."""
        row = self._store.row("SELECT identity FROM sites WHERE name = ? AND status = 'joined'", site)
        return str(row["identity"]) if row else ""

    def joined(self) -> list[str]:
        """Names of the sites that belong to the federation, sorted."""
        return [str(row["name"]) for row in self._joined()]

    def sites(self) -> list[dict[str, Any]]:
        """All sites in name order: name, status, identity, since, certificate_expires (None where it has none)."""
        rows = self._store.rows(
            "SELECT name, status, identity, since, (SELECT max(expires) FROM certificates "
            "WHERE site = name AND revoked IS NULL) AS certificate_expires FROM sites ORDER BY name"
        )
        return [dict(row) for row in rows]

    def renew(self, site: str, issue: Issue) -> str:
        """Another certificate chain (PEM) for a site; the one before stays valid until it expires.

        Raises:
            RefusedError: the site does not belong to the federation, or had very many today.
        """
        now = self._clock()
        with self._store.transaction() as db:
            row = db.execute("SELECT status FROM sites WHERE name = ?", (site,)).fetchone()
            if row is None or row["status"] != "joined":
                raise RefusedError(f"site '{site}' does not belong to the federation")
            since = (site, now - 86400.0)
            many = db.execute(
                "SELECT count(*) FROM certificates WHERE site = ? AND issued > ?", since
            ).fetchone()[0]
            if many >= MOST_A_DAY:
                raise RefusedError(f"site '{site}' was given {many} certificates within a day; try tomorrow")
            issued = issue(site, now)
            db.execute(_INSERT, (issued.fingerprint, site, issued.issued, issued.expires))
            db.execute("DELETE FROM certificates WHERE expires < ?", (now - _KEPT_FOR,))
            self._note("renewed", {"site": site, "certificate": issued.fingerprint})
        return issued.chain

    def renewal_due(self, site: str) -> bool:
        """Whether a site should renew: its newest certificate is two thirds over, or older than `ask_renewal`."""
        row = self._store.row(
            "SELECT issued, expires FROM certificates WHERE site = ? AND revoked IS NULL "
            "ORDER BY issued DESC, expires DESC LIMIT 1",
            site,
        )
        if row is None:
            return False
        with self._lock:
            asked = self._renewals.get(site, 0.0)
        return bool(
            row["issued"] < asked or self._clock() >= row["issued"] + (row["expires"] - row["issued"]) * 2 / 3
        )

    def ask_renewal(self) -> list[str]:
        """Want a new certificate of every site; the names of those that are asked. Forgotten when the server ends."""
        names = [str(row["name"]) for row in self._joined()]
        with self._lock:
            self._renewals |= dict.fromkeys(names, self._clock())
        return names

    def expired(self) -> list[str]:
        """Sites that have joined, but whose every certificate has expired: their connections must end."""
        rows = self._store.rows(
            "SELECT name FROM sites WHERE status = 'joined' AND NOT EXISTS (SELECT 1 FROM certificates "
            "WHERE site = name AND revoked IS NULL AND expires > ?) ORDER BY name",
            self._clock(),
        )
        return [str(row["name"]) for row in rows]

    def leave(self, site: str) -> None:
        """A site that has joined leaves by its own will: its certificates end. Again changes nothing.

        Raises:
            InputError: there is no such site.
        """
        self._end(site, "left", ("joined",))

    def revoke(self, site: str) -> None:
        """Shut a site out: its certificates and an open invitation end. Again changes nothing.

        Raises:
            InputError: there is no such site.
        """
        self._end(site, "revoked", ("invited", "joined", "left"))

    def _end(self, site: str, status: str, before: tuple[str, ...]) -> None:
        now = self._clock()
        with self._store.transaction() as db:
            row = db.execute("SELECT status FROM sites WHERE name = ?", (site,)).fetchone()
            if row is None:
                raise InputError(f"there is no site '{site[:80]}'; type: consortium server sites")
            if row["status"] not in before:
                return
            db.execute("UPDATE sites SET status = ?, since = ? WHERE name = ?", (status, now, site))
            db.execute("UPDATE certificates SET revoked = ? WHERE site = ? AND revoked IS NULL", (now, site))
            db.execute("DELETE FROM invitations WHERE site = ?", (site,))
            self._note(status, {"site": site})

    def _joined(self) -> list[Any]:
        return list(self._store.rows("SELECT name FROM sites WHERE status = 'joined' ORDER BY name"))

    # Tokens of the admin door

    def new_token(self, name: str, role: str) -> str:
        """A token for a person or script, kept here by its digest alone; it replaces an earlier one of that name."""
        token = secrets.token_urlsafe(32)
        with self._store.transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO tokens (name, role, digest, created) VALUES (?, ?, ?, ?)",
                (name, role, _digest(token), self._clock()),
            )
            self._note("token", {"name": name, "role": role})
        return token

    def role_of(self, token: str) -> tuple[str, str] | None:
        """Name and role of a token, or None. Every known digest is compared, each in constant time."""
        wanted, found = _digest(token), None
        for row in self._store.rows("SELECT name, role, digest FROM tokens"):
            if hmac.compare_digest(row["digest"], wanted):
                found = (str(row["name"]), str(row["role"]))
        return found


def _again(row: Any, joining: Joining) -> bool:
    """Whether a joining is the one that used the invitation, and the site has not left since."""
    same = row["used_by"] == joining.identity and row["request"] == joining.request
    return bool(same and row["status"] == "joined")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
