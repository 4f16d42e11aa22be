"""The records of runs in the database: encrypted lines that `server/checkpoint.py` makes and understands."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping

from consortium.protocol.sealed import DataKey, unseal
from consortium.server.checkpoint import HISTORIES, Added
from consortium.server.store import Store

PAGE = 1 << 20
"""Bytes of lines after which no other is given at once."""
NONE: Mapping[str, Added] = {}


def put(db: sqlite3.Connection, run: str, added: Mapping[str, Added]) -> None:
    """Keep lines, within a transaction, in place of those of a commit that never was."""
    for kind, one in added.items():
        rows = [(run, kind, place, line) for place, line in enumerate(one.lines, one.first)]
        db.executemany("INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?)", rows)


def keep(store: Store, run: str, added: Mapping[str, Added]) -> None:
    """Keep lines that a later commit is to count."""
    with store.transaction() as db:
        put(db, run, added)


def count(store: Store, run: str, kind: str) -> int:
    """How many lines of a kind are kept."""
    row = store.row("SELECT MAX(place) AS last FROM records WHERE run = ? AND kind = ?", run, kind)
    return 0 if row is None or row["last"] is None else int(row["last"]) + 1


def told(store: Store, run: str) -> Counter[str]:
    """By kind of record, of how many a run has told in its events."""
    rows = store.rows(
        "SELECT json_extract(document, '$.kind') AS kind, COUNT(*) AS times FROM events WHERE run = ? GROUP BY 1",
        run,
    )
    times = {str(row["kind"]): int(row["times"]) for row in rows}
    return Counter({kind: times.get(kind.removesuffix("s"), 0) for kind in HISTORIES})


def page(store: Store, run: str, kind: str, start: int) -> list[bytes]:
    """Lines of a kind from a place on: one at least, where it is there, and no more than `PAGE` bytes and one."""
    found, size = [], 0
    for place in range(start, start + PAGE):
        row = store.row(
            "SELECT content FROM records WHERE run = ? AND kind = ? AND place = ?", run, kind, place
        )
        if row is None or size > PAGE:
            break
        found.append(bytes(row["content"]))
        size += len(found[-1])
    return found


def history(store: Store, run: str, key: DataKey, kind: str, number: int) -> Iterator[bytes]:
    """A `checkpoint.History` straight from the database."""
    for place in range(number):
        row = store.row(
            "SELECT content FROM records WHERE run = ? AND kind = ? AND place = ?", run, kind, place
        )
        if row is None:
            return
        yield unseal(bytes(row["content"]), key, f"record {place} of its {kind}")
