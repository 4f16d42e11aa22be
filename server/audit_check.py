"""Whether a server's folder shows what happened: its log against the sites' word and the database, and decisions."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from consortium.protocol import audit, chain
from consortium.protocol.audit import FOLDER, name_at_server
from consortium.protocol.chain import Head, start_of
from consortium.protocol.errors import IntegrityError
from consortium.protocol.signing import public_key
from consortium.server.audit import restores, verify
from consortium.server.federation import DATABASE, Federation
from consortium.server.heads import witnessed
from consortium.server.serving import acts
from consortium.server.serving.gate_file import MODELS
from consortium.server.serving.registry import Registry
from consortium.server.store import Store

LOOKS, PAUSE = 5, 0.2
"""How often, and after how many seconds each, a decision is looked for that is noted and not in the database yet."""


@dataclass(frozen=True)
class Checked:
    """head: of the log. events, decisions, acts: how many agree; acts are those on the federation's registry of models.
    sites: what each has countersigned of the log."""

    head: Head
    events: int
    decisions: int
    sites: Mapping[str, Head]
    acts: int


def check(federation: Federation) -> Checked:
    """Check a server's folder, also of one that runs.

    Raises:
        IntegrityError: naming the entry that is not as it was written, is missing, or says otherwise than the database.
    """
    store = Store(federation.folder / DATABASE)
    try:
        sites = witnessed(store, federation, restores(federation))
        head = verify(federation, list(sites.values()))
        events = _events(store, federation)  # waits for a decision that is noted and not committed yet
        decisions = _decisions(store, federation.config.name)
        registry = Registry(federation.folder / MODELS, time.time)
        return Checked(head, events, decisions, sites, acts.check_registry(registry))
    finally:
        store.close()


Decision = tuple[str, int, str]
"""Site, number and hash."""


def _decision(body: Mapping[str, Any]) -> Decision:
    return body["site"], body["sequence"], body["hash"]


def _decided(store: Store) -> set[Decision]:
    return {_decision(dict(row)) for row in store.rows("SELECT site, sequence, hash FROM approvals")}


def _decided_by_now(store: Store, wanted: Decision) -> set[Decision]:
    """The decisions, once one of them is there, or was waited for: it is noted before it is committed."""
    found = _decided(store)
    for _ in range(LOOKS):
        if wanted in found:
            break
        time.sleep(PAUSE)
        found = _decided(store)
    return found


def _events(store: Store, federation: Federation) -> int:
    """How many events stand in the log as they do in the database; what was before a restore is not there any more."""
    name = name_at_server(federation.config.name, federation.root_fingerprint)
    decided = _decided(store)
    first = max(restores(federation).values(), default=0)
    count = 0
    for entry in chain.entries(audit.segments(federation.folder / FOLDER), name, first):
        one = entry.body
        if entry.kind == "decided" and _decision(one) not in decided:
            decided = _decided_by_now(store, _decision(one))
        if entry.kind == "decided" and _decision(one) not in decided:
            raise IntegrityError(
                f"{federation.folder}: decision {one['sequence']} of site '{one['site']}', of which entry "
                f"{entry.sequence} of the audit log tells, is not in the database any more, or is another one. If the "
                "server was killed, or its disk full, while the site decided, the site says it again when it connects: "
                "check again then"
            )
        if "run" not in entry.body or "event" not in entry.body:
            continue
        number = entry.body["event"]
        row = store.row("SELECT run, document FROM events WHERE id = ?", number)
        if row is None:
            raise IntegrityError(
                f"{federation.folder}: entry {entry.sequence} of the audit log is about event {number}, which the "
                "database lacks: an older copy of the database was put back"
            )
        said = {**json.loads(row["document"]), "run": row["run"]}
        both = {key: value for key, value in said.items() if key in entry.body and key != "kind"}
        if "cut" not in entry.body and (
            len(both) != len(said) - 1 or any(entry.body[k] != both[k] for k in both)
        ):
            raise IntegrityError(
                f"{federation.folder}: entry {entry.sequence} of the audit log says otherwise than event {number} of "
                "the database"
            )
        count += 1
    return count


def _decisions(store: Store, federation: str) -> int:
    """How many decisions of sites are as they were signed, each site's in a chain of its own."""
    lines: dict[tuple[str, str], list[bytes]] = {}
    for row in store.rows("SELECT site, identity, line FROM approvals ORDER BY site, identity, sequence"):
        lines.setdefault((str(row["site"]), str(row["identity"])), []).append(str(row["line"]).encode())
    for (site, identity), made in lines.items():
        name = f"approvals {federation} {site}"
        chain.continued(made, start_of(name), [public_key(identity)], name)
    return sum(map(len, lines.values()))
