"""Where the logs of sites end, as each of them said: kept, countersigned, and compared with what was seen before.

The newest head of a site is durable with the commit that its answer led to, or within seconds. Beside it stands every
`APART`th, so that a log which was rewritten by the holder of its key is told where it begins to differ.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from consortium.privacy.ledger import ledger_name
from consortium.protocol import heads, site_epoch
from consortium.protocol.audit import Audit, name_at_site
from consortium.protocol.chain import Head, start_of
from consortium.protocol.errors import IntegrityError, RefusedError
from consortium.protocol.heads import APPROVALS, AUDIT, LEDGER, Shown
from consortium.protocol.signing import fingerprint, public_key
from consortium.protocol.site_epoch import Restored
from consortium.server import ledger_heads
from consortium.server.approvals import Approvals
from consortium.server.federation import Federation
from consortium.server.store import Store

APART = 64
NEWEST = -1
"""The place of a log's newest head; others have the number of their entry divided by `APART`."""
MOST_KEPT = 10_000
"""Heads of one log that are kept, the newest ones: a site that states ever higher ones fills no disk."""
MOST_SHOWN = 500
"""Heads that a site is given at once, the newest ones."""
_NONE = Head(0, "0" * 64)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Known:
    """Of one site. document: its newest statement, as it signed it. trouble: what was wrong with the last one."""

    head: Head | None = None
    at: float = 0.0
    document: Mapping[str, Any] = field(default_factory=dict)
    trouble: str = ""
    behind: bool = False  # whether the server's own log lacks what the site has seen


