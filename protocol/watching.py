"""Watching a confined process from outside: what it takes, and what it says."""

from __future__ import annotations

import contextlib
import io
import os
import stat
from collections.abc import Callable, Sequence
from typing import IO

from consortium.protocol.sandbox import MAX_DISK, MAX_THREADS

LONGEST_LINE = 4000
MOST_LINES = 1000
"""Lines of a confined process that are logged."""
LOOK_EVERY = 0.2
"""Seconds between two looks at what it takes."""
FORBIDDEN = "the study's code asked the kernel for what the sandbox forbids, and was ended"


def beyond(pid: int, folders: Sequence[str], disk: int = MAX_DISK) -> str:
    """Why a confined process must be ended now, for what it takes of threads and disk; empty where it need not.

    folders: where it may write. disk: bytes that it may have in them, and in files that it has open and no name.

    Raises:
        OSError: it is ending.
    """
    if len(os.listdir(f"/proc/{pid}/task")) > MAX_THREADS:  # noqa: PTH208 - names alone
        return f"started more than {MAX_THREADS} threads, and was ended"
    if _taken(pid, folders) > disk:
        return f"wrote more than {MAX_DISK >> 30} GiB, and was ended"
    return ""


def pump(stream: IO[bytes], log: Callable[[str], None], bounded: bool) -> None:
    """Hand on the lines of a process until it ends, without control characters. bounded: at most `MOST_LINES`."""
    count = 0
    with io.TextIOWrapper(stream, "utf-8", "replace") as lines:
        while line := lines.readline(LONGEST_LINE):
            count += 1
            if line.strip() and (not bounded or count <= MOST_LINES):
                log(plain(line.rstrip()))
            if bounded and count == MOST_LINES:
                log(f"it has written {MOST_LINES} lines; no more of them are shown")


def plain(text: str) -> str:
    """A text that study's code may have written, without control characters."""
    return "".join(c if c.isprintable() else " " for c in text)


def _taken(pid: int, folders: Sequence[str]) -> int:
    count = 0
    for folder in folders:
        for place, _, names in os.walk(folder):
            count += sum(_blocks(os.path.join(place, name)) for name in names)  # noqa: PTH118 - it is many
    return count + sum(_blocks(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208


def _blocks(path: str) -> int:
    with contextlib.suppress(OSError):
        about = os.stat(path)  # noqa: PTH116 - it is many
        return about.st_blocks * 512 if stat.S_ISREG(about.st_mode) else 0
    return 0
