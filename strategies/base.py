"""What a strategy is: data, made of small pure parts.

    Reducer            many updates -> one            init, add, finish, sensitivity
    ServerOptimizer    one update -> the next model   init, step
    Selector           who is asked in a round
    Local              what clients do besides plain training

M reducers times N optimizers, not M*N classes (as in fedjax and optax). Nothing here keeps state: it is passed in
and returned, plain (numbers and arrays), so that a round can be committed and replayed. Randomness is an argument.

The order of sums is fixed everywhere: the asked cohort in site-name order is cut into blocks of `BLOCK` slots; a
block is summed in slot order, left-out members skipped; then the blocks are summed in order. So a process that
holds one block may return its sum, and the result has the same bits.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from consortium.protocol.errors import InputError
from consortium.protocol.layout import Vector

BLOCK = 16


@dataclass(frozen=True)
class Contribution:
    """One admitted update.

    slot: the site's place in the asked cohort, sorted by name; 0 for the first.
    update: local model minus global, 1-D, the segment's dtype; perhaps memory-mapped, never written to.
    weight: > 0, already capped by the study.
    norm: L2 norm of `update` in float64; NaN where the reducer says that it looks at none.
    """

    slot: int
    update: Vector
    weight: float
    norm: float


@dataclass(frozen=True)
class BlockSum:
    """The sum over one block, made where the updates were made (`means.include`, `means.block_sum`), or over all blocks
    from the first to one (`means.follow`).

    block: slot // BLOCK of its (last) members.
    total: sum of `Reducer.scale` * update over a block's members in slot order, starting from zeros; of blocks, the sum
        of these in order, starting from zeros.
    weight: sum of the members' `Reducer.weight` in the same order: their part of what the whole sum is divided by.
    count: how many members were summed.
    """

    block: int
    total: Vector
    weight: float
    count: int


State = Any
"""A reducer's running state: plain numbers, arrays and tuples."""

OptimizerState = Mapping[str, Vector]
"""A server optimizer's state: named vectors of the model's size and dtype."""


@dataclass(frozen=True)
class Reducer:
    """How many updates become one.

    init: (size, dtype) -> state.
    add: (state, Contribution or BlockSum) -> state, called in slot order. It may keep references to updates
        (they are memory-mapped) and may reuse the arrays of the state that it is given.
    finish: state -> 1-D vector of the size and dtype; the state is used up. InputError with fewer updates than
        `minimum`.
    sensitivity: n -> s, where replacing one of n updates of norm C by zero changes the result by an L2 norm of at most
        s * C, for every C; None where no such bound holds (then differential privacy at the server is refused).
    minimum: fewest updates for which the rule means anything; a round with fewer is void.
    scale, weight: where the rule is a sum, and so accepts `BlockSum`: the factor on a contribution's update, and
        its part of the divisor. The result is sum(scale * update) / sum(weight). They differ where updates are
        bounded. None for rules that are not sums.
    norms: whether it looks at the contributions' norms; where it does not, they need not be measured.
    """

    init: Callable[[int, np.dtype[Any]], State]
    add: Callable[[State, Contribution | BlockSum], State]
    finish: Callable[[State], Vector]
    sensitivity: Callable[[int], float | None]
    minimum: int = 1
    scale: Callable[[Contribution], float] | None = None
    weight: Callable[[Contribution], float] | None = None
    norms: bool = True


@dataclass(frozen=True)
class ServerOptimizer:
    """How one reduced update moves the model.

    init: model -> state.
    step: (state, model, update) -> (next model, next state); arguments are not modified.
    step_over: the same numbers, but the next model lies in the memory of `update`, and the next state in that of
        `state`, for a caller to whom alone these belong; None where there is none.
    """

    init: Callable[[Vector], OptimizerState]
    step: Callable[[OptimizerState, Vector, Vector], tuple[Vector, OptimizerState]]
    step_over: Callable[[OptimizerState, Vector, Vector], tuple[Vector, OptimizerState]] | None = None


Selector = Callable[[Sequence[str], int, random.Random], list[str]]
"""(sites at hand in name order, round, randomness) -> the cohort. Live, the randomness is `random.SystemRandom`."""


def everyone(sites: Sequence[str], round: int, rng: random.Random) -> list[str]:
    """The selector that asks all sites."""
    return list(sites)


def fixed_size(size: int) -> Selector:
    """A selector that asks `size` sites, drawn without replacement; all of them where there are fewer."""

    def select(sites: Sequence[str], round: int, rng: random.Random) -> list[str]:
        return sorted(rng.sample(sites, size)) if size < len(sites) else list(sites)

    return select


def poisson(rate: float) -> Selector:
    """A selector that asks each site with probability `rate`, by itself; perhaps none."""

    def select(sites: Sequence[str], round: int, rng: random.Random) -> list[str]:
        return [site for site in sites if rng.random() < rate]

    return select


@dataclass(frozen=True)
class Local:
    """What a client does besides plain training.

    proximal: mu >= 0 of FedProx, added to the loss as mu/2 * ||w - w_global||^2 (arXiv 1812.06127, eq. 2).
    control_variates: SCAFFOLD's correction, with the variate kept at the site (arXiv 1910.06378, alg. 1).
    """

    proximal: float = 0.0
    control_variates: bool = False


@dataclass(frozen=True)
class Strategy:
    """One way to federate. A new one is one function that returns one of these."""

    name: str
    reducer: Reducer
    optimizer: ServerOptimizer
    selector: Selector = everyone
    local: Local = field(default_factory=Local)


def require(ok: bool, parameter: str, got: object, right: str) -> None:
    """Refuse a part of a strategy at construction.

    Raises:
        InputError: unless `ok`, naming the parameter, the value and what would be right.
    """
    if not ok:
        raise InputError(f"{parameter}: got {got!r}; {right} would be right")
