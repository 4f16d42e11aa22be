"""One study at several levels of privacy: what accuracy each epsilon leaves, by record, by person and by site.

Each level is the same study with another [privacy]: dp-sgd by record, by person where the data name people, noise at
the server by site where the strategy states a sensitivity. Poisson cohorts, which earn something by site alone, are all
sites elsewhere. Trying settings on the same records costs what all the runs
cost together: in a simulation nobody's records are at stake, or they should not be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from consortium.protocol.errors import InputError, StudyError
from consortium.protocol.study import Study

DELTA, CLIP = 1e-5, 1.0
"""Where the study says nothing."""
MECHANISMS = {"record": "dp-sgd", "person": "dp-sgd", "site": "central-gaussian"}


@dataclass(frozen=True)
class Level:
    """One study at one level. epsilon: infinite for no privacy at all, which stands beside every unit."""

    study: Study
    unit: str
    epsilon: float

    @property
    def label(self) -> str:
        """What tables and plots call it."""
        return "no privacy" if math.isinf(self.epsilon) else f"{self.unit}, epsilon {self.epsilon:g}"


def epsilons(text: str) -> list[float]:
    """The numbers of "0.5,1,2,inf".

    Raises:
        InputError: it is something else.
    """
    found = []
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            value = math.nan
        if not value > 0:
            raise InputError(
                f"--epsilon: got {part.strip()!r}; numbers above 0 and inf would be right: 0.5,1,2,4,8,inf"
            )
        found.append(value)
    if len(set(found)) < len(found):
        raise InputError(f"--epsilon: {text} names a number twice; name each once")
    return found


def levels(study: Study, wanted: list[float]) -> list[Level]:
    """The study at each epsilon for each unit that it allows, then without privacy where infinity is wanted.

    Raises:
        InputError: no unit fits the study.
    """
    finite = sorted(value for value in wanted if math.isfinite(value))
    found, problems = [], []
    for unit, mechanism in MECHANISMS.items():
        try:
            found += [Level(_at(study, unit, mechanism, epsilon), unit, epsilon) for epsilon in finite]
        except StudyError as error:
            problems += [str(problem) for problem in error.problems]
    if finite and not found:
        lines = "\n".join(f"  {problem}" for problem in dict.fromkeys(problems))
        raise InputError(f"--epsilon: the study fits no level of privacy\n{lines}\nCorrect the study")
    if math.inf in wanted:
        found.append(Level(study.with_(privacy=_nothing(study), cohort=_all(study)), "any", math.inf))
    return found


def _at(study: Study, unit: str, mechanism: str, epsilon: float) -> Study:
    asked = study.privacy
    values: dict[str, object] = {
        **_nothing(study), "unit": unit, "mechanism": mechanism, "epsilon": epsilon,
        "delta": asked.delta or DELTA, "clip_norm": asked.clip_norm or CLIP,
        "sampling_rate": asked.sampling_rate if mechanism == "dp-sgd" else None,
    }  # fmt: skip
    table = study.strategy.table()
    if unit == "site" and ":" not in table["name"]:
        table = {**table, "weighted": False}
    cohort = {} if mechanism == "central-gaussian" else _all(study)
    return study.with_(privacy=values, strategy=table, cohort=cohort)


def _all(study: Study) -> dict[str, object]:
    """What to change of [cohort] where no Poisson sample may be drawn."""
    return {} if study.cohort.sampling_rate is None else {"sampling_rate": None, "size": None}


def _nothing(study: Study) -> dict[str, object]:
    keys = ("epsilon", "delta", "clip_norm", "clip_quantile", "sampling_rate")
    return {"mechanism": "none", **dict.fromkeys(keys)}
