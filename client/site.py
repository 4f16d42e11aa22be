"""One site: an instruction goes in, an answer comes out. The same in simulation and live.

A site holds its data, and between rounds its state (SCAFFOLD's variate, a personal head). The state has two
versions: what an answer produced stays pending until a later instruction says that this site's answer of that round
counted; else it is dropped. Giving the same answer when asked the same again is the keeper's part (`client/store.py`).
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256

import numpy as np
import torch
from numpy.typing import NDArray

from consortium.client.judging import judged
from consortium.client.private_training import Private, refuse_unclippable, refuse_unfit
from consortium.client.task import Examples, Source, Task
from consortium.client.trainer import (
    Batches,
    Resident,
    Schedule,
    SiteState,
    TorchTrainer,
    Update,
    resident,
    schedule,
    seed_for,
)
from consortium.privacy import mechanisms
from consortium.privacy.mechanisms import Mechanism, mechanism_of
from consortium.privacy.randomness import Stream
from consortium.protocol.errors import ConsortiumError, InputError, IntegrityError
from consortium.protocol.layout import digest_of
from consortium.protocol.messages import Answer, Instruction, Payload, Statistics
from consortium.protocol.metrics import at_most
from consortium.protocol.sections import TabularData
from consortium.protocol.study import Study
from consortium.strategies.base import Local

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Memory:
    """What a site keeps between instructions: plain, so that it can be stored.

    committed: the state that counted. pending: the state that the answer of round `pending_round` produced.
    """

    committed: SiteState = field(default_factory=dict)
    pending: SiteState = field(default_factory=dict)
    pending_round: int = 0

    def settled(self, admitted: int) -> Memory:
        """The memory once it is known that this site last counted in round `admitted` (0: never)."""
        if self.pending_round and admitted == self.pending_round:
            return Memory(self.pending)
        return Memory(self.committed)


@dataclass(frozen=True)
class Rows:
    """A site's examples, split. note: what was skipped of them, in counts, for the site's answers.

    people, test_people: (rows,) whose each row is, numbered from 0; None: not known.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    test_inputs: torch.Tensor
    test_targets: torch.Tensor
    sums: Statistics
    note: str = ""
    people: NDArray[np.int64] | None = None
    test_people: NDArray[np.int64] | None = None


Draws = Callable[[str, int], Stream]
"""(site, round) -> the randomness that the site's privacy rests on in that round. A round that is tried again has the
same answer live, so it has the same draws in a simulation."""


def from_the_system(site: str, round: int) -> Stream:
    """The only draws that protect anybody."""
    return Stream.system()


def held_out(examples: Examples, share: float, key: bytes, gaps: Sequence[int] = ()) -> NDArray[np.bool_]:
    """Which rows are held out: (n,) True for the holdout. gaps: as `Source`.

    A row's place is decided by HMAC-SHA256(key, id) alone, so rows of one person stay together, and a person stays
    on its side in every study and whatever rows are added.
    """
    if examples.test is not None:
        return examples.test
    n = len(examples.inputs)
    if share == 0:
        return np.zeros(n, np.bool_)
    ids = examples.ids
    if ids is None:
        ids = np.setdiff1d(np.arange(n + len(gaps)), gaps) if gaps else np.arange(n)
    limit = int(share * 2**64)
    places = {
        value: int.from_bytes(hmac.digest(key, str(value).encode(), sha256)[:8], "big") < limit
        for value in dict.fromkeys(ids.tolist())
    }
    return np.fromiter((places[value] for value in ids.tolist()), np.bool_, n)


