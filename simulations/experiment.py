"""Several strategies over several seeds, and the baselines, as one experiment with one table.

The sites, their rows and what is held out stay the same throughout: seeds change the first model, the cohorts and the
batches. So an interval over seeds says how much training varies, not how much another split would.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from consortium.protocol.errors import ConsortiumError, InputError
from consortium.protocol.metrics import SIZES
from consortium.protocol.study import Study
from consortium.protocol.vocabulary import check_strategy
from consortium.server.records import Evaluation, Round
from consortium.simulations import baselines as base
from consortium.simulations import own_code
from consortium.simulations.attacks import Attacked, States, attack
from consortium.simulations.baselines import Baselines
from consortium.simulations.faults import Fault
from consortium.simulations.host import one_thread
from consortium.simulations.privacy_levels import Level, levels
from consortium.simulations.simulation import Result, simulate
from consortium.simulations.sites import Sites
from consortium.strategies.chosen import strategy_of

Judged = Literal["union", "sites"]


@dataclass(frozen=True)
class Trial:
    """One strategy, or one level of privacy, with one seed.

    strategy: its name; of a level its label.

    metrics: of the selected model on the union of the holdouts; empty where there is none or its outputs are not
        finite. judged: "union", in one place, AUROC exact; "sites", by the sites' counts, where the model has layers
        that stay at the sites.
    attacked: what attacks on it came to, where that was asked for.
    """

    strategy: str
    seed: int
    result: Result
    metrics: Mapping[str, float]
    judged: Judged = "union"
    level: Level | None = None
    attacked: Attacked | None = None


@dataclass(frozen=True)
class Experiment:
    """All that a report says.

    study: as it was run, with its first seed. sites: None where only their names are known.
    faults: scripted ones. seconds: all together. stopped: by Ctrl-C, so that some trials are not there.
    """

    study: Study
    trials: Sequence[Trial]
    sites: Sites | None = None
    baselines: Sequence[Baselines] = ()
    faults: Sequence[Fault] = ()
    seconds: float = 0.0
    stopped: bool = False

    @property
    def status(self) -> Literal["finished", "finished early", "failed", "stopped"]:
        """The worst of the trials'; "stopped" where Ctrl-C came before the last."""
        found = {trial.result.status for trial in self.trials}
        if "failed" in found:
            return "failed"
        if self.stopped:
            return "stopped"
        return "finished early" if "finished early" in found else "finished"

    @property
    def strategies(self) -> list[str]:
        return list(dict.fromkeys(trial.strategy for trial in self.trials))

    @property
    def seeds(self) -> list[int]:
        return list(dict.fromkeys(trial.seed for trial in self.trials))

    @property
    def metric(self) -> str:
        """The metric that the study is judged by, or the first that its task counts; "" where nothing is held out."""
        if self.study.metric:
            return self.study.metric
        found = (name for trial in self.trials for name in trial.metrics if name not in SIZES)
        return next(found, "")


def alone(result: Result) -> Experiment:
    """A result as an experiment of one trial, judged by the counts that the sites sent."""
    study, found = result.study, result.outcome.evaluation
    trial = Trial(study.strategy.name, study.seed, result, dict(found.pooled) if found else {}, "sites")
    return Experiment(study, [trial], seconds=sum(one.seconds for one in result.outcome.state.rounds))


@dataclass(frozen=True)
class Step:
    """Where an experiment is: `done` of `total` steps; `label` and `text` say what has just come.

    loud: worth a line in a log, however many there are.
    """

    done: int
    total: int
    label: str
    text: str
    loud: bool = False


Watch = Callable[[Step], None]


@dataclass
class _Counter:
    """Counts steps of a known total for a `Watch`."""

    watch: Watch
    total: int
    done: int = 0
    score: str = ""

    def tell(self, label: str, text: str, *, advance: bool = True, loud: bool = False) -> None:
        self.done += advance
        self.watch(Step(min(self.done, self.total), self.total, label, text, loud))


def strategy_tables(study: Study, names: Sequence[str]) -> list[dict[str, Any]]:
    """[strategy] tables to compare: the study's own table for its own strategy, defaults for any other.

    Raises:
        InputError: there is no such strategy, or one is named twice.
    """
    own = study.strategy.table()
    if not names:
        return [own]
    if len(set(names)) < len(names):
        raise InputError(f"--compare: {','.join(names)} names a strategy twice; name each once")
    problems = [problem for name in names for problem in check_strategy({"name": name})]
    if problems:
        lines = "\n".join(f"  {problem.got}: {problem.right}" for problem in problems)
        raise InputError(f"--compare: not known\n{lines}\nSee: consortium strategies")
    return [own if name == own["name"] else {"name": name} for name in names]


def _variants(
    study: Study, compare: Sequence[str], epsilons: Sequence[float]
) -> list[tuple[str, Study, Level | None]]:
    """What is run, by label."""
    if compare and epsilons:
        raise InputError("--compare and --epsilon: give one of them")
    if epsilons:
        return [(level.label, level.study, level) for level in levels(study, list(epsilons))]
    found = [study.with_(strategy=table) for table in strategy_tables(study, compare)]
    return [(one.strategy.name, one, None) for one in found]


