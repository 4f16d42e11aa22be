"""What noise buys: epsilon from releases, and back."""

import math

import numpy as np
import own_losses
import pytest

from consortium.privacy import accounting
from consortium.privacy.accounting import Guarantee, Release, calibrate, spent
from consortium.protocol.errors import InputError

DELTA = 1e-5


def epsilon(multiplier: float, rate: float, count: int, delta: float = DELTA) -> float:
    return spent([Release(multiplier, rate, count)], delta, "record", "add or remove one").epsilon


def classic(multiplier: float, rate: float, count: int, delta: float = DELTA) -> float:
    """The conversion of 2016: the least over orders of RDP + log(1 / delta) / (order - 1)."""
    from dp_accounting import rdp

    accountant = rdp.RdpAccountant()  # its own orders, from 1.1 on
    accountant.compose(accounting._event(multiplier, rate, count))
    pairs = zip(accountant._orders, accountant._rdp, strict=True)
    return float(min(value + math.log(1 / delta) / (order - 1) for order, value in pairs))


@pytest.mark.parametrize(
    ("multiplier", "rate", "count", "expected"),
    [
        (1.5, 0.04, 2250, 6.77),
        (4.0, 0.01, 10_000, 0.947),
        (1.0, 1.0, 1, 4.3772),
        (1.0, 1.0, 10, 17.8566),
        (5.0, 1.0, 100, 9.9973),
        (1.0, 1.0, 50, 54.38),
        (2.0, 1.0, 50, 20.68),
        (5.0, 1.0, 50, 6.573),
        (10.0, 1.0, 50, 2.943),
    ],
)
def test_figures_are_the_published_ones(multiplier: float, rate: float, count: int, expected: float) -> None:
    """Within 1 %: sampled by PLD, unsampled exact."""
    assert epsilon(multiplier, rate, count) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("multiplier", "rate", "count", "expected"), [(1.5, 0.04, 2250, 7.329), (4, 0.01, 10_000, 1.0355)]
)
def test_renyi_figures_are_the_published_ones(
    multiplier: float, rate: float, count: int, expected: float
) -> None:
    """Renyi's bound by itself, within 1 %."""
    assert accounting._renyi(((multiplier, rate, count),), DELTA) == pytest.approx(expected, rel=0.01)


def test_the_other_bounds_of_the_table_are_the_published_ones() -> None:
    """By Renyi's bound alone epsilon 8 needs a multiplier of 1.416; the conversion of 2016 gives 1.2586. Within 1 %."""
    assert accounting._renyi_calibrated(8.0, DELTA, 2250, 0.04) == pytest.approx(1.416, rel=0.01)
    assert classic(4.0, 0.01, 10_000) == pytest.approx(1.2586, rel=0.01)


CORNERS = [
    (0.7, 0.02, 500, 1e-5), (1.1, 0.1, 100, 1e-5), (2.0, 0.5, 40, 1e-5), (0.9, 0.005, 3000, 1e-5),
    (8.0, 0.2, 1000, 1e-5), (1.3, 0.9, 3, 1e-5), (15.0, 1e-4, 90_000, 1e-8), (40.0, 0.002, 60_000, 1e-5),
    (50.0, 1e-5, 30, 1e-9), (0.8, 6e-5, 60_000, 1e-7), (1.4, 0.96, 4, 1e-9), (3.0, 1e-6, 1_000_000, 1e-9),
]  # fmt: skip


def between(multiplier: float, rate: float, count: int, delta: float) -> None:
    from dp_accounting import pld

    fine = pld.PLDAccountant(value_discretization_interval=1e-4)
    fine.compose(accounting._event(multiplier, rate, count))
    got = epsilon(multiplier, rate, count, delta)
    assert fine.get_epsilon(delta) - 0.02 <= got, (multiplier, rate, count, delta)
    assert got <= classic(multiplier, rate, count, delta), (multiplier, rate, count, delta)


@pytest.mark.parametrize("setting", CORNERS)
def test_a_figure_lies_between_the_finest_losses_and_the_classic_conversion(
    setting: tuple[float, float, int, float],
) -> None:
    """Never below PLD by more than 0.02, never above the classic conversion: tiny and large rates, many and few steps,
    much and little noise, delta down to 1e-9."""
    between(*setting)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_so_it_does_at_random_settings() -> None:
    """Sixty, over five decades of rates and counts, always the same, so that no grid's own error is met by chance."""
    rng = np.random.default_rng(20)
    for _ in range(60):
        rate, delta = 10 ** rng.uniform(-5, 0), 10 ** rng.uniform(-9, -3)
        multiplier, count = 10 ** rng.uniform(-0.2, 1.7), int(10 ** rng.uniform(0, 5))
        if epsilon(multiplier, rate, count, delta) < 20:  # beyond it the finest grid takes minutes
            between(multiplier, rate, count, delta)


