"""What a process does with memory that it has freed."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # of <malloc.h>


def one_heap() -> None:
    """Have all threads that start from now on share one heap, where the C library is glibc.

    By default it has up to eight heaps a processor, and a thread takes memory from any of them. With a thread for each
    connection every heap comes to hold the most that was ever needed at once, and what is free in one is no use to the
    others: a process of which nothing grows takes more with every hour. Python's threads take memory one at a time in
    any case.
    """
    _mallopt(_ARENA_MAX, 1)


def keep_freed_memory() -> None:
    """Keep freed memory for the next array of its size, from now on, where the C library is glibc.

    By default each array of 32 MiB or more is mapped when it is made and unmapped when it is freed, and the kernel
    clears every page of it again: a training step over 100 M parameters costs 100,000 page faults for its gradient,
    and on a virtual machine that gives freed memory back to its host more time than the arithmetic. The process's
    memory stays at its peak instead.
    """
    _mallopt(_MMAP_MAX, 0)
    _mallopt(_TRIM_THRESHOLD, -1)  # none


def give_freed_memory_back() -> None:
    """Undo `keep_freed_memory`, and give what is free to the system now."""
    _mallopt(_MMAP_MAX, 1 << 16)
    _mallopt(_TRIM_THRESHOLD, 1 << 17)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _mallopt(parameter: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(parameter, value)
