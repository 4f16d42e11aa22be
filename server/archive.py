"""What the server keeps of studies and runs: rows of the database, and a checkpoint file a run.

A commit is durable in this order: the file gets a name, its bytes and its name reach the disk, the row that refers to
it is written together with the events of its rounds, and only then the file before it is removed. So after a crash at
any moment the row's file is there, whole; files that no row names are removed when the server starts.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consortium.protocol.bundle import Bundle, of, read
from consortium.protocol.errors import ConsortiumError, InputError, IntegrityError, RefusedError
from consortium.protocol.files import private_folder
from consortium.protocol.sealed import DataKey, new_data_key
from consortium.protocol.study import Study
from consortium.server import run_records
from consortium.server.checkpoint import Added
from consortium.server.states import EARLY, FINISHED, OVER, PROPOSED, STATES
from consortium.server.store import Store

_log = logging.getLogger(__name__)


KEPT_DAYS = 30
"""How long the checkpoint of a run that finished is kept: its model is in the run's folder, in use or not."""


@dataclass(frozen=True)
class Run:
    """A run's row. digest, text: the study's at its start. since: when its state began, seconds since the epoch."""

    name: str
    study: str
    digest: str
    text: str
    state: str
    why: str
    since: float
    created: float


@dataclass(frozen=True)
class Commit:
    """A run's last commit. file: its name in the folder of checkpoints, "" where it is not kept any more. sha256: of
    the checkpoint's document."""

    round: int
    attempt: int
    file: str
    sha256: str
    at: float


def waits(study: Study) -> bool:
    """Whether runs of a study wait until sites have said that they approve it: where it brings code, or wants more than
    one approval. Else each site decides when it is asked, and the first that takes part has approved."""
    return not study.built_in or study.cohort.approvals > 1