def rows(task: Task, source: Source) -> Rows:
    """Load a site's data and split them.

    Raises:
        InputError: naming the file, column or row that is wrong.
    """
    examples = source.table if isinstance(source.table, Examples) else task.data(source)
    note = str(examples.skipped)
    test = held_out(examples, task.study.data.holdout, source.key, source.gaps)
    if not test.any() and not task.prepares:
        # nothing to split: the task's own arrays, perhaps mapped from a file
        people = _people(examples, ~test)
        return Rows(
            examples.inputs, examples.targets, examples.inputs[:0], examples.targets[:0], {}, note, people
        )
    train, out = torch.from_numpy(np.flatnonzero(~test)), torch.from_numpy(np.flatnonzero(test))
    training = Examples(examples.inputs[train], examples.targets[train])
    sums = task.statistics(training) if task.prepares else {}
    share = min(1.0, task.study.cohort.max_weight / max(len(training.inputs), 1))  # a site counts for no more
    sums = {name: values * share for name, values in sums.items()} if share < 1 else sums
    people = _people(examples, ~test)
    tested = _people(examples, test)
    return Rows(
        training.inputs,
        training.targets,
        examples.inputs[out],
        examples.targets[out],
        sums,
        note,
        people,
        tested,
    )


def _people(examples: Examples, kept: NDArray[np.bool_]) -> NDArray[np.int64] | None:
    if examples.ids is None:
        return None
    return np.unique(np.asarray(examples.ids)[kept].astype(str), return_inverse=True)[1].astype(np.int64)


@dataclass
class Site:
    """One site of one study.

    net: this process's model; several sites of one process share it.
    load: gives the rows; called once, at the first instruction that needs them.
    schedule: gives each round's batches. mechanism: of the study's privacy. draws: what it rests on.
    """

    name: str
    study: Study
    task: Task
    local: Local
    net: Resident
    load: Callable[[], Rows]
    schedule: Schedule = schedule
    mechanism: Mechanism | None = None
    draws: Draws = from_the_system
    memory: Memory = field(default_factory=Memory)
    _trainer: TorchTrainer | None = None
    _note: str = ""
    _persons: int = 0
    _units: NDArray[np.int64] | None = None
    _warm: Rows | None = None

    def warm(self) -> None:
        """Load the rows now, for the first instruction that needs them. Raises as `load`."""
        self._warm = self.load()

    def answer(self, instruction: Instruction) -> Answer:
        """Do what is asked; a site that cannot declines with its reason. Nothing of the answer is kept here."""
        try:
            answer = self._answer(instruction)
            return replace(answer, reason=self._note) if self._note else answer
        except ConsortiumError as error:
            # The first line names the file and what is wrong; what follows may name the site's own columns, and the
            # mapping never leaves. The operator reads the whole in the site's log.
            _log.warning("%s: %s", self.name, error)
            return Answer.to_instruction(instruction, status="declined", reason=str(error).partition("\n")[0])

    def _answer(self, instruction: Instruction) -> Answer:
        if instruction.kind == "judge":
            return Answer.to_instruction(instruction, metrics=self._judged(instruction.payload.opaque))
        trainer = self._ready(instruction.payload.statistics)
        if instruction.kind == "query":
            return Answer.to_instruction(instruction, payload=Payload(statistics=trainer.query()))
        model = instruction.payload.vectors
        if instruction.admitted or self.memory.pending_round:
            self.memory = self.memory.settled(instruction.admitted)
        state = self.memory.committed
        counts = at_most(self._counts(trainer.evaluate(model, state)), self.study.cohort.max_weight)
        if instruction.kind == "evaluate":
            return Answer.to_instruction(instruction, metrics=counts)
        number, seed = instruction.round, self.study.seed
        draws = None if self.mechanism is None else self.draws(self.name, number)
        private = None
        if self.mechanism is not None and draws is not None and self.mechanism.name == "dp-sgd":
            private = Private(self.mechanism, draws, self._units)
            batches: Batches = private.batches(len(trainer.inputs))
        else:
            batches = self.schedule(self.study.training, len(trainer.inputs), seed, self.name, number)
        update, after = trainer.train(model, state, batches, seed_for(seed, self.name, number), private)
        if after:
            self.memory = Memory(state, after, number)
        payload = self._released(update, instruction.payload.statistics, draws)
        return Answer.to_instruction(instruction, weight=update.weight, payload=payload, metrics=counts)

    def _counts(self, counts: Statistics) -> Statistics:
        """Counts with the number of persons behind them, where the study names persons."""
        return {**counts, "persons": np.array([float(self._persons)])} if counts and self._persons else counts

    def _judged(self, graph: bytes) -> Statistics:
        self._warm = data = self._warm or self.load()
        rows = data.test_inputs, data.test_targets
        return judged(self.task, self.net.module, graph, *rows, data.test_people)

    def _released(self, update: Update, sums: Statistics, draws: Stream | None) -> Payload:
        """What leaves the site of an update: with a mechanism on whole updates, clipped, and noised if that is here."""
        one = self.mechanism
        if one is None or one.name == "dp-sgd":
            return Payload(update.vectors)
        assert draws is not None
        clipped, within = mechanisms.clip(update.vectors["shared"], mechanisms.bound_of(one, sums))
        vectors = {**update.vectors, "shared": mechanisms.add_noise(clipped, one.local_deviation, draws)}
        return Payload(vectors, {mechanisms.WITHIN: np.array(float(within))} if one.quantile else {})

    def _ready(self, sums: Statistics) -> TorchTrainer:
        """The trainer, its rows preprocessed by the federation's sums, which never change within a run."""
        sums = {name: values for name, values in sums.items() if name not in mechanisms.RESERVED}
        if self._trainer is None or (sums and self._trainer.preprocessed is False):
            data, self._warm = self._warm or self.load(), None
            self._note = data.note if self.mechanism is None else ""  # it counts records
            step = self.task.preprocessing(sums) if sums or not self.task.prepares else None
            self._units = self._checked_units(data)
            if (
                data.test_people is not None
                and isinstance(self.study.data, TabularData)
                and self.study.data.person
            ):
                self._persons = len(np.unique(data.test_people))
            self._trainer = _trainer(self.task, self.net, self.local, data, step, bool(sums))
        return self._trainer

    def _checked_units(self, data: Rows) -> NDArray[np.int64] | None:
        if self.mechanism is None or self.mechanism.unit != "person":
            return None
        if data.people is None:
            raise InputError(
                f"{self.study.task}: unit = \"person\" needs each row's person: give ids in the task's Examples"
            )
        return data.people


