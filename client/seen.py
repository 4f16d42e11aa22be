"""The last thing that each run asked of this site, on disk: what came before it is never done again, nor anything of a
run that has ended."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import time

from consortium.protocol.errors import IntegrityError
from consortium.protocol.files import write_private
from consortium.protocol.messages import Instruction

FORMAT = 1
KEPT_DAYS = 400
"""How long a run that asks nothing is remembered; its instructions have expired long before."""


@dataclass(frozen=True, order=True)
class Place:
    """Where in its run an instruction stands: rounds committed before it, then the attempt at the next one.

    An evaluation of the model of round r belongs to the attempts at round r + 1, whether or not any came before it, and
    a query before round 1 stands before all.
    """

    committed: int
    attempt: int

    @staticmethod
    def of(instruction: Instruction) -> Place:
        """The place of an instruction."""
        committed = instruction.round - (instruction.kind != "evaluate")
        return Place(committed, instruction.attempt)


class Seen:
    """The file of one site; for any number of threads.

    epoch: of the server, the latest that was seen (`protocol/epoch.py`).

    Raises:
        IntegrityError: the file is damaged.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time) -> None:
        self._path, self._clock, self._lock = path, clock, threading.Lock()
        self.epoch, self._places, self._times, self._over = _read(path)
        oldest = clock() - KEPT_DAYS * 86400
        for run in [run for run, at in self._times.items() if at < oldest]:
            del self._places[run], self._times[run]
            self._over.discard(run)

    def last(self, run: str) -> Place | None:
        """The last place that was accepted of a run."""
        return self._places.get(run)

    def heard(self, run: str) -> float:
        """When the run last moved on, seconds since the epoch; 0 where it is unknown."""
        return self._times.get(run, 0.0)

    @property
    def latest(self) -> float:
        """The latest time at which an instruction was accepted, seconds since the epoch; 0 for never."""
        return max(self._times.values(), default=0.0)

    def runs(self) -> list[str]:
        """Every run that is remembered and has not ended, the one that moved on last first."""
        return sorted(self._places.keys() - self._over, key=self.heard, reverse=True)

    def over(self) -> set[str]:
        """Every run that is remembered and has ended for good."""
        return set(self._over)

    def begin_epoch(self, epoch: int) -> None:
        """A restored server goes on from what it remembers: forget what was seen of runs. Durable when it returns.

        Raises:
            OSError: it cannot be written; then the epoch has not begun here.
        """
        with self._lock:
            assert epoch > self.epoch
            self._write({}, {}, set(), epoch)

    def end(self, run: str) -> None:
        """A run has ended for good; it is durable when this returns.

        Raises:
            OSError: it cannot be written; then the run has not ended here.
        """
        with self._lock:
            if run in self._places and run not in self._over:
                self._write(self._places, self._times, self._over | {run})

    def accept(self, run: str, place: Place) -> bool:
        """Whether `place` is not before the last one of its run, which goes on. It is durable when this returns True.

        Raises:
            OSError: it cannot be written; then it is not accepted.
        """
        with self._lock:
            last = self._places.get(run)
            if run in self._over:
                return False
            if last is not None and place <= last:
                return place == last
            at = max(self._clock(), self._times.get(run, 0.0))  # a clock that is set back takes nothing back
            self._write({**self._places, run: place}, {**self._times, run: at}, self._over)
            return True

    def _write(
        self, places: dict[str, Place], times: dict[str, float], over: set[str], epoch: int | None = None
    ) -> None:
        epoch = self.epoch if epoch is None else epoch
        runs = {
            name: {"committed": at.committed, "attempt": at.attempt, "at": times[name], "over": name in over}
            for name, at in places.items()
        }
        write_private(
            self._path, json.dumps({"format": FORMAT, "epoch": epoch, "runs": runs}, indent=1).encode()
        )
        self.epoch = epoch
        self._places, self._times, self._over = places, times, over


def _read(path: Path) -> tuple[int, dict[str, Place], dict[str, float], set[str]]:
    if not path.exists():
        return 0, {}, {}, set()
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise ValueError
        runs = document["runs"]
        places = {name: Place(int(one["committed"]), int(one["attempt"])) for name, one in runs.items()}
        over = {
            name for name, one in runs.items() if one.get("over", False) is True
        }  # not there before it was known
        return (
            int(document.get("epoch", 0)),
            places,
            {name: float(one["at"]) for name, one in runs.items()},
            over,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(
            f"{path}: is damaged; without it old instructions cannot be told from new ones. Restore it, or move it "
            "away where no run is under way"
        ) from error