EXTREMES = [
    (0.3, 1e-4, 10, 1e-12), (0.3, 0.05, 1, 1e-5), (0.46, 0.002, 14, 1e-8), (0.75, 0.007, 216, 1e-12),
    (1.5, 0.04, 2250, 1e-5), (1.5, 5e-6, 2070, 1e-12), (2.6, 9e-4, 223, 1e-6), (4.0, 0.01, 10_000, 1e-5),
    (8.8, 0.19, 59, 1e-9), (8.0, 0.9, 1, 1e-3), (20.0, 0.5, 300, 1e-12), (50.0, 0.01, 100_000, 1e-12),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("setting", EXTREMES)
def test_a_figure_is_that_of_another_accountant(setting: tuple[float, float, int, float]) -> None:
    """One that shares nothing with ours (`tests/support/own_losses.py`): never more than .02 below it, nor .02 and 2 %
    above, from noise of 0.3 to 50, from one step to 100,000, down to delta 1e-12."""
    multiplier, rate, count, delta = setting
    got, other = epsilon(multiplier, rate, count, delta), own_losses.epsilon(multiplier, rate, count, delta)
    assert other - 0.02 <= got <= other * 1.02 + 0.02
    assert got <= classic(multiplier, rate, count, delta)


def test_the_exact_gaussian_meets_its_delta() -> None:
    """Balle & Wang, theorem 8: delta = Phi(1/2s - e s) - exp(e) Phi(-1/2s - e s), also far above epsilon 1."""

    def phi(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    for sigma in (0.4, 1.0, 3.0, 20.0):
        e = epsilon(sigma, 1.0, 1)
        delta = phi(1 / (2 * sigma) - e * sigma) - math.exp(e) * phi(-1 / (2 * sigma) - e * sigma)
        assert delta == pytest.approx(DELTA, rel=1e-3)


@pytest.mark.parametrize(
    ("target", "count", "rate", "expected"),
    [
        (8.0, 2250, 0.04, 1.346),
        (1.0, 60, 0.2, None),
        (0.1, 100, 0.1, None),
        (3.0, 20, 1.0, None),
        pytest.param(30.0, 50, 0.1, None, marks=pytest.mark.slow),
    ],
)
def test_calibration_hits_its_target_from_below(
    target: float, count: int, rate: float, expected: float | None
) -> None:
    """The noise spends at most the target, and at least 99 % of it."""
    multiplier = calibrate(target, DELTA, count, rate)
    assert 0.99 * target <= epsilon(multiplier, rate, count) <= target
    if expected is not None:
        assert multiplier == pytest.approx(expected, rel=0.01)


def test_releases_compose_whatever_their_order() -> None:
    """Different multipliers and rates together cost more than each, at most their sum, in any order."""
    one, other = Release(2.0, 0.1, 50), Release(3.0, 1.0, 2)
    both = spent([one, other], DELTA, "record", "add or remove one")
    assert both == spent([other, one], DELTA, "record", "add or remove one")
    parts = [spent([part], DELTA, "record", "add or remove one").epsilon for part in (one, other)]
    assert max(parts) < both.epsilon < sum(parts)
    assert both.sampling == "Poisson sampling, rate 0.1, 1"


def test_only_a_sampled_release_is_amplified() -> None:
    """Rate 1 costs what no sampling costs; a lower rate costs less."""
    assert epsilon(1.0, 1.0, 10) == pytest.approx(17.8566, rel=1e-4)
    assert epsilon(1.0, 0.5, 10) < epsilon(1.0, 1.0, 10)


def test_without_noise_nothing_is_promised() -> None:
    """Epsilon is infinite, and the text and the document say so; nothing released costs nothing."""
    none = spent([Release(0.0), Release(5.0)], DELTA, "site", "zero out one")
    assert math.isinf(none.epsilon)
    assert str(none) == "no bound (epsilon is infinite) per site"
    assert none.document()["epsilon"] is None
    assert spent([], DELTA, "site", "zero out one").epsilon == 0
    assert math.isinf(epsilon(1e-4, 1.0, 1))
    assert math.isinf(epsilon(1e-4, 0.5, 1))


def test_a_guarantee_always_says_what_it_means() -> None:
    """Epsilon, delta, unit, relation, sampling and accountant stand together."""
    text = str(Guarantee(1.25, 1e-5, "person", "add or remove one", "Poisson sampling, rate 0.1", "PLD"))
    assert (
        text == "epsilon 1.250 at delta 1e-05 per person (add or remove one; Poisson sampling, rate 0.1; PLD)"
    )


@pytest.mark.parametrize(
    "values", [(-1.0, 1.0, 1), (math.nan, 1.0, 1), (1.0, 0.0, 1), (1.0, 1.5, 1), (1.0, 1.0, -1)]
)
def test_a_release_out_of_range_is_refused(values: tuple[float, float, int]) -> None:
    """A negative or undefined multiplier, a rate outside (0, 1], a negative count."""
    with pytest.raises(InputError, match="would be right"):
        Release(*values)


@pytest.mark.parametrize(
    "values",
    [
        (0.0, 1e-5, 1, 1.0),
        (math.inf, 1e-5, 1, 1.0),
        (1.0, 0.0, 1, 1.0),
        (1.0, 1.0, 1, 1.0),
        (1.0, 1e-5, 0, 1.0),
    ],
)
def test_a_target_out_of_range_is_refused(values: tuple[float, float, int, float]) -> None:
    """Epsilon, delta or the count of releases."""
    with pytest.raises(InputError, match="would be right"):
        calibrate(*values)
