"""The sites in worker processes, one single-threaded process a core.

A worker is a fork of this process: it starts in milliseconds with everything imported, and data that are already in
memory are not copied. It holds one model, which it overwrites for each client in turn. Models, block sums and updates
lie in shared memory; pipes carry ranges of slots one way and a few numbers a client the other way.

Whole blocks of the cohort are dealt out and summed where they are made. What would leave a process idle at the end,
fewer blocks than processes, is dealt out slot by slot, put into shared memory and summed here. A worker that is done,
or far ahead, takes from the one that is farthest behind, so that few sums wait for one before them. None of this
changes a bit: sums are always made block by block, in slot order, and added up in block order.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import selectors
import signal
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from consortium.protocol.errors import ConsortiumError
from consortium.protocol.layout import Kind, Vector
from consortium.protocol.messages import Answer, Instruction, Payload
from consortium.server.clients import Block
from consortium.simulations.host import Host, Question, Share, Sums, World, block, blocks_of, joined
from consortium.simulations.shared import Vault, shared_array
from consortium.strategies.base import BLOCK, BlockSum, Contribution
from consortium.strategies.means import block_sum

AHEAD = 2
"""Tasks that a worker has at hand, the one it is at included: it need not wait for the next."""

LEAD = 16
"""Blocks by which a worker may be ahead of another before it helps that one: sums wait for those before them."""

_PR_SET_PDEATHSIG = 1
_FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Areas:
    """What this process and its workers share.

    model: the vectors asked about, by kind. rows: (sites, size) by kind: a block's sum at the row that its task names,
    or a slot's update at the slot's own. cohort, admitted: as in `Question`, of which the first slots are in use.
    """

    model: Mapping[Kind, Vector]
    rows: Mapping[Kind, NDArray[Any]]
    cohort: NDArray[np.int32]
    admitted: NDArray[np.int32]
    vault: Vault | None


@dataclass(frozen=True)
class Exchange:
    """A question as it is sent to workers: vectors and cohort are in the areas.

    slots: how many were asked. kinds: the vectors that the instruction carries.
    """

    instruction: Instruction
    slots: int
    kinds: tuple[Kind, ...]


@dataclass(frozen=True)
class Task:
    """Slots of one block to serve; `summed`: they are the whole block and only its sum is kept, at `row`."""

    slots: range
    summed: bool
    row: int = -1


@dataclass(frozen=True)
class Done:
    """What a worker gives back for a task; `sums` has the weight and count of each segment's sum."""

    share: Share
    sums: Mapping[Kind, tuple[float, int]]


@dataclass(frozen=True)
class Failed:
    """The study's code failed at a site: what to say, and where it happened."""

    message: str
    trace: str


@dataclass(eq=False)
class Worker:
    """A worker as this process sees it. at_hand: tasks sent to it. ahead: tasks dealt to it, but not sent."""

    process: ForkProcess
    pipe: Connection
    at_hand: deque[Task] = field(default_factory=deque)
    ahead: deque[Task] = field(default_factory=deque)


