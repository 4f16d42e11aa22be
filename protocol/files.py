"""Private files and folders: written whole, durable, and readable by their owner alone."""

from __future__ import annotations

import ctypes
import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from consortium.protocol.errors import InputError


def write_private(path: Path, content: bytes, beside: Path | None = None) -> None:
    """Put `content` in place of what was at `path`, whole or not at all, mode 0600; it survives a power cut.

    beside: a folder on the same disk for the file until it is whole, where that of `path` may hold no other file, not
    for a moment and not after a power cut.

    Raises:
        OSError: the disk is full, read-only, and the like; what was there is untouched then.
    """
    write_pieces(path, [content], beside)


def write_pieces(
    path: Path, pieces: Iterable[bytes | bytearray | memoryview], beside: Path | None = None
) -> None:
    """As `write_private`, of content that is never in memory as a whole."""
    partial = (beside or path.parent) / f".{path.name}.{secrets.token_hex(4)}"
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            write_early(descriptor, pieces)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        partial.replace(path)
    except BaseException as error:
        with suppress(OSError):  # on a disk that went read-only; what is left of it is in nobody's way
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say where
        raise
    sync_folder(path.parent)


def sweep(folder: Path, *names: str) -> None:
    """Remove what a power cut left of files that were never whole. Nobody may write files of these names meanwhile."""
    for name in names:
        for path in folder.glob(f".{name}.*"):
            path.unlink(missing_ok=True)


EARLY = 8 << 20
"""Bytes after which the disk begins to take what was written."""
_WRITE = 2  # SYNC_FILE_RANGE_WRITE of <fcntl.h>


def write_early(descriptor: int, pieces: Iterable[bytes | bytearray | memoryview], place: int = 0) -> int:
    """Write `pieces` one after the other into a file from `place` on; returns where they end.

    The disk takes them meanwhile, so that the fsync after 400 MB waits for the last few alone. It is no less needed.

    Raises:
        OSError: the disk is full, and the like.
    """
    begin, given = getattr(ctypes.CDLL(None), "sync_file_range", None), place
    for piece in pieces:
        left = memoryview(piece).cast("B")
        while left:
            count = os.pwrite(descriptor, left, place)
            left, place = left[count:], place + count
        if begin is not None and place - given >= EARLY:  # Linux has it; elsewhere the fsync does it all
            begin(descriptor, ctypes.c_int64(given), ctypes.c_int64(place - given), _WRITE)
            given = place
    return place


MEMORY = 64 << 20
"""Bytes up to which a working file is held in memory; beyond it lies on disk, not encrypted, and without a name."""


def working_file(folder: Path, size: int) -> int:
    """A new file for `size` bytes of which nothing is left when it is closed; a descriptor."""
    if size <= MEMORY:
        return os.memfd_create("consortium", os.MFD_CLOEXEC)
    return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)


def written_over(descriptor: int, size: int) -> int:
    """A working file that was used before, ready for `size` bytes in place of what it holds.

    To write 400 MB over costs a tenth to a half of writing them into a new file, for which the system must find pages.

    Raises:
        OSError: it cannot have that size.
    """
    os.ftruncate(descriptor, size)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: what was created, renamed or removed there."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def private_folder(path: Path) -> Path:
    """The folder `path`, made with mode 0700 where it is missing, and closed to others where it is not. Its name is
    durable when this returns, so that what is kept in it can be.

    Raises:
        InputError: it cannot be made or is not ours.
    """
    try:
        missing = [one for one in (path, *path.parents) if not one.exists()]
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for one in missing:
            sync_folder(one.parent)
        if path.stat().st_mode & 0o077:
            path.chmod(0o700)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be used as a folder ({error.strerror}); give another one"
        ) from error
    return path