class SiteLogs:
    """For any number of threads. log: the server's own. note: writes to it."""

    def __init__(
        self,
        store: Store,
        federation: Federation,
        log: Audit,
        approvals: Approvals,
        note: Callable[[str, Mapping[str, Any]], object],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store, self._federation, self._log = store, federation, log
        self._approvals, self._note, self._clock = approvals, note, clock
        self._lock = (
            store.lock
        )  # the one lock: `keep_with` is called within a transaction, the others begin some
        self._known: dict[tuple[str, str], _Known] = {}
        self._unkept: dict[tuple[str, str], list[Head]] = {}

    def take(self, site: str, identity: str, document: Mapping[str, Any]) -> str:
        """Keep what a site says; why it cannot be trusted any more, or "".

        Raises:
            IntegrityError: the statement is not the site's.
        """
        name = self._federation.config.name
        shown = heads.verified(document, [public_key(identity)], "site", name, site)
        shown = replace(
            shown, at=min(shown.at, self._clock())
        )  # else a site could make its roll-back look overtaken
        lacks = self._lacks(site, shown)
        with self._lock:
            known = self._of(site, identity)
            trouble = self._trouble(shown, known, identity)
            if trouble and trouble != known.trouble:
                _log.error("site %s: %s", site, trouble)
                self._note("site distrusted", {"site": site, "why": trouble, "statement": dict(document)})
            head = shown.heads.get(AUDIT)
            if trouble or head is None or (known.head is not None and head < known.head):
                self._known[site, identity] = replace(known, trouble=trouble, behind=lacks)
                return trouble
            if head != known.head or not known.document:
                self._unkept.setdefault((site, identity), []).append(head)
            self._known[site, identity] = _Known(head, shown.at, dict(document), "", lacks)
            return ""

    def said(self, site: str, identity: str, nonce: str) -> dict[str, str]:
        """The server's own statement, for one request of a site."""
        federation = self._federation
        with self._lock:
            known = self._of(site, identity)
        seen = {APPROVALS: self._approvals.head(site), LEDGER: self._ledger(site, identity)}
        if known.head is not None:
            seen[AUDIT] = known.head
        shown = Shown(
            "server", federation.config.name, site, nonce, self._clock(), federation.epoch,
            {AUDIT: self._log.head}, {log: head for log, head in seen.items() if head.sequence},
            (AUDIT,) if known.behind else (),
        )  # fmt: skip
        return heads.state(federation.instruction_key, shown)

    def trouble(self, site: str, identity: str) -> str:
        """Why a site is not asked anything, or ""."""
        with self._lock:
            return self._of(site, identity).trouble

    def head(self, site: str, identity: str) -> Head | None:
        """The newest head of the site's audit log."""
        with self._lock:
            return self._of(site, identity).head

    def history(self, site: str, identity: str) -> list[str]:
        """Heads of the site's audit log that are kept, the newest first."""
        self.keep()
        sql = "SELECT sequence, hash FROM heads WHERE log = ? ORDER BY sequence DESC LIMIT ?"
        rows = self._store.rows(sql, self._name(site, identity), MOST_SHOWN)
        return [Head(row["sequence"], row["hash"]).text for row in rows]

    def restored(self, site: str, identity: str, document: Mapping[str, Any]) -> dict[str, str]:
        """A site's folder was restored, and its audit log goes on without what was lost. It is in the server's own log,
        with what was seen of the site before, when this returns; countersigned.

        Raises:
            IntegrityError: the site did not sign it, or it is not about what was seen of its log.
            RefusedError: the server's own log lacks what the site has seen, so it is in no place to agree.
        """
        name, log = self._federation.config.name, self._name(site, identity)
        one = site_epoch.verified(document, [public_key(identity)], name, site)
        with self._lock:
            self.keep()
            known = self._of(site, identity)
            if known.behind:
                raise RefusedError(
                    "the server's own audit log lacks what this site has seen of it; ask its admin to start the latest "
                    "copy of its folder first"
                )
            if known.head is None or one.lost != known.head:
                raise IntegrityError(
                    "the entry that is said to be lost is not the last one that the server has seen of this site"
                )
            if not self._shares(log, one):
                raise IntegrityError("the server has not seen the entry after which the log is said to go on")
            what = {"site": site, "lost": one.lost.text, "kept": one.kept.text, "now": one.now.text}
            self._note("site restored", {**what, "statement": dict(document)})
            with self._store.transaction() as db:
                db.execute("DELETE FROM heads WHERE log = ? AND sequence > ?", (log, one.kept.sequence))
                row = (log, NEWEST, one.now.sequence, one.now.hash)
                db.execute("INSERT OR REPLACE INTO heads VALUES (?, ?, ?, ?)", row)
            at = min(one.at, self._clock())
            self._known[site, identity] = replace(known, head=one.now, at=at, trouble="")
        _log.warning(
            "site %s: its folder was restored; of its audit log what it had shown after entry %d, up to %d, is lost",
            *(site, one.kept.sequence, one.lost.sequence),
        )
        return site_epoch.state(self._federation.instruction_key, one)

    def _shares(self, log: str, one: Restored) -> bool:
        """Whether a restored log goes on from an entry that was seen of it, or from none at all."""
        if one.now.sequence < one.kept.sequence or one.kept.sequence > one.lost.sequence:
            return False
        if one.kept.sequence == 0:
            return one.kept == start_of(log)
        rows = self._store.rows(
            "SELECT 1 FROM heads WHERE log = ? AND sequence = ? AND hash = ?",
            *(log, one.kept.sequence, one.kept.hash),
        )
        return bool(rows)

    def keep(self) -> None:
        """Make all of it durable."""
        with self._lock:
            if self._unkept:
                with self._store.transaction() as db:
                    self.keep_with(db)
                self._unkept.clear()

    def keep_with(self, db: sqlite3.Connection) -> None:
        """Write it within a transaction; what that does not bring to the disk, the next `keep` does."""
        with self._lock:
            for (site, identity), made in self._unkept.items():
                known, name = self._known[site, identity], self._name(site, identity)
                for head in made:
                    row = (name, head.sequence // APART, head.sequence, head.hash)
                    if db.execute("INSERT OR IGNORE INTO heads VALUES (?, ?, ?, ?)", row).rowcount:
                        db.execute(
                            "DELETE FROM heads WHERE log = ?1 AND sequence < (SELECT sequence FROM heads "
                            "WHERE log = ?1 ORDER BY sequence DESC LIMIT 1 OFFSET ?2)",
                            (name, MOST_KEPT),
                        )
                newest = (name, NEWEST, made[-1].sequence, made[-1].hash)
                db.execute("INSERT OR REPLACE INTO heads VALUES (?, ?, ?, ?)", newest)
                db.execute(
                    "INSERT OR REPLACE INTO shown VALUES (?, ?, ?, ?)",
                    (site, identity, known.at, json.dumps(known.document)),
                )

    def _of(self, site: str, identity: str) -> _Known:
        key = (site, identity)
        if key not in self._known:
            sql = "SELECT sequence, hash FROM heads WHERE log = ? AND place = ?"
            row = self._store.row(sql, self._name(site, identity), NEWEST)
            said = self._store.row(
                "SELECT at, statement FROM shown WHERE site = ? AND identity = ?", site, identity
            )
            if row is None or said is None:
                self._known[key] = _Known()
            else:
                head, document = Head(row["sequence"], row["hash"]), json.loads(said["statement"])
                self._known[key] = _Known(head, said["at"], document)
        return self._known[key]

    def _trouble(self, shown: Shown, known: _Known, identity: str) -> str:
        if shown.lacks:
            return (
                f"its {' and '.join(shown.lacks)} log lacks what was seen of it: an older copy was put back"
            )
        head = shown.heads.get(AUDIT)
        if head is None:
            return ""
        why = heads.behind(known.head, head)
        overtaken = known.head is not None and head.sequence < known.head.sequence and shown.at <= known.at
        if why and not overtaken:
            return f"audit log: {why}"
        spent = shown.heads.get(LEDGER)
        if spent is not None:
            highest = ledger_heads.seen(self._store, self._ledger_of(shown.site, identity), spent)
            if highest.sequence == spent.sequence and highest != spent:
                return f"privacy ledger: {heads.behind(highest, spent)}"
        return ""

    def _lacks(self, site: str, shown: Shown) -> bool:
        """Whether the server's own log, in the epoch of now, lacks what a site has seen of it."""
        seen = shown.seen.get(AUDIT)
        if seen is None or shown.epoch != self._federation.epoch or self._log.contains(seen):
            return False
        _log.error(
            "site %s has seen entry %d of this server's audit log, which is not in it: an old copy of the folder was "
            "started, or the log was rewritten. Start the latest one, or restore the latest backup",
            *(site, seen.sequence),
        )
        return True

    def _ledger(self, site: str, identity: str) -> Head:
        return ledger_heads.seen(self._store, self._ledger_of(site, identity), _NONE)

    def _ledger_of(self, site: str, identity: str) -> str:
        return ledger_name(self._federation.config.name, site, public_key(identity))

    def _name(self, site: str, identity: str) -> str:
        return name_at_site(self._federation.config.name, site, fingerprint(public_key(identity)))


def witnessed(store: Store, federation: Federation, restored: Mapping[int, int]) -> dict[str, Head]:
    """By site, the last head of the server's log that it has countersigned, as its signature proves.

    restored: by epoch, the entry that began it: what was seen in an epoch before counts up to there.

    Raises:
        IntegrityError: a statement that is kept is not the site's.
    """
    found = {}
    for row in store.rows("SELECT site, identity, statement FROM shown ORDER BY site"):
        site = str(row["site"])
        try:
            document, keys = json.loads(row["statement"]), [public_key(str(row["identity"]))]
            shown = heads.verified(document, keys, "site", federation.config.name, site)
        except (ValueError, IntegrityError) as error:
            raise IntegrityError(
                f"{federation.folder}: what site '{site}' said is damaged: {error}"
            ) from error
        seen = shown.seen.get(AUDIT)
        end = min((at for epoch, at in restored.items() if epoch > shown.epoch), default=None)
        if seen is not None and (end is None or seen.sequence < end):
            found[site] = seen
    return found