class Processes:
    """`Clients` over `count` workers; a context manager, which ends them however it is left.

    A worker that dies (killed, out of memory) costs the sites that it was serving their place in the round, and
    another is started. Sites' memories are in shared memory and stay.

    Raises:
        ConsortiumError: while answers are read, if the study's code fails at a site.
    """

    def __init__(self, world: World, count: int) -> None:
        sites, segments = len(world.population.names), [world.layout[kind] for kind in world.kinds]
        self._world = world
        self._areas = Areas(
            model={s.kind: shared_array((s.size,), s.numpy_dtype) for s in segments},
            rows={s.kind: shared_array((sites, s.size), s.numpy_dtype) for s in segments},
            cohort=shared_array((sites,), np.int32),
            admitted=shared_array((sites,), np.int32),
            vault=Vault(world.layout, sites) if Vault.needed(world.layout) else None,
        )
        self._index = {name: index for index, name in enumerate(world.population.names)}
        self._exchange: Exchange | None = None
        self._summed = False
        self._sums = Sums()
        self._rows: dict[int, int] = {}  # of blocks that are summed and not folded yet
        self._free: list[int] = []
        self._selector = selectors.DefaultSelector()
        self._workers: list[Worker] = []
        for _ in range(count):
            worker = Worker(*self._fork())
            self._selector.register(worker.pipe, selectors.EVENT_READ, worker)
            self._workers.append(worker)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        """End the workers; an idle one ends by itself when its pipe closes."""
        self._selector.close()
        for worker in self._workers:
            worker.pipe.close()
        for worker in self._workers:
            worker.process.join(timeout=0 if worker.at_hand else 1)
            worker.process.kill()
            worker.process.join()
            worker.process.close()

    @property
    def pids(self) -> list[int]:
        """The workers' process ids."""
        return [worker.process.pid or 0 for worker in self._workers]

    def sites(self) -> Sequence[str]:
        return self._world.population.names

    def ask(self, sites: Sequence[str], instruction: Instruction) -> None:
        areas, names, slots = self._areas, self._world.population.names, len(sites)
        cohort, counted = areas.cohort[:slots], instruction.counted
        cohort[:] = np.fromiter((self._index[site] for site in sites), np.int32, slots)
        cohort.sort()
        areas.admitted[:slots] = np.fromiter((counted.get(names[i], 0) for i in cohort), np.int32, slots)
        vectors = instruction.payload.vectors
        kinds = tuple(kind for kind in areas.model if kind in vectors)
        for kind in kinds:
            areas.model[kind][:] = vectors[kind]
        payload = Payload({}, dict(instruction.payload.statistics))
        self._exchange = Exchange(replace(instruction, payload=payload, counted={}), slots, kinds)
        self._summed = instruction.kind == "train" and self._world.strategy.reducer.scale is not None
        for worker in self._workers:
            if worker.process.is_alive():
                _send(worker, self._exchange)
            else:
                self._restart(worker)
        self._deal(slots)

    def _deal(self, slots: int) -> None:
        """Whole blocks as far as every worker gets the same number of them, then slot by slot."""
        blocks, count = list(blocks_of(slots)), len(self._workers)
        whole = slots // BLOCK // count * count
        self._sums, self._rows = Sums(), {}
        self._free = list(range(whole))[::-1]  # none is a row of a slot that is served by itself
        tasks = [Task(one, self._summed) for one in blocks[:whole]]
        tasks += [Task(range(slot, slot + 1), False) for one in blocks[whole:] for slot in one]
        for number, task in enumerate(tasks):
            self._workers[number % count].ahead.append(task)

    def answers(self, deadline: float) -> Iterator[Answer | Block]:
        parts: dict[int, list[Share]] = {}
        for worker in self._workers:
            self._feed(worker)
        while any(worker.at_hand for worker in self._workers):
            for key, _ in self._selector.select():
                task, done = self._next(key.data)
                self._feed(key.data)
                if task is not None:
                    yield from self._taken(task, done, parts)
        if self._summed:
            assert self._exchange is not None
            yield block(self._exchange.instruction, self._name, Share(), self._sums.whole, {})

    def _next(self, worker: Worker) -> tuple[Task | None, Done]:
        """The task that the worker has done, or that died with it; None where it died idle."""
        try:
            result = worker.pipe.recv()
        except (EOFError, OSError):
            reason = self._restart(worker)
            if not worker.at_hand:
                return None, Done(Share(), {})
            task = worker.at_hand.popleft()
            worker.ahead.extendleft(reversed(worker.at_hand))  # these it had not begun
            worker.at_hand.clear()
            return task, Done(Share(left_out=dict.fromkeys(task.slots, reason)), {})
        if isinstance(result, Failed):
            # chained, not noted: a trace is shown with --debug only
            raise ConsortiumError(result.message) from RuntimeError(f"in a worker process:\n{result.trace}")
        assert isinstance(result, Done)
        return worker.at_hand.popleft(), result

    def _feed(self, worker: Worker) -> None:
        """Send the worker its next tasks, or those of the worker that is farthest behind; the one used last of the free
        rows is used next, so that few are ever written."""
        while len(worker.at_hand) < AHEAD:
            own = worker.ahead
            waiting = [other.ahead for other in self._workers if other.ahead]
            if not waiting:
                return
            behind = min(waiting, key=lambda tasks: tasks[0].slots.start)
            near = own and own[0].slots.start - behind[0].slots.start <= LEAD * BLOCK
            tasks = own if near else behind
            more = tasks is own and len(own) > 1 and len(own[1].slots) > 1
            if worker.at_hand and len(tasks[0].slots) > 1 and not more:
                return  # whoever is free first takes it
            task = tasks.popleft()
            if task.summed and task.row < 0:
                task = replace(task, row=self._free.pop())
            worker.at_hand.append(task)
            _send(worker, task)

    def _taken(self, task: Task, done: Done, parts: dict[int, list[Share]]) -> Iterator[Block]:
        """What the round loop can have now that this task is done."""
        assert self._exchange is not None
        instruction, slots, rows = self._exchange.instruction, task.slots, self._areas.rows
        number = slots.start // BLOCK
        if task.summed:
            self._rows[number] = task.row
            sums = {k: BlockSum(number, rows[k][task.row], w, n) for k, (w, n) in done.sums.items()}
            self._fold(number, sums)
            yield block(instruction, self._name, done.share, {}, {})
        elif self._summed:
            have = parts.setdefault(number, [])
            have.append(done.share)
            if len(have) == min(BLOCK, self._exchange.slots - number * BLOCK):
                share = joined(parts.pop(number))
                self._fold(number, self._summed_here(share))
                yield block(instruction, self._name, share, {}, {})
        else:
            kinds = self._world.kinds if instruction.kind == "train" else ()
            vectors: dict[int, dict[str, Vector]] = {
                slot: {kind: rows[kind][slot] for kind in kinds} for slot in done.share.slots
            }
            yield block(instruction, self._name, done.share, {}, vectors)

    def _fold(self, number: int, sums: Mapping[Kind, BlockSum]) -> None:
        for folded in self._sums.add(number, sums):
            if folded in self._rows:
                self._free.append(self._rows.pop(folded))

    def _summed_here(self, share: Share) -> dict[Kind, BlockSum]:
        """The sums of a block that was served slot by slot."""
        sums: dict[Kind, BlockSum] = {}
        for kind, rows in self._areas.rows.items() if share.slots else ():
            columns = zip(share.slots, share.weights, share.norms, strict=True)
            members = [Contribution(slot, rows[slot], weight, norm) for slot, weight, norm in columns]
            sums[kind] = block_sum(self._world.strategy.reducer, members)
        return sums

    def _name(self, slot: int) -> str:
        return self._world.population.names[int(self._areas.cohort[slot])]

    def wait(self, sites: Sequence[str]) -> bool:
        return False

    def _fork(self) -> tuple[ForkProcess, Connection]:
        ours, theirs = _FORK.Pipe()
        inherited = [ours, *(worker.pipe for worker in self._workers)]
        process = _FORK.Process(target=_work, args=(self._world, self._areas, theirs, inherited), daemon=True)
        process.start()
        theirs.close()  # no later fork may hold it open, or the end of this worker would not be seen
        return process, ours

    def _restart(self, worker: Worker) -> str:
        """A new process in the place of one that has died, whose tasks stay; says how that one died."""
        self._selector.unregister(worker.pipe)
        worker.pipe.close()
        worker.process.join()
        code = worker.process.exitcode or 0
        worker.process.close()
        worker.process, worker.pipe = self._fork()
        self._selector.register(worker.pipe, selectors.EVENT_READ, worker)
        _send(worker, self._exchange)
        if code >= 0:
            return f"no answer: its process ended with exit code {code}"
        hint = " (perhaps out of memory)" if code == -signal.SIGKILL else ""
        return f"no answer: its process was killed by {signal.Signals(-code).name}{hint}"


