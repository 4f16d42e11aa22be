"""A folder's file operations, each of which can fail, be torn, or be the last one before the power is cut.

The real operations run on the real folder; what is durable is kept beside, by the rules that hold on any file system: a
file's bytes are durable once it was fsynced, a name once its folder was. After a cut `Disk.after` lays what a machine
could find at its next start: the least (only what is durable), the most (all that was done), or every name that was
given with none of the bytes that were not yet forced out. SQLite's own writes are one operation, of which any number of
bytes of its log may have reached the disk. Once the power is off, nothing that the program would clean up is done.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import pytest

from consortium.protocol.errors import ConsortiumError
from consortium.protocol.files import private_folder
from consortium.server.store import Store

How = Literal["fails", "torn", "cut"]
"""fails: with an OSError, and the program goes on. torn: half of a write is done, then a cut. cut: just before it."""
VARIANTS = ("least", "most", "names")
_CALLS = (
    "open", "write", "pwrite", "sendfile", "ftruncate", "fsync", "link", "rename", "replace", "unlink", "mkdir",
    "rmdir",
)  # fmt: skip
_WRITES = ("write", "pwrite", "sendfile")


class PowerCut(BaseException):
    """The machine is off from here on."""


@dataclass(frozen=True)
class Found:
    """What is there after an act that was broken at one operation. over: whether it had returned.

    variant: of `VARIANTS`, or "goes on": the program was told of the failure, and works in its folder still.
    """

    folder: Path
    over: bool
    variant: str
    at: int


def interrupted(
    where: Path,
    patch: pytest.MonkeyPatch,
    how: How,
    prepare: Callable[[Path], object],
    act: Callable[[Path], object],
    most: int = 60,
) -> Iterator[Found]:
    """Break an act at each of its file operations in turn, in a folder of its own that `prepare` fills; what is found
    then, in every variant. The last ones are those of an act that nothing happened to."""
    with patch.context() as quick:
        quick.setattr(os, "fsync", lambda _: None)  # what is durable is modelled
        for at in range(most):
            folder = private_folder(where / f"{at}")
            prepare(folder)
            disk, over = Disk(folder, at, how), False
            with disk.recording(patch):
                try:
                    act(folder)
                    over = True
                except (OSError, ConsortiumError):
                    assert how == "fails"
                except PowerCut:
                    pass
            for variant in VARIANTS if how != "fails" else VARIANTS[:1]:
                yield Found(disk.after(variant, where / f"{at}-{variant}"), over, variant, at)
            if how == "fails":
                yield Found(folder, over, "goes on", at)
            if over and len(disk.log) <= at:
                return
    pytest.fail("this has more operations than are tried")


class Disk:
    """The folder `root` and all below it, durable as it is found. log: what was done since, in order."""

    def __init__(self, root: Path, at: int = -1, how: How = "cut", share: float = 0.5) -> None:
        self._root, self._at, self._how, self._share = root, at, how, share
        self._names: dict[int, dict[str, int]] = {}  # of durable folders, by inode
        self._bytes: dict[int, bytes] = {}  # of files, the durable ones
        self._held: list[int] = []  # descriptors, so that no inode is given twice
        self._real = {name: getattr(os, name) for name in _CALLS}
        self._off = False
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
            within.setattr(io, "open", self._open)
            within.setattr(builtins, "open", self._open)
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
            if self._step(name) and self._how == "torn" and name in _WRITES:
                self._tear(name, real, given)
            if self._last():
                self._end(name)
            if name == "fsync":  # the real one would add nothing but time
                self._force(Path(f"/proc/self/fd/{given[0]}"))
                return None
            done = real(*given, **more)
            if name == "open":
                self._opened(done, given[1])
            return done

        return call

    def _tear(self, name: str, real: Callable[..., Any], given: tuple[Any, ...]) -> None:
        if name == "sendfile":
            real(*given[:3], max(1, os.fstat(given[1]).st_size // 2))
        else:
            view = memoryview(given[1]).cast("B")
            real(given[0], view[: max(1, len(view) // 2)], *given[2:])
        self._cut()

    def _open(self, file: Any, mode: str = "r", buffering: int = -1, *more: Any, **named: Any) -> Any:
        """As `open`, with each write of a file of ours an operation."""
        if not set(mode) & set("wax+") or not self._ours("open", (file,), {}):
            return self._open_real(file, mode, buffering, *more, **named)
        assert "b" in mode or not more, "only what our programs use of it is modelled"
        plain: Any = mode.replace("b", "").replace("t", "")
        raw = _File(file, plain, opener=lambda at, how: os.open(at, how, 0o666))
        if not buffering:
            return raw
        buffer: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffer if "b" in mode else io.TextIOWrapper(buffer, **named)

    _open_real: Any = staticmethod(open)

    def _ours(self, name: str, given: tuple[Any, ...], more: dict[str, Any]) -> bool:
        if isinstance(given[0], int):
            path = Path(f"/proc/self/fd/{given[0]}").readlink()
        else:
            path = Path(os.fsdecode(given[1] if name in ("rename", "replace") else given[0]))
            within = more.get("dir_fd")
            path = path.absolute() if within is None else Path(f"/proc/self/fd/{within}").readlink() / path
        return name == "link" or path.is_relative_to(self._root)

    def _step(self, name: str) -> bool:
        """Note one operation; whether it is the last one."""
        if self._off:
            raise PowerCut
        self.log.append(name)
        return self._last()

    def _last(self) -> bool:
        return len(self.log) == self._at + 1

    def _cut(self) -> NoReturn:
        self._off = True
        raise PowerCut

    def _end(self, name: str) -> None:
        if self._how != "fails":
            self._cut()
        raise OSError(errno.ENOSPC if name in (*_WRITES, "open") else errno.EIO, "as the test wants")

    def _opened(self, fd: int, flags: int) -> None:
        about = os.fstat(fd)
        if flags & (os.O_CREAT | os.O_TMPFILE & ~os.O_DIRECTORY) and not about.st_size:
            self._held.append(os.dup(fd))
            self._bytes.setdefault(about.st_ino, b"")

    @contextmanager
    def _transaction(self, real: Callable[..., Any], store: Store) -> Iterator[Any]:
        if not Path(store._path).is_relative_to(self._root):
            with real(store) as db:
                yield db
            return
        last = self._step("sqlite")
        log = Path(f"{store._path}-wal")
        before = log.read_bytes()
        with real(store) as db:
            yield db
            if last and self._how == "fails":
                raise sqlite3.OperationalError("disk I/O error")
            if last and self._how == "cut":
                self._cut()
        after = log.read_bytes()
        assert after.startswith(before), "a checkpoint of SQLite's own is not modelled"
        if last:
            self._force(log, before + after[len(before) :][: int(self._share * (len(after) - len(before)))])
            self._cut()
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


class _File(io.FileIO):
    """A file whose writes go through `os`."""

    def write(self, content: Any, /) -> int:
        """As of any file."""
        return os.write(self.fileno(), content)

    def truncate(self, size: int | None = None, /) -> int:
        """As of any file."""
        size = self.tell() if size is None else size
        os.ftruncate(self.fileno(), size)
        return size
