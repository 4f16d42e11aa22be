"""What a model bundle says of the run behind it: where the model comes from, how it was judged, what data it saw.

Pure: from a run's plan and outcome to plain JSON documents, the same for the same run. Whatever could tell of fewer
than `FEWEST` examples is left out, and says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consortium.privacy.statement import of_run
from consortium.protocol.metrics import FEWEST
from consortium.protocol.sections import Numeric, TabularData
from consortium.server import tally
from consortium.server.records import Evaluation, Outcome, Plan

FORMAT = 1
REFERENCE_BINS = 10
"""Bins of a feature's reference, each of about a tenth of the values."""

RESTORED = (
    "rounds that the server published between a backup and its restore, and noised anew after it: each site's own "
    "ledger has charged them twice"
)
SUPPRESSED = f"fewer than {FEWEST} examples"
FEW_PERSONS = f"fewer than {FEWEST} persons"
_COMPLEMENT = "suppressed, because it and the others would tell a smaller cell"
_UNKNOWN = "suppressed: how many examples stand behind it is not known"


def lineage(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    """Which study, run and rounds made the model: by round its sites with their weights, the SHA-256 of what each of
    them sent and signed (of the updates themselves nothing is kept), and the model after it.

    Of cohorts that were drawn as Poisson samples it does not say who was in which: privacy rests on that, too."""
    last = made_after(outcome)
    return {
        "format": FORMAT,
        "federation": plan.federation,
        "run": plan.run,
        "study": {
            "name": plan.study.name,
            "task": plan.study.task,
            "digest": plan.study.digest,
            "text": plan.study.text,
        },
        "strategy": plan.strategy.name,
        "model": outcome.digest,
        "sites": sites(outcome),
        "rounds": [
            {
                "round": one.round,
                "attempt": one.attempt,
                "sites": {} if plan.sampled else dict(sorted(one.admitted.items())),
                "updates": {} if plan.sampled else dict(sorted(one.updates.items())),
                "left_out": {} if plan.sampled else dict(sorted(one.left_out.items())),
                "void": one.void,
                "model": one.model,
            }
            for one in outcome.state.rounds
            if one.round <= last
        ],
    }


def sites(outcome: Outcome) -> list[str]:
    """Names of the sites whose updates are in the model, or whose statistics prepare its inputs; of Poisson cohorts, of
    those that they were drawn from, as a site that was never drawn must not be told from the others."""
    last = made_after(outcome)
    counted = [one for one in outcome.state.rounds if not one.void and one.round <= last]
    return sorted({site for one in counted for site in one.drawn_from or one.admitted})


def made_after(outcome: Outcome) -> int:
    """How many rounds the selected model has seen: fewer than were committed where the best one was chosen."""
    judged = outcome.evaluation
    chosen = judged is not None and outcome.digest != outcome.state.digest
    return judged.round if chosen and judged is not None else outcome.state.round


def privacy(plan: Plan, outcome: Outcome, ledger: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What protects the records that the model was trained on, what each site spent, and what is not covered.

    ledger: what the server's holds of the run, which may be more than its records tell of: a round that was noised anew
    after a crash. Never less is said than either.
    """
    counts = tally.releases(outcome.state.rounds, plan.mechanism)
    if plan.mechanism is None or ledger is None:
        return of_run(plan.study, counts)
    noted: Mapping[str, int] = ledger["sites"]
    counts = {
        site: max(counts.get(site, 0), noted.get(site, 0) + ledger["any"]) for site in {*counts, *noted}
    }
    said = of_run(plan.study, counts)
    if ledger["restored"] and plan.mechanism.name == "central-gaussian":
        said["not_covered"].append(RESTORED)
    return {**said, "ledger": {name: ledger[name] for name in ("entries", "head", "restored")}}


# How it was judged


def evaluation(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    """Metrics on the holdouts, by site and pooled, and calibration; small cells are suppressed.

    Where the study names persons, they are counted, not their rows; calibration, whose bins hold rows, is left out then
    if a person has several.

    `groups` is null: no task counts by group.
    """
    judged = outcome.evaluation
    if judged is None or judged.model != outcome.digest:
        return {"format": FORMAT, "model": outcome.digest, "evaluated": False, "groups": None}
    pooled = _metrics(judged.pooled)
    return {
        "format": FORMAT,
        "model": outcome.digest,
        "evaluated": True,
        "metric": plan.study.metric,
        "round": judged.round,
        "pooled": pooled,
        "sites": _by_site(judged),
        "groups": None,
        "calibration": None
        if "suppressed" in pooled or _several(judged)
        else calibration(judged.reliability),
        "smallest_cell": FEWEST,
    }


def _metrics(values: Mapping[str, float]) -> dict[str, Any]:
    if "n" not in values:
        return {"suppressed": _UNKNOWN}
    if _size(values) < FEWEST:
        return {"suppressed": SUPPRESSED if values["n"] < FEWEST else FEW_PERSONS}
    return {name: value if math.isfinite(value) else None for name, value in sorted(values.items())}


def _size(values: Mapping[str, float]) -> float:
    """How many persons stand behind metrics; examples, where the study does not name persons."""
    return values.get("persons", values["n"])


def _several(judged: Evaluation | None) -> bool:
    """Whether persons with several rows each are among those that were judged, so that rows are not persons."""
    return judged is not None and judged.pooled.get("persons", math.inf) < judged.pooled.get("n", 0.0)


def _by_site(judged: Evaluation) -> dict[str, Any]:
    """Metrics by site. One cell alone that is hidden could be told from the rest, so the next smallest goes with it."""
    found = {site: _metrics(values) for site, values in sorted(judged.sites.items())}
    hidden = [site for site, values in found.items() if "suppressed" in values]
    shown = [site for site in found if site not in hidden]
    if len(hidden) == 1 and shown:
        found[min(shown, key=lambda site: (_size(judged.sites[site]), site))] = {"suppressed": _COMPLEMENT}
    return found


def calibration(reliability: Sequence[tuple[float, float, float]]) -> dict[str, Any] | None:
    """Predicted against observed, by bin of the predicted probability of class 1; None where nothing was counted.

    reliability: by bin examples, positives, and the sum of predicted probabilities, in order of the prediction. Bins
    are joined until each has `FEWEST` examples. `expected_error` is the mean of |predicted - observed| over examples.
    """
    bins: list[list[float]] = []
    for cell in reliability:
        if bins and bins[-1][0] < FEWEST:
            bins[-1] = [a + b for a, b in zip(bins[-1], cell, strict=True)]
        elif cell[0]:
            bins.append(list(cell))
    if len(bins) > 1 and bins[-1][0] < FEWEST:
        last = bins.pop()
        bins[-1] = [a + b for a, b in zip(bins[-1], last, strict=True)]
    total = sum(n for n, _, _ in bins)
    if total < FEWEST:
        return None
    cells = [{"n": n, "predicted": p / n, "observed": k / n} for n, k, p in bins]
    error = sum(abs(cell["predicted"] - cell["observed"]) * cell["n"] for cell in cells) / total
    return {"class": "1", "bins": cells, "expected_error": error}


# What data it saw


def reference(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    """How the numeric features were distributed over all sites before round 1: what later inputs are compared with.

    By feature the edges of bins, in the feature's unit, and the share of values in each. A bin has `FEWEST` values or
    more. `features` is empty where the task asks for no such sums, and where a person has several rows: values are then
    not persons.
    """
    data, sums = plan.study.data, outcome.state.statistics
    found: dict[str, Any] = {}
    told = isinstance(data, TabularData) and not _several(outcome.evaluation)
    if told and isinstance(data, TabularData) and {"histogram", "count"} <= set(sums):
        numeric = {name: one for name, one in data.features.items() if isinstance(one, Numeric)}
        for (name, one), counts in zip(numeric.items(), sums["histogram"], strict=True):
            bins = _reference_bins(np.maximum(counts, 0.0), one.min, one.max)
            if bins is not None:
                found[name] = bins
    return {"format": FORMAT, "what": "shares of observed values by bin, before round 1", "features": found}


def _reference_bins(counts: NDArray[np.float64], low: float, high: float) -> dict[str, Any] | None:
    """Fine bins joined from the left until each has a tenth of the values; None where there are too few."""
    total = float(counts.sum())
    least = max(FEWEST, total / REFERENCE_BINS)
    if total < 2 * FEWEST:
        return None
    width = (high - low) / len(counts)
    edges, held, running = [low], [], 0.0
    for place, count in enumerate(counts):
        running += float(count)
        if running >= least:
            edges.append(low + (place + 1) * width)
            held.append(running)
            running = 0.0
    if not held:
        return None
    held[-1] += running  # what is left over belongs to the last bin
    edges[-1] = high
    return {"edges": edges, "shares": [count / total for count in held]}
