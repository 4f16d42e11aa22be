"""The sites of one process: opened when first asked, served one after the other on one resident model.

Both runtimes are made of this: `inline` calls it, `processes` calls it in each worker. Every answer passes the
server's own gate here, and is added to its block's sum at once, so that nothing of one client outlives its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from consortium.client.site import Draws, Memory, Site, rows
from consortium.client.task import Source, Task
from consortium.client.trainer import Resident, Schedule
from consortium.privacy.mechanisms import Mechanism, mechanism_of
from consortium.privacy.randomness import Stream
from consortium.protocol.errors import ConsortiumError
from consortium.protocol.layout import Kind, Layout, Vector
from consortium.protocol.messages import Answer, Instruction, Payload, Statistics, changed
from consortium.protocol.study import Study
from consortium.server.admission import Admitted, Gate
from consortium.server.clients import Block
from consortium.server.tally import judge
from consortium.simulations.faults import Fault, deliver
from consortium.strategies.base import BLOCK, BlockSum, Contribution, Strategy
from consortium.strategies.means import follow, include


@dataclass(frozen=True)
class Population:
    """All the sites there are; what is not asked is never opened, so an idle site costs its name.

    names: sorted, each once. source: the data of `names[i]`, called once in each process that serves the site.
    """

    names: Sequence[str]
    source: Callable[[int], Source]


@dataclass(frozen=True)
class World:
    """What every process of a simulation knows from the start."""

    study: Study
    task: Task
    strategy: Strategy
    net: Resident
    population: Population
    schedule: Schedule
    faults: Mapping[str, tuple[Fault, ...]] = field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        return self.net.layout

    @cached_property
    def mechanism(self) -> Mechanism | None:
        """The mechanism of the study's privacy."""
        return mechanism_of(self.study)

    @cached_property
    def _draws(self) -> Draws:
        return partial(Stream.seeded, self.study.seed)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The segments that an update has."""
        return ("shared", "control") if self.layout["control"].size else ("shared",)

    def gate(self, instruction: Instruction) -> Gate:
        """What an exchange accepts."""
        norms = self.strategy.reducer.norms
        return Gate(instruction, self.layout, self.study.cohort.max_weight, self.mechanism, norms=norms)

    def open(self, index: int) -> Site:
        """The site `names[index]`."""
        source = self.population.source(index)
        return Site(
            self.population.names[index], self.study, self.task, self.strategy.local, self.net,
            partial(rows, self.task, source), self.schedule, self.mechanism, self._draws,
        )  # fmt: skip


@dataclass(frozen=True)
class Question:
    """One exchange as a process sees it.

    cohort: (slots,) index of each asked site in `Population.names`, ascending, so that a site's place is its slot.
    admitted: (slots,) the last round in which that site counted, 0 for none.
    """

    instruction: Instruction
    gate: Gate
    cohort: NDArray[np.int32]
    admitted: NDArray[np.int32]


@dataclass
class Share:
    """What came of some slots of the cohort: columns, one entry a slot that was admitted, but no vectors."""

    slots: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    metrics: list[Statistics] = field(default_factory=list)
    statistics: list[Statistics] = field(default_factory=list)
    left_out: dict[int, str] = field(default_factory=dict)

    def note(self, slot: int, verdict: Admitted) -> None:
        """One more admitted slot."""
        answer = verdict.answer
        self.slots.append(slot)
        self.weights.append(answer.weight)
        self.norms.append(verdict.norm)
        self.metrics.append(dict(answer.metrics))
        self.statistics.append(dict(answer.payload.statistics))


def joined(shares: Sequence[Share]) -> Share:
    """Shares of different slots as one, in slot order."""
    whole = Share()
    for share in sorted(shares, key=lambda one: one.slots[:1]):
        for name in ("slots", "weights", "norms", "metrics", "statistics"):
            getattr(whole, name).extend(getattr(share, name))
        whole.left_out.update(share.left_out)
    return whole


class Sums:
    """Block sums of one exchange, folded into one as soon as all before them are: few wait, however many there are.

    whole: the sum over the blocks so far, by segment.
    """

    def __init__(self) -> None:
        self.whole: dict[Kind, BlockSum] = {}
        self._waiting: dict[int, Mapping[Kind, BlockSum]] = {}
        self._next = 0

    def add(self, number: int, sums: Mapping[Kind, BlockSum]) -> list[int]:
        """Take block `number`, empty where all its members were left out; each once, in any order.

        Returns the numbers of the blocks that are folded now, and whose arrays may be used again.
        """
        self._waiting[number] = sums
        folded = []
        while self._next in self._waiting:
            for kind, one in self._waiting.pop(self._next).items():
                self.whole[kind] = follow(self.whole.get(kind), one)
            folded.append(self._next)
            self._next += 1
        return folded


Store = Callable[[Kind, int, Vector], None]
"""Keeps a copy of one slot's update of one segment."""


