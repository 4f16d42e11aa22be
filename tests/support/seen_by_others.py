"""What can be seen of processes from outside: arguments and environment, as they come and go."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Shown:
    """One program that ran. environment: as it was started with."""

    pid: int
    arguments: bytes
    environment: bytes

    def runs(self, module: str) -> bool:
        """Whether it is that command or module."""
        return module.encode() in self.arguments.replace(b"\0", b" ")


class Watcher:
    """Notes every program among the processes that `who` lists, until it is stopped."""

    def __init__(self, who: Callable[[], Sequence[int]]) -> None:
        self._who, self.shown = who, set[Shown]()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look once more, and then no more."""
        self._ended.set()
        self._thread.join(20)

    def _loop(self) -> None:
        while True:
            for pid in self._who():
                with suppress(OSError):
                    folder = Path(f"/proc/{pid}")
                    arguments, environment = (
                        (folder / "cmdline").read_bytes(),
                        (folder / "environ").read_bytes(),
                    )
                    if arguments:
                        self.shown.add(Shown(pid, arguments, environment))
            if self._ended.wait(0.05):
                return
