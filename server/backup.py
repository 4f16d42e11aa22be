"""One file that holds a server: made while it runs, and laid out again elsewhere, without a site joining anew.

The file is a tar: the folder's files, a copy of the database (SQLite's online backup), the checkpoints that this copy
names, and last `backup.json`: the SHA-256 of every other member, under a code (HMAC-SHA256) by a key that only whoever
has the federation's key file or passphrase can derive. That secret itself is not in the file.

    backup.json   {"about": {"format", "federation", "version", "created", "epoch", "files"}, "code": hex}

A restore makes a new folder or none, and begins a new epoch (`protocol/epoch.py`).
"""

from __future__ import annotations

import hashlib
import hmac
import io
import json
import os
import secrets
import shutil
import sqlite3
import tarfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, BinaryIO

from consortium.protocol import configuration, keys
from consortium.protocol.errors import ConsortiumError, InputError, IntegrityError
from consortium.protocol.files import sync_folder, write_private
from consortium.protocol.keys import Lock
from consortium.protocol.messages import canonical
from consortium.protocol.sealed import DATA_KEY, DataKey, data_key
from consortium.server.check import check
from consortium.server.child import SCRATCH
from consortium.server.federation import CHECKPOINTS, CONFIG, DATABASE, EPOCH_FILE, Config, Federation

FORMAT = 1
ABOUT = "backup.json"
MAX_ABOUT = 1 << 26
TRIES = 100
"""How often a backup begins again because the server committed meanwhile."""
_LEFT_OUT = ("spool", "server.lock", f"{DATABASE}-wal", f"{DATABASE}-shm")


@dataclass(frozen=True)
class Backup:
    """What was written or restored. created: seconds since the epoch. epoch: the server's, then or now."""

    path: Path
    federation: str
    created: float
    epoch: int
    files: int
    size: int


def back_up(folder: Path, out: Path, lock: Lock | None = None, now: float | None = None) -> Backup:
    """Write a backup of a server's folder, also of one that runs, into the new file `out`, or into the folder `out`.

    Raises:
        InputError: there is no federation, or `out` is there already or cannot be written.
    """
    folder, made = folder.absolute(), time.time() if now is None else now
    federation = Federation.open(folder, lock)
    name = federation.config.name
    if out.is_dir():
        out = out / f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime(made))}.backup"
    if out.exists():
        raise InputError(f"{out}: is there already; give a new file")
    partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        with ExitStack() as stack:
            stack.callback(lambda: partial.unlink(missing_ok=True))
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            file = stack.enter_context(os.fdopen(descriptor, "w+b"))
            about = {
                "format": FORMAT, "federation": name, "version": version("consortium"), "created": int(made),
                "epoch": federation.epoch,
            }  # fmt: skip
            files = _written(folder, partial, file, stack, about, federation.data_key())
            file.flush()
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
            os.link(partial, out)  # which never replaces
        sync_folder(out.absolute().parent)
    except OSError as error:
        raise InputError(
            f"{out}: the backup cannot be written ({error.strerror}); nothing was left there. Give a place with room"
        ) from error
    return Backup(out, name, made, federation.epoch, files, size)


