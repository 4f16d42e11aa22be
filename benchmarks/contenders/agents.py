"""Many sites on one machine: agents (`client/agent.py`) as threads of a few processes, whose work is trivial.

The agents are the real ones, each with its folder, keys, connections and signatures; only what a site computes is left
out, so that what is measured is the server.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import BinaryIO

import numpy as np

from consortium.client import joining
from consortium.client.agent import Agent
from consortium.client.home import Home
from consortium.client.work import Answered, Given
from consortium.protocol.errors import ConsortiumError
from consortium.protocol.memory import one_heap
from consortium.protocol.messages import Answer, Payload, encode
from consortium.server.admin_client import Admin
from contenders.live import FEATURES, ROWS

PROCESSES = 2
BINS = 256
HOLE = 1 << 16
LATE = 0.7
"""Seconds."""
_SPAWN = multiprocessing.get_context("spawn")


class Trivial:
    """As `client.work.Work`: answers at once, as a site of `live.study_of` would that learns nothing.

    parameters: of the study's model.
    """

    def __init__(self, parameters: int) -> None:
        self._update = np.zeros(parameters, np.float32)  # pages that nobody writes take no memory

    def begin(self, runs: set[str], over: set[str]) -> None: ...
    def end(self, run: str) -> None: ...
    def finished(self, run: str, for_good: bool) -> None: ...
    def tidy(self, recent: Callable[[str], bool]) -> None: ...
    def interrupt(self) -> None: ...
    def stop(self) -> None: ...

    def answer(self, given: Given) -> Answered:
        about = given.about
        metrics = {"rmse": np.array([1.0, ROWS / 2])}
        if about.kind == "query":
            each = np.full(FEATURES, ROWS / 2)
            bins = np.full((FEATURES, BINS), ROWS / 2 / BINS)
            sums = {"histogram": bins, "count": each, "sum": each / 2, "squares": each / 3}
            answer = Answer.to_instruction(about, payload=Payload(statistics=sums))
        elif about.kind == "evaluate":
            answer = Answer.to_instruction(about, metrics=metrics)
        else:
            update = Payload({"shared": self._update})
            answer = Answer.to_instruction(about, weight=ROWS / 2, payload=update, metrics=metrics)
        header, views = encode(answer)
        return Answered(header, _file(views))


class Unreliable(Trivial):
    """Trivial, but that a share of its answers to training are, a third each, late by `LATE`, lost, or NaN."""

    def __init__(self, parameters: int, share: float, seed: int) -> None:
        super().__init__(parameters)
        self._nan = np.full(parameters, np.nan, np.float32)
        self._share, self._random = share, random.Random(seed)

    def answer(self, given: Given) -> Answered:
        about = given.about
        drawn = self._random.random() / self._share if self._share and about.kind == "train" else 1.0
        if drawn < 1 / 3:
            time.sleep(LATE)
        elif drawn < 2 / 3:
            time.sleep(max(0.0, about.expires - time.time()) + 0.01)
            raise ConsortiumError("the answer is lost")  # after its time, the agent sends none
        elif drawn < 1:
            header, views = encode(
                Answer.to_instruction(about, weight=ROWS / 2, payload=Payload({"shared": self._nan}))
            )
            return Answered(header, _file(views))
        return super().answer(given)


def _file(views: Sequence[memoryview]) -> BinaryIO:
    """A file of the views, one after the other; a long one is zeros, of which a file need not hold anything."""
    file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - the agent closes it
    for view in views:
        if len(view) > HOLE:
            file.seek(len(view), os.SEEK_CUR)
        else:
            file.write(view)
    return file


def join(admin: Admin, folder: Path, number: int) -> list[Path]:
    """Let as many sites join; their folders."""
    homes = []
    for site in (f"site-{n:04}" for n in range(number)):
        code = admin.post(f"/v1/sites/{site}/invite")["code"]
        homes.append(joining.join(code, folder / site).home.folder)
    return homes


@contextmanager
def agents(homes: Sequence[Path], parameters: int = FEATURES + 1, faulty: float = 0.0) -> Iterator[list[int]]:
    """The agents of these folders run while the block lasts; the ids of their processes.

    parameters: of the model that is trained. faulty: the share of `Unreliable` answers.
    """
    started: list[tuple[BaseProcess, Connection]] = []
    for part in range(PROCESSES):
        ours, theirs = _SPAWN.Pipe()
        process: BaseProcess = _SPAWN.Process(
            target=_host, args=(homes[part::PROCESSES], parameters, faulty, theirs), daemon=True
        )
        process.start()
        started.append((process, ours))
    try:
        yield [process.pid or 0 for process, _ in started]
    finally:
        for process, pipe in started:
            pipe.send(None)
            process.join(60)
            process.kill()


def _host(homes: Sequence[Path], parameters: int, faulty: float, pipe: Connection) -> None:
    one_heap()  # as `client/program.py` does
    running = []
    for number, folder in enumerate(homes):
        home = Home(folder)
        agent = Agent(home, home.lock(), Unreliable(parameters, faulty, number))
        agent.start()
        running.append(agent)
    pipe.recv()
    for agent in running:
        agent.stop(0.1)