def _send(worker: Worker, message: Exchange | Task | None) -> None:
    with contextlib.suppress(BrokenPipeError):  # it has died: reading from it says so
        worker.pipe.send(message)


def _work(world: World, areas: Areas, pipe: Connection, inherited: Sequence[Connection]) -> None:
    """A worker's life: serve tasks until the other end of the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started us
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # and if it is killed, so are we
    torch.set_num_threads(1)
    for connection in inherited:
        connection.close()
    gc.freeze()  # what was there before the fork stays shared
    host = Host(world, areas.vault)
    question: Question | None = None
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            message = pipe.recv()
            if isinstance(message, Exchange):
                question = _question(world, areas, message)
            else:
                assert question is not None
                pipe.send(_done(host, areas, question, message))


def _question(world: World, areas: Areas, exchange: Exchange) -> Question:
    vectors: dict[str, Vector] = {kind: areas.model[kind].view() for kind in exchange.kinds}
    for vector in vectors.values():
        vector.flags.writeable = False
    statistics = exchange.instruction.payload.statistics
    instruction = replace(exchange.instruction, payload=Payload(vectors, statistics))
    gate = world.gate(instruction)
    return Question(instruction, gate, areas.cohort[: exchange.slots], areas.admitted[: exchange.slots])


def _done(host: Host, areas: Areas, question: Question, task: Task) -> Done | Failed:
    def store(kind: Kind, slot: int, update: Vector) -> None:
        areas.rows[kind][slot] = update

    try:
        share, sums = host.serve(question, task.slots, None if task.summed else store)
    except ConsortiumError as error:
        return Failed(str(error), "".join(traceback.format_exception(error)))
    for kind, one in sums.items():
        areas.rows[kind][task.row] = one.total
    return Done(share, {kind: (one.weight, one.count) for kind, one in sums.items()})
