"""Of how many heaps of glibc a process takes memory."""

from __future__ import annotations

from pathlib import Path

_HEAP = 64 << 20
"""Bytes of address space that each heap but the first reserves, at a multiple of as many."""


def heaps(pid: int | str) -> int:
    """The first, and all that were made for threads: the part of each that is in use comes before the rest of it."""
    found, before, used = 1, 0, False
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        where, rights = line.split()[:2]
        start, end = (int(one, 16) for one in where.split("-"))
        found += used and rights == "---p" and start == before and end % _HEAP == 0
        used, before = rights == "rw-p" and start % _HEAP == 0, end
    return found
