"""What a study or a finished run says of privacy: figures with all that they mean, and every release, covered or not.

`study check` prints it before anything runs, an exported model carries it as `privacy.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from consortium.privacy.accounting import Release, spent
from consortium.privacy.mechanisms import Mechanism, mechanism_of
from consortium.protocol.study import Study

FORMAT = 1
MOST_ROWS = 25
"""Rounds that a table lists; of more, as many evenly spaced ones."""
OTHER_NOISE = (0.5, 0.75, 1.5, 2.0, 4.0)

NONE = (
    "No differential privacy: nothing bounds what the model, its updates or its evaluation tell of one record. Records "
    "did not leave the sites; updates, statistics and counts did."
)
TRUST = {
    "dp-sgd": "noise is added at the site, so server, other sites and users of the model see private numbers alone",
    "central-gaussian": "the server sees each clipped update and adds the noise, so it is trusted; other sites and "
    "users of the model see private numbers alone",
    "local-gaussian": "noise is added at the site, so server, other sites and users of the model see private numbers "
    "alone",
}


def statement(study: Study) -> dict[str, Any]:
    """A study's privacy before it runs, as plain JSON values."""
    mechanism = mechanism_of(study)
    if mechanism is None:
        return {
            "format": FORMAT, "mechanism": "none", "unit": None, "epsilon": None, "delta": None, "statement": NONE,
            **releases(study),
        }  # fmt: skip
    return {
        "format": FORMAT,
        "mechanism": mechanism.name,
        **mechanism.guarantee().document(),
        "statement": f"{mechanism.name}: {mechanism.guarantee()}, after all rounds; it protects {_protects(study)}. "
        f"{TRUST[mechanism.name].capitalize()}.",
        "target_epsilon": mechanism.epsilon,
        "clip_norm": mechanism.clip_norm,
        "clip_quantile": mechanism.quantile,
        "noise_multiplier": mechanism.noise_multiplier,
        "sampling_rate": mechanism.rate,
        "steps_a_round": mechanism.steps,
        "denominator": mechanism.denominator,
        "trust": TRUST[mechanism.name],
        "protects": _protects(study),
        "after_rounds": [
            {"round": number, "epsilon": mechanism.guarantee(number).epsilon}
            for number in _rows(mechanism.rounds)
        ],
        "other_noise": [_with_noise(mechanism, factor) for factor in OTHER_NOISE],
        **releases(study),
    }


def of_run(study: Study, counts: Mapping[str, int]) -> dict[str, Any]:
    """A finished run's privacy: the study's, and what each site spent. counts: how often each site released."""
    said = statement(study)
    mechanism = mechanism_of(study)
    if mechanism is None:
        return {**said, "sites": {}}
    delta, unit, relation = mechanism.delta, mechanism.unit, mechanism.relation
    sites = {
        site: {"releases": count, **spent([mechanism.release(count)], delta, unit, relation).document()}
        for site, count in sorted(counts.items())
    }
    return {**said, "sites": sites}


def releases(study: Study) -> dict[str, list[str]]:
    """Everything computed from records that leaves a site or the server: what the mechanism accounts for, and what it
    does not."""
    asked, none = study.privacy, study.privacy.mechanism == "none"
    accounted: list[str] = []
    declared: list[str] = []
    if study.app is not None:
        whatever = (
            "whatever the app's ClientApp puts into its replies: arrays, metrics, settings, without noise"
        )
        return {"accounted": [], "not_covered": [whatever, _ANSWERED]}
    if none:
        declared += ["updates of shared weights, each round, without noise"]
        declared += ["the number of training rows of each site, as the update's weight, each round"]
        declared += ["sums over the training rows for preprocessing, once" if study.built_in else _OWN_SUMS]
    else:
        accounted += ["updates of shared weights, each round"]
        if asked.clip_quantile is not None:
            accounted += ["whether each site's update lay within the clip bound, each round"]
        declared += [] if study.built_in else [_OWN_SUMS]
    if study.data.holdout or study.data.split or not study.built_in:
        what = "every held-out score" if study.evaluation.auroc == "exact" else "counts"
        declared += [f"evaluation of each model over the held-out rows: {what} by site, each round"]
        declared += [_JUDGED]
        if study.evaluation.select == "best":
            declared += ["the choice of the best round, made by these evaluations"]
    declared += [_ANSWERED]
    return {"accounted": accounted, "not_covered": declared}