def _written(
    folder: Path, partial: Path, file: BinaryIO, stack: ExitStack, about: dict[str, object], key: DataKey
) -> int:
    """Write all members, the last of which is `about` with the SHA-256 of the others; how many others there are."""
    copy = partial.with_name(f"{partial.name}.db")
    stack.callback(lambda: copy.unlink(missing_ok=True))
    for _ in range(TRIES):
        with ExitStack() as opened:
            try:
                named = _snapshot(folder, copy)
                checkpoints = {
                    name: opened.enter_context((folder / CHECKPOINTS / name).open("rb")) for name in named
                }
            except FileNotFoundError:
                continue  # a commit came between the copy and its files: their successors are there
            file.seek(0)
            file.truncate()
            with tarfile.open(fileobj=file, mode="w") as tar:
                digests = {DATABASE: _add(tar, DATABASE, opened.enter_context(copy.open("rb")))}
                for name, one in checkpoints.items():
                    digests[f"{CHECKPOINTS}/{name}"] = _add(tar, f"{CHECKPOINTS}/{name}", one)
                for path in _others(folder):
                    name = str(path.relative_to(folder))
                    with (
                        suppress(FileNotFoundError),
                        path.open("rb") as one,
                    ):  # gone since: a run's, that ended
                        digests[name] = _add(tar, name, one)
                about = {**about, "files": digests}
                content = json.dumps({"about": about, "code": _code(about, key)}).encode()
                tar.addfile(_entry(ABOUT, len(content)), io.BytesIO(content))
            return len(digests)
    raise ConsortiumError(
        f"{folder}: the server commits too fast for a backup; pause its runs, then try again"
    )


