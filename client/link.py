"""How the agent stands with the server, in words for its operator: a line of the log for a change, not for a try."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from consortium.client.backoff import Backoff
from consortium.protocol.connection import ShutOutError, StatusError

SLOW = 30.0
"""Seconds between tries of a site that the server does not let in."""
SHUT_OUT = 3
"""How often in a row a connection must be closed at once before that is taken for a refusal."""
AGAIN = 60.0
"""Seconds before another reason of the same absence is worth a line."""

_log = logging.getLogger("consortium.agent")


class Link:
    """For one thread that changes it and any that read it.

    since: when the present state began, seconds since the epoch. error: why there is no connection, "" where there is
    one. refused: whether the server seems to know this site's certificate no more.
    """

    def __init__(self, where: str, clock: Callable[[], float] = time.time) -> None:
        self._where, self._clock = where, clock
        self._backoff = Backoff()
        self._shut = 0
        self._said = 0.0
        self.up, self.refused = False, False
        self.since, self.error = clock(), "not connected yet"

    def connected(self) -> None:
        """The server answered."""
        self._backoff.reset()
        self._shut = 0
        if not self.up:
            _log.info("connected to %s", self._where)
            self.up, self.refused, self.since, self.error = True, False, self._clock(), ""

    def lost(self, error: Exception) -> float:
        """There is no connection, for that reason; how many seconds to wait before the next try."""
        self._shut = self._shut + 1 if not self.up and isinstance(error, ShutOutError) else 0
        forbidden = isinstance(error, StatusError) and error.status in (401, 403)
        refused = forbidden or self._shut >= SHUT_OUT
        reason = str(error)
        if refused:
            reason = (
                f"{self._where} does not let this site in (was it revoked, has its certificate expired, was the "
                "server restored from a backup of before this site joined, or is it full?); ask the server's admin, "
                "who can invite it anew"
            )
        now = self._clock()
        fresh = self.up or refused != self.refused or self.error == "not connected yet"
        if fresh or (reason != self.error and now - self._said > AGAIN):
            _log.warning("no connection: %s; trying again", reason)
            self._said = now
        if self.up or self.error == "not connected yet":
            self.since = now
        self.up, self.refused, self.error = False, refused, reason
        wait = self._backoff.next()
        return SLOW * (0.8 + 0.04 * wait) if refused else wait
