"""What is wrong with a study's [privacy], by itself and with the other sections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from consortium.protocol.errors import Problem
from consortium.protocol.sections import Cohort, Data, Evaluation, Privacy, StrategyTable, Training

UNITS = {"dp-sgd": ("record", "person"), "central-gaussian": ("site",), "local-gaussian": ("site",)}
MEANS = ("fedavg", "fedavgm", "fedprox", "fedadam", "fedadagrad", "fedyogi")
"""Strategies whose reducer has a sensitivity where `weighted = false`; a test compares it with the reducers."""


def _alone(privacy: Privacy) -> Iterator[Problem]:
    if privacy.secure_aggregation:
        right = "this version has no secure aggregation; false would be right"
        yield Problem("privacy.secure_aggregation", "true", right)
    if privacy.mechanism == "distributed-skellam":
        right = "this version does not have it; dp-sgd, central-gaussian or local-gaussian would be right"
        yield Problem("privacy.mechanism", "'distributed-skellam'", right)
    elif privacy.mechanism == "none":
        for key in ("epsilon", "delta", "clip_norm", "clip_quantile", "sampling_rate"):
            if getattr(privacy, key) is not None:
                right = 'mechanism = "none" promises nothing; leave it out'
                yield Problem(f"privacy.{key}", str(getattr(privacy, key)), right)
    else:
        yield from _mechanism(privacy)


def _mechanism(privacy: Privacy) -> Iterator[Problem]:
    mechanism = privacy.mechanism
    for key, right in (
        ("epsilon", "such as 3.0"),
        ("delta", "far below one over the number of people, such as 1e-5"),
        ("clip_norm", "the longest that one contribution may be, such as 1.0"),
    ):
        if getattr(privacy, key) is None:
            yield Problem(f"privacy.{key}", "nothing", f"{mechanism} needs it: {right}")
    units = UNITS[mechanism]
    if privacy.unit not in units:
        other = "dp-sgd" if mechanism != "dp-sgd" else "central-gaussian"
        right = (
            f"{mechanism} protects by {' or '.join(units)}; for '{privacy.unit}' use mechanism = \"{other}\""
        )
        yield Problem("privacy.unit", repr(privacy.unit), right)
    if privacy.sampling_rate is not None and mechanism != "dp-sgd":
        right = f"{mechanism} samples nothing, so nothing is amplified; leave it out"
        yield Problem("privacy.sampling_rate", str(privacy.sampling_rate), right)
    if privacy.clip_quantile is not None and mechanism != "central-gaussian":
        right = f"the bound adapts with central-gaussian alone, not {mechanism}; leave it out"
        yield Problem("privacy.clip_quantile", str(privacy.clip_quantile), right)


def _delta(privacy: Privacy, training: Training, cohort: Cohort) -> Iterator[Problem]:
    """A delta of one over the people would allow to publish one of them whole."""
    if privacy.delta is None or privacy.mechanism == "none":
        return
    if privacy.mechanism == "dp-sgd":
        people, of = training.batch_size / privacy.rate, "training.batch_size / privacy.sampling_rate"
    else:
        people, of = float(max(cohort.min_sites, cohort.size or 0, 2)), "the cohort"
    if privacy.delta >= 1 / people:
        right = f"below 1 / {people:g} ({of}), else it allows to show one of them whole; 1e-5 is usual"
        yield Problem("privacy.delta", f"{privacy.delta:g}", right)


def _strategy(privacy: Privacy, strategy: StrategyTable) -> Iterator[Problem]:
    mechanism, table = privacy.mechanism, strategy.table()
    if mechanism not in ("central-gaussian", "local-gaussian"):
        return
    if strategy.name == "scaffold":
        right = f"its control variates would need noise of their own under {mechanism}; dp-sgd, or fedprox, would do"
        yield Problem("strategy.name", "'scaffold'", right)
    elif mechanism == "local-gaussian" or ":" in strategy.name:
        return  # what leaves the site is private already; a study's own reducer is asked when it is loaded
    elif strategy.name not in MEANS:
        right = (
            f"no bound is known on how far one site moves its result; with central-gaussian use one of "
            f"{', '.join(MEANS)} with weighted = false, or dp-sgd"
        )
        yield Problem("strategy.name", repr(strategy.name), right)
    elif table.get("weighted", True) is not False:
        right = "under central-gaussian weighted = false would be right: weights are read from records"
        yield Problem("strategy.weighted", str(table.get("weighted", "nothing (true)")), right)


def _person(privacy: Privacy, data: Data) -> Iterator[Problem]:
    if (
        privacy.unit == "person"
        and privacy.mechanism == "dp-sgd"
        and hasattr(data, "person")
        and not data.person
    ):
        right = 'unit = "person" needs the column that names the person, such as person = "patient_id"'
        yield Problem("data.person", "nothing", right)


def _scores(privacy: Privacy, evaluation: Evaluation) -> Iterator[Problem]:
    if privacy.mechanism != "none" and evaluation.auroc == "exact":
        right = 'every held-out score would leave the site without noise; "binned" would be right'
        yield Problem("evaluation.auroc", "'exact'", right)


def _sampled(privacy: Privacy, cohort: Cohort, evaluation: Evaluation) -> Iterator[Problem]:
    """A Poisson cohort is worth its trouble where it makes the noise at the server less, and there alone."""
    if cohort.sampling_rate is None:
        return
    rate = f"{cohort.sampling_rate:g}"
    if privacy.mechanism != "central-gaussian":
        right = 'goes with mechanism = "central-gaussian" alone; with others use cohort.size, or leave it out'
        yield Problem("cohort.sampling_rate", rate, right)
    elif privacy.clip_quantile is not None:
        right = (
            "the bound adapts to those that answer, and a drawn cohort may be empty; leave one of them out"
        )
        yield Problem("privacy.clip_quantile", f"{privacy.clip_quantile:g}", right)
    if evaluation.select == "best":
        right = 'its judges would be a drawn cohort, which must stay secret; "last" would be right'
        yield Problem("evaluation.select", "'best'", right)


CHECKS: dict[str, Any] = {
    "privacy": _alone,
    "privacy+training+cohort": _delta,
    "privacy+cohort+evaluation": _sampled,
    "privacy+strategy": _strategy,
    "privacy+data": _person,
    "privacy+evaluation": _scores,
}
"""Checks by the sections that they look at, as in `checking`."""