class Archive:
    """Studies, runs, commits and events. For any number of threads.

    folder: for checkpoints, on any disk that knows files without a name (O_TMPFILE). key: the federation's data key;
    without one, one that is lost with this object.

    Raises:
        InputError: the folder cannot be used.
    """

    def __init__(
        self,
        store: Store,
        folder: Path,
        clock: Callable[[], float] = time.time,
        key: DataKey | None = None,
    ) -> None:
        self.store = self._store = store
        self._clock = clock
        self._key = key or new_data_key()
        self._news = threading.Condition()
        self.folder = private_folder(folder)
        self.recorded: Callable[[], None] = lambda: None
        """Returns once the audit log of what led to a commit is on the disk."""
        self.kept_with: Callable[[sqlite3.Connection], None] = lambda db: None
        """Writes within a commit's transaction what is to be durable with it."""
        self.told: Callable[[], None] = lambda: None
        """Called when there are new events."""
        self.released: Callable[[str, Study, Mapping[str, Any]], None] = lambda *_: None
        """Notes what a round is about to publish, before it is committed."""
        self.published: Callable[[str], dict[str, Any] | None] = lambda _: None
        """What a study has published."""
        self.released_by: Callable[[str], dict[str, Any] | None] = lambda _: None
        """What a run has released, by site."""
        self._sweep()

    def _sweep(self) -> None:
        """Remove files that no commit names: a crash came before their row, or after their successor's."""
        kept = {str(row["file"]) for row in self._store.rows("SELECT file FROM commits")}
        for path in self.folder.iterdir():
            if path.name not in kept:
                path.unlink(missing_ok=True)

    def retire(self) -> list[str]:
        """Drop the checkpoints of runs that finished `KEPT_DAYS` ago, and name the runs. Their rows and events (who was
        asked and counted in each round, the digests of all models) stay, as do results and model in the run's folder.
        """
        before = self._clock() - KEPT_DAYS * 86400
        with self._store.transaction() as db:
            rows = db.execute(
                "SELECT run, file FROM commits JOIN runs ON runs.name = commits.run "
                "WHERE file != '' AND state IN (?, ?) AND since < ?",
                (FINISHED, EARLY, before),
            ).fetchall()
            for row in rows:
                db.execute("UPDATE commits SET file = '' WHERE run = ?", (row["run"],))
                db.execute("DELETE FROM records WHERE run = ?", (row["run"],))
        for row in rows:
            self._drop(row["file"])
        return [str(row["run"]) for row in rows]

    # Studies

    def submit(self, given: Bundle | Study) -> None:
        """Keep a study in place of one of the same name; runs that began with that one keep theirs.

        given: its bundle; a study without code of its own is its bundle.

        Raises:
            RefusedError: a run of this very study is under way with another bundle, which differs in comments alone.
        """
        made = given if isinstance(given, Bundle) else of(given)
        study, before = made.study, self.bundle_of(made.study.digest)
        if before is not None and before != made.content:
            for run in self.runs():
                if run.digest == study.digest and run.state not in OVER:
                    raise RefusedError(
                        f"study '{study.name}': run '{run.name}' of the same settings and code is under way, and sites "
                        f"approved its bundle; to submit one with other comments end it first: consortium study stop "
                        f"{run.study}"
                    )
        with self._store.transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO bundles VALUES (?, ?, ?)",
                (study.digest, made.digest, made.content),
            )
            db.execute(
                "INSERT INTO studies VALUES (?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET "
                "digest = excluded.digest, text = excluded.text, submitted = excluded.submitted "
                "WHERE digest != excluded.digest",
                (study.name, study.digest, study.text, self._clock()),
            )

    def studies(self) -> list[dict[str, Any]]:
        """Submitted studies by name: name, digest, submitted, and run, state and why of the latest run."""
        found = []
        for row in self._store.rows("SELECT name, digest, submitted FROM studies ORDER BY name"):
            run = self.latest(row["name"])
            state, why = (run.state, run.why) if run is not None else (PROPOSED, "")
            found.append({**dict(row), "run": run and run.name, "state": state, "why": why})
        return found

    def proposals(self) -> tuple[int, list[dict[str, Any]]]:
        """A number that changes when a study is submitted, and what sites are shown of the studies: name, digest,
        bundle, and whether runs of it wait for approvals."""
        rows = self._store.rows(
            "SELECT studies.name, studies.digest, bundles.digest AS bundle, bundles.rowid AS number, content "
            "FROM studies JOIN bundles ON bundles.study = studies.digest ORDER BY studies.name"
        )
        found = []
        for row in rows:
            study = read(bytes(row["content"])).study
            about = {"name": row["name"], "digest": row["digest"], "bundle": row["bundle"]}
            found.append({**about, "waits": waits(study)})
        return self.number(), found

    def number(self) -> int:
        """A number that changes when a study is submitted."""
        row = self._store.row("SELECT COALESCE(MAX(rowid), 0) AS number FROM bundles")
        return int(row["number"]) if row is not None else 0

    def bundle_of(self, digest: str) -> bytes | None:
        """The bundle of the study of that digest."""
        row = self._store.row("SELECT content FROM bundles WHERE study = ?", digest)
        return bytes(row["content"]) if row is not None else None

    def bundle_digest(self, digest: str) -> str | None:
        """SHA-256 (hex) of the bundle of the study of that digest."""
        row = self._store.row("SELECT digest FROM bundles WHERE study = ?", digest)
        return str(row["digest"]) if row is not None else None

    def text_of(self, digest: str) -> str | None:
        """The text of the study of that digest, submitted or of a run."""
        for query in ("SELECT text FROM studies WHERE digest = ?", "SELECT text FROM runs WHERE digest = ?"):
            row = self._store.row(query, digest)
            if row is not None:
                return str(row["text"])
        return None

    # Runs

    def propose(self, study: str, of: Run | None = None, without: Collection[str] = ()) -> Run:
        """A new run of a submitted study, or of the very study of a run before. Its name, such as breast-cancer.2, is
        never given again. without: sites that it is made without.

        Raises:
            InputError: there is no such study.
        """
        now = self._clock()
        with self._store.transaction() as db:
            row = db.execute("SELECT digest, text FROM studies WHERE name = ?", (study,)).fetchone()
            if row is None:
                raise InputError(
                    f"there is no study '{study}'; submit it first: consortium study submit FILE"
                )
            number = db.execute("SELECT COUNT(*) FROM runs WHERE study = ?", (study,)).fetchone()[0] + 1
            digest, text = (row["digest"], row["text"]) if of is None else (of.digest, of.text)
            run = Run(f"{study}.{number}", study, digest, text, PROPOSED, "", now, now)
            db.execute(
                "INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (run.name, study, run.digest, run.text, run.state, run.why, now, now),
            )
            db.executemany("INSERT INTO left_out VALUES (?, ?)", [(run.name, site) for site in set(without)])
        return run

    def without(self, run: str) -> frozenset[str]:
        """The sites that a run is made without."""
        return frozenset(
            str(r["site"]) for r in self._store.rows("SELECT site FROM left_out WHERE run = ?", run)
        )

    def run(self, name: str) -> Run | None:
        """The run of that name."""
        row = self._store.row("SELECT * FROM runs WHERE name = ?", name)
        return Run(**dict(row)) if row is not None else None

    def latest(self, study: str) -> Run | None:
        """The newest run of a study."""
        row = self._store.row("SELECT * FROM runs WHERE study = ? ORDER BY rowid DESC LIMIT 1", study)
        return Run(**dict(row)) if row is not None else None

    def runs(self) -> list[Run]:
        """All runs, the newest first."""
        return [Run(**dict(row)) for row in self._store.rows("SELECT * FROM runs ORDER BY rowid DESC")]

    def move(self, run: str, state: str, why: str = "") -> None:
        """Set a run's state; a change is an event. `since` stays where only `why` is another."""
        assert state in STATES
        now = self._clock()
        with self._store.transaction() as db:
            old = db.execute("SELECT state, why FROM runs WHERE name = ?", (run,)).fetchone()
            if old is None or (old["state"], old["why"]) == (state, why):
                return
            db.execute(
                "UPDATE runs SET since = CASE WHEN state = ? THEN since ELSE ? END, state = ?, why = ? "
                "WHERE name = ?",
                (state, now, state, why, run),
            )
            _add(db, run, now, {"kind": "state", "state": state, "why": why})
        _log.info("run %s: %s%s", run, state, f": {why}" if why else "")
        self._tell()

    # Commits

    def key_of(self, run: str) -> DataKey:
        """What a run's checkpoints, and what it sends, are encrypted under while they lie on disk."""
        return self._key.of(f"run {run}")

    def committed(self, run: str) -> Commit | None:
        """The last commit of a run."""
        row = self._store.row("SELECT round, attempt, file, sha256, at FROM commits WHERE run = ?", run)
        return Commit(**dict(row)) if row is not None else None

    def open(self, run: str, commit: Commit) -> int:
        """A descriptor of a commit's file, to read.

        Raises:
            IntegrityError: it is not there.
        """
        path = self.folder / commit.file
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise IntegrityError(
                f"run '{run}': its checkpoint {path} cannot be read ({error.strerror}); restore it from a backup, "
                "or start the study anew: consortium study start NAME"
            ) from error

    def commit(
        self,
        run: str,
        round: int,
        attempt: int,
        file: int,
        sha256: str,
        events: Sequence[Mapping[str, Any]] = (),
        records: Mapping[str, Added] = run_records.NONE,
    ) -> None:
        """Keep a checkpoint in place of the one before; when this returns it would survive a power cut.

        file: a descriptor of a file without a name, opened in `folder`, which gets one.
        events: what to show of it; they are there exactly when the commit is.
        records: by kind, its own lines (`server/checkpoint.py`), encrypted; likewise.

        Raises:
            IntegrityError: the file is not such a file.
            ConsortiumError: the disk is full, and the like; the commit before is untouched then.
        """
        about = os.fstat(file)
        if not stat.S_ISREG(about.st_mode) or about.st_nlink:
            raise IntegrityError(f"run '{run}': a checkpoint must be a new file without a name")
        self.recorded()
        before, now = self.committed(run), self._clock()
        name = f"{run}.{round}.{attempt}.{secrets.token_hex(4)}"
        self._name(file, name)
        try:
            with self._store.transaction() as db:
                db.execute(
                    "INSERT OR REPLACE INTO commits VALUES (?, ?, ?, ?, ?, ?)",
                    (run, round, attempt, name, sha256, now),
                )
                for event in events:
                    _add(db, run, now, event)
                run_records.put(db, run, records)
                self.kept_with(db)
        except ConsortiumError:
            kept = self.committed(run)
            if kept is None or kept.file != name:
                self._drop(name)
            raise
        if before is not None:
            self._drop(before.file)
        self._tell()

    def _drop(self, name: str) -> None:
        """Remove a file that no commit names; what cannot be removed now is swept at the next start."""
        with suppress(OSError):
            (self.folder / name).unlink(missing_ok=True)

    def _name(self, file: int, name: str) -> None:
        """Give a file without a name one, durably."""
        try:
            folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                # With a folder's descriptor this is linkat(AT_SYMLINK_FOLLOW), which alone can name such a file.
                os.link(f"/proc/self/fd/{file}", name, dst_dir_fd=folder, follow_symlinks=True)
                os.fsync(file)
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            self._drop(name)
            raise ConsortiumError(
                f"{self.folder / name}: the checkpoint cannot be written ({error.strerror}); is the disk full?"
            ) from error

    # Events

    def note(self, run: str, event: Mapping[str, Any]) -> None:
        """Keep an event of a run that goes with no commit."""
        with self._store.transaction() as db:
            _add(db, run, self._clock(), event)
        self._tell()

    def events(self, run: str, after: int = 0, limit: int = 1000) -> list[dict[str, Any]]:
        """Events of a run with a number above `after`, in order, each with `id` and `at`, at most `limit`."""
        rows = self._store.rows(
            "SELECT id, at, document FROM events WHERE run = ? AND id > ? ORDER BY id LIMIT ?",
            *(run, after, limit),
        )
        return [{"id": row["id"], "at": row["at"], **json.loads(row["document"])} for row in rows]

    def wait(self, run: str, after: int, seconds: float) -> bool:
        """Wait until the run has an event above `after`; False where time is over first."""
        with self._news:
            return self._news.wait_for(lambda: bool(self.events(run, after, 1)), seconds)

    def _tell(self) -> None:
        self.told()
        with self._news:
            self._news.notify_all()


def _add(db: Any, run: str, at: float, document: Mapping[str, Any]) -> None:
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    db.execute("INSERT INTO events (run, at, document) VALUES (?, ?, ?)", (run, at, text))
