"""What is served now, and its predictions: versions that come and go without a request being lost, in batches.

A request holds the version that it began with, so a promotion changes what later ones get and nothing else. Short
work runs where it is, at once, on the loop's thread, because handing it to another costs more than it takes. What takes
longer goes to a thread, so that health is answered meanwhile, and requests that wait for it go into one batch.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consortium.protocol.errors import ConsortiumError, InputError
from consortium.server import seal
from consortium.server.model import load_model
from consortium.server.serving.tensors import Checker, RequestError

MAX_BATCH = 1 << 12
"""Rows of one batch; a larger request is a batch of its own."""
MAX_WAITING = 1 << 18
"""Rows that may wait; more are refused."""
SHORT = 3e-3
"""Seconds of work that are not handed to a thread."""

Arrays = Mapping[str, NDArray[Any]]


class AbsentError(InputError):
    """There is no such model or version here."""


class OverloadedError(ConsortiumError):
    """Too much waits already."""


@dataclass(frozen=True)
class Loaded:
    """A version with its documents. digest: of its manifest. version: its number in the registry, as text."""

    name: str
    version: str
    digest: str
    contract: Mapping[str, Any]
    lineage: Mapping[str, Any]
    card: str
    lane: Lane
    check: Checker


@dataclass(frozen=True)
class Offered:
    """The versions of one model: the one that is meant where none is named, and all that can be named."""

    default: Loaded | None
    versions: Mapping[str, Loaded]


def load(folder: Path, name: str, version: str, roots: tuple[str, ...], unsigned: bool) -> Loaded:
    """A bundle, verified to the byte and to its signer.

    Raises:
        InputError, IntegrityError: see `load_model` and `seal.check_signer`.
    """
    model = load_model(folder)
    sealed = seal.read(folder)
    seal.check_signer(folder, sealed, roots, unsigned)
    seal.check_approved(folder, sealed)
    lineage = json.loads(seal.content(folder, sealed, "lineage.json"))
    card = seal.content(folder, sealed, "MODEL_CARD.md").decode()
    return Loaded(
        name,
        version,
        sealed.digest,
        model.contract,
        lineage,
        card,
        Lane(model.run),
        Checker(model.contract["inputs"]),
    )


class Engine:
    """Models by name. `offered` is replaced whole, by whoever watches the registry."""

    def __init__(self, offered: Mapping[str, Offered]) -> None:
        self.offered = offered

    def find(self, name: str, version: str = "") -> Loaded:
        """The version that is meant.

        Raises:
            AbsentError: there is none such.
        """
        model = self.offered.get(name)
        if model is None:
            raise AbsentError(f"there is no model '{name[:80]}' here")
        found = model.versions.get(version) if version else model.default
        if found is None:
            known = ", ".join(sorted(model.versions)) or "none"
            what = f"version {version[:20]!r} is not served" if version else "no version is served by default"
            raise AbsentError(f"model '{name}': {what}; served: {known}")
        return found

    @property
    def ready(self) -> bool:
        """Whether each model has a version that is served."""
        return bool(self.offered) and all(one.default is not None for one in self.offered.values())


@dataclass
class _Waiting:
    arrays: Arrays
    rows: int
    done: asyncio.Future[dict[str, NDArray[Any]]]


class Lane:
    """The requests of one version, one batch at a time. For one event loop.

    run: the graph; arrays in, arrays out, a row each.
    """

    def __init__(self, run: Callable[[Arrays], dict[str, NDArray[Any]]]) -> None:
        self._run = run
        self._waiting: deque[_Waiting] = deque()
        self._rows = 0
        self._busy = False
        self._per_row = 0.0
        self._thread: ThreadPoolExecutor | None = None
        self.batches = 0

    async def predict(self, arrays: Arrays) -> dict[str, NDArray[Any]]:
        """The outputs for these rows.

        Raises:
            OverloadedError: too many rows wait.
            RequestError: the graph cannot take these values.
        """
        rows = len(next(iter(arrays.values())))
        if not self._busy and 0 < self._per_row * rows < SHORT:
            self.batches += 1
            try:
                return self._timed(arrays, rows)
            except Exception as error:
                raise _uncomputable(error) from error
        if self._rows and self._rows + rows > MAX_WAITING:
            raise OverloadedError(f"{self._rows} rows wait already; try again later")
        loop = asyncio.get_running_loop()
        done: asyncio.Future[dict[str, NDArray[Any]]] = loop.create_future()
        self._waiting.append(_Waiting(arrays, rows, done))
        self._rows += rows
        if not self._busy:
            self._busy = True
            loop.call_soon(self._next, loop)  # after whatever else has come in by now
        return await done

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin the next batch, or rest."""
        batch = self._take()
        if not batch:
            self._busy = False
            return
        if 0 < self._per_row * sum(one.rows for one in batch) < SHORT:
            self._finish(loop, batch, self._work(batch))
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="graph")
        work = loop.run_in_executor(self._thread, self._work, batch)
        work.add_done_callback(lambda done: self._finish(loop, batch, done.result()))

    def _take(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        rows = 0
        while self._waiting and (not batch or rows + self._waiting[0].rows <= MAX_BATCH):
            one = self._waiting.popleft()
            self._rows -= one.rows
            if not one.done.cancelled():  # else whoever asked has gone
                batch.append(one)
                rows += one.rows
        return batch

    def _work(self, batch: list[_Waiting]) -> dict[str, NDArray[Any]] | Exception:
        joined = batch[0].arrays
        try:
            if len(batch) > 1:
                joined = {name: np.concatenate([one.arrays[name] for one in batch]) for name in joined}
            return self._timed(joined, sum(one.rows for one in batch))
        except Exception as error:  # noqa: BLE001 - whatever the runtime raises is told to whoever asked
            return error

    def _timed(self, arrays: Arrays, rows: int) -> dict[str, NDArray[Any]]:
        started = time.perf_counter()
        found = self._run(arrays)
        taken = (time.perf_counter() - started) / rows
        # The shortest of late: when another program has the processor, the work is not longer for it.
        self._per_row = min(taken, self._per_row * 1.02) if self._per_row else taken
        return found

    def _finish(
        self,
        loop: asyncio.AbstractEventLoop,
        batch: list[_Waiting],
        found: dict[str, NDArray[Any]] | Exception,
    ) -> None:
        self.batches += 1
        if isinstance(found, Exception) and len(batch) > 1:
            for one in batch:  # one request must not spoil another's answer
                self._tell([one], self._work([one]))
        else:
            self._tell(batch, found)
        if self._waiting:
            loop.call_soon(self._next, loop)
        else:
            self._busy = False

    def _tell(self, batch: list[_Waiting], found: dict[str, NDArray[Any]] | Exception) -> None:
        place = 0
        for one in batch:
            if one.done.done():
                pass
            elif isinstance(found, Exception):
                one.done.set_exception(_uncomputable(found))
            else:
                part = {name: array[place : place + one.rows] for name, array in found.items()}
                one.done.set_result(part)
            place += one.rows


def _uncomputable(error: Exception) -> RequestError:
    return RequestError(f"the model cannot compute with these values ({type(error).__name__})")
