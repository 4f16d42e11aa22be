"""Poisson cohorts with a fixed denominator: what they earn, what they draw, and what a round of nobody is."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from mechanism_checks import ballot
from private_studies import private_study, table

from consortium.privacy.accounting import Release, calibrate
from consortium.privacy.ledger import Ledger, Question, charge_of
from consortium.privacy.mechanisms import Mechanism, mechanism_of
from consortium.privacy.randomness import Stream
from consortium.protocol.errors import StudyError
from consortium.protocol.study import Study
from consortium.server.lineage import lineage, privacy
from consortium.server.noise import noised
from consortium.server.records import Plan
from consortium.simulations import simulate
from consortium.simulations.faults import Fault
from consortium.simulations.privacy_levels import levels
from consortium.strategies import chosen
from consortium.strategies.base import poisson
from consortium.strategies.catalogue import build
from consortium.strategies.chosen import strategy_of
from consortium.strategies.means import mean, norm_bounded, weighted_mean

CENTRAL = 'unit = "site"\nmechanism = "central-gaussian"'


def sampled(rate: float = 0.3, size: int = 2, rounds: int = 6, hidden: str = "[]", extra: str = "") -> Study:
    return private_study(
        CENTRAL + extra, rounds=rounds, hidden=hidden, cohort=f"sampling_rate = {rate}\nsize = {size}"
    )


def test_the_sample_earns_less_noise_and_no_other_cohort_does() -> None:
    """The event is a Poisson-sampled Gaussian at the study's rate, and calibrated as such."""
    one, whole = mechanism_of(sampled()), mechanism_of(private_study(CENTRAL, cohort="size = 2"))
    assert one is not None
    assert whole is not None
    assert one.release(4) == Release(one.noise_multiplier, 0.3, 4)
    assert one.noise_multiplier == calibrate(3.0, 1e-5, 6, 0.3) < whole.noise_multiplier
    assert (one.denominator, one.sampled, whole.sampled) == (2.0, True, False)
    assert "Poisson sampling, rate 0.3" in str(one.guarantee())


def test_each_site_is_drawn_with_the_rate_by_itself() -> None:
    """By the operating system's randomness: each as often as the rate says, pairs as often as its square (6 errors)."""
    select, rng, repeats = poisson(0.3), random.SystemRandom(), 20_000
    drawn = np.array([["a" in one, "b" in one] for one in (select("abc", 1, rng) for _ in range(repeats))])
    for share, rate in ((drawn[:, 0], 0.3), (drawn[:, 1], 0.3), (drawn.all(1), 0.09)):
        assert abs(share.mean() - rate) <= 6 * math.sqrt(rate * (1 - rate) / repeats)


@pytest.mark.parametrize("admitted", [(), (0,), (0, 1, 2, 3, 4)])
def test_sum_and_noise_follow_the_fixed_denominator(admitted: tuple[int, ...]) -> None:
    """However many came: the sum over the study's number, and noise of multiplier x C over it, within 2 %."""
    one = Mechanism("central-gaussian", "site", 3.0, 1e-5, 0.7, 2.5, 10, rate=0.3, denominator=2.0)
    update = np.full(200_000, 0.5 if admitted else 0.0, np.float32)
    noisy, _ = noised(one, mean(), ballot(5, admitted, 1), update, {}, Stream.system())
    deviation = 2.5 * 0.7 / 2.0
    assert float(noisy.std()) == pytest.approx(deviation, rel=0.02)
    assert abs(float(noisy.mean()) - 0.5 * len(admitted) / 2.0) <= 6 * deviation / math.sqrt(noisy.size)


def test_a_round_of_nobody_is_noise_and_no_round_is_void() -> None:
    """Missing answers count as zero, too: a site that never answers is no reason for a void round."""
    study = sampled(rate=0.1, size=1, rounds=30, hidden="[64]")
    sites = {f"s{number}": table(60, number) for number in range(3)}
    result = simulate(study, sites=sites, processes=0, faults=[Fault("s1", "drop", None)])
    rounds = result.outcome.state.rounds
    assert (result.status, len(rounds)) == ("finished", 30)
    assert not any(record.void for record in rounds)
    empty = [record for record in rounds if not record.asked]
    assert empty
    assert all(one.model != other.model for one, other in pairwise(rounds))
    assert any(record.asked == ("s1",) and not record.admitted for record in rounds) or any(
        "s1" in record.left_out for record in rounds
    )