def check(study: Study, compare: Sequence[str], seeds: int, epsilons: Sequence[float] = ()) -> None:
    """Refuse what `experiment` would refuse, before data are read.

    Raises:
        InputError: a strategy or the number of seeds is wrong, or the study's own strategy fails.
    """
    if seeds < 1:
        raise InputError(f"--seeds: {seeds} given; 1 or more would be right")
    for _, own, _ in _variants(study, compare, epsilons):
        strategy_of(own)


def experiment(
    study: Study,
    sites: Sites,
    *,
    compare: Sequence[str] = (),
    epsilons: Sequence[float] = (),
    seeds: int = 1,
    processes: int | None = None,
    faults: Sequence[Fault] = (),
    baselines: bool = True,
    attacks: bool = False,
    watch: Watch = lambda _: None,
) -> Experiment:
    """Run each strategy with each seed, and the baselines with each seed.

    compare: names of strategies; none for the study's own. epsilons: levels of privacy, in place of the study's.
    seeds: how many, counting up from the study's.
    baselines: whether sites alone and all rows together are trained too.
    attacks: whether each model and its updates are attacked too (`simulations/attacks.py`).
    watch: called as it goes.

    Ctrl-C after the first trial ends it with the trials that are done.

    Raises:
        InputError: a strategy, a fault or the number of seeds is wrong, or the study's own task does not count the
            metric that the study is judged by.
        ConsortiumError: the study's code failed.
    """
    check(study, compare, seeds, epsilons)
    started = time.monotonic()
    studies = _variants(study, compare, epsilons)
    numbers = range(study.seed, study.seed + seeds)
    per_seed = len(studies) * study.rounds + (len(sites.sources) + 1 if baselines else 0)
    counter = _Counter(watch, seeds * per_seed)
    trials: list[Trial] = []
    references: list[Baselines] = []
    stopped = False
    with one_thread(), own_code.named("", ConsortiumError):
        room = base.one_room(study, sites.sources)
        own_code.check(room)
        # Inputs are scaled by learnt statistics, or under privacy by declared ranges: a model is judged on its own.
        rooms = {study.privacy.mechanism == "none": room}
        for _, one, _ in studies:
            if (plain := one.privacy.mechanism == "none") not in rooms:
                rooms[plain] = base.one_room(one, sites.sources)
        try:
            for seed in numbers:
                for label, one, level in studies:
                    where = rooms[one.privacy.mechanism == "none"]
                    states = States() if attacks else None
                    made = _trial(label, one, seed, sites, where, processes, faults, counter, states)
                    if states is not None:
                        made = _attacked(made, sites, states, counter)
                    trials.append(replace(made, level=level))
                if baselines:
                    references.append(_baselines(room, seed, counter))
        except KeyboardInterrupt:
            if not trials:
                raise
            stopped = True
    seconds = time.monotonic() - started
    return Experiment(study, trials, sites, references, tuple(faults), seconds, stopped)


def _trial(
    name: str,
    study: Study,
    seed: int,
    sites: Sites,
    room: base.OneRoom,
    processes: int | None,
    faults: Sequence[Fault],
    counter: _Counter,
    commits: States | None,
) -> Trial:
    result = simulate(
        study,
        sites=sites.sources,
        seed=seed,
        processes=processes,
        faults=faults,
        report=lambda item: _tell(counter, name, study, seed, item),
        commits=commits,
    )
    if result.status != "finished":
        counter.tell(
            f"{name}, seed {seed}", f"{result.status}: {result.outcome.why}", advance=False, loud=True
        )
    if result.status == "failed":
        return Trial(name, seed, result, {})
    if result.layout["local"].size:
        found = result.outcome.evaluation
        return Trial(name, seed, result, dict(found.pooled) if found else {}, "sites")
    try:
        return Trial(name, seed, result, base.judge(room, result.outcome.model))
    except InputError as error:
        counter.tell(f"{name}, seed {seed}", str(error), advance=False, loud=True)
        return Trial(name, seed, result, {})


def _attacked(trial: Trial, sites: Sites, states: States, counter: _Counter) -> Trial:
    result = trial.result
    if result.status == "failed":
        return trial
    counter.tell(f"{trial.strategy}, seed {trial.seed}", "attacking the model and its updates", advance=False)
    return replace(trial, attacked=attack(result.study, sites.sources, states, result.outcome.model))


def _tell(counter: _Counter, name: str, study: Study, seed: int, item: Round | Evaluation) -> None:
    label = f"{name}, seed {seed}"
    if isinstance(item, Evaluation):
        score = item.pooled.get(study.metric, math.nan)
        if not math.isnan(score):
            counter.score = f", {study.metric} {score:.4f} after round {item.round}"
        return
    place = f"round {item.round}/{study.rounds}" if item.round else "statistics for preprocessing"
    text = f"{place}: {len(item.admitted)} of {len(item.asked)} sites{counter.score}"
    counter.score = ""
    text += f", void: {item.void}" if item.void else ""
    text += "".join(f"; {site} left out: {why}" for site, why in list(item.left_out.items())[:5])
    counter.tell(
        label, text, advance=bool(item.round) and not item.void, loud=bool(item.void or item.left_out)
    )


def _baselines(room: base.OneRoom, seed: int, counter: _Counter) -> Baselines:
    found = base.train(
        room, seed, report=lambda site: counter.tell(f"baselines, seed {seed}", f"training {site}")
    )
    for site, why in found.left_out.items():
        counter.tell(f"baselines, seed {seed}", f"{site} left out: {why}", advance=False, loud=True)
    return found
