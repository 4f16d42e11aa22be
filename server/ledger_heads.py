"""The sites' privacy ledgers, so far as the server knows them: the highest head that each has shown, countersigned on
demand, and a copy of each line that the site alone can read (`privacy/ledger_copy.py`).

So a site whose ledger was rolled back, or replaced by another history, is told of the entry that it lacks, and gets it
back. The server learns numbers, hashes and sizes alone, nothing of what an entry says.
"""

from __future__ import annotations

import sqlite3
from base64 import b64decode, b64encode
from collections.abc import Mapping
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from consortium.protocol.chain import Head, Witness, countersign
from consortium.protocol.errors import InputError
from consortium.server.store import Store

MOST_COPIES = 20_000
"""Lines of one ledger that are kept, the newest ones."""
LARGEST = 8 << 10
"""Bytes of one sealed line."""
PAGE = 256
"""Lines that a site is given at once."""


def seen(store: Store, ledger: str, shown: Head, lines: Mapping[int, bytes] | None = None) -> Head:
    """Keep a head that a site shows of its ledger, and give the highest that was ever shown; of two with one number the
    first. lines: sealed, by number; they are kept with the head, so that no head is without the lines that led to it,
    and only where it is the highest: another history's are not."""
    with store.transaction() as db:
        row = db.execute("SELECT sequence, hash FROM ledger_heads WHERE ledger = ?", (ledger,)).fetchone()
        known = Head(row["sequence"], row["hash"]) if row is not None else None
        if known is not None and known.sequence >= shown.sequence and known != shown:
            return known
        if shown.sequence and known != shown:
            db.execute(
                "INSERT OR REPLACE INTO ledger_heads VALUES (?, ?, ?)", (ledger, shown.sequence, shown.hash)
            )
        _copy(db, ledger, shown, lines or {})
        return shown


def copied(store: Store, ledger: str) -> int:
    """The number of the last line of which there is a copy; there is one of each before it, so far as they are kept."""
    row = store.row("SELECT MAX(sequence) AS last FROM ledger_copies WHERE ledger = ?", ledger)
    return int(row["last"] or 0) if row is not None else 0


def copies(store: Store, ledger: str, after: int) -> dict[str, Any]:
    """The copies after a number, in order: {"first", "lines"}; as many as are given at once."""
    rows = store.rows(
        "SELECT sequence, sealed FROM ledger_copies WHERE ledger = ? AND sequence > ? ORDER BY sequence LIMIT ?",
        *(ledger, after, PAGE),
    )
    first = rows[0]["sequence"] if rows else 0
    return {"first": first, "lines": [b64encode(row["sealed"]).decode() for row in rows]}


def sent(document: Mapping[str, Any]) -> dict[int, bytes]:
    """The sealed lines in what a site shows: [[number, base64], ...].

    Raises:
        InputError: they are malformed.
    """
    given = document.get("copies", [])
    try:
        found = {number: b64decode(text, validate=True) for number, text in given}
    except (ValueError, TypeError) as error:
        raise InputError("field 'copies': numbers and lines in base64 were expected") from error
    if any(type(number) is not int or number < 1 or len(one) > LARGEST for number, one in found.items()):
        raise InputError(f"field 'copies': lines of at most {LARGEST} bytes were expected")
    return found


def countersigned(
    store: Store, key: Ed25519PrivateKey, ledger: str, shown: Head, lines: Mapping[int, bytes] | None = None
) -> Witness:
    """As `seen`, with the server's signature."""
    return countersign(key, ledger, seen(store, ledger, shown, lines))


def _copy(db: sqlite3.Connection, ledger: str, shown: Head, lines: Mapping[int, bytes]) -> None:
    """Keep the lines that follow on what there is, without a gap."""
    row = db.execute("SELECT MAX(sequence) AS last FROM ledger_copies WHERE ledger = ?", (ledger,)).fetchone()
    last = int(row["last"] or 0)
    while last < shown.sequence and last + 1 in lines:
        last += 1
        db.execute("INSERT INTO ledger_copies VALUES (?, ?, ?)", (ledger, last, lines[last]))
    db.execute("DELETE FROM ledger_copies WHERE ledger = ? AND sequence <= ?", (ledger, last - MOST_COPIES))
