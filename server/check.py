"""Whether what a server keeps is whole: its keys and certificates, its database, and every checkpoint, byte by byte."""

from __future__ import annotations

import os
import sqlite3
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from consortium.protocol.errors import ConsortiumError, IntegrityError
from consortium.protocol.keys import Lock
from consortium.protocol.sealed import DataKey
from consortium.server import checkpoint
from consortium.server.federation import CHECKPOINTS, DATABASE, Federation
from consortium.server.run_records import history
from consortium.server.store import Store


@dataclass(frozen=True)
class Checked:
    """What was found whole. checkpoints: runs by name, and the last committed round of each."""

    federation: str
    checkpoints: dict[str, int]
    size: int


def check(folder: Path, lock: Lock | None = None) -> Checked:
    """Check a server's folder, also of one that runs.

    Raises:
        IntegrityError: something is damaged: every damage is named.
        InputError: there is no federation, or it cannot be opened.
    """
    federation = Federation.open(folder, lock)
    key, wrong = federation.data_key(), list[str]()
    store = Store(folder / DATABASE)
    try:
        said = [str(row[0]) for row in store.rows("PRAGMA integrity_check")]
        wrong += [f"{folder / DATABASE}: {one}" for one in said if one != "ok"]
        found, size = {}, 0
        for (run,) in store.rows("SELECT run FROM commits WHERE file != '' ORDER BY run"):
            try:
                found[str(run)], more = _commit(store, folder / CHECKPOINTS, str(run), key)
                size += more
            except ConsortiumError as error:
                wrong.append(str(error))
    finally:
        store.close()
    if wrong:
        again = "restore the latest backup into another folder: consortium server restore FILE --dir NEW"
        raise IntegrityError("\n".join([f"{folder}: is damaged", *(f"  {one}" for one in wrong), again]))
    return Checked(federation.config.name, found, size)


def _commit(store: Store, folder: Path, run: str, key: DataKey) -> tuple[int, int]:
    """The round of a run's commit whose file is as it was written, and how long that is."""
    while True:
        row = store.row("SELECT round, file, sha256 FROM commits WHERE run = ?", run)
        assert row is not None
        path = folder / str(row["file"])
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            now = store.row("SELECT file FROM commits WHERE run = ?", run)
            if now is not None and now["file"] != row["file"]:
                continue  # the server committed meanwhile
            raise IntegrityError(f"run '{run}': {path} cannot be read ({error.strerror})") from error
        try:
            own = key.of(f"run {run}")
            checkpoint.Writer(run, own, partial(history, store, run, own)).read(fd, str(row["sha256"]))
            return int(row["round"]), os.fstat(fd).st_size
        except IntegrityError as error:
            raise IntegrityError(f"run '{run}': {path}: {error}") from error
        finally:
            os.close(fd)


def database_is_whole(path: Path) -> None:
    """Raises IntegrityError where a database that nobody has open is damaged."""
    try:
        db = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        try:
            (said,) = db.execute("PRAGMA integrity_check").fetchone()
        finally:
            db.close()
    except sqlite3.DatabaseError as error:
        said = str(error)
    if said != "ok":
        raise IntegrityError(f"{path}: is damaged ({said})")