class Memories(Protocol):
    """Where sites' memories are kept between rounds."""

    def load(self, index: int) -> Memory:
        """The memory of site `index`."""

    def save(self, index: int, before: Memory, after: Memory) -> None:
        """Keep `after` in place of what `load` gave."""


class Host:
    """Serves slots of the cohort. Without `memories` each site keeps its memory in itself."""

    def __init__(self, world: World, memories: Memories | None = None) -> None:
        self.world = world
        world.net.lends = True  # an update is copied or added up before anything else is computed
        self._memories = memories
        self._sites: dict[int, Site] = {}

    def serve(
        self, question: Question, slots: range, store: Store | None
    ) -> tuple[Share, dict[Kind, BlockSum]]:
        """Ask the sites of these slots, of one block at most; `store` keeps their updates, else they are summed.

        Raises:
            ConsortiumError: the study's code failed at a site.
        """
        share, sums = Share(), dict[Kind, BlockSum]()
        names = self.world.population.names
        counted = {names[question.cohort[slot]]: int(question.admitted[slot]) for slot in slots}
        instruction = replace(question.instruction, counted=counted)
        kinds = self.world.kinds if instruction.kind == "train" else ()
        for slot in slots:
            verdict = self._verdict(question.gate, instruction, int(question.cohort[slot]))
            if isinstance(verdict, str):
                share.left_out[slot] = verdict
                continue
            share.note(slot, verdict)
            for kind in kinds:
                update = verdict.answer.payload.vectors[kind]
                if store is not None:
                    store(kind, slot, update)
                else:
                    one = Contribution(slot, update, verdict.answer.weight, verdict.norm)
                    # the update is used up, so the product may take its place
                    sums[kind] = include(self.world.strategy.reducer, sums.get(kind), one, scratch=update)
        return share, sums

    def _verdict(self, gate: Gate, instruction: Instruction, index: int) -> Admitted | str:
        site = self._sites.get(index)
        if site is None:
            site = self._sites[index] = self.world.open(index)
        answer = self._answer(site, index, instruction.to(site.name))
        return judge(gate, site.name, deliver(answer, self.world.faults.get(site.name, ())))

    def _answer(self, site: Site, index: int, instruction: Instruction) -> Answer:
        before = site.memory
        if self._memories is not None:
            before = site.memory = self._memories.load(index)
        try:
            answer = site.answer(instruction)
        except Exception as error:
            raise ConsortiumError(
                f"site {site.name}, {instruction.kind}, round {instruction.round}: the study's code failed: "
                f"{type(error).__name__}: {error}"
            ) from error
        if self._memories is not None:
            self._memories.save(index, before, site.memory)
        return answer


def block(
    instruction: Instruction,
    names: Callable[[int], str],
    share: Share,
    sums: Mapping[Kind, BlockSum],
    vectors: Mapping[int, Mapping[str, Vector]],
) -> Block:
    """A share as the round loop takes it.

    names: a slot's site. vectors: updates by slot, where they are not summed.
    """
    columns = (share.slots, share.weights, share.norms, share.metrics, share.statistics)
    blank, admitted = Answer.to_instruction(instruction), []
    for slot, weight, norm, metrics, statistics in zip(*columns, strict=True):
        payload = Payload(vectors.get(slot, {}), statistics) if vectors or statistics else blank.payload
        answer = changed(blank, site=names(slot), nonce="", weight=weight, payload=payload, metrics=metrics)
        admitted.append(Admitted(answer, norm))
    left_out = {names(slot): reason for slot, reason in share.left_out.items()}
    return Block(admitted, left_out, sums.get("shared"), sums.get("control"))


def blocks_of(slots: int) -> Iterator[range]:
    """The blocks that a cohort of so many slots is cut into."""
    for start in range(0, slots, BLOCK):
        yield range(start, min(start + BLOCK, slots))


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch and BLAS inside, as before after it: more would change the bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)
