"""Clip, noise, and the release that accounts for both: what each mechanism is, wherever it is called.

    dp-sgd             the site clips each unit's gradient, adds noise to the sum of a Poisson batch (arXiv 1607.00133)
    central-gaussian   the site clips its update, the server adds noise to their mean (arXiv 1710.06963)
    local-gaussian     the site clips its update and adds noise to it

`mechanism_of` reads a study into a `Mechanism`, with the noise that keeps all its rounds within its epsilon. Who calls
`clip` and `add_noise` is the trust model; the figures come from here alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from consortium.privacy.accounting import Guarantee, Relation, Release, Unit, calibrate, spent
from consortium.privacy.randomness import Stream
from consortium.protocol.errors import InputError
from consortium.protocol.study import Study

Vector = NDArray[Any]
Name = Literal["dp-sgd", "central-gaussian", "local-gaussian"]

_CHUNK = 1 << 13
"""Numbers; a longer dot product would wake BLAS's threads."""
BIT_SHARE = 20.0
"""Adaptive clipping: the deviation of the noise on the count of unclipped sites is n / 20 (arXiv 1905.03871, 3.1)."""
ADAPTATION = 0.2
"""Adaptive clipping: the learning rate of the bound's logarithm (the same place)."""
WITHIN, BOUND = "privacy.within", "privacy.bound"
"""Names of statistics: a site's bit (1: its update lay within the bound), and the bound that an instruction brings."""
RESERVED = frozenset({WITHIN, BOUND})
LOWEST, HIGHEST = 1e-6, 1e6
"""Adaptive clipping: where the bound stays, so that no noise can carry it off for good."""


@dataclass(frozen=True)
class Mechanism:
    """One study's mechanism.

    epsilon, delta: the target that all `rounds` together keep, for one unit.
    clip_norm: L2 bound of one unit's gradient (dp-sgd) or of one site's update; the first one where it adapts.
    noise_multiplier: of the noise on what is released, over that release's sensitivity.
    rate, steps, denominator: of dp-sgd: each unit is in a batch with probability `rate`; `steps` batches a round; sums
        are divided by `denominator`. All are the study's public numbers; nothing is read from the data's length.
        central-gaussian with a Poisson cohort likewise: each site is in a round with probability `rate` below 1.
    quantile: of adaptive clipping: the share of sites whose update should stay unclipped. None: the bound is fixed.
    """

    name: Name
    unit: Unit
    epsilon: float
    delta: float
    clip_norm: float
    noise_multiplier: float
    rounds: int
    rate: float = 1.0
    steps: int = 1
    denominator: float = 1.0
    quantile: float | None = None

    @property
    def relation(self) -> Relation:
        """What its neighbouring data sets differ in."""
        relations: dict[str, Relation] = {
            "dp-sgd": "add or remove one",
            "central-gaussian": "zero out one",
            "local-gaussian": "replace one",
        }
        return relations[self.name]

    def release(self, rounds: int = 1) -> Release:
        """What so many rounds release of a unit that is in all of them."""
        return Release(self.noise_multiplier, self.rate, self.steps * rounds)

    def guarantee(self, rounds: int | None = None) -> Guarantee:
        """What a unit has spent after so many rounds (all of the study's where None)."""
        return spent(
            [self.release(self.rounds if rounds is None else rounds)], self.delta, self.unit, self.relation
        )

    @property
    def sampled(self) -> bool:
        """Whether cohorts are Poisson samples of the sites. Each round then costs each site the same, in it or not."""
        return self.name == "central-gaussian" and self.rate < 1

    @property
    def local_deviation(self) -> float:
        """Deviation of the noise that a site adds: to a batch's sum of gradients (dp-sgd), to its update
        (local-gaussian, where two updates of norm C may lie 2C apart), or 0."""
        factors = {"dp-sgd": 1.0, "central-gaussian": 0.0, "local-gaussian": 2.0}
        return factors[self.name] * self.noise_multiplier * self.clip_norm

    def update_multiplier(self, count: int) -> float:
        """central-gaussian: the multiplier of the noise on `count` sites' mean.

        Where the bound adapts, the noisy count of unclipped sites is part of what is released, so the update's own
        noise is larger (arXiv 1905.03871, theorem 1).
        """
        if self.quantile is None:
            return self.noise_multiplier
        left = self.noise_multiplier**-2 - (2 * self.bit_deviation(count)) ** -2
        return float(left**-0.5)

    def bit_deviation(self, count: int) -> float:
        """Adaptive clipping: the deviation of the noise on the sum of `count` bits, each +-1/2.

        n / 20, but never so little that the bits would take more than half of what a round may spend.
        """
        return max(count / BIT_SHARE, self.noise_multiplier / math.sqrt(2))