def _snapshot(folder: Path, copy: Path) -> list[str]:
    """Copy the database as it is at one moment; the names of the checkpoints that the copy names."""
    copy.unlink(missing_ok=True)
    os.close(os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    try:
        with (
            closing(sqlite3.connect(folder / DATABASE, timeout=10.0)) as source,
            closing(sqlite3.connect(copy)) as db,
        ):
            source.backup(db)
            db.execute("PRAGMA journal_mode = DELETE")
            return [str(name) for (name,) in db.execute("SELECT file FROM commits WHERE file != ''")]
    except sqlite3.DatabaseError as error:
        raise IntegrityError(f"{folder / DATABASE}: cannot be copied ({error})") from error


def _others(folder: Path) -> Iterator[Path]:
    """Every other file that a restored server needs, or whose loss somebody would notice. The registry of models comes
    before its bundles, and the audit log last: what is done meanwhile may be in the log alone, never out of it."""
    log, registry = folder / "audit", folder / "models" / "registry.json"
    for path in sorted(folder.rglob("*"), key=lambda one: (log in one.parents, one != registry, one)):
        first, *_ = parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") or part == SCRATCH for part in parts)
        if first in (*_LEFT_OUT, DATABASE, CHECKPOINTS) or hidden or path.is_symlink() or not path.is_file():
            continue
        yield path


def _entry(name: str, size: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = size, 0o600, int(time.time())
    return entry


def _add(tar: tarfile.TarFile, name: str, file: BinaryIO) -> str:
    """Add a file as long as it is now; its SHA-256. A log that grows meanwhile is cut there."""
    hashing = _Hashing(file)
    try:
        tar.addfile(_entry(name, os.fstat(file.fileno()).st_size), hashing)  # type: ignore[arg-type]
    except OSError as error:
        if error.errno is None:  # tarfile's own: it became shorter
            raise ConsortiumError(f"{name}: was being written; try again") from error
        raise
    return hashing.sha.hexdigest()


class _Hashing:
    """A file that is hashed while it is read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.sha = file, hashlib.sha256()

    def read(self, size: int) -> bytes:
        content = self._file.read(size)
        self.sha.update(content)
        return content


def _code(about: dict[str, object], key: DataKey) -> str:
    return hmac.new(key.of("backup").secret, canonical(about), "sha256").hexdigest()


# Restoring


def restore(backup: Path, folder: Path, key_file: Path | None = None, now: float | None = None) -> Backup:
    """Lay out a backup as the new folder `folder`, whole or not at all, and begin a new epoch.

    key_file: what the federation's keys are encrypted under, where that is another file than its configuration names or
    DIR.key beside the folder; a passphrase is asked for where the federation has one.

    Raises:
        InputError: the folder is there and not empty, or the key file is missing.
        IntegrityError: the backup was altered or is damaged.
    """
    folder, started = folder.absolute(), time.time() if now is None else now
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: is not empty; a restore replaces nothing, give a new folder")
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(mode=0o700)
        try:
            said, digests = _extracted(backup, partial)
            config = _config(partial, folder, key_file)
            lock = keys.lock_from(config.key_file, partial)
            about = _verified(backup, said, digests, data_key(partial / DATA_KEY, lock, make=False))
            epoch = max(int(about["epoch"]) + 1, int(started))
            write_private(partial / EPOCH_FILE, json.dumps({"format": 1, "epoch": epoch}).encode())
            configuration.write(partial / CONFIG, config)
            (partial / "spool").mkdir(mode=0o700)
            (partial / CHECKPOINTS).mkdir(mode=0o700, exist_ok=True)
            (partial / "runs").mkdir(mode=0o700, exist_ok=True)
            check(partial, lock)
            for one in (partial, *partial.rglob("*")):
                if one.is_dir():
                    sync_folder(one)
            if folder.exists():
                folder.rmdir()
            partial.rename(folder)
            sync_folder(folder.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"{error.filename or folder}: cannot be restored ({error.strerror}); nothing was left"
        ) from error
    return Backup(folder, config.name, float(about["created"]), epoch, len(digests), backup.stat().st_size)


def _extracted(backup: Path, folder: Path) -> tuple[dict[str, object], dict[str, str]]:
    """Lay out all members; what the last one says, not believed yet, and the SHA-256 of the others."""
    digests: dict[str, str] = {}
    about = b""
    try:
        with tarfile.open(backup, "r:") as tar:
            for entry in tar:
                source = tar.extractfile(entry) if entry.isreg() else None
                if source is None or not _safe(entry.name) or about or entry.name in digests:
                    raise IntegrityError(f"{backup}: holds '{entry.name[:80]}', which no backup has")
                if entry.name == ABOUT:
                    about = source.read(MAX_ABOUT)
                    continue
                path = folder / entry.name
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                digests[entry.name] = _laid(source, path)
        said = json.loads(about)
        if not isinstance(said["about"], dict):
            raise TypeError
    except (tarfile.TarError, EOFError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{backup}: is no backup, or is not whole; take another one") from error
    for needed in (CONFIG, DATABASE, DATA_KEY):
        if needed not in digests:
            raise IntegrityError(f"{backup}: is not whole, {needed} is missing; take another one")
    return said, digests


def _safe(name: str) -> bool:
    return bool(name) and not name.startswith("/") and not {"", ".", ".."} & set(name.split("/"))


def _laid(source: IO[bytes], path: Path) -> str:
    sha = hashlib.sha256()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        while piece := source.read(1 << 20):
            sha.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return sha.hexdigest()


def _config(partial: Path, folder: Path, key_file: Path | None) -> Config:
    """The configuration, which names the key file where it is now."""
    config = configuration.read(partial / CONFIG, Config)
    if not config.key_file and key_file is None:
        return config
    beside = folder.with_name(folder.name + ".key")
    places = [key_file.absolute()] if key_file is not None else [Path(config.key_file), beside]
    for place in places:
        if place.is_file():
            return config.model_copy(update={"key_file": str(place)})
    raise InputError(
        f"{places[-1]}: the key file of federation '{config.name}' is not there; it is not part of a backup. Copy it "
        "there, or name it: --key-file FILE"
    )


def _verified(backup: Path, said: dict[str, object], digests: dict[str, str], key: DataKey) -> dict[str, int]:
    """What the last member says, once its code is found right and the other members are those that it names."""
    about = said["about"]
    assert isinstance(about, dict)
    if not hmac.compare_digest(str(said.get("code")), _code(about, key)):
        raise IntegrityError(f"{backup}: was altered: its code is not the federation's; take another one")
    if about.get("format") != FORMAT:
        raise InputError(
            f"{backup}: has format {about.get('format')}, this version reads {FORMAT}; install consortium "
            f"{about.get('version')} or later"
        )
    names: dict[str, str] = about["files"]
    wrong = sorted(name for name in {*names, *digests} if names.get(name) != digests.get(name))
    if wrong:
        raise IntegrityError(f"{backup}: was altered or is damaged: {', '.join(wrong[:5])}; take another one")
    return about
