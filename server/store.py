"""The server's database: SQLite, one file, the only durable truth beside the blobs that it names.

WAL with `synchronous=FULL`: what a transaction committed is there after a power cut. One connection, one lock: the
server writes little and rarely (joins, states, a commit a round), and a transaction is then plainly serial.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from consortium.protocol.errors import ConsortiumError, InputError, IntegrityError
from consortium.protocol.files import sync_folder

FORMAT = 2
CACHE = 256
"""KiB of pages that SQLite holds. Its default of 2,000 would fill with events over hundreds of rounds."""

_TABLES = """
CREATE TABLE sites (              -- the roster: server/roster.py
    name TEXT PRIMARY KEY,
    status TEXT NOT NULL,         -- invited, joined, left, revoked
    identity TEXT NOT NULL,       -- hex of the Ed25519 public key, "" before the first joining
    since REAL NOT NULL           -- when the status began, seconds since the epoch
) STRICT;
CREATE TABLE invitations (
    site TEXT PRIMARY KEY,
    secret TEXT NOT NULL,         -- SHA-256 (hex) of the code's secret, never the secret
    expires REAL NOT NULL,
    used_by TEXT NOT NULL,        -- the identity that joined by it, "" while it is outstanding
    request TEXT NOT NULL,        -- SHA-256 (hex) of the request that used it
    chain TEXT NOT NULL           -- what was given for it (PEM): a repeated request gets it again
) STRICT;
CREATE TABLE certificates (
    fingerprint TEXT PRIMARY KEY, -- SHA-256 (hex) of the DER
    site TEXT NOT NULL,
    issued REAL NOT NULL,
    expires REAL NOT NULL,
    revoked REAL                  -- when, or NULL
) STRICT;
CREATE TABLE tokens (
    name TEXT PRIMARY KEY,
    role TEXT NOT NULL,           -- admin, researcher, viewer
    digest TEXT NOT NULL UNIQUE,  -- SHA-256 (hex) of the token, never the token
    created REAL NOT NULL
) STRICT;
CREATE TABLE studies (            -- server/archive.py
    name TEXT PRIMARY KEY,
    digest TEXT NOT NULL,
    text TEXT NOT NULL,
    submitted REAL NOT NULL
) STRICT;
CREATE TABLE runs (
    name TEXT PRIMARY KEY,        -- unique for ever, such as breast-cancer.2
    study TEXT NOT NULL,
    digest TEXT NOT NULL,         -- the study's, at the start
    text TEXT NOT NULL,
    state TEXT NOT NULL,          -- server/archive.py: STATES
    why TEXT NOT NULL,
    since REAL NOT NULL,
    created REAL NOT NULL
) STRICT;
CREATE TABLE commits (            -- the last commit of each run
    run TEXT PRIMARY KEY,
    round INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    file TEXT NOT NULL,           -- name under checkpoints/
    sha256 TEXT NOT NULL,
    at REAL NOT NULL
) STRICT;
CREATE TABLE events (             -- what watch shows, in order
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    run TEXT NOT NULL,
    at REAL NOT NULL,
    document TEXT NOT NULL
) STRICT;
CREATE INDEX events_of_run ON events (run, id);
"""
_RECORDS = """
CREATE TABLE records (            -- of a run's rounds and evaluations: server/checkpoint.py
    run TEXT NOT NULL,
    kind TEXT NOT NULL,           -- rounds, evaluations
    place INTEGER NOT NULL,       -- from 0; those from the number that the last commit's document names count not
    content BLOB NOT NULL,        -- a line, encrypted under the run's key
    PRIMARY KEY (run, kind, place)
) STRICT;
"""
_LATER = """
CREATE TABLE IF NOT EXISTS bundles (  -- server/archive.py
    study TEXT PRIMARY KEY,       -- digest of the study: its settings and its code
    digest TEXT NOT NULL,         -- SHA-256 (hex) of the bundle
    content BLOB NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS approvals (  -- decisions of sites, as they signed them: server/approvals.py
    site TEXT NOT NULL,
    identity TEXT NOT NULL,       -- under which it signed
    sequence INTEGER NOT NULL,    -- in the site's own log
    hash TEXT NOT NULL,           -- SHA-256 (hex) of the line
    kind TEXT NOT NULL,           -- approved, rejected
    bundle TEXT NOT NULL,
    expires REAL NOT NULL,
    reason TEXT NOT NULL,
    line TEXT NOT NULL,
    PRIMARY KEY (site, identity, sequence)
) STRICT;
CREATE TABLE IF NOT EXISTS left_out (  -- sites that a run is made without: server/rerun.py
    run TEXT NOT NULL,
    site TEXT NOT NULL,
    PRIMARY KEY (run, site)
) STRICT;
CREATE TABLE IF NOT EXISTS ledger_heads (  -- server/ledger_heads.py
    ledger TEXT PRIMARY KEY,      -- name of a site's privacy ledger
    sequence INTEGER NOT NULL,
    hash TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS ledger_copies (  -- lines of the same, which the site alone can read
    ledger TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    sealed BLOB NOT NULL,
    PRIMARY KEY (ledger, sequence)
) STRICT;
CREATE TABLE IF NOT EXISTS heads (    -- where audit logs of sites ended: server/heads.py
    log TEXT NOT NULL,
    place INTEGER NOT NULL,
    sequence INTEGER NOT NULL,
    hash TEXT NOT NULL,
    PRIMARY KEY (log, place)
) STRICT;
CREATE TABLE IF NOT EXISTS shown (    -- the newest statement of each site about its logs
    site TEXT NOT NULL,
    identity TEXT NOT NULL,
    at REAL NOT NULL,             -- by the site's clock
    statement TEXT NOT NULL,
    PRIMARY KEY (site, identity)
) STRICT;
"""
"""Tables that a database of this format may lack, because an earlier version made it."""


STEPS: Mapping[int, str] = {1: _RECORDS}
"""SQL that makes a database of the next format from one of the format that it is listed under."""


class Store:
    """The database in a file, which is made where it is missing. For any number of threads.

    One of an earlier format is copied to a file beside it, whose name ends with that format, and then brought to this
    one in a single transaction. steps: as `STEPS`; their number of the last, and one, is the format.

    Raises:
        InputError: a later version wrote it.
        IntegrityError: it is damaged.
        ConsortiumError: it cannot be opened or written.
    """

    def __init__(self, path: Path, steps: Mapping[int, str] = STEPS) -> None:
        self._path, self._steps = path, steps
        self._lock = threading.RLock()
        try:
            path.touch(mode=0o600, exist_ok=True)
        except OSError as error:
            raise ConsortiumError(
                f"{path}: cannot be written or read ({error.strerror}); is the disk full or read-only?"
            ) from error
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10.0)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute(f"PRAGMA cache_size = -{CACHE}")  # the kernel keeps the file's pages as well
            self._prepare()
            self._db.executescript(_LATER)
        except sqlite3.DatabaseError as error:
            raise self._error(error) from error

    def _prepare(self) -> None:
        found = self._db.execute("PRAGMA user_version").fetchone()[0]
        last = max([FORMAT, *(number + 1 for number in self._steps)])
        if found > last:
            raise InputError(
                f"{self._path}: has format {found}, this version reads up to {last}; a later version of consortium "
                f"wrote it. Install that one again, or restore a backup of before"
            )
        if not found:
            self._db.executescript(
                f"BEGIN IMMEDIATE; {_TABLES} {_RECORDS} PRAGMA user_version = {FORMAT}; COMMIT;"
            )
            found = FORMAT
        elif found < last:
            self._copy(self._path.with_name(f"{self._path.name}.format-{found}"))
        if found < last:
            # Schema and number are one transaction: after a crash it is of the format of before, or of this one.
            steps = " ".join(self._steps[number] for number in range(found, last))
            try:
                self._db.executescript(f"BEGIN IMMEDIATE; {steps} PRAGMA user_version = {last}; COMMIT;")
            except sqlite3.DatabaseError:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _copy(self, path: Path) -> None:
        """A copy as of now, whole or not there; one of an upgrade that was interrupted is as good."""
        if path.exists():
            return
        partial = path.with_name(f".{path.name}")
        partial.unlink(missing_ok=True)
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        with closing(sqlite3.connect(partial)) as copy:
            self._db.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")
        descriptor = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        partial.replace(path)
        sync_folder(path.parent)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All that is executed within becomes durable together, or none of it where an error leaves the block."""
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield self._db
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.in_transaction:  # some errors of the disk have ended it already
                        self._db.execute("ROLLBACK")
                    raise
            except sqlite3.DatabaseError as error:
                raise self._error(error) from error

    @property
    def lock(self) -> threading.RLock:
        """What every call holds: for those who keep something in memory beside the database, and must not hold a lock
        of their own when they call it, or are called within a transaction."""
        return self._lock

    def rows(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        """The rows of a query."""
        with self._lock:
            try:
                return self._db.execute(sql, values).fetchall()
            except sqlite3.DatabaseError as error:
                raise self._error(error) from error

    def row(self, sql: str, *values: Any) -> sqlite3.Row | None:
        """The first row of a query, or None."""
        found = self.rows(sql, *values)
        return found[0] if found else None

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def _error(self, error: sqlite3.DatabaseError) -> ConsortiumError:
        if isinstance(error, sqlite3.OperationalError):
            return ConsortiumError(
                f"{self._path}: cannot be written or read ({error}); is the disk full or read-only?"
            )
        return IntegrityError(f"{self._path}: is damaged ({error}); restore it from a backup")
