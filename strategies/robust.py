"""Reducers that some lying sites cannot move far: median, trimmed mean, Krum, Multi-Krum.

None of them looks at weights: a weight is a claim of the site. None has a sensitivity, so differential privacy at
the server is refused with them. They cost accuracy where honest sites differ.

All keep references to the (memory-mapped) updates until `finish`, which then works piece by piece: its memory is a
few pieces and the result, whatever the number of updates and their size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from consortium.protocol.errors import InputError
from consortium.protocol.layout import Vector
from consortium.strategies.base import BlockSum, Contribution, Reducer, require
from consortium.strategies.chunks import on_spans, pieces, plain
from consortium.strategies.means import mean

Matrix = NDArray[Any]
Rule = Callable[[Matrix], Vector]
"""(k, n) -> (k,): n updates' values of k coordinates, one coordinate a row, in slot order; it may be overwritten."""

GATHER_BYTES = 1 << 23
"""Bytes of all updates that one thread copies side by side at a time: long copies, so that threads seldom meet."""

SORT_BYTES = 1 << 21
"""Bytes of the block of coordinates that one thread sorts at a time, within what it copied."""

GRAM_BYTES = 1 << 22
"""Bytes of the block of updates that enters a matrix product at a time."""


class _Kept(NamedTuple):
    """All contributions so far, in slot order."""

    size: int
    dtype: np.dtype[Any]
    contributions: tuple[Contribution, ...]