def _trainer(
    task: Task, net: Resident, local: Local, data: Rows, step: torch.nn.Module | None, preprocessed: bool
) -> TorchTrainer:
    inputs, test = data.inputs, data.test_inputs
    if step is not None:
        with torch.inference_mode():
            inputs, test = step(inputs), step(test)
        inputs, test = inputs.clone(), test.clone()  # plain tensors, which autograd can keep
    return TorchTrainer(
        task, net, local, inputs, data.targets, test, data.test_targets, data.sums, preprocessed
    )


def open_site(
    study: Study,
    task: Task,
    local: Local,
    net: Resident,
    source: Source,
    schedule: Schedule = schedule,
    draws: Draws = from_the_system,
) -> Site:
    """A site over a source; its data are read at the first instruction."""
    load = lambda: rows(task, source)  # noqa: E731 - read once, when first needed
    return Site(source.site, study, task, local, net, load, schedule, mechanism_of(study), draws)


def start(study: Study, task: Task, local: Local) -> Resident:
    """This process's model, at the study's initial weights: every process that calls this has the same."""
    net = resident(task, local, seed_for(study.seed, "initial model", 0))
    if study.privacy.mechanism != "none":
        refuse_unfit(net.module, study.task)
    if study.privacy.mechanism == "dp-sgd":
        refuse_unclippable(net.module, study.task)
    return net


def check_model(instruction: Instruction, net: Resident, digest: str = "") -> None:
    """The model must be the one that the instruction names, in this study's layout; checked before a site computes.

    digest: of the `shared` vector, where whoever hashed the content on its way in found it; else it is computed here.

    Raises:
        IntegrityError: it is not.
    """
    vectors = instruction.payload.vectors
    wrong = instruction.layout != net.layout.digest
    for kind, vector in vectors.items():
        segment = net.layout["control" if kind == "control" else "shared"]
        wrong |= vector.shape != (segment.size,) or vector.dtype != segment.numpy_dtype
    if instruction.kind != "query":
        found = digest if digest or "shared" not in vectors else digest_of([vectors["shared"]])
        wrong |= "shared" not in vectors or found != instruction.model
    if wrong:
        raise IntegrityError("the instruction's model is not what it says, or not of this study's layout")
