"""The features of predictions, for whoever must keep them: encrypted, for a stated number of days, and then gone.

    features/features.sqlite   a row a prediction: its id, model and version, when, until when; its inputs, sealed
    features/data.key          what they are sealed under, itself wrapped under DIR.key

Nothing here exists unless `--keep-features DAYS` is said. Then a prediction whose features cannot be kept is not
answered. A row outlives `kill -9` as soon as it is answered, and a power cut all but the last seconds. What is deleted
is overwritten in the database, whose log is emptied after; what the disk itself still has of it is encrypted.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consortium.protocol.errors import ConsortiumError, InputError, IntegrityError
from consortium.protocol.files import private_folder
from consortium.protocol.keys import Lock
from consortium.protocol.sealed import DATA_KEY, DataKey, Sealed, data_key, sealing
from consortium.server.serving.engine import Arrays
from consortium.server.serving.wire import compact, datatype_of

FOLDER, DATABASE = "features", "features.sqlite"
MOST_DAYS = 3650
DAY = 86400.0
_FORMAT = 1
_BATCH = 500
_WAIT = 5.0
"""Seconds that one program waits for another that writes here."""
_TABLE = """
CREATE TABLE kept (
    prediction TEXT PRIMARY KEY,
    model TEXT NOT NULL,
    version TEXT NOT NULL,
    at REAL NOT NULL,             -- seconds since the epoch
    until REAL NOT NULL,          -- from then on it is deleted, and not handed out
    inputs BLOB NOT NULL          -- the protocol's JSON, sealed under a key for this prediction alone
) STRICT;
CREATE INDEX kept_until ON kept (until);
"""


@dataclass(frozen=True)
class Kept:
    """What was kept of a prediction. at, until: seconds since the epoch. inputs: as the protocol has them in JSON."""

    prediction: str
    model: str
    version: str
    at: float
    until: float
    inputs: list[dict[str, Any]]


class Features:
    """The features kept in a serving program's folder. For one thread; other programs may work on them meanwhile.

    folder: the program's own. lock: what the key is wrapped under. clock: seconds since the epoch. days: how long each
    is kept, what is there already too; None to read and purge alone, where nothing is made.

    Raises:
        InputError: nothing is kept there, or the folder or its key cannot be made or read.
        IntegrityError: the key is damaged, or another's.
        ConsortiumError: the disk is full, and the like.
    """

    def __init__(self, folder: Path, lock: Lock, clock: Callable[[], float], days: int | None) -> None:
        place, make = folder / FOLDER, days is not None
        if make:
            private_folder(place)
        self._path, self._clock, self.days = place / DATABASE, clock, days
        self._db = _opened(self._path, make=make)
        try:
            self._key: DataKey = data_key(place / DATA_KEY, lock, make=make)
        except OSError as error:
            raise InputError(f"{place / DATA_KEY}: cannot be made ({error.strerror})") from error
        if days is not None:
            with _told(self._path, "the time cannot be shortened"):
                self._db.execute("UPDATE kept SET until = at + ?1 WHERE until > at + ?1", (days * DAY,))

    def keep(self, prediction: str, model: str, version: str, arrays: Arrays) -> None:
        """Keep the inputs of a prediction.

        Raises:
            ConsortiumError: that cannot be done; the disk is full, say.
        """
        inputs = [
            {
                "name": name,
                "datatype": datatype_of(array),
                "shape": list(array.shape),
                "data": array.reshape(-1).tolist(),
            }
            for name, array in arrays.items()
        ]
        assert self.days is not None
        now = self._clock()
        sealed = b"".join(map(bytes, sealing([compact({"inputs": inputs})], self._key_of(prediction))))
        row = (prediction, model, version, now, now + self.days * DAY, sealed)
        with _told(self._path, "the features cannot be kept, so nothing is answered"):
            self._db.execute("INSERT INTO kept VALUES (?, ?, ?, ?, ?, ?)", row)

    def read(self, prediction: str) -> Kept:
        """What was kept of a prediction.

        Raises:
            InputError: nothing is.
            IntegrityError: it is not as it was written.
        """
        with _told(self._path, "cannot be read"):
            row = self._db.execute(
                "SELECT model, version, at, until, inputs FROM kept WHERE prediction = ? AND until > ?",
                (prediction, self._clock()),
            ).fetchone()
        if row is None:
            raise _nothing(self._path, [prediction])
        model, version, at, until, sealed = row
        fd = os.memfd_create("consortium", os.MFD_CLOEXEC)
        try:
            os.write(fd, sealed)
            content = Sealed(fd, self._key_of(prediction), f"{self._path}: {prediction}").read()
        finally:
            os.close(fd)
        return Kept(prediction, model, version, at, until, json.loads(content)["inputs"])

    def purge(self, predictions: Sequence[str]) -> None:
        """Delete what was kept of these predictions, all or none.

        Raises:
            InputError: nothing is kept of one of them.
            ConsortiumError: it cannot be deleted, or another program still reads what was.
        """
        with _told(self._path, "the features cannot be deleted"), _transaction(self._db):
            gone = [
                one
                for one in dict.fromkeys(predictions)
                if self._db.execute("DELETE FROM kept WHERE prediction = ?", (one,)).rowcount == 0
            ]
            if gone:
                raise _nothing(self._path, gone)
        if not _emptied(self._db, self._path):
            raise ConsortiumError(
                f"{self._path}: deleted, but another program is at the database, whose log still has it, encrypted; "
                "it goes within a minute where a program serves"
            )

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def _key_of(self, prediction: str) -> DataKey:
        return self._key.of(f"features of prediction {prediction}")


def expire(folder: Path, clock: Callable[[], float]) -> int:
    """Delete what has been kept for its time in a serving program's folder, without the key; how many.

    Raises:
        ConsortiumError: it cannot be deleted now. It is not handed out in any case.
    """
    path = folder / FOLDER / DATABASE
    if not path.exists():
        return 0
    count = 0
    with closing(_opened(path, make=False)) as db:
        while True:  # a few at a time, so that the program that serves need not wait long
            with _told(path, "what has had its time cannot be deleted"):
                some = "SELECT rowid FROM kept WHERE until <= ? LIMIT ?"
                found = db.execute(f"DELETE FROM kept WHERE rowid IN ({some})", (clock(), _BATCH)).rowcount  # noqa: S608
            count += found
            if found < _BATCH:
                break
        _emptied(db, path)  # if another program is at it: the next time
    return count


def _opened(path: Path, *, make: bool) -> sqlite3.Connection:
    if not make and not path.exists():
        raise InputError(
            f"{path}: is not there; no features are kept unless model serve has --keep-features DAYS"
        )
    with _told(path, "cannot be opened"):
        db = sqlite3.connect(path, timeout=_WAIT, isolation_level=None)
        path.chmod(0o600)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("PRAGMA secure_delete = ON")
        with _transaction(db):
            found = db.execute("PRAGMA user_version").fetchone()[0]
            if found == 0:
                for statement in _TABLE.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {_FORMAT}")
            elif found != _FORMAT:
                raise InputError(f"{path}: is of format {found}; this version knows {_FORMAT}")
    return db


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # SQLite may have ended it itself
            db.execute("ROLLBACK")
        raise


def _emptied(db: sqlite3.Connection, path: Path) -> bool:
    """Have the log hold nothing of what was deleted; whether that was possible."""
    with _told(path, "the log cannot be emptied"):
        busy = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
    return not busy


@contextmanager
def _told(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.DatabaseError as error:
        kind = (
            IntegrityError if "malformed" in str(error) or "not a database" in str(error) else ConsortiumError
        )
        raise kind(f"{path}: {what} ({error})") from error
    except OSError as error:
        raise ConsortiumError(f"{path}: {what} ({error.strerror})") from error


def _nothing(path: Path, predictions: Sequence[str]) -> InputError:
    some = ", ".join(repr(one[:80]) for one in predictions[:5])
    return InputError(
        f"{path}: no features are kept of {some}; they may have had their time. Nothing was done"
    )
