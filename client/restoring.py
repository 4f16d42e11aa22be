"""A site's folder was put back from an older copy, and the newest one is lost: what there is to do.

    ledger     the entries that it lacks come from the server's copy, which this site alone can read, bit for bit: so
               never is less spent than what the server has countersigned
    decisions  likewise: the server has them as this site signed them
    audit log  what is lost of it is lost. It goes on in a new epoch: signed by the site, noted by the server in its own
               log with the last entry that it had seen, and countersigned (`protocol/site_epoch.py`)

What the operator wrote into ledger and decisions since the older copy was put back follows after what came back.
"""

from __future__ import annotations

import time
from base64 import b64decode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from consortium.client.approvals import name_of
from consortium.client.audit import site_audit
from consortium.client.heads import Countersigned, countersigned
from consortium.client.home import Home
from consortium.privacy.ledger import ledger_name
from consortium.privacy.ledger_copy import all_opened, copy_key
from consortium.protocol import chain, site_epoch, wire
from consortium.protocol.audit import Audit
from consortium.protocol.chain import Head, start_of
from consortium.protocol.chain_writer import Chain
from consortium.protocol.connection import Connection, UnreachableError
from consortium.protocol.errors import IntegrityError
from consortium.protocol.files import sync_folder, write_private
from consortium.protocol.heads import APPROVALS, AUDIT, LEDGER
from consortium.protocol.keys import Lock
from consortium.protocol.site_epoch import Restored

MOST_LINES = 100_000
"""Entries of one log that are taken from the server."""
Page = Callable[[int], tuple[int, Sequence[bytes]]]
"""Lines of a log from the server, after a number: the first one's number, and they."""


@dataclass(frozen=True)
class Report:
    """What was done. ledger, decisions: how many entries came back. audit: what was lost of it; None: nothing."""

    ledger: int
    decisions: int
    audit: Restored | None


def restore(home: Home, lock: Lock, clock: Callable[[], float] = time.time) -> Report:
    """Make the logs of a site whole again, so that its agent may go on. No agent may run meanwhile.

    Raises:
        UnreachableError: the server cannot be asked.
        IntegrityError: a log is damaged, the server's word is not signed, or it has no copy of what is missing.
        ConsortiumError: the server does not agree, or a file cannot be written.
    """
    key, config = home.identity(lock), home.config
    name = ledger_name(config.federation, config.site, key.public_key())
    seen = countersigned(home, lock)
    if not seen.asked:
        raise UnreachableError(
            f"{config.host}:{config.port}: cannot be reached, and what this site lacks is known there alone; try again"
        )
    secret = copy_key(key)
    connection = home.connection(lock)
    try:

        def of_ledger(after: int) -> tuple[int, Sequence[bytes]]:
            said = connection.request("GET", f"{wire.COPIES}{LEDGER}/{after}").document(1 << 22)
            first, lines = wire.field(said, "first", int), wire.field(said, "lines", list)
            return first, all_opened(secret, name, first, [b64decode(str(one)) for one in lines])

        def of_approvals(after: int) -> tuple[int, Sequence[bytes]]:
            said = connection.request("GET", f"{wire.COPIES}{APPROVALS}/{after}").document(1 << 26)
            return after + 1, [str(one).encode() for one in wire.field(said, "lines", list)]

        decisions = (home.folder / "approvals.log", name_of(config.federation, config.site))
        ledger = _whole(home.ledger_file, name, key, seen.seen.get(LEDGER), of_ledger)
        decided = _whole(*decisions, key, seen.seen.get(APPROVALS), of_approvals)
        log = site_audit(home, key)
        lost = _new_epoch(home, lock, key, log, seen, connection, clock())
    finally:
        connection.close()
    if ledger or decided or lost is not None:
        about = {"ledger": ledger, "decisions": decided, "lost": lost.lost.text if lost else ""}
        log.note("folder restored", about)
    return Report(ledger, decided, lost)


def _whole(path: Path, name: str, key: Ed25519PrivateKey, seen: Head | None, page: Page) -> int:
    """Bring back what the log at `path` lacks of what the server has seen; how many entries that were."""
    if seen is None or _has(path, name, key, seen):
        return 0
    own, theirs, first = chain.lines(path), list[bytes](), 0
    while first + len(theirs) <= seen.sequence or not first:
        number, lines = page(first + len(theirs) - 1 if first else 0)
        if not lines or (first and number != first + len(theirs)):
            break
        first = first or number
        theirs += lines
        if len(theirs) > MOST_LINES:
            raise IntegrityError(f"{path}: the server gives more than {MOST_LINES} entries of it")
    theirs = theirs[: seen.sequence - first + 1]
    if not first or first + len(theirs) <= seen.sequence or len(own) < first - 1:
        raise IntegrityError(
            f"{path}: the server has seen entry {seen.sequence}, and has no copy of all that is missing here (from "
            f"entry {len(own) + 1}). Put the newest copy of the file back; where it is lost, join anew from a new "
            "folder: what was spent before is not known there"
        )
    same = first - 1
    while same < min(len(own), seen.sequence) and own[same] == theirs[same - first + 1]:
        same += 1
    partial = path.with_name(f".{path.name}.restored")
    write_private(partial, b"".join(line + b"\n" for line in (*own[: first - 1], *theirs)))
    chain.verify(partial, name, [key.public_key()], [seen])
    log = Chain(partial, name, key)
    for entry in chain.entries(path, name, same) if path.exists() else ():
        log.append(entry.kind, entry.body, entry.at)  # what was added since the older copy was put back
    partial.replace(path)
    sync_folder(path.parent)
    return seen.sequence - same


def _has(path: Path, name: str, key: Ed25519PrivateKey, seen: Head) -> bool:
    """Whether a log, which is sound in itself, once ended with a head.

    Raises:
        IntegrityError: it is not sound.
    """
    end = chain.verify(path, name, [key.public_key()])
    if end.sequence < seen.sequence:
        return False
    return next(chain.entries(path, name, seen.sequence - 1)).head == seen


def _new_epoch(
    home: Home,
    lock: Lock,
    key: Ed25519PrivateKey,
    log: Audit,
    seen: Countersigned,
    connection: Connection,
    now: float,
) -> Restored | None:
    """Have the server agree to what is lost of the audit log; None where nothing is."""
    last = seen.seen.get(AUDIT)
    if last is None or log.contains(last):
        return None
    shared = [head for head in seen.earlier if log.contains(head)]
    kept = max(shared, default=start_of(log.name))
    one = Restored(home.config.federation, home.config.site, now, last, kept, log.head)
    said = connection.request(
        "POST", wire.RESTORED, {"format": wire.FORMAT, "restored": site_epoch.state(key, one)}
    ).document()
    if site_epoch.verified(said, home.trust().keys, one.federation, one.site) != one:
        raise IntegrityError("the server countersigned another statement of this site's restore")
    log.note("new epoch", {"countersigned": dict(said), "lost": last.text, "kept": kept.text})
    return one
