"""The loop's step between reduce and step: noise on the mean of clipped updates, where the study asks for it there."""

from __future__ import annotations

import numpy as np

from consortium.privacy import mechanisms
from consortium.privacy.mechanisms import Mechanism
from consortium.privacy.randomness import Stream
from consortium.protocol.errors import InputError
from consortium.protocol.layout import Vector
from consortium.protocol.messages import Statistics
from consortium.server.tally import Ballot
from consortium.strategies.base import Reducer


def noised(
    mechanism: Mechanism | None,
    reducer: Reducer,
    ballot: Ballot,
    update: Vector,
    statistics: Statistics,
    draws: Stream,
) -> tuple[Vector, Statistics]:
    """The reduced update as it may be used, and the statistics of the next instruction (the bound, where it adapts).

    The noise follows the answers that came: it hides one of the sites that were admitted, however few they are. Where
    the cohort is a Poisson sample, it follows the study's fixed denominator.

    Raises:
        InputError: the reducer has no sensitivity.
    """
    if mechanism is None or mechanism.name != "central-gaussian":
        return update, statistics
    count = len(ballot.admitted)
    if mechanism.sampled:
        bound = mechanisms.bound_of(mechanism, statistics)
        return mechanisms.sampled_mean(mechanism, update, count, bound, draws), statistics
    sensitivity = reducer.sensitivity(count)
    if sensitivity is None:
        raise InputError("this strategy's reducer states no sensitivity, so noise would protect nobody")
    bound = mechanisms.bound_of(mechanism, statistics)
    update = mechanisms.noised_mean(mechanism, update, sensitivity, count, bound, draws)
    if mechanism.quantile is None:
        return update, statistics
    within = sum(float(one.answer.payload.statistics[mechanisms.WITHIN]) for one in ballot.admitted.values())
    after = mechanisms.next_bound(mechanism, bound, within, count, draws)
    return update, {**statistics, mechanisms.BOUND: np.array(after)}
