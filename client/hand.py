"""The instructions that a site has in hand, and how the runs stand here: what the server and the operator are told."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from consortium.client.inbox import Taken

MOST_NONCES = 64
"""Nonces that a poll may name."""

_log = logging.getLogger("consortium.agent")


@dataclass(frozen=True)
class RunStatus:
    """What the operator sees of a run.

    state: waiting, training, working, sending, answered, declined, late, not taken, failed; why: where one of the last
        four.
    at: since when, seconds since the epoch.
    """

    study: str
    state: str
    why: str
    kind: str
    round: int
    attempt: int
    at: float


class Hand:
    """For any number of threads."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._open: dict[str, Taken] = {}
        self._closed: OrderedDict[str, None] = OrderedDict()
        self._runs: OrderedDict[str, RunStatus] = OrderedDict()

    def has(self, nonce: str) -> bool:
        """Whether the instruction of a nonce is in hand."""
        return nonce in self._open

    def nonces(self) -> list[str]:
        """What the server need not offer: what is in hand, and what was refused or given up for good."""
        with self._lock:
            return [*self._open, *self._closed][:MOST_NONCES]

    def take(self, taken: Taken) -> None:
        """An instruction came."""
        with self._lock:
            self._open[taken.about.nonce] = taken
        self.show(taken, "waiting")

    def done(self, nonce: str) -> Taken:
        """The instruction of a nonce is answered, and the server has the answer."""
        with self._lock:
            return self._open.pop(nonce)

    def close(self, nonce: str) -> None:
        """Nothing more is done about a nonce, though the server may still offer it."""
        with self._lock:
            self._open.pop(nonce, None)
            self._closed[nonce] = None
            while len(self._closed) > MOST_NONCES // 2:
                self._closed.popitem(last=False)

    def show(self, taken: Taken, state: str, why: str = "") -> None:
        """Note how the run of an instruction stands now."""
        about = taken.about
        study = taken.study.name if taken.study is not None else ""
        status = RunStatus(study, state, why, about.kind, about.round, about.attempt, self._clock())
        with self._lock:
            self._runs[about.run] = status
            self._runs.move_to_end(about.run)
            while len(self._runs) > MOST_NONCES:
                self._runs.popitem(last=False)
        level = {"answered": logging.INFO, "declined": logging.INFO}.get(state, logging.DEBUG)
        level = logging.WARNING if state in ("late", "not taken", "failed") else level
        end = f": {why}" if why else ""
        _log.log(level, "run %s, %s of round %d: %s%s", about.run, about.kind, about.round, state, end)

    def state(self, run: str) -> str:
        """How a run stands, "" where it is unknown."""
        status = self._runs.get(run)
        return status.state if status is not None else ""

    def runs(self) -> dict[str, dict[str, Any]]:
        """Every run of late, by name, the latest last."""
        with self._lock:
            return {run: asdict(one) for run, one in self._runs.items()}
