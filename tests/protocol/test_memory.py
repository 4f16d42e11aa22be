"""What a process does with memory: of how many heaps its threads take it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

_THREADS = """
import sys, threading
from consortium.protocol.memory import one_heap
from heaps import heaps
if sys.argv[1] == "one":
    one_heap()
here, done = threading.Barrier(9), threading.Event()
def take():
    kept = [bytearray(2000) for _ in range(100)]
    here.wait()
    done.wait()
    del kept
threads = [threading.Thread(target=take) for _ in range(8)]
for thread in threads:
    thread.start()
here.wait()
print(heaps("self"))
done.set()
"""


def _heaps(how: str) -> int:
    environment = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    environment["PYTHONPATH"] = os.pathsep.join(one for one in sys.path if one)
    command = [sys.executable, "-c", _THREADS, how]
    return int(subprocess.run(command, env=environment, capture_output=True, check=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has other heaps")
def test_threads_share_one_heap() -> None:
    """Eight threads at once take memory from one heap, where they otherwise have several, each as large as its peak."""
    assert _heaps("one") == 1
    assert _heaps("many") > 1
