"""What noise buys: epsilon from releases, and the noise multiplier for a target epsilon.

A `Release` is one Gaussian release, repeated, perhaps on a Poisson sample. `spent` composes releases and gives the
smaller of two sound bounds, Renyi differential privacy (arXiv 1702.07476, 1908.10530) and privacy loss distributions
(PLD; arXiv 1506.01807, 2106.08567), both by dp-accounting. Where nothing was sampled the Gaussian mechanism is exact
(Balle & Wang, arXiv 1805.06530, theorem 8), and composition too: k Gaussians of multiplier z are one of z / sqrt(k).

An epsilon means nothing alone, so it never leaves here but in a `Guarantee`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Literal

from consortium.protocol.errors import InputError

Unit = Literal["record", "person", "site"]
Relation = Literal["add or remove one", "zero out one", "replace one"]
"""What two neighbouring data sets differ in: one unit is there or not; one site's update is zero; one is any other."""

FINEST = 1e-4
"""The grid of privacy losses, dp-accounting's own default; coarser where the range is so wide that it would not fit."""
MOST_LOSSES = 1_000_000
HIGHEST = 1e6
"""Above it epsilon is given as infinite: nothing is promised."""
FAST_ORDERS = (*map(float, range(2, 64)), 128.0, 256.0, 512.0, 1024.0)
FINE_ORDERS = tuple(sorted({*FAST_ORDERS, *(2 + tenth / 10 for tenth in range(90))}))
"""Renyi orders; whole ones are finite sums, and orders below 2 need series that do not always converge."""
_TOLERANCE = 1e-3
"""How far a calibrated epsilon may lie below its target, relative."""


@dataclass(frozen=True)
class Release:
    """The Gaussian mechanism, `count` times on the same units.

    noise_multiplier: the noise's standard deviation over the sensitivity; 0 for none at all.
    rate: the probability with which each unit is in a Poisson sample, independently and secretly; 1 for all. A cohort
        or batch that was drawn in another way earns no rate below 1.
    """

    noise_multiplier: float
    rate: float = 1.0
    count: int = 1

    def __post_init__(self) -> None:
        """Raises InputError for numbers that are out of range."""
        if not 0 <= self.noise_multiplier < math.inf:
            raise InputError(
                f"noise multiplier: got {self.noise_multiplier}; a number at least 0 would be right"
            )
        if not 0 < self.rate <= 1:
            raise InputError(f"sampling rate: got {self.rate}; above 0 and at most 1 would be right")
        if self.count < 0:
            raise InputError(f"count of releases: got {self.count}; a whole number at least 0 would be right")


@dataclass(frozen=True)
class Guarantee:
    """An (epsilon, delta) with all that it means. epsilon is infinite where nothing is promised.

    unit, relation: whose presence or content is hidden, and in which sense.
    sampling: how units were drawn. accountant: which bound gave the figure.
    """

    epsilon: float
    delta: float
    unit: Unit
    relation: Relation
    sampling: str
    accountant: Literal["exact Gaussian", "RDP", "PLD", "none"]

    def __str__(self) -> str:
        if math.isinf(self.epsilon):
            return f"no bound (epsilon is infinite) per {self.unit}"
        return (
            f"epsilon {self.epsilon:.3f} at delta {self.delta:g} per {self.unit} ({self.relation}; {self.sampling}; "
            f"{self.accountant})"
        )

    def document(self) -> dict[str, str | float | None]:
        """As plain JSON values; an infinite epsilon is None."""
        epsilon = None if math.isinf(self.epsilon) else self.epsilon
        return {
            "epsilon": epsilon, "delta": self.delta, "unit": self.unit, "relation": self.relation,
            "sampling": self.sampling, "accountant": self.accountant,
        }  # fmt: skip


def spent(releases: Iterable[Release], delta: float, unit: Unit, relation: Relation) -> Guarantee:
    """What these releases together promise to each unit that was in all of them.

    Raises:
        InputError: delta is not between 0 and 1.
    """
    if not 0 < delta < 1:
        raise InputError(f"delta: got {delta}; a number between 0 and 1 would be right")
    joined = _joined(releases)
    epsilon, accountant = _epsilon(joined, delta)
    return Guarantee(epsilon, delta, unit, relation, _sampling(joined), accountant)


def calibrate(epsilon: float, delta: float, count: int, rate: float = 1.0) -> float:
    """The smallest noise multiplier, up to 0.1 % of epsilon, with which `count` releases spend at most `epsilon`.

    Rounded up to four decimals, so that every machine that calibrates finds the same.

    Raises:
        InputError: a number is out of range, or so small that no noise would do.
    """
    if not 0 < epsilon < math.inf:
        raise InputError(f"epsilon: got {epsilon}; a number above 0 would be right")
    if not 0 < delta < 1:
        raise InputError(f"delta: got {delta}; a number between 0 and 1 would be right")
    if count < 1:
        raise InputError(f"count of releases: got {count}; a whole number at least 1 would be right")
    Release(1.0, rate)
    return _calibrated(epsilon, delta, count, rate)


