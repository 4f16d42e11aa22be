"""Rounds of federated averaging on one machine: ours beside loops written by hand, Flower and pfl-research.

    python benchmarks/simulation.py [--quick] [--json] [--only NAME,…] [--rounds N]

Every contender runs in processes of its own on the same records, first model, cohorts and order of batches
(`contenders/workloads.py`); that their models agree after three rounds is one of the targets. A row is the time of a
round after the first, its processor time (of all the contender's processes, which hardly depends on what else the
machine does), or the time from the start of the process to the end of round 1. Peak memory is the
proportional set size of the contender's process tree, sampled twice a second, with libraries and mapped records.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import numpy as np
from contenders.launch import ContenderError, Outcome, launch, pfl_python
from contenders.workloads import CHECK_ROUND, Spec, make_arrays
from report import Row, Target, emit


@dataclass(frozen=True)
class Contender:
    name: str
    target: str  # module:function under contenders
    processes: int
    repeats: int = 2  # whole runs; their rounds are pooled


CONTENDERS = {
    c.name: c
    for c in (
        Contender("batched-1", "batched:run", 1),
        Contender("batched-2", "batched:run", 2),
        Contender("plain-1", "plain:run", 1),
        Contender("plain-2", "plain:run", 2),
        Contender("consortium", "ours:run", 2),
        Contender("pfl-1", "pfl_research:run", 1),
        Contender("pfl-2", "pfl_research:run", 2),
        Contender("flower", "flower:run", 2, repeats=1),
    )
}
FRAMEWORKS = ("pfl-1", "pfl-2", "flower")
OURS = ("consortium",)


@dataclass(frozen=True)
class Case:
    name: str
    workload: str
    population: int
    cohort: int
    rounds: int
    contenders: tuple[str, ...]


SCALING = ("batched-2", "plain-1", "plain-2", *OURS)
W1 = Case("W1 100 of 1k", "w1", 1_000, 100, 30, tuple(CONTENDERS))
W1_1K = Case("W1 1k of 1k", "w1", 1_000, 1_000, 8, SCALING)
W1_10K = Case("W1 10k of 10k", "w1", 10_000, 10_000, 4, SCALING)
W1_IDLE = Case("W1 100 of 100k", "w1", 100_000, 100, 30, SCALING)
W2 = Case("W2 10 of 10", "w2", 10, 10, 10, ("plain-1", "plain-2", "consortium", *FRAMEWORKS))
CASES = (W1, W1_1K, W1_10K, W1_IDLE, W2)


@dataclass
class Results:
    """What was measured, by case and contender."""

    outcomes: dict[tuple[str, str], Outcome] = field(default_factory=dict)

    def add(self, case: Case, contender: str, new: Outcome) -> None:
        old = self.outcomes.get((case.name, contender))
        self.outcomes[case.name, contender] = new if old is None else old.pooled(new)

    def ms(self, case: Case, *contenders: str) -> float:
        """Median time of a round of the fastest of `contenders`, in ms; NaN if none ran."""
        found = [self.outcomes[case.name, c] for c in contenders if (case.name, c) in self.outcomes]
        return min((median(o.round_seconds) * 1000 for o in found), default=float("nan"))

    def cpu_ms(self, case: Case, contender: str) -> float:
        """Median processor time of a round, in ms; NaN where the contender did not run."""
        found = self.outcomes.get((case.name, contender))
        return float("nan") if found is None else median(found.cpu_seconds) * 1000

    def rows(self) -> Iterator[Row]:
        for (case, contender), outcome in self.outcomes.items():
            yield Row.of(f"{case}, {contender}", outcome.round_seconds, "ms", outcome.peak_mb)
        for (case, contender), outcome in self.outcomes.items():
            yield Row.of(f"{case}, {contender}, processor time", outcome.cpu_seconds, "ms")
            if case in (W1.name, W2.name):
                yield Row.of(f"{case}, {contender}, start and round 1", outcome.first_seconds, "s")

    def targets(self) -> Iterator[Target]:
        for (case, contender), outcome in self.outcomes.items():
            base = next(o for (c, _), o in self.outcomes.items() if c == case)
            if outcome is not base:
                away = float(np.linalg.norm(outcome.model - base.model) / np.linalg.norm(base.model))
                yield Target(
                    f"{case}, {contender}: distance of the model from the first row's", away, "<=", 1e-4
                )
        ratios = [*self._against_others(), *self._scaling(), *self._start_and_memory()]
        yield from (target for target in ratios if not np.isnan(target.value))

    def _against_others(self) -> Iterator[Target]:
        trainer = self.ms(W1, "consortium")
        plain, pfl, flower = self.ms(W1, "plain-2"), self.ms(W1, "pfl-1", "pfl-2"), self.ms(W1, "flower")
        yield Target("W1, any trainer / plain-2, at first", trainer / plain, "<=", 1.25)
        yield Target("W1, any trainer / plain-2, then", trainer / plain, "<=", 1.15)
        cpu = self.cpu_ms(W1, "consortium") / self.cpu_ms(W1, "plain-2")
        yield Target("W1, any trainer / plain-2, processor time", cpu, "<=", 1.25)
        yield Target("W1, flower / any trainer", flower / trainer, ">=", 45)
        yield Target("W1, best pfl / any trainer", pfl / trainer, ">=", 2)
        ours = self.ms(W2, "consortium")
        yield Target("W2, any trainer / plain-2", ours / self.ms(W2, "plain-2"), "<=", 1.1)
        cpu = self.cpu_ms(W2, "consortium") / self.cpu_ms(W2, "plain-2")
        yield Target("W2, any trainer / plain-2, processor time", cpu, "<=", 1.1)
        yield Target("W2, any trainer / pfl-2", ours / self.ms(W2, "pfl-2"), "<=", 1.05)

    def _scaling(self) -> Iterator[Target]:
        for name in OURS:
            each = self.ms(W1, name) / W1.cohort
            cpu = self.cpu_ms(W1, name) / W1.cohort
            for case in (W1_1K, W1_10K):
                more = self.cpu_ms(case, name) / case.cohort / cpu
                yield Target(
                    f"{case.name}, {name}: time per client / that at 100 of 1k, processor", more, "<=", 1.1
                )
                growth = self.ms(case, name) / case.cohort / each
                yield Target(f"{case.name}, {name}: time per client / that at 100 of 1k", growth, "<=", 1.1)
            idle = self.ms(W1_IDLE, name) / self.ms(W1, name)
            yield Target(f"{W1_IDLE.name}, {name}: round / that of 1k", idle, "<=", 1.05)
            idle = self.cpu_ms(W1_IDLE, name) / self.cpu_ms(W1, name)
            yield Target(f"{W1_IDLE.name}, {name}: round / that of 1k, processor time", idle, "<=", 1.05)

    def _start_and_memory(self) -> Iterator[Target]:
        plain = self.outcomes.get((W1.name, "plain-2"))
        for name in OURS:
            ours = self.outcomes.get((W1.name, name))
            if ours is None:
                continue
            yield Target(f"W1, {name}: start and round 1, s", median(ours.first_seconds), "<=", 2.5)
            if plain is not None:
                yield Target(f"W1, {name}: peak memory / plain-2", ours.peak_mb / plain.peak_mb, "<=", 1.3)


def quick_cases() -> tuple[Case, ...]:
    """A few small rounds that show that everything runs; no other framework, and each loop in one form."""
    return (
        replace(
            W1,
            name="W1 20 of 100",
            population=100,
            cohort=20,
            rounds=CHECK_ROUND,
            contenders=("batched-2", "plain-2", *OURS),
        ),
        replace(
            W2,
            name="W2 2 of 10",
            cohort=2,
            rounds=CHECK_ROUND,
            contenders=("plain-2", *OURS),
        ),
    )


def run_case(case: Case, names: Sequence[str], repeats: int, folder: Path, results: Results) -> None:
    """Run the contenders of one case in turns, so that a slow spell of the machine meets all of them."""
    failed: set[str] = set()
    for repeat in range(repeats):
        for contender in (CONTENDERS[name] for name in case.contenders if name in names):
            if contender.name in failed or repeat >= contender.repeats:
                continue
            say(f"{case.name}, {contender.name}, run {repeat + 1}")
            try:
                python = pfl_python() if contender.target.startswith("pfl") else Path(sys.executable)
                spec = Spec(
                    case.workload, case.population, case.cohort, case.rounds, contender.processes, str(folder)
                )
                results.add(case, contender.name, launch(python, contender.target, spec))
            except ContenderError as error:
                failed.add(contender.name)
                say(f"{case.name}, {contender.name}: MISSING: {error}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a few small rounds, no other framework")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    parser.add_argument("--only", metavar="NAME,…", help=f"contenders, of {', '.join(CONTENDERS)}")
    parser.add_argument("--cases", metavar="TEXT", default="", help="only cases whose name has this in it")
    parser.add_argument(
        "--rounds", type=int, metavar="N", help=f"rounds of every case, at least {CHECK_ROUND}"
    )
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(CONTENDERS)
    if unknown := set(names) - set(CONTENDERS):
        parser.error(f"--only: no contender {', '.join(sorted(unknown))}")
    if arguments.rounds is not None and arguments.rounds < CHECK_ROUND:
        parser.error(f"--rounds: at least {CHECK_ROUND}, got {arguments.rounds}")
    cases = [c for c in (quick_cases() if arguments.quick else CASES) if arguments.cases in c.name]
    if not cases:
        parser.error(f"--cases: no case has {arguments.cases!r} in its name")
    results = Results()
    with tempfile.TemporaryDirectory() as folder:
        make_arrays(Path(folder))
        for case in cases:
            case = replace(case, rounds=arguments.rounds or case.rounds)
            run_case(case, names, 1 if arguments.quick else 2, Path(folder), results)
    emit(list(results.rows()), list(results.targets()), arguments.json)


if __name__ == "__main__":
    main()