def test_what_is_exported_does_not_say_who_was_drawn() -> None:
    """Neither the lineage's rounds nor privacy.json, in which each site has spent all rounds."""
    study = sampled(rounds=4)
    result = simulate(study, sites={f"s{n}": table(60, n) for n in range(3)}, processes=0)
    plan = Plan(study, strategy_of(study), result.layout, result.outcome.model)
    assert all(not one["sites"] and not one["left_out"] for one in lineage(plan, result.outcome)["rounds"])
    assert {one["releases"] for one in privacy(plan, result.outcome)["sites"].values()} == {4}


def test_a_site_that_was_never_drawn_is_not_told_from_the_others() -> None:
    """Of a single round, whoever the bundle names would be the cohort itself."""
    study = sampled(rate=0.5, rounds=1)
    sites = [f"s{number}" for number in range(5)]
    result = simulate(study, sites={site: table(60, n) for n, site in enumerate(sites)}, processes=0)
    plan = Plan(study, strategy_of(study), result.layout, result.outcome.model)
    assert 0 < len(result.outcome.state.rounds[-1].asked) < 5
    assert lineage(plan, result.outcome)["sites"] == sites
    assert list(privacy(plan, result.outcome)["sites"]) == sites


def test_a_site_charges_the_whole_run_at_its_first_round(tmp_path: Path) -> None:
    """Rounds that it was not in cost it the same, and it does not see them."""
    one, key = mechanism_of(sampled()), Ed25519PrivateKey.generate()
    book = Ledger(tmp_path / "ledger.jsonl", "ledger a", key)
    asked = [charge_of("patients", Question("r.1", number, 0, f"m{number}"), "s", one) for number in (2, 5)]
    assert [book.charge(each, 6, 1.0) for each in asked] == [True, False]
    assert not book.release(asked[1], "a" * 64, 6, 1.0)
    (only,) = Ledger(tmp_path / "ledger.jsonl", "ledger a", key).accounts()["patients"].charges
    assert only.whole
    assert only.release is not None
    assert only.release.count == 6


@pytest.mark.parametrize(
    ("cohort", "privacy_", "word"),
    [
        ("sampling_rate = 0.3", CENTRAL, "cohort.size"),
        ("sampling_rate = 0.3\nsize = 2\nspare = 1", CENTRAL, "cohort.spare"),
        ("sampling_rate = 1.5\nsize = 2", CENTRAL, "cohort.sampling_rate"),
        ("sampling_rate = 0.3\nsize = 2", CENTRAL + "\nclip_quantile = 0.5", "privacy.clip_quantile"),
        ("sampling_rate = 0.3\nsize = 2", 'mechanism = "dp-sgd"', "central-gaussian"),
        ("sampling_rate = 0.3\nsize = 2", 'mechanism = "none"', "central-gaussian"),
    ],
)
def test_where_it_would_earn_nothing_it_is_refused(cohort: str, privacy_: str, word: str) -> None:
    """When the study is read, with the key and what to write."""
    with pytest.raises(StudyError, match=word):
        private_study(privacy_, cohort=cohort)


def test_the_judges_of_a_best_model_would_be_a_cohort() -> None:
    """So the last model is kept, which all sites judge."""
    text = sampled().text + '[evaluation]\nselect = "best"\n'
    with pytest.raises(StudyError, match=r"evaluation.select"):
        Study.parse(text)


def test_only_means_count_an_absent_site_as_zero() -> None:
    """With a bound of its own or without; a weighted one does not."""
    study = sampled()
    plain = build(study.strategy.table(), study.name)
    assert chosen._sums(plain)
    assert chosen._sums(replace(plain, reducer=norm_bounded(1.0, weighted=False)))
    assert not chosen._sums(replace(plain, reducer=weighted_mean()))


def test_levels_of_a_sampled_study_keep_its_cohorts_where_they_earn_something() -> None:
    """By site alone; by record and without privacy all sites are asked, where a sample would be refused."""
    found = {one.label: one.study.cohort for one in levels(sampled(), [4.0, math.inf])}
    assert found.keys() == {"record, epsilon 4", "site, epsilon 4", "no privacy"}
    rates = {label: (cohort.sampling_rate, cohort.size) for label, cohort in found.items()}
    assert rates.pop("site, epsilon 4") == (0.3, 2)
    assert set(rates.values()) == {(None, None)}
