"""The table of an experiment: means and intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from consortium.protocol.metrics import SIZES
from consortium.protocol.sections import LOWER_IS_BETTER
from consortium.simulations.experiment import Experiment

LOCAL, POOLED = "local-only", "pooled"
ALPHA = 0.05


@dataclass(frozen=True)
class Spread:
    """A metric over seeds.

    mean: NaN where no seed gave a number. low, high: the 95 % interval of the mean by Student's t; NaN with fewer
    than two seeds. seeds: how many gave a number.
    """

    mean: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "-"
        if math.isnan(self.low):
            return _short(self.mean)
        return f"{_short(self.mean)} ± {_short(self.mean - self.low)}"


def _short(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10_000 else f"{value:.3e}"


def spread(values: Sequence[float]) -> Spread:
    """Mean and interval of some numbers; those that are NaN are left out."""
    kept = [value for value in values if not math.isnan(value)]
    if len(kept) < 2:
        return Spread(kept[0] if kept else math.nan, math.nan, math.nan, len(kept))
    mean = fmean(kept)
    half = t_quantile(len(kept) - 1) * stdev(kept) / math.sqrt(len(kept))
    return Spread(mean, mean - half, mean + half, len(kept))


def t_quantile(freedom: int) -> float:
    """What Student's t with so many degrees of freedom stays within, plus or minus, with probability 0.95.

    By bisection of the closed form for whole degrees (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    low, high = 0.0, 13.0  # 12.706 with one degree, less with more
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 1 - ALPHA else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """The probability that |T| <= t."""
    theta = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    return 2 / math.pi * (theta + sine * total) if odd else sine * total


@dataclass(frozen=True)
class Row:
    """One line: a strategy or a baseline, and its metrics by name, the study's own metric first."""

    name: str
    metrics: Mapping[str, Spread]


def rows(experiment: Experiment) -> list[Row]:
    """Local-only (mean over the sites), each strategy, pooled; all judged on the union of the holdouts."""
    names = metric_names(experiment)
    table = []
    if experiment.baselines:
        local = [
            {name: _mean_of_sites(list(one.local.values()), name) for name in names}
            for one in experiment.baselines
        ]
        table.append(_row(LOCAL, local, names))
    for strategy in experiment.strategies:
        own = [trial.metrics for trial in experiment.trials if trial.strategy == strategy]
        table.append(_row(strategy, own, names))
    if experiment.baselines:
        table.append(_row(POOLED, [one.pooled for one in experiment.baselines], names))
    return table


def metric_names(experiment: Experiment) -> list[str]:
    """All metrics that any model has, the study's own first, in the order in which the task counts them."""
    found: dict[str, None] = {}
    for metrics in [
        *(trial.metrics for trial in experiment.trials),
        *(b.pooled for b in experiment.baselines),
    ]:
        found.update(dict.fromkeys(name for name in metrics if name not in SIZES))
    return sorted(found, key=lambda name: name != experiment.metric)


def _mean_of_sites(sites: Sequence[Mapping[str, float]], name: str) -> float:
    values = [site[name] for site in sites if not math.isnan(site.get(name, math.nan))]
    return fmean(values) if values else math.nan


def _row(name: str, seeds: Sequence[Mapping[str, float]], names: Sequence[str]) -> Row:
    return Row(name, {metric: spread([one.get(metric, math.nan) for one in seeds]) for metric in names})


def heading(metric: str) -> str:
    """A metric's name with the direction that is better."""
    return f"{metric} {'↓' if metric in LOWER_IS_BETTER else '↑'}"


def text(table: Sequence[Row]) -> str:
    """The table as aligned plain text; empty where nothing was judged (see `nothing`)."""
    if not table or not table[0].metrics:
        return ""
    lines = [["", *(heading(name) for name in table[0].metrics)]]
    lines += [[row.name, *(str(spread) for spread in row.metrics.values())] for row in table]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def nothing(experiment: Experiment) -> str:
    """Why there is no table."""
    if experiment.sites and not any(held for _, held in experiment.sites.counts.values()):
        return "No site holds out rows, so nothing was judged."
    return "No model could be judged."


def judged(experiment: Experiment) -> str:
    """How the table's metrics came about, in words; empty where there are none."""
    if not metric_names(experiment):
        return ""
    at_sites = any(trial.judged == "sites" for trial in experiment.trials)
    n = sum(held for _, held in experiment.sites.counts.values()) if experiment.sites else 0
    union = f"the union of the sites' holdouts ({n} rows)" if n else "the union of the sites' holdouts"
    if experiment.sites is None:
        return f"Judged by the counts that the sites sent ({experiment.study.evaluation.auroc} AUROC)."
    if at_sites:
        where = f"Baselines are judged in one place on {union}, strategies at the sites, with the sites' own layers."
    else:
        where = f"All models are judged on {union}."
    if "auroc" in metric_names(experiment):
        where += " AUROC is exact, from pooled scores: possible only as all rows are on one machine."
    return where
