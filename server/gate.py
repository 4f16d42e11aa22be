"""Whether a version may become the champion: its counts at the sites beside those of the champion of now. Pure.

Both are judged on the same held-out rows of the same sites. The version passes only if no site, no group of rows and
no group at a site falls by more than the margin, in the unit of the metric; and where a minimum is stated, if none is
worse than that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from consortium.protocol import metrics
from consortium.protocol.messages import Statistics
from consortium.protocol.sections import LOWER_IS_BETTER
from consortium.protocol.study import Study

ALL = "all"
Groups = Mapping[str, Statistics]
"""A site's counts by the name of a group; of all its rows by `ALL`."""
_SLACK = 1e-9
"""What sums of rounded numbers may differ by."""


@dataclass(frozen=True)
class Terms:
    """metric: by which models are compared. margin: how much a cell may fall, in its unit. minimum: what every cell
    must reach (for an error: not pass) of which a figure is known, and all rows together must have one; None: nothing
    is asked."""

    metric: str
    margin: float
    minimum: float | None = None


@dataclass(frozen=True)
class Verdict:
    """cells: each with site, group ("all" for all rows), both values and the fall; None where the counts do not decide.

    why: by reason a cell or more that do not pass; empty where the version passes.
    """

    cells: Sequence[Mapping[str, Any]]
    why: Sequence[str]


def problem(table: Statistics, metric: str, groups: Mapping[str, str], most: float) -> str:
    """Why a site's counts are none of an honest site; empty where they may be. groups: names by cell."""
    found = metrics.cells(table)
    if "" not in found:
        return "sends no counts of all its held-out rows"
    for cell, counts in found.items():
        if cell and cell not in groups:
            return "sends counts of a group that the study does not name"
        for name, array in counts.items():
            finite = math.isfinite(float(array.sum()))
            wrong = metrics.problem(name, array) if finite else "is not finite"
            if wrong:
                return f"metric '{name[:40]}' {wrong}"
            if metrics.examples(name, array) > most:
                return f"metric '{name[:40]}' counts more examples than cohort.max_weight, {most:g}"
            whole = found[""].get(name)
            if whole is None or not (name.endswith("_exact") or whole.shape == array.shape):
                return f"metric '{name[:40]}' has another shape for a group than for all rows"
        if metric not in metrics.values(counts):
            return f"sends nothing of which '{metric}' is made"
    return ""


def groups(study: Study) -> dict[str, str]:
    """The study's groups by cell: {"0.1": "sex = F"}."""
    features: Mapping[str, Any] = getattr(study.data, "features", {})
    return {
        f"{number}.{place}": f"{name} = {value}"
        for number, name in enumerate(study.evaluation.groups)
        for place, value in enumerate(features[name].values)
    }


def named(table: Statistics, groups: Mapping[str, str]) -> Groups:
    """A site's counts by group. groups: names by cell, as the study numbers them; another study numbers others."""
    return {groups[cell] if cell else ALL: counts for cell, counts in metrics.cells(table).items()}


def verdict(terms: Terms, candidate: Mapping[str, Groups], champion: Mapping[str, Groups] | None) -> Verdict:
    """What the counts of the same sites say. champion: None where there is none yet."""
    new = _values(candidate, terms.metric)
    old = {} if champion is None else _values(champion, terms.metric)
    cells, why = [], []
    for place in sorted({*new, *old}, key=lambda place: (place[0], place[1] != ALL, place[1])):
        site, group = place
        value, before = new.get(place, math.nan), old.get(place, math.nan)
        about = {"site": site or ALL, "group": group}
        fall = _worse(terms.metric, value) - _worse(terms.metric, before)
        cells.append({**about, "candidate": _plain(value), "champion": _plain(before), "fall": _plain(fall)})
        failing = [*_failing(terms, value, before, fall)]
        if terms.minimum is not None and place == ("", ALL) and math.isnan(value):
            failing.append(f"{terms.metric} is not known, and {terms.minimum:g} is asked for")
        why += [f"site {about['site']}, group {group}: {one}" for one in failing]
    return Verdict(cells, why)


def _failing(terms: Terms, value: float, before: float, fall: float) -> Iterator[str]:
    if fall > terms.margin + _SLACK:
        yield (
            f"{terms.metric} {value:.4f} is worse than the champion's {before:.4f} by {fall:.4f}, more than the margin "
            f"of {terms.margin:g}"
        )
    elif math.isnan(value) and not math.isnan(before):
        yield f"{terms.metric} is not known, and the champion's is {before:.4f}"
    if (
        terms.minimum is not None
        and _worse(terms.metric, value) > _worse(terms.metric, terms.minimum) + _SLACK
    ):
        yield f"{terms.metric} {value:.4f} does not reach the minimum of {terms.minimum:g}"


def _worse(metric: str, value: float) -> float:
    """Larger where it is worse."""
    return value if metric in LOWER_IS_BETTER else -value


def _values(tables: Mapping[str, Groups], metric: str) -> dict[tuple[str, str], float]:
    """The metric by site ("" for all) and group."""
    found: dict[tuple[str, str], float] = {}
    by_group: dict[str, list[Statistics]] = {}
    for site, groups in sorted(tables.items()):
        for group, counts in groups.items():
            found[site, group] = metrics.values(counts).get(metric, math.nan)
            by_group.setdefault(group, []).append(counts)
    for group, several in by_group.items():
        found["", group] = metrics.values(metrics.pool(several)).get(metric, math.nan)
    return found


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