_ANSWERED = "whether a site answered, when, and its reason where it did not"

_OWN_SUMS = "sums over the training rows for preprocessing, where the study's own task asks for them, once"

_JUDGED = (
    "evaluation of an exported model before it is promoted: counts over the held-out rows by site and group, none of "
    "fewer than 10 persons, where the site takes part in gates"
)


def _protects(study: Study) -> str:
    if study.privacy.unit == "site":
        return "whether and with what data a site took part, at each site by itself"
    if study.privacy.unit == "person":
        return (
            "all training rows of one person at a site; a person at two sites is protected at each by itself"
        )
    several = getattr(study.data, "person", None)
    warning = (
        " (rows, not people: a person here may have several)"
        if several
        else ", people only where each has one row"
    )
    return f"single training rows{warning}"


def _rows(rounds: int) -> list[int]:
    if rounds <= MOST_ROWS:
        return list(range(1, rounds + 1))
    return sorted({round(1 + (rounds - 1) * step / (MOST_ROWS - 1)) for step in range(MOST_ROWS)})


def _with_noise(mechanism: Mechanism, factor: float) -> dict[str, float | None]:
    multiplier = mechanism.noise_multiplier * factor
    release = Release(multiplier, mechanism.rate, mechanism.steps * mechanism.rounds)
    found = spent([release], mechanism.delta, mechanism.unit, mechanism.relation).document()["epsilon"]
    assert not isinstance(found, str)
    return {"noise_multiplier": multiplier, "epsilon": found}


def text(said: Mapping[str, Any]) -> str:
    """A statement for people to read."""
    lines = ["privacy"]
    if said["mechanism"] == "none":
        lines += ["  mechanism    none: nothing is noised, and updates may reveal records"]
    else:
        lines += [
            f"  mechanism    {said['mechanism']}: {said['trust']}",
            f"  protects     {said['protects']}",
            f"  epsilon      {said['epsilon']:.3f} at delta {said['delta']:g} per {said['unit']}, after all rounds",
            f"  meaning      neighbours: {said['relation']}; {said['sampling']}; accountant: {said['accountant']}",
            f"  noise        multiplier {said['noise_multiplier']:g}, clip norm {said['clip_norm']:g}"
            + (f" at first, adapting to quantile {said['clip_quantile']:g}" if said["clip_quantile"] else ""),
        ]
        if said["mechanism"] == "dp-sgd":
            lines.append(
                f"  batches      {said['steps_a_round']} a round, each {said['unit']} in each with probability "
                f"{said['sampling_rate']:g}; sums divided by {said['denominator']:g}"
            )
        after = [f"{one['round']}: {one['epsilon']:.3f}" for one in said["after_rounds"]]
        lines.append(f"  each site, epsilon at delta {said['delta']:g} per {said['unit']} after round")
        lines += ["    " + "  ".join(after[start : start + 6]) for start in range(0, len(after), 6)]
        lines.append(
            f"  with other noise multipliers, epsilon at delta {said['delta']:g} per {said['unit']} after all rounds"
        )
        lines += [
            f"    {one['noise_multiplier']:.4g}: {_shown(one['epsilon'])}" for one in said["other_noise"]
        ]
    lines.append("  accounted    " + ("; ".join(said["accounted"]) or "nothing"))
    lines.append("  not covered  " + "; ".join(said["not_covered"]))
    for site, one in said.get("sites", {}).items():
        lines.append(
            f"  {site}: {one['releases']} releases, epsilon {_shown(one['epsilon'])} at delta {one['delta']:g} per "
            f"{one['unit']}"
        )
    return "\n".join(lines)


def _shown(epsilon: float | None) -> str:
    return "infinite" if epsilon is None else f"{epsilon:.3f}"
