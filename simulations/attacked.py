"""What attacks came to, by model, over seeds: for the report, the terminal and --json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import mean
from typing import Any

from consortium.simulations.experiment import Experiment

MEANING = (
    "Membership: the share of the rows that were trained on which an attacker finds while taking at most 1 % of the "
    "others for such, by the model's loss and by the direction of the updates; guessing finds .01. Inversion: a round "
    "of one step over one row, the worst for a site; 0 means that the row was found exactly, 1 that guessing the mean "
    "row does as well. Means over seeds. That these attacks fail proves nothing; what is promised holds against all."
)


def document(experiment: Experiment) -> dict[str, Any]:
    """By model, as JSON values; empty where nothing was attacked."""
    found: dict[str, Any] = {}
    for name in experiment.strategies:
        tried = [
            one.attacked for one in experiment.trials if one.strategy == name and one.attacked is not None
        ]
        if not tried:
            continue
        rates = {way: _mean([one.true_positives[way] for one in tried]) for way in tried[0].true_positives}
        errors = {
            way: _mean([one.errors[way] for one in tried if way in one.errors]) for way in tried[0].errors
        }
        found[name] = {
            "true_positives": rates, "bound": tried[0].bound, "trained": tried[0].trained,
            "others": tried[0].others, "errors": errors,
            "left_out": {way: why for one in tried for way, why in one.left_out.items()},
        }  # fmt: skip
    return found


def lines(experiment: Experiment) -> list[str]:
    """For people, a line a model."""
    return [
        f"attacks on {name}: rows found at 1 % false positives: {_listed(one['true_positives'])}"
        + ("" if one["bound"] is None else f" (privacy promises at most {one['bound']:.3g})")
        + f"; error of an inverted row (1: as the mean row): {_listed(one['errors'])}"
        + "".join(f"; {sentence}" for sentence in left_out(one))
        for name, one in document(experiment).items()
    ]


def left_out(one: Mapping[str, Any]) -> list[str]:
    """Of one model of `document`: which attacks could not be made, and why."""
    return [f"left out, {way}: {why}" for way, why in sorted(one["left_out"].items())]


def shown(value: float | None) -> str:
    """A number for a table."""
    return "" if value is None else f"{value:.3g}"


def _listed(values: dict[str, float | None]) -> str:
    return (
        ", ".join(f"by {way} {shown(value) or 'not known'}" for way, value in values.items()) or "not known"
    )


def _mean(values: list[float]) -> float | None:
    """None where it is not known: no row is held out."""
    known = [value for value in values if not math.isnan(value)]
    return mean(known) if known else None
