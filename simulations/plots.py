"""The plots of an experiment, drawn without a display."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from consortium.simulations.experiment import Experiment
from consortium.simulations.table import LOCAL, POOLED, heading, rows, spread

Numbers = NDArray[np.float64]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
"""Of Okabe and Ito, which people tell apart who do not see all colours."""

MARKERS = "osD^vPX"
MOST_NAMES = 40
WITHIN_ONE = ("accuracy", "auroc")
"""Metrics that lie in [0, 1], where an interval should not leave it."""


def draw(experiment: Experiment, folder: Path) -> dict[str, Path]:
    """PNG files in `folder`, by what they show: "privacy", "rounds", "sites". None where no site holds out rows."""
    drawn = {}
    if any(trial.level for trial in experiment.trials) and experiment.metric:
        drawn["privacy"] = _save(_privacy(experiment), folder / "privacy.png")
    if any(trial.result.outcome.state.evaluations for trial in experiment.trials) and experiment.metric:
        drawn["rounds"] = _save(_rounds(experiment), folder / "rounds.png")
        if any(trial.result.outcome.evaluation for trial in experiment.trials):
            drawn["sites"] = _save(_sites(experiment), folder / "sites.png")
    return drawn


def _save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=144, metadata={"Software": None})
    return path


def _figure(width: float = 7.0) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def colour(number: int) -> str:
    """The colour of the strategy with that number."""
    return COLOURS[number % len(COLOURS)]


def _rounds(experiment: Experiment) -> Figure:
    """The pooled metric of the sites' counts after each round: means over seeds, bands where there are several.

    The initial model is left out: it would set the scale.
    """
    figure, axes = _figure()
    metric = experiment.metric
    for number, strategy in enumerate(experiment.strategies):
        by_round: dict[int, list[float]] = {}
        for trial in experiment.trials:
            if trial.strategy == strategy:
                for evaluation in trial.result.outcome.state.evaluations:
                    if evaluation.round == 0:
                        continue
                    by_round.setdefault(evaluation.round, []).append(evaluation.pooled.get(metric, math.nan))
        found = [(at, spread(values)) for at, values in sorted(by_round.items())]
        x = np.array([at for at, _ in found])
        marker = MARKERS[number % len(MARKERS)] if len(x) <= 25 else ""
        means = [one.mean for _, one in found]
        axes.plot(
            x, means, color=colour(number), label=strategy, marker=marker, ms=4, linewidth=1.4, alpha=0.85
        )
        low, high = _band([one.low for _, one in found], [one.high for _, one in found], metric)
        axes.fill_between(x, low, high, color=colour(number), alpha=0.15, linewidth=0)
    for row in rows(experiment):
        mean = row.metrics[metric].mean if metric in row.metrics else math.nan
        if row.name in (LOCAL, POOLED) and not math.isnan(mean):
            style = "--" if row.name == LOCAL else ":"
            axes.axhline(mean, color="#444444", linestyle=style, linewidth=1.1, label=row.name)
    axes.set_xlabel("round")
    axes.set_ylabel(heading(metric))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(frameon=False, fontsize="small", loc="outside upper center", ncols=6)
    return figure


def _privacy(experiment: Experiment) -> Figure:
    """The selected model's metric against epsilon, for each unit: means over seeds and their intervals."""
    figure, axes = _figure()
    metric = experiment.metric
    found = [trial.level for trial in experiment.trials if trial.level]
    places = {epsilon: place for place, epsilon in enumerate(sorted({one.epsilon for one in found}))}
    plain = [t.metrics.get(metric, math.nan) for t in experiment.trials if t.level and t.level.unit == "any"]
    for number, unit in enumerate(dict.fromkeys(one.unit for one in found if one.unit != "any")):
        by_epsilon: dict[float, list[float]] = {math.inf: plain} if plain else {}
        for trial in experiment.trials:
            if trial.level and trial.level.unit == unit:
                by_epsilon.setdefault(trial.level.epsilon, []).append(trial.metrics.get(metric, math.nan))
        at = [(places[epsilon], spread(values)) for epsilon, values in sorted(by_epsilon.items())]
        x = np.array([place for place, _ in at])
        axes.plot(
            x,
            [one.mean for _, one in at],
            color=colour(number),
            label=f"per {unit}",
            marker=MARKERS[number],
            ms=5,
        )
        low, high = _band([one.low for _, one in at], [one.high for _, one in at], metric)
        axes.fill_between(x, low, high, color=colour(number), alpha=0.15, linewidth=0)
    named = ["no privacy" if math.isinf(epsilon) else f"{epsilon:g}" for epsilon in places]
    axes.set_xticks(list(places.values()), named)
    deltas = sorted({one.study.privacy.delta for one in found if one.study.privacy.delta})
    axes.set_xlabel(f"epsilon at delta {', '.join(f'{delta:g}' for delta in deltas)}, each site by itself")
    axes.set_ylabel(heading(metric))
    figure.legend(frameon=False, fontsize="small", loc="outside upper center", ncols=6)
    return figure


def _sites(experiment: Experiment) -> Figure:
    """The selected model's metric on each site's own holdout: means over seeds and their intervals."""
    metric = experiment.metric
    names = sorted({s for t in experiment.trials if (e := t.result.outcome.evaluation) for s in e.sites})
    named = len(names) <= MOST_NAMES
    figure, axes = _figure(max(7.0, min(14.0, 0.3 * len(names))) if named else 9.0)
    strategies = experiment.strategies
    for number, strategy in enumerate(strategies):
        found = []
        for site in names:
            values = [
                evaluation.sites[site].get(metric, math.nan)
                for trial in experiment.trials
                if trial.strategy == strategy
                and (evaluation := trial.result.outcome.evaluation)
                and site in evaluation.sites
            ]
            found.append(spread(values))
        if not named:  # too many to name: from the least to the greatest
            found.sort(key=lambda one: (math.isnan(one.mean), one.mean))
        x = np.arange(len(found)) + (number - (len(strategies) - 1) / 2) * 0.6 / max(len(strategies), 2)
        means = np.array([one.mean for one in found])
        low, high = _band([one.low for one in found], [one.high for one in found], metric)
        half = np.nan_to_num(np.stack([means - low, high - means]))
        marker = MARKERS[number % len(MARKERS)]
        axes.errorbar(x, means, half, fmt=marker, ms=4, color=colour(number), label=strategy, elinewidth=1)
    if named:
        axes.set_xticks(np.arange(len(names)), [_short(name) for name in names], rotation=45 if len(names) > 6 else 0,
                        ha="right" if len(names) > 6 else "center")  # fmt: skip
    else:
        axes.set_xlabel(f"{len(names)} sites, in order of the metric")
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_ylabel(f"{heading(metric)} on the site's own holdout")
    figure.legend(frameon=False, fontsize="small", loc="outside upper center", ncols=6)
    return figure


def _band(low: Sequence[float], high: Sequence[float], metric: str) -> tuple[Numbers, Numbers]:
    ends = np.array([low, high], np.float64)
    if metric in WITHIN_ONE:
        ends = np.clip(ends, 0, 1)
    return ends[0], ends[1]


def _short(name: str) -> str:
    # A dollar sign would start a formula.
    return (name if len(name) <= 24 else name[:23] + "…").replace("$", r"\$")
