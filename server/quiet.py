"""Log lines about strangers and about errors: not too many, and nothing of what a peer sent."""

from __future__ import annotations

import logging
import threading
import time
import traceback


class Quiet:
    """Logs what anybody from outside can bring about: a few lines in a while, then their number."""

    LINES, SECONDS = 20, 10.0

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._lock = threading.Lock()
        self._begun, self._lines = time.monotonic(), 0

    def __call__(self, level: int, message: str, *values: object) -> None:
        """As `logging.Logger.log`."""
        if not self._log.isEnabledFor(level):
            return
        with self._lock:
            now, left_out = time.monotonic(), 0
            if now - self._begun > self.SECONDS:
                left_out, self._begun, self._lines = max(0, self._lines - self.LINES), now, 0
            self._lines += 1
            silent = self._lines > self.LINES
        if left_out:
            self._log.warning("%d more lines such as the following were left out", left_out)
        if not silent:
            self._log.log(level, message, *values)


def where(error: BaseException) -> str:
    """An error's type and the lines that it came through. Its text is left out: it may hold what a peer sent."""
    return f"{type(error).__name__}\n{''.join(traceback.format_tb(error.__traceback__))}".rstrip()
