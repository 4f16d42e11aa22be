"""`simulate`: a study, run over sites on this machine by the very round loop that runs it live."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from consortium.client.site import start
from consortium.client.task import Source, task_of
from consortium.client.trainer import Schedule, schedule
from consortium.privacy.randomness import Stream
from consortium.protocol.errors import InputError, nearest
from consortium.protocol.layout import Layout, Vector
from consortium.protocol.study import Study
from consortium.server.clients import Clients
from consortium.server.coordinator import run
from consortium.server.records import Commits, Evaluation, InMemory, Outcome, Plan, Round
from consortium.simulations.faults import Fault, by_site
from consortium.simulations.host import Population, World, one_thread
from consortium.simulations.inline import Inline
from consortium.simulations.processes import Processes
from consortium.strategies.chosen import strategy_of

if TYPE_CHECKING:
    import pandas as pd

Sites = Sequence[Source] | Mapping[str, Any] | Population


@dataclass(frozen=True)
class Result:
    """How a simulation went.

    outcome: the run's, with its whole record in `outcome.state`.
    layout: how `outcome.model`, the shared vector, is cut into arrays.
    """

    study: Study
    layout: Layout
    outcome: Outcome

    @property
    def status(self) -> Literal["finished", "finished early", "failed"]:
        """How it ended; `outcome.why` says why, where it did not finish."""
        return self.outcome.status

    @property
    def model(self) -> dict[str, Vector]:
        """The selected model's shared arrays by name, in their shapes."""
        return self.layout["shared"].split(self.outcome.model)

    @property
    def rounds(self) -> pd.DataFrame:
        """A row an attempt, in order: round, attempt, asked, admitted, left_out (reasons by site), void (why the
        model did not move, or empty), seconds, and the pooled metrics of the model after it where there are any.

        Row 0, of round 0, is the initial model; statistics asked for before round 1 are of round 0 too.
        """
        import pandas as pd

        state = self.outcome.state
        scores = {evaluation.round: evaluation.pooled for evaluation in state.evaluations}
        start = {
            "round": 0,
            "attempt": 0,
            "asked": 0,
            "admitted": 0,
            "left_out": {},
            "void": "",
            "seconds": 0.0,
        }
        rows: list[dict[str, Any]] = [{**start, **scores.get(0, {})}]
        for one in state.rounds:
            row = {
                "round": one.round,
                "attempt": one.attempt,
                "asked": len(one.asked),
                "admitted": len(one.admitted),
                "left_out": dict(one.left_out),
                "void": one.void,
                "seconds": one.seconds,
            }
            rows.append({**row, **({} if one.void or not one.round else scores.get(one.round, {}))})
        return pd.DataFrame(rows)

    def report(self, folder: str | Path) -> Path:
        """Write tables, plots and a self-contained page into `folder`, a new or empty one; returns the page's path.

        Raises:
            InputError: the folder is not empty, or cannot be made.
        """
        from consortium.simulations.experiment import alone
        from consortium.simulations.report import write

        return write(alone(self), Path(folder))


def simulate(
    study: Study | str | Path,
    *,
    sites: Sites,
    seed: int | None = None,
    processes: int | None = None,
    faults: Sequence[Fault] = (),
    initial: Vector | None = None,
    batches: Schedule = schedule,
    report: Callable[[Round | Evaluation], None] = lambda _: None,
    commits: Commits | None = None,
) -> Result:
    """Run a study over sites on this machine. The same arguments give the same model, bit for bit, whatever
    `processes` is.

    study: or the path of its file.
    sites: sources; or tables (or paths of files) by site; or a `Population`, whose sources are made when first asked.
    seed: of the first model, cohorts and batches; None: the study's.
    processes: how many worker processes; 0 for none, all in this process (for a debugger); None: one a core, at most
        one a site, and none where that is one.
    faults: what goes wrong at which site and when.
    initial: the first model's shared vector, in place of the task's own start.
    batches: gives each round's batches, in place of the study's.
    report: called with each round and each evaluation when it is committed.
    commits: where the state after each round goes, for whoever wants the models in between; it must be empty, as
        what sites keep is not in it.

    Time does not count: a site here shares its processor with all others, so nobody is late but by a fault.

    Raises:
        InputError: the study, its code, the sites or the faults are wrong; StudyError for the study file.
        ConsortiumError: the study's code failed at a site.
    """
    study = study if isinstance(study, Study) else Study.load(study)
    study = study if seed is None else study.with_(study={"seed": seed})
    if commits is not None and commits.load() is not None:
        raise InputError("commits: a run is in there already; a simulation starts anew, so give a new one")
    population = population_of(sites)
    table = by_site(faults)
    for site in table:
        if site not in set(population.names):
            raise InputError(f"faults: there is no site {site!r}{nearest(site, population.names)}")
    task, strategy = task_of(study), strategy_of(study)
    with one_thread():
        net = start(study, task, strategy.local)
        first = net.vector("shared") if initial is None else _checked(initial, net.layout)
        plan = Plan(study, strategy, net.layout, first, prepares=task.prepares)
        world = World(study, task, strategy, net, population, batches, table)
        with _runtime(world, processes) as clients:
            rng = random.Random(study.seed)  # noqa: S311 - a simulation is to be repeated
            draws = Stream.seeded(study.seed, "server")
            outcome = run(
                plan, clients, commits or InMemory(), clock=time.time, rng=rng, draws=draws, report=report
            )
    return Result(study, net.layout, outcome)


def population_of(sites: Sites) -> Population:
    """The sites, in name order.

    Raises:
        InputError: there is none, two have one name, or a `Population` is not in that order.
    """
    if not isinstance(sites, Population):
        if isinstance(sites, Mapping):
            sites = [_source(name, table) for name, table in sites.items()]
        ordered = sorted(sites, key=lambda source: source.site)
        sites = Population([source.site for source in ordered], ordered.__getitem__)
    for name, after in pairwise(sites.names):
        if name == after:
            raise InputError(f"sites: {name!r} is there twice; give each site a name of its own")
        if name > after:  # a site's place in the cohort is its place here
            raise InputError(f"sites: {after!r} stands after {name!r}; sort the names of a Population")
    if not sites.names:
        raise InputError("sites: there is none; give at least one")
    return sites


def _source(name: str, table: object) -> Source:
    return Source(name, path=Path(table)) if isinstance(table, str | Path) else Source(name, table=table)


def _checked(initial: Vector, layout: Layout) -> Vector:
    segment = layout["shared"]
    if initial.shape != (segment.size,) or initial.dtype != segment.numpy_dtype:
        raise InputError(
            f"initial: {initial.dtype} {initial.shape} given, {segment.dtype} ({segment.size},) would be right"
        )
    return initial


@contextmanager
def _runtime(world: World, processes: int | None) -> Iterator[Clients]:
    if processes is None:
        cores = len(os.sched_getaffinity(0))
        processes = min(cores, len(world.population.names))
        processes = 0 if processes == 1 else processes
    if processes < 0:
        raise InputError(f"processes: {processes} given; 0 (none) or more would be right")
    if processes == 0:
        yield Inline(world)
        return
    with Processes(world, processes) as clients:
        yield clients