def coordinatewise(rule: Rule, minimum: int = 1) -> Reducer:
    """A reducer that treats each coordinate by itself, by `rule`; `minimum` as in `Reducer`."""

    def combine(contributions: Sequence[Contribution], size: int, dtype: np.dtype[Any]) -> Vector:
        result = np.empty(size, dtype)
        n, updates = len(contributions), [plain(contribution.update) for contribution in contributions]
        # Odd, because rows that lie a power of two apart drive each other out of the cache.
        wide = max(GATHER_BYTES // (n * dtype.itemsize), 64) | 1
        step = max(SORT_BYTES // (n * dtype.itemsize), 64)

        def work(start: int, stop: int) -> None:
            rows = np.empty((n, min(wide, stop - start)), dtype)
            scratch = np.empty((min(step, wide, stop - start), n), dtype)
            for span in pieces(start, stop, wide):
                width = span.stop - span.start
                for row, update in zip(rows, updates, strict=True):
                    row[:width] = update[span]
                # Turned from there: four times as fast as update by update.
                for piece in pieces(0, width, len(scratch)):
                    block = scratch[: piece.stop - piece.start]
                    block[:] = rows[:, piece].T
                    result[span][piece] = rule(block)

        on_spans(work, size)
        return result

    return _keeping(combine, minimum)


def median() -> Reducer:
    """The median of each coordinate, of an even number the mean of the middle two (arXiv 1803.01498, definition 1).

    As long as fewer than half of the sites lie, each coordinate stays within the range of the honest values.
    """

    def rule(block: Matrix) -> Vector:
        block.sort(axis=1)
        n = block.shape[1]
        low, high = block[:, (n - 1) // 2], block[:, n // 2]
        # In float64, so that neither the sum overflows nor the half of a subnormal is lost.
        middle: Vector = np.add(low, high, dtype=np.float64)
        return np.multiply(middle, 0.5, middle)

    return coordinatewise(rule)


def trimmed_mean(trim: int = 1) -> Reducer:
    """The mean of each coordinate without its `trim` highest and `trim` lowest values (arXiv 1803.01498, definition 2).

    `trim` is a number of updates, not a fraction. As long as at most `trim` sites lie, each coordinate stays within
    the range of the honest values (up to rounding). At least 2 * trim + 1 updates.

    Raises:
        InputError: unless trim >= 0.
    """
    require(trim >= 0, "trim", trim, "a whole number at least 0")

    def rule(block: Matrix) -> Vector:
        block.sort(axis=1)
        kept = block[:, trim : block.shape[1] - trim]
        return np.asarray(
            np.einsum("ij->i", kept) / kept.shape[1]
        )  # a row's sum, three times as fast as np.sum

    return coordinatewise(rule, 2 * trim + 1)


def krum(byzantine: int = 1) -> Reducer:
    """The one update that is nearest to its n - f - 2 nearest others (arXiv 1703.02757, section 4), f = `byzantine`.

    Nearness is the sum of squared L2 distances; of equals the first in slot (site-name) order is taken. At least
    2f + 3 updates, as the paper's proposition 1 needs.

    Raises:
        InputError: unless byzantine >= 0.
    """
    return multikrum(byzantine, 1)


def multikrum(byzantine: int = 1, keep: int | None = None) -> Reducer:
    """The uniform mean of the `keep` updates that Krum scores best (arXiv 1703.02757, section 6).

    With None, keep = n - f - 2, as many as a score counts neighbours. At least 2f + 3 updates, and `keep`.

    Raises:
        InputError: unless byzantine >= 0 and keep >= 1.
    """
    require(byzantine >= 0, "byzantine", byzantine, "a whole number at least 0")
    require(keep is None or keep >= 1, "keep", keep, "a whole number at least 1")

    def combine(contributions: Sequence[Contribution], size: int, dtype: np.dtype[Any]) -> Vector:
        neighbours = len(contributions) - byzantine - 2
        scores = krum_scores(contributions, neighbours)
        best = np.argsort(scores, kind="stable")[: neighbours if keep is None else keep]
        average = mean()
        state = average.init(size, dtype)
        for index in sorted(best):
            state = average.add(state, contributions[index])
        return average.finish(state)

    return _keeping(combine, max(2 * byzantine + 3, keep or 1), norms=True)


def krum_scores(contributions: Sequence[Contribution], neighbours: int) -> Vector:
    """Each update's sum of squared L2 distances to its `neighbours` nearest others, (n,) float64.

    Distances come from a matrix product of updates minus a common centre, because products of what all updates
    share would drown what sets them apart. The first centre is an update of median norm, which less than half of
    the sites cannot make longer than all honest ones. Where distances turn out too small for the dtype from there,
    they are measured again from the update that seems nearest to its others.
    """
    norms = np.array([contribution.norm for contribution in contributions])
    centre = int(np.argsort(norms, kind="stable")[(len(norms) - 1) // 2])
    for _ in range(4):
        squares, distances = _distances(contributions, centre)
        np.fill_diagonal(distances, np.inf)
        nearest = np.argsort(distances, axis=1, kind="stable")[:, :neighbours]
        scores = np.take_along_axis(distances, nearest, axis=1).sum(axis=1)
        best = int(np.argmin(scores))
        # Each distance is wrong by about the dtype's rounding times the squares that it is the difference of.
        involved = neighbours * squares[best] + squares[nearest[best]].sum()
        if scores[best] >= 1e-3 * involved:
            break
        centre = best
    return np.asarray(scores)


def _distances(contributions: Sequence[Contribution], centre: int) -> tuple[Vector, Matrix]:
    """Squared norms (n,) and squared distances (n, n), float64, of the updates minus the one at `centre`.

    Infinite where the dtype cannot hold them.
    """
    updates = [plain(contribution.update) for contribution in contributions]
    n, size, dtype = len(updates), updates[0].size, updates[0].dtype
    gram = np.zeros((n, n))
    step = max(GRAM_BYTES // (n * dtype.itemsize), 256)
    scratch = np.empty((n, min(step, size)), dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        for piece in pieces(0, size, step):
            block = scratch[:, : piece.stop - piece.start]
            for row, update in zip(block, updates, strict=True):
                np.subtract(update[piece], updates[centre][piece], row)
            gram += block @ block.T
        squares = np.diagonal(gram).copy()
        distances = squares[:, None] + squares[None, :] - 2 * gram
    distances[~np.isfinite(distances)] = np.inf
    return squares, np.maximum(distances, 0.0)


def _keeping(
    combine: Callable[[Sequence[Contribution], int, np.dtype[Any]], Vector], minimum: int, norms: bool = False
) -> Reducer:
    """A reducer that keeps all contributions and combines them at the end."""

    def init(size: int, dtype: np.dtype[Any]) -> _Kept:
        return _Kept(size, np.dtype(dtype), ())

    def add(state: _Kept, item: Contribution | BlockSum) -> _Kept:
        if isinstance(item, BlockSum):
            raise InputError("this strategy's rule is not a sum: every update must be sent by itself")
        return state._replace(contributions=(*state.contributions, item))

    def finish(state: _Kept) -> Vector:
        n = len(state.contributions)
        if n < minimum:
            raise InputError(f"this strategy's rule needs at least {minimum} updates, got {n}")
        return combine(state.contributions, state.size, state.dtype)

    return Reducer(init, add, finish, lambda _: None, minimum, norms=norms)
