"""The sites by function call, in this very process: the plainest runtime, and the one to debug in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from consortium.protocol.layout import Kind, Vector
from consortium.protocol.messages import Answer, Instruction
from consortium.server.clients import Block
from consortium.simulations.host import Host, Question, Share, Sums, World, block, blocks_of


class Inline:
    """`Clients` over sites that share this process's model. Sites' deadlines are not measured: see `simulate`."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._host = Host(world)
        self._index = {name: index for index, name in enumerate(world.population.names)}
        self._question: Question | None = None

    def sites(self) -> Sequence[str]:
        return self._world.population.names

    def ask(self, sites: Sequence[str], instruction: Instruction) -> None:
        cohort = np.fromiter((self._index[site] for site in sites), np.int32, len(sites))
        cohort.sort()
        names, counted = self._world.population.names, instruction.counted
        admitted = np.fromiter((counted.get(names[i], 0) for i in cohort), np.int32, len(cohort))
        gate = self._world.gate(instruction)
        self._question = Question(instruction, gate, cohort, admitted)

    def answers(self, deadline: float) -> Iterator[Answer | Block]:
        question = self._question
        assert question is not None
        summed = question.instruction.kind == "train" and self._world.strategy.reducer.scale is not None
        totals = Sums()
        for number, slots in enumerate(blocks_of(len(question.cohort))):
            kept: dict[int, dict[str, Vector]] = {slot: {} for slot in slots}

            def store(
                kind: Kind, slot: int, update: Vector, kept: dict[int, dict[str, Vector]] = kept
            ) -> None:
                kept[slot][kind] = update.copy()

            share, sums = self._host.serve(question, slots, None if summed else store)
            totals.add(number, sums)
            yield block(question.instruction, self._name, share, {}, kept)
        if summed:
            yield block(question.instruction, self._name, Share(), totals.whole, {})

    def _name(self, slot: int) -> str:
        assert self._question is not None
        return self._world.population.names[int(self._question.cohort[slot])]

    def wait(self, sites: Sequence[str]) -> bool:
        return False
