"""What sites have decided about studies, as each of them signed it.

A site's decisions are entries of a log of its own (`client/approvals.py`), which it sends whole. Here each is verified
by the identity key on the roster, and must follow the one before it: a site's log that was rolled back or forked is
found when its next decision comes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from consortium.protocol import chain
from consortium.protocol.chain import Head
from consortium.protocol.errors import InputError, IntegrityError
from consortium.protocol.signing import public_key
from consortium.server.roster import Note, Roster, unnoted
from consortium.server.store import Store

PAGE = 100
"""Decisions that a site is given at once."""
MOST = 1000
"""Decisions that a site may send at once."""


class Approvals:
    """For any number of threads. federation: its name."""

    def __init__(
        self,
        store: Store,
        roster: Roster,
        federation: str,
        clock: Callable[[], float] = time.time,
        note: Note = unnoted,
    ) -> None:
        self._store, self._roster, self._federation, self._clock = store, roster, federation, clock
        self._note = note

    def head(self, site: str) -> Head:
        """The last decision that is known of a site, under the identity that it has now."""
        row = self._store.row(
            "SELECT sequence, hash FROM approvals WHERE site = ? AND identity = ? ORDER BY sequence DESC LIMIT 1",
            *(site, self._roster.identity(site)),
        )
        return Head(row["sequence"], row["hash"]) if row is not None else chain.start_of(self._name(site))

    def heads(self, site: str) -> list[Head]:
        """Every decision that is known of a site, under the identity that it has now, oldest first."""
        rows = self._store.rows(
            "SELECT sequence, hash FROM approvals WHERE site = ? AND identity = ? ORDER BY sequence",
            *(site, self._roster.identity(site)),
        )
        return [Head(row["sequence"], row["hash"]) for row in rows]

    def lines_of(self, site: str, after: int) -> list[str]:
        """The decisions of a site after a number, as it signed them, oldest first; as many as are given at once."""
        rows = self._store.rows(
            "SELECT line FROM approvals WHERE site = ? AND identity = ? AND sequence > ? ORDER BY sequence LIMIT ?",
            *(site, self._roster.identity(site), after, PAGE),
        )
        return [str(row["line"]) for row in rows]

    def take(self, site: str, lines: Sequence[str]) -> Head:
        """Keep decisions of a site that follow what is known of it.

        Raises:
            InputError: they are too many.
            IntegrityError: one is not signed by the site, does not follow, or is not about this federation and site.
        """
        if len(lines) > MOST:
            raise InputError(f"at most {MOST} decisions are taken at once")
        identity = self._roster.identity(site)
        with self._store.transaction() as db:
            head = self.head(site)
            given = [line.encode() for line in lines]
            entries = chain.continued(given, head, [public_key(identity)], self._name(site))
            for line, entry in zip(lines, entries, strict=True):
                body = entry.body
                if (body.get("federation"), body.get("site")) != (self._federation, site):
                    raise IntegrityError(f"{self._name(site)}: entry {entry.sequence} is about another site")
                expires = body.get("expires", 0.0)
                db.execute(
                    "INSERT INTO approvals VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        site, identity, entry.sequence, entry.hash, entry.kind, str(body.get("bundle")),
                        float(expires) if isinstance(expires, int | float) else 0.0,
                        str(body.get("reason", ""))[:500], line,
                    ),
                )  # fmt: skip
                about = {"site": site, "sequence": entry.sequence, "hash": entry.hash}
                self._note("decided", {**about, "decision": entry.kind, "bundle": str(body.get("bundle"))})
            return entries[-1].head if entries else head

    def decisions(self, bundle: str) -> dict[str, tuple[str, str]]:
        """The last decision of every site about a bundle: its kind, or "expired"; and a rejection's reason."""
        found = {}
        for row in self._store.rows("SELECT * FROM approvals WHERE bundle = ? ORDER BY sequence", bundle):
            if row["identity"] != self._roster.identity(row["site"]):
                continue  # of an identity that it had before
            late = row["kind"] == "approved" and row["expires"] <= self._clock()
            found[str(row["site"])] = ("expired" if late else str(row["kind"]), str(row["reason"]))
        return found

    def lines(self, bundle: str) -> list[str]:
        """Every decision about a bundle, as it was signed."""
        query = "SELECT line FROM approvals WHERE bundle = ? ORDER BY site, sequence"
        return [str(row["line"]) for row in self._store.rows(query, bundle)]

    def members(self) -> list[str]:
        """The sites that have joined."""
        return [one["name"] for one in self._roster.sites() if one["status"] == "joined"]

    def missing(self, bundle: str, need: int) -> str:
        """Why a study may not run yet, for its admin; empty where enough sites have approved it."""
        decisions = self.decisions(bundle)
        approved = sorted(site for site, (kind, _) in decisions.items() if kind == "approved")
        if len(approved) >= need:
            return ""
        others = []
        for site in self.members():
            kind, reason = decisions.get(site, ("", ""))
            if kind != "approved":
                others.append(site + (f" ({kind}{': ' + reason if reason else ''})" if kind else ""))
        have = f" ({', '.join(approved)})" if approved else ""
        missing = ", ".join(others) or "sites"
        return f"{len(approved)} of at least {need} sites have approved it{have}; missing: {missing}"

    def approved(self, bundle: str) -> set[str]:
        """The sites whose approval of a bundle holds now."""
        return {site for site, (kind, _) in self.decisions(bundle).items() if kind == "approved"}

    def _name(self, site: str) -> str:
        return f"approvals {self._federation} {site}"