@lru_cache(maxsize=256)
def _calibrated(epsilon: float, delta: float, count: int, rate: float) -> float:
    if rate == 1:
        from dp_accounting import gaussian_mechanism

        exact = float(gaussian_mechanism.get_sigma_gaussian(epsilon, delta)) * math.sqrt(count)
        return math.ceil(exact * 1e4) / 1e4

    def over(multiplier: float) -> float:
        """Above 0 where too much is spent."""
        return math.log(_epsilon((Release(multiplier, rate, count),), delta)[0] / epsilon)

    # Renyi's bound is fast and never below, so where it is met the smaller one is too, and asks for a little less.
    high = _renyi_calibrated(epsilon, delta, count, rate)
    above, low = over(high), 0.8 * high
    while (under := over(low)) <= 0:
        high, above, low = low, under, 0.8 * low
    for _ in range(20):
        if above > -_TOLERANCE:
            break
        # The logarithms lie nearly on a line; a little on the sound side of its zero.
        share = min(max((-above - _TOLERANCE / 2) / (under - above), 0.01), 0.99)
        middle = high * (low / high) ** share
        if (at := over(middle)) <= 0:
            high, above = middle, at
        else:
            low, under = middle, at
    return math.ceil(high * 1e4) / 1e4


def _renyi_calibrated(epsilon: float, delta: float, count: int, rate: float) -> float:
    """A multiplier with which Renyi's bound spends at most epsilon, 0.1 % too high at most."""

    def enough(multiplier: float) -> bool:
        return _renyi(((multiplier, rate, count),), delta, FAST_ORDERS) <= epsilon

    low, high = 0.05, 1.0
    while not enough(high):
        low, high = high, high * 2
        if high > 1e7:
            raise InputError(
                f"epsilon {epsilon:g} at delta {delta:g} over {count} steps: no noise reaches it"
            )
    while (high - low) / high > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _joined(releases: Iterable[Release]) -> tuple[Release, ...]:
    """Equal releases as one, in a fixed order; those that were never made left out."""
    counts: dict[tuple[float, float], int] = {}
    for one in releases:
        key = (one.noise_multiplier, one.rate)
        counts[key] = counts.get(key, 0) + one.count
    return tuple(Release(*key, count) for key, count in sorted(counts.items()) if count)


def _sampling(releases: tuple[Release, ...]) -> str:
    rates = sorted({one.rate for one in releases})
    if not rates or rates == [1.0]:
        return "no sampling"
    return "Poisson sampling, rate " + ", ".join(f"{rate:g}" for rate in rates)


def _epsilon(
    releases: tuple[Release, ...], delta: float
) -> tuple[float, Literal["exact Gaussian", "RDP", "PLD", "none"]]:
    if not releases:
        return 0.0, "exact Gaussian"
    if any(one.noise_multiplier == 0 for one in releases):
        return math.inf, "none"
    key = tuple((one.noise_multiplier, one.rate, one.count) for one in releases)
    if all(one.rate == 1 for one in releases):
        return _exact(math.sqrt(sum(one.count / one.noise_multiplier**2 for one in releases)), delta)
    renyi = _renyi(key, delta)
    if renyi > HIGHEST:
        return math.inf, "none"
    losses = _by_losses(key, delta, renyi)
    return (losses, "PLD") if losses <= renyi else (renyi, "RDP")


def _exact(inverse: float, delta: float) -> tuple[float, Literal["exact Gaussian", "none"]]:
    """Of one Gaussian with multiplier 1 / inverse."""
    from dp_accounting import gaussian_mechanism

    if inverse * inverse / 2 > HIGHEST:
        return math.inf, "none"
    return max(0.0, float(gaussian_mechanism.get_epsilon_gaussian(1 / inverse, delta))), "exact Gaussian"


_Key = tuple[tuple[float, float, int], ...]


@lru_cache(maxsize=4096)
def _renyi(releases: _Key, delta: float, orders: tuple[float, ...] = FINE_ORDERS) -> float:
    from dp_accounting import rdp

    accountant = rdp.RdpAccountant(orders=orders)
    for one in releases:
        accountant.compose(_event(*one))
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=4096)
def _by_losses(releases: _Key, delta: float, renyi: float) -> float:
    """By PLD, pessimistic: a coarser grid only makes it larger."""
    from consortium.privacy.losses import composed

    widest = max(2 / multiplier**2 + 20 / multiplier for multiplier, _, _ in releases)
    grid = max(FINEST, (2 * renyi + widest) / MOST_LOSSES)
    parts = (composed(multiplier, rate, count, grid) for multiplier, rate, count in releases)
    return float(reduce(lambda some, more: some.compose(more), parts).get_epsilon_for_delta(delta))


def _event(multiplier: float, rate: float, count: int) -> object:
    import dp_accounting

    event = dp_accounting.GaussianDpEvent(multiplier)
    if rate < 1:
        event = dp_accounting.PoissonSampledDpEvent(rate, event)
    return dp_accounting.SelfComposedDpEvent(event, count)
