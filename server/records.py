"""What a run is, what is committed after each round, and how a run ends: frozen, plain, versioned by their store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from typing import Generic, Literal, Protocol, TypeVar, overload

from consortium.privacy.mechanisms import Mechanism, mechanism_of
from consortium.protocol.layout import Layout, Vector
from consortium.protocol.messages import Statistics
from consortium.protocol.study import Study
from consortium.server.compact import Numbers, shared, table, words
from consortium.strategies.base import OptimizerState, Strategy

_NONE: dict[str, str] = {}
T = TypeVar("T")


class Past(Sequence[T], Generic[T]):
    """Records of which all but the latest lie elsewhere, and are read where somebody asks for them: a run that goes on
    for thousands of rounds takes no more memory than one of ten.

    earlier: reads those that lie elsewhere, from the first on. count: how many of them belong here. recent: the rest.
    """

    __slots__ = ("_count", "_earlier", "_recent")

    def __init__(self, earlier: Callable[[], Iterator[T]], count: int, recent: tuple[T, ...]) -> None:
        self._earlier, self._count, self._recent = earlier, count, recent

    def followed(self, one: T) -> Past[T]:
        """These, and one more."""
        return Past(self._earlier, self._count, (*self._recent, one))

    def __len__(self) -> int:
        return self._count + len(self._recent)

    def __iter__(self) -> Iterator[T]:
        yield from islice(self._earlier(), self._count)
        yield from self._recent

    def __reversed__(self) -> Iterator[T]:
        yield from reversed(self._recent)
        yield from reversed(list(islice(self._earlier(), self._count)))

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[T, ...]: ...
    def __getitem__(self, place: int | slice) -> T | tuple[T, ...]:
        wanted = range(len(self))[place]
        if isinstance(wanted, int):
            return self._recent[wanted - self._count] if wanted >= self._count else tuple(self)[wanted]
        if all(one >= self._count for one in (*wanted[:1], *wanted[-1:])):
            return tuple(self._recent[one - self._count] for one in wanted)
        return tuple(self)[place]


def followed(records: Sequence[T], one: T) -> Sequence[T]:
    """The records, and one more; none of what lies elsewhere is read."""
    return records.followed(one) if isinstance(records, Past) else (*records, one)


@dataclass(frozen=True)
class Plan:
    """What stays the same from a run's start to its end.

    federation, run: durable names.
    initial: the first model's `shared` vector.
    prepares: whether the task asks for statistics before round 1 (medians, scales).
    spare: sites that are asked beyond the selector's cohort; the first answers count, as many as that cohort has.
    failures: in a row, after which a site is set aside for a while (`server/standing.py`); 0: never. A simulation does
        neither: nobody is late there, and its faults are to be studied.
    """

    study: Study
    strategy: Strategy
    layout: Layout
    initial: Vector
    federation: str = "simulation"
    run: str = "run"
    prepares: bool = False
    spare: int = 0
    failures: int = 0

    @property
    def sampled(self) -> bool:
        """Whether cohorts are Poisson samples."""
        return self.mechanism is not None and self.mechanism.sampled

    @cached_property
    def mechanism(self) -> Mechanism | None:
        """The mechanism of the study's privacy."""
        return mechanism_of(self.study)


@dataclass(frozen=True)
class Evaluation:
    """The model after `round` rounds, judged at the sites.

    model: its digest.
    pooled: metrics of the union of the holdouts, computed from summed counts.
    sites: the same by site.
    reliability: `metrics.reliability` of the union, empty for what has no two classes.
    """

    round: int
    model: str
    pooled: Mapping[str, float]
    sites: Mapping[str, Mapping[str, float]]
    reliability: tuple[tuple[float, float, float], ...] = ()

    def __post_init__(self) -> None:
        keep = partial(object.__setattr__, self)  # they are many, and last as long as the run
        keep("pooled", Numbers(self.pooled))
        keep("sites", table(self.sites))


@dataclass(frozen=True)
class Round:
    """One attempt at a round, committed or void.

    asked: the cohort in name order.
    admitted: weights by site, of those whose answers counted (the survivor set).
    left_out: reasons by site.
    unseen: of SCAFFOLD alone, else 0: sites at hand that had never counted before.
    drawn_from: the sites of which a Poisson cohort was drawn, in name order; empty where cohorts are none.
    aside: by site, why it was not asked though it was at hand.
    notes: by site, what it said beside an answer that counted, such as how many records it skipped.
    updates: by admitted site, the SHA-256 (hex) of its answer's content, as it signed it; empty where nothing travels.
    void: why the model did not move; empty where it did.
    model: digest of the model after it.
    seconds: from select to commit.
    """

    round: int
    attempt: int
    asked: tuple[str, ...]
    admitted: Mapping[str, float]
    left_out: Mapping[str, str]
    model: str
    seconds: float
    void: str = ""
    unseen: int = 0
    aside: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    updates: Mapping[str, str] = field(default_factory=dict)
    drawn_from: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        keep = partial(object.__setattr__, self)  # as above
        keep("asked", shared(self.asked))
        keep("drawn_from", shared(self.drawn_from))
        keep("admitted", Numbers(self.admitted))
        keep("left_out", words(self.left_out))
        keep("aside", words(self.aside) if self.aside else _NONE)
        keep("notes", words(self.notes) if self.notes else _NONE)
        keep("updates", dict(self.updates) if self.updates else _NONE)


@dataclass(frozen=True)
class RunState:
    """All that the next round needs: what a commit makes durable.

    round: rounds committed so far. attempt: void attempts at the next one.
    model: the `shared` vector. control: SCAFFOLD's c, or None. statistics: sums over the sites, from before round 1.
    counted: by site, the last round in which its answer was admitted.
    best: the best evaluated model so far by the study's metric, where the study selects it.
    """

    round: int
    attempt: int
    model: Vector
    digest: str
    control: Vector | None
    optimizer: OptimizerState
    statistics: Statistics
    counted: Mapping[str, int] = field(default_factory=dict)
    rounds: Sequence[Round] = ()
    evaluations: Sequence[Evaluation] = ()
    best: tuple[Evaluation, Vector] | None = None


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    status: "finished"; "finished early", when a model was committed but later rounds found no quorum;
        "failed", when no round was ever committed.
    why: the reason, empty where finished.
    model, digest: the selected model's `shared` vector and name. evaluation: its evaluation, if any came.
    """

    status: Literal["finished", "finished early", "failed"]
    why: str
    model: Vector
    digest: str
    evaluation: Evaluation | None
    state: RunState


class Commits(Protocol):
    """Where a run's state is kept. `commit` returns only when the state would survive."""

    def load(self) -> RunState | None:
        """The last committed state, or None where the run has not begun."""

    def commit(self, state: RunState) -> RunState:
        """Keep `state` in place of the one before; gives it back, perhaps with its older records put away (`Past`)."""


class InMemory:
    """Commits that last as long as the process: for simulation."""

    def __init__(self) -> None:
        self._state: RunState | None = None

    def load(self) -> RunState | None:
        return self._state

    def commit(self, state: RunState) -> RunState:
        self._state = state
        return state