def mechanism_of(study: Study) -> Mechanism | None:
    """The mechanism of a study, its noise calibrated for all rounds; None where it has none.

    Raises:
        InputError: no noise reaches the study's epsilon.
    """
    asked = study.privacy
    if asked.mechanism == "none":
        return None
    assert asked.epsilon is not None
    assert asked.delta is not None
    assert asked.clip_norm is not None
    name: Name = asked.mechanism  # type: ignore[assignment] # the study's checks refuse the others
    rate, steps, denominator = 1.0, 1, 1.0
    if name == "dp-sgd":
        training = study.training
        rate, denominator = asked.rate, float(training.batch_size)
        steps = training.local_steps or (training.local_epochs or 1) * max(1, round(1 / rate))
    elif study.cohort.sampling_rate is not None:
        assert study.cohort.size is not None
        rate, denominator = study.cohort.sampling_rate, float(study.cohort.size)
    multiplier = calibrate(asked.epsilon, asked.delta, study.rounds * steps, rate)
    return Mechanism(
        name, asked.unit, asked.epsilon, asked.delta, asked.clip_norm, multiplier, study.rounds, rate, steps,
        denominator, asked.clip_quantile,
    )  # fmt: skip


def bound_of(mechanism: Mechanism, statistics: Mapping[str, Vector]) -> float:
    """The clip bound of a round: the one that its instruction brings where it adapts, else the study's."""
    return float(statistics[BOUND]) if BOUND in statistics else mechanism.clip_norm


def norm(vector: Vector) -> float:
    """L2 norm in float64, of any shape; not finite where a number is not."""
    flat, total = vector.reshape(-1), 0.0
    for start in range(0, flat.size, _CHUNK):
        chunk = flat[start : start + _CHUNK].astype(np.float64)
        total += float(np.dot(chunk, chunk))
    return math.sqrt(total) if total == total else math.nan


def clip(update: Vector, bound: float) -> tuple[Vector, bool]:
    """The update scaled down to an L2 norm of at most `bound`, and whether it was within it before.

    update: any shape, 0-d too; float32 or float64, kept; float16 becomes float32, whose rounding the bound allows for.
    A zero update stays zero. The argument is not modified, and is returned as it is where it lies within the bound.

    Raises:
        InputError: a number is not finite, the dtype is another (integers do not travel), or the bound is not above 0.
    """
    if not 0 < bound < math.inf:
        raise InputError(f"clip_norm: got {bound}; a number above 0 would be right")
    if update.dtype == np.float16:
        update = update.astype(np.float32)
    if update.dtype not in (np.float32, np.float64):
        raise InputError(
            f"an update of dtype {update.dtype} cannot be clipped; float32 or float64 would be right"
        )
    length = norm(update)
    if not math.isfinite(length):
        raise InputError(
            "the update is not finite: training diverged; a lower lr, or cleaner data, would help"
        )
    if length <= bound:
        return update, True
    # Rounded to the dtype, a vector can be longer by a few units in the last place: so it is made shorter by as much.
    factor = bound / length * (1 - 4 * float(np.finfo(update.dtype).eps))
    return np.asarray(update * update.dtype.type(factor)), False


def add_noise(vector: Vector, deviation: float, stream: Stream) -> Vector:
    """A copy of a 1-D float32 or float64 vector with N(0, deviation^2) added to each number."""
    noisy = np.array(vector)
    stream.add_gaussian(noisy, deviation)
    return noisy


def batches(
    mechanism: Mechanism,
    units: int,
    rows_of: Callable[[NDArray[np.int64]], NDArray[np.int64]],
    stream: Stream,
) -> list[NDArray[np.int64]]:
    """One round's Poisson batches as row numbers: each of `units` is in each batch with probability `rate`.

    rows_of: the rows of some units. A batch may be empty: it is noised and released like any other.
    """
    return [rows_of(stream.chosen(units, mechanism.rate)) for _ in range(mechanism.steps)]


def noised_mean(
    mechanism: Mechanism, mean: Vector, sensitivity: float, count: int, bound: float, stream: Stream
) -> Vector:
    """central-gaussian: the mean of `count` clipped updates, with the noise that hides any one of them.

    sensitivity: of the reducer that made the mean, at `count` updates. bound: the one that clipped them.
    """
    deviation = mechanism.update_multiplier(count) * bound * sensitivity
    return add_noise(mean, deviation, stream)


def sampled_mean(mechanism: Mechanism, mean: Vector, count: int, bound: float, stream: Stream) -> Vector:
    """central-gaussian with a Poisson cohort: the sum of `count` clipped updates over the study's denominator, noised.

    mean: of the updates that came; of none, zeros. A site that is not in the cohort, or does not answer, is a zero in
    the sum, so that neither the divisor nor the noise tells how many came.
    """
    whole = mean * mean.dtype.type(count / mechanism.denominator)
    return add_noise(whole, mechanism.noise_multiplier * bound / mechanism.denominator, stream)


def next_bound(mechanism: Mechanism, bound: float, within: float, count: int, stream: Stream) -> float:
    """The clip bound of the next round (arXiv 1905.03871, algorithm 1).

    bound: the one that clipped this round. within: how many of the `count` updates lay within it, each site's bit being
    "norm <= bound"; the sum of the bits less 1/2 each is noised, and so hides whether any site was there.
    """
    if mechanism.quantile is None:
        return bound
    noise = mechanism.bit_deviation(count) * float(stream.gaussians(1)[0])
    share = (within - count / 2 + noise) / count + 0.5
    moved = bound * math.exp(-ADAPTATION * (share - mechanism.quantile))
    return min(max(moved, LOWEST), HIGHEST)
