"""A folder's file operations, each of which can fail, be torn, or be the last one before the power is cut.

The real operations run on the real folder; what is durable is kept beside, by the rules that hold on any file system: a
file's bytes are durable once it was fsynced, a name once its folder was. After a cut `Disk.after` lays what a machine
could find at its next start: the least (only what is durable), the most (all that was done), or every name that was
given with none of the bytes that were not yet forced out. SQLite's own writes are one operation, of which any number of
bytes of its log may have reached the disk.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest

from consortium.server.store import Store

How = Literal["fails", "torn", "cut"]
"""fails: with an OSError, and the program goes on. torn: half of a write is done, then a cut. cut: just before it."""
VARIANTS = ("least", "most", "names")
_CALLS = ("open", "write", "pwrite", "fsync", "link", "rename", "replace", "unlink", "mkdir")


class PowerCut(BaseException):
    """The machine is off from here on."""


class Disk:
    """The folder `root` and all below it, durable as it is found. log: what was done since, in order."""

    def __init__(self, root: Path, at: int = -1, how: How = "cut", share: float = 0.5) -> None:
        self._root, self._at, self._how, self._share = root, at, how, share
        self._names: dict[int, dict[str, int]] = {}  # of durable folders, by inode
        self._bytes: dict[int, bytes] = {}  # of files, the durable ones
        self._held: list[int] = []  # descriptors, so that no inode is given twice
        self._real = {name: getattr(os, name) for name in _CALLS}
        self.log: list[str] = []
        for folder, _, files in os.walk(root):
            self._force(Path(folder))
            for name in files:
                self._force(Path(folder) / name)

    # What happens

    @contextmanager
    def recording(self, patch: pytest.MonkeyPatch) -> Iterator[None]:
        """Every operation within the block goes through here."""
        with patch.context() as within:
            for name in _CALLS:
                within.setattr(os, name, self._wrapped(name))
            transaction = Store.transaction
            within.setattr(Store, "transaction", lambda store: self._transaction(transaction, store))
            try:
                yield
            finally:
                for fd in self._held:
                    os.close(fd)

    def _wrapped(self, name: str) -> Callable[..., Any]:
        real = self._real[name]

        def call(*given: Any, **more: Any) -> Any:
            if not self._ours(name, given, more):
                return real(*given, **more)
            if self._step(name) and self._how == "torn" and name in ("write", "pwrite"):
                fd, view = given[0], memoryview(given[1]).cast("B")
                real(fd, view[: max(1, len(view) // 2)], *given[2:])
                raise PowerCut
            if self._last():
                self._end(name)
            done = real(*given, **more)
            if name == "fsync":
                self._force(Path(f"/proc/self/fd/{given[0]}"))
            elif name == "open":
                self._opened(done, given[1])
            return done

        return call

    def _ours(self, name: str, given: tuple[Any, ...], more: dict[str, Any]) -> bool:
        if isinstance(given[0], int):
            path = str(Path(f"/proc/self/fd/{given[0]}").readlink())
        else:
            path = str(Path(given[-1] if name in ("rename", "replace") else given[0]).absolute())
        return name == "link" or path.startswith(str(self._root))

    def _step(self, name: str) -> bool:
        """Note one operation; whether it is the last one."""
        self.log.append(name)
        return self._last()

    def _last(self) -> bool:
        return len(self.log) == self._at + 1

    def _end(self, name: str) -> None:
        if self._how != "fails":
            raise PowerCut
        raise OSError(errno.ENOSPC if name in ("write", "pwrite", "open") else errno.EIO, "as the test wants")

    def _opened(self, fd: int, flags: int) -> None:
        about = os.fstat(fd)
        if flags & (os.O_CREAT | os.O_TMPFILE & ~os.O_DIRECTORY) and not about.st_size:
            self._held.append(os.dup(fd))
            self._bytes.setdefault(about.st_ino, b"")

    @contextmanager
    def _transaction(self, real: Callable[..., Any], store: Store) -> Iterator[Any]:
        last = self._step("sqlite")
        log = Path(f"{store._path}-wal")
        before = log.read_bytes()
        with real(store) as db:
            yield db
            if last and self._how == "fails":
                raise sqlite3.OperationalError("disk I/O error")
            if last and self._how == "cut":
                raise PowerCut
        after = log.read_bytes()
        assert after.startswith(before), "a checkpoint of SQLite's own is not modelled"
        if last:
            self._force(log, before + after[len(before) :][: int(self._share * (len(after) - len(before)))])
            raise PowerCut
        self._force(log)

    # What is left

    def _force(self, path: Path, content: bytes | None = None) -> None:
        """What a file or folder is now is durable."""
        flags = os.O_RDONLY | (os.O_DIRECTORY if path.is_dir() else 0)
        fd = self._real["open"](path, flags)
        self._held.append(fd)
        inode = os.fstat(fd).st_ino
        if path.is_dir():
            self._names[inode] = {one.name: one.inode() for one in os.scandir(path)}
        else:
            self._bytes[inode] = path.read_bytes() if content is None else content

    def after(self, variant: str, where: Path) -> Path:
        """Lay into `where` what may be found after a cut now."""
        if variant == "least":
            self._lay(self._root.stat().st_ino, where)
        else:
            self._copy(self._root, where, whole=variant == "most")
        return where

    def _lay(self, folder: int, where: Path) -> None:
        where.mkdir(mode=0o700)
        for name, inode in self._names[folder].items():
            if inode in self._bytes:
                (where / name).write_bytes(self._bytes[inode])
            elif inode in self._names:
                self._lay(inode, where / name)
            else:
                (where / name).mkdir(mode=0o700)  # its own entries were never forced out
        (where / "db-shm").unlink(missing_ok=True)

    def _copy(self, folder: Path, where: Path, *, whole: bool) -> None:
        where.mkdir(mode=0o700)
        for one in os.scandir(folder):
            if one.is_dir():
                self._copy(Path(one), where / one.name, whole=whole)
            elif not one.name.endswith("-shm"):
                known = self._bytes.get(one.inode(), b"")
                # SQLite's log is what its own fsyncs made of it, in every variant.
                kept = whole and not one.name.endswith("-wal")
                (where / one.name).write_bytes(Path(one).read_bytes() if kept else known)
