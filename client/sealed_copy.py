"""A copy of a site's data as it lies on disk, encrypted, and as a run's worker has it, in memory, by the same path.

    data.csv        a link to /proc/self/fd/600, which leads somewhere in the worker alone
    .sealed/0       what it holds, encrypted under a key of the run's

A worker reads each sealed file into one in memory, which cannot be written any more, under the number that its link
says. So a task opens its data by a path, as ever, and no disk holds them in the clear. It is done before anything that
a study brings is loaded.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from consortium.protocol.errors import InputError
from consortium.protocol.files import write_early
from consortium.protocol.sealed import CHUNK, DataKey, Sealed, Sealer

SEALED = ".sealed"
FIRST = 600
"""The number of the first file in memory: above those that a worker opens before."""
OTHERS = 424
"""Open files that a worker may have beyond those."""
_READ_ONLY = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


class Tree:
    """Seals files one after the other below `folder`, a new one. key: the run's, for its data."""

    def __init__(self, folder: Path, key: DataKey) -> None:
        self._folder, self.key, self.count = folder, key, 0
        (folder / SEALED).mkdir(mode=0o700)

    def link(self, path: Path) -> Path:
        """Make `path` the link to a next file; the path that this is to be written to."""
        path.symlink_to(f"/proc/self/fd/{FIRST + self.count}")
        self.count += 1
        return self._folder / SEALED / str(self.count - 1)

    def copy(self, source: str | os.PathLike[str], path: str) -> str:
        """Copy a file, as `shutil.copytree` asks for it. Raises OSError."""
        with Path(source).open("rb") as given, writing(self.link(Path(path)), self.key) as file:
            while piece := given.read(CHUNK):
                file.write(piece)
        return path


class _Sealing(io.RawIOBase):
    """A file of which what is written is encrypted."""

    def __init__(self, file: BinaryIO, key: DataKey) -> None:
        self._file, self._sealer, self._size = file, Sealer(key), 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def write(self, content: Any, /) -> int:
        view = memoryview(content).cast("B")
        for piece in self._sealer.take(view):
            self._file.write(piece)
        self._size += len(view)
        return len(view)

    def end(self) -> None:
        self._file.write(self._sealer.end())


@contextmanager
def writing(path: Path, key: DataKey | None) -> Iterator[BinaryIO]:
    """The new file `path`, mode 0400, to write from its start to its end; it is on the disk after the block. key: what
    it is encrypted under, None for not.

    Raises:
        OSError: it cannot be written.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
    with os.fdopen(descriptor, "wb") as file:
        if key is None:
            yield file
        else:
            sealing = _Sealing(file, key)
            yield cast("BinaryIO", sealing)
            sealing.end()
        file.flush()
        os.fsync(file.fileno())


def most_open(count: int) -> int:
    """How many files a worker with `count` of data may open; at most what this program may."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FIRST + OTHERS + count
    return wanted if most == resource.RLIM_INFINITY else min(most, wanted)


def open_all(folder: Path, count: int, key: DataKey) -> None:
    """Have the data of which `folder` holds `count` sealed files in this process's memory, where the links lead.

    Raises:
        InputError: they are more files, or larger, than this machine has room for.
        IntegrityError: one is not as it was written.
    """
    if FIRST + count >= resource.getrlimit(resource.RLIMIT_NOFILE)[0]:
        raise InputError(
            f"the data are {count} files, more than a program may open here; raise the limit (LimitNOFILE, "
            "ulimit -Hn), or put them into fewer files"
        )
    for number in range(count):
        sealed = os.open(folder / SEALED / str(number), os.O_RDONLY | os.O_CLOEXEC)
        try:
            held = os.memfd_create("data", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                write_early(held, Sealed(sealed, key, "the copy of the data").pieces())
                fcntl.fcntl(held, fcntl.F_ADD_SEALS, _READ_ONLY)
                os.dup2(held, FIRST + number, inheritable=False)
            finally:
                os.close(held)
        except OSError as error:
            if error.errno in (errno.ENOMEM, errno.ENOSPC):
                raise InputError("the data do not fit into this machine's memory") from error
            raise
        finally:
            os.close(sealed)
