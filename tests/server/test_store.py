"""The database: upgrades of its format, and what a disk or an editor may do to it."""

from __future__ import annotations

import _sqlite3
import ctypes
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from consortium.protocol.errors import ConsortiumError, InputError, IntegrityError
from consortium.server.store import CACHE, FORMAT, STEPS, Store

NEXT = {
    **STEPS,
    FORMAT: "ALTER TABLE tokens ADD COLUMN used REAL;",
    FORMAT + 1: "CREATE TABLE more (name TEXT PRIMARY KEY) STRICT; UPDATE tokens SET used = 1.0;",
}


def made(path: Path) -> Path:
    store = Store(path)
    with store.transaction() as db:
        db.execute("INSERT INTO tokens VALUES ('alice', 'viewer', 'digest', 5.0)")
    store.close()
    return path


def version(path: Path) -> int:
    with closing(sqlite3.connect(path)) as db:
        return int(db.execute("PRAGMA user_version").fetchone()[0])


def test_a_long_history_takes_no_more_memory_than_a_short_one(tmp_path: Path) -> None:
    """Of some megabytes of events that were written and read, SQLite holds a few hundred kilobytes."""
    used = getattr(ctypes.CDLL(_sqlite3.__file__), "sqlite3_memory_used", None)
    if used is None:
        pytest.skip("SQLite is built into Python here, and cannot be asked")
    used.restype = ctypes.c_int64
    store = Store(tmp_path / "db")
    before = used()
    for number in range(600):
        with store.transaction() as db:
            db.execute("INSERT INTO events (run, at, document) VALUES ('r', ?, ?)", (number, "x" * 5000))
    assert len(store.rows("SELECT document FROM events WHERE run = 'r' ORDER BY id")) == 600
    assert used() - before < 2 * CACHE * 1024
    store.close()


def test_an_earlier_format_is_upgraded_after_a_copy(tmp_path: Path) -> None:
    """Over two steps at once; what was there stays, the copy is as it was, and the next start finds nothing to do."""
    path = made(tmp_path / "db")
    for _ in range(2):
        store = Store(path, NEXT)
        assert [tuple(row) for row in store.rows("SELECT name, used FROM tokens")] == [("alice", 1.0)]
        assert store.rows("SELECT * FROM more") == []
        store.close()
        assert version(path) == FORMAT + 2
    copy = tmp_path / f"db.format-{FORMAT}"
    assert version(copy) == FORMAT
    assert copy.stat().st_mode & 0o777 == 0o600
    before = Store(copy)
    assert [tuple(row) for row in before.rows("SELECT * FROM tokens")] == [("alice", "viewer", "digest", 5.0)]
    before.close()


def test_a_new_database_has_the_latest_format(tmp_path: Path) -> None:
    """And no copy of nothing."""
    Store(tmp_path / "db", NEXT).close()
    assert version(tmp_path / "db") == FORMAT + 2
    assert list(tmp_path.glob("*format*")) == []


def test_an_upgrade_that_fails_leaves_the_format_of_before(tmp_path: Path) -> None:
    """All of its steps or none: this version, and after a correction the next one, opens it."""
    path = made(tmp_path / "db")
    with pytest.raises(ConsortiumError):
        Store(
            path,
            {**NEXT, FORMAT + 1: "CREATE TABLE more (name TEXT) STRICT; INSERT INTO nothing VALUES (1);"},
        )
    assert version(path) == FORMAT
    store = Store(path)
    assert len(store.rows("SELECT * FROM tokens")) == 1
    store.close()
    Store(path, NEXT).close()
    assert version(path) == FORMAT + 2


def test_a_later_format_is_refused_with_what_to_do(tmp_path: Path) -> None:
    """Exit code 2, and nothing of it is touched."""
    path = made(tmp_path / "db")
    Store(path, NEXT).close()
    before = path.read_bytes()
    with pytest.raises(InputError, match="a later version of consortium wrote it"):
        Store(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"no database at all " * 500, b"SQLite format 3\0" + bytes(4080)])
def test_a_damaged_database_is_named(tmp_path: Path, content: bytes) -> None:
    """Exit code 4, and where to get it again."""
    (tmp_path / "db").write_bytes(content)
    with pytest.raises(IntegrityError, match="restore it from a backup"):
        Store(tmp_path / "db")
