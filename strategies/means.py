"""Reducers that are a sum divided by a number: uniform and weighted means, with or without a bound on norms.

The order of sums is that of `consortium.strategies.base`. Updates stay references until there are `PENDING` of
them, or the end comes; then each piece of the vector runs through all of them at once, so that every update is read
once and the only long array is the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from consortium.protocol.errors import InputError
from consortium.protocol.layout import Vector
from consortium.strategies.base import BLOCK, BlockSum, Contribution, Reducer, require
from consortium.strategies.chunks import on_spans, pieces, plain

SUM_BYTES = 1 << 19
"""Bytes of one vector that are summed at a time: a sum and a product fit a core's second-level cache, and each step
takes so long that threads seldom meet at the interpreter lock, where one would fall asleep."""

PENDING = 16 * BLOCK
"""From so many updates on, those that came are summed when a block ends: a pass over the sum for all of them."""


def mean() -> Reducer:
    """Every update counts the same: sum(update) / n."""
    return _summing(scale=lambda _: 1.0, weight=lambda _: 1.0, sensitivity=lambda n: 1.0 / n, norms=False)


def weighted_mean() -> Reducer:
    """FedAvg's mean, sum(weight * update) / sum(weight) (arXiv 1602.05629, algorithm 1).

    It has no sensitivity: what one site can change depends on the weights of all sites, which are themselves
    read from records.
    """
    return _summing(
        scale=lambda c: c.weight, weight=lambda c: c.weight, sensitivity=lambda _: None, norms=False
    )


def norm_bounded(bound: float, weighted: bool = True) -> Reducer:
    """A mean of updates that are first scaled down to an L2 norm of at most `bound` (up to rounding).

    sum(w * min(1, bound / norm) * update) / sum(w), with w the weight or 1. So one site moves the result by at most
    bound * w / sum(w), whatever it sends (arXiv 1911.07963, section 5). The norm is the contribution's `norm`.

    Raises:
        InputError: unless bound > 0 and finite.
    """
    require(0 < bound < math.inf, "bound", bound, "a number above 0")

    def weight(c: Contribution) -> float:
        return c.weight if weighted else 1.0

    def scale(c: Contribution) -> float:
        return weight(c) * (1.0 if c.norm <= bound else bound / c.norm)

    return _summing(scale, weight, lambda n: None if weighted else 1.0 / n, norms=True)


def accumulate(total: Vector, update: Vector, scale: float, scratch: Vector | None = None) -> None:
    """total += scale * update, in place: the one addition of which all sums here are made.

    `total` and `update` are 1-D of one size and dtype. `scale` is rounded to that dtype; product and sum are
    rounded one after the other (not fused). `scratch`, of the same dtype and at least one number, saves the
    allocation where many small vectors are added; it may be `update` itself, where that is not needed any more.
    """
    if scratch is None:
        scratch = np.empty(max(1, min(SUM_BYTES // total.itemsize, total.size)), total.dtype)
    factor = total.dtype.type(scale)
    for piece in pieces(0, total.size, scratch.size):
        _add_product(total[piece], update[piece], factor, scratch[: piece.stop - piece.start])


def _add_product(total: Vector, update: Vector, factor: Any, product: Vector) -> None:
    """total += factor * update; `product`, of the same size, is written over."""
    if factor == 1.0:
        np.add(total, update, total)
        return
    np.multiply(update, factor, product)
    np.add(total, product, total)


def include(
    reducer: Reducer, partial: BlockSum | None, contribution: Contribution, scratch: Vector | None = None
) -> BlockSum:
    """The block's sum with one more member, right after its update is made; `partial` is None for the first.

    Members must come in slot order. The arrays of `partial` are used again: keep only what is returned. The update
    is not referred to afterwards. `scratch` as in `accumulate`.
    """
    assert reducer.scale is not None
    assert reducer.weight is not None
    if partial is None:
        zeros = np.zeros(contribution.update.size, contribution.update.dtype)
        partial = BlockSum(contribution.slot // BLOCK, zeros, 0.0, 0)
    assert contribution.slot // BLOCK == partial.block
    accumulate(partial.total, contribution.update, reducer.scale(contribution), scratch)
    weight = partial.weight + reducer.weight(contribution)
    return BlockSum(partial.block, partial.total, weight, partial.count + 1)


def block_sum(reducer: Reducer, contributions: Iterable[Contribution]) -> BlockSum:
    """The sum over some members of one block, given in slot order; at least one.

    Raises:
        InputError: if the reducer is not a sum, or there is no contribution.
    """
    if reducer.scale is None:
        raise InputError("this strategy's rule is not a sum: every update must be sent by itself")
    partial = None
    for contribution in contributions:
        partial = include(reducer, partial, contribution)
    if partial is None:
        raise InputError("a block's sum needs at least one update")
    return partial


def follow(before: BlockSum | None, one: BlockSum) -> BlockSum:
    """The sum over the blocks of `before` and then `one`; `before` is None, or the sum over all blocks before it.

    A reducer makes the same bits of this as of the blocks one by one. The arrays of `before` are used again: keep
    only what is returned. `one` is not referred to afterwards.
    """
    if before is None:
        before = BlockSum(-1, np.zeros_like(one.total), 0.0, 0)
    assert one.block > before.block, "blocks come in order"
    np.add(before.total, one.total, before.total)
    return BlockSum(one.block, before.total, before.weight + one.weight, before.count + one.count)


class _Running(NamedTuple):
    """The sum, divisor and number of members of what was summed, and the last block that was begun.

    pending: contributions that come after what was summed, in slot order.
    """

    total: Vector
    divisor: float
    members: int
    block: int
    pending: tuple[Contribution, ...]


def _summing(
    scale: Callable[[Contribution], float],
    weight: Callable[[Contribution], float],
    sensitivity: Callable[[int], float | None],
    norms: bool,
) -> Reducer:
    def init(size: int, dtype: np.dtype[Any]) -> _Running:
        return _Running(np.empty(size, dtype), 0.0, 0, -1, ())  # `total` holds nothing yet

    def add(state: _Running, item: Contribution | BlockSum) -> _Running:
        if isinstance(item, Contribution):
            block = item.slot // BLOCK
            assert block >= state.block, "contributions come in slot order"
            if block > state.block and len(state.pending) >= PENDING:
                state = flush(state)
            return state._replace(block=block, pending=(*state.pending, item))
        assert item.block > state.block, "blocks come in order"
        state = flush(state)
        np.add(state.total if state.members else 0.0, item.total, state.total)
        return _Running(state.total, state.divisor + item.weight, state.members + item.count, item.block, ())

    def flush(state: _Running) -> _Running:
        blocks = [list(members) for _, members in groupby(state.pending, lambda c: c.slot // BLOCK)]
        of = state.total.dtype.type
        parts = [[(plain(c.update), of(scale(c))) for c in members] for members in blocks]
        _add_blocks(state.total, parts, first=not state.members)
        divisor = state.divisor
        for members in blocks:
            part = 0.0
            for member in members:  # as in `include`: sum() would compensate for rounding
                part += weight(member)
            divisor += part
        return _Running(state.total, divisor, state.members + len(state.pending), state.block, ())

    def finish(state: _Running) -> Vector:
        total, divisor, members, *_ = flush(state)
        if members == 0:
            raise InputError("a mean needs at least one update")
        by = np.array(divisor, total.dtype)
        on_spans(lambda start, stop: np.divide(total[start:stop], by, total[start:stop]), total.size)
        return total

    return Reducer(init, add, finish, sensitivity, scale=scale, weight=weight, norms=norms)


def _add_blocks(total: Vector, blocks: Sequence[Sequence[tuple[Vector, Any]]], *, first: bool) -> None:
    """total += each block's sum of factor * update, that sum made first, in order; factors have the dtype of `total`.

    first: `total` holds nothing yet, and is taken for zeros; to write them, and read them again, would cost two passes
    over the memory.

    `total` holds sums that began with zeros, so none of its numbers is -0.0. That is why a block's sum may begin with
    its first product: it differs from one that begins with zeros only where it is -0.0.
    """
    step = SUM_BYTES // total.itemsize

    def work(start: int, stop: int) -> None:
        sums, products = np.empty((2, min(step, stop - start)), total.dtype)
        for piece in pieces(start, stop, step):
            long = piece.stop - piece.start
            part, block, product = total[piece], sums[:long], products[:long]
            for number, ((begin, factor), *others) in enumerate(blocks):
                np.multiply(begin[piece], factor, block)
                for update, factor in others:
                    _add_product(block, update[piece], factor, product)
                np.add(0.0 if first and not number else part, block, part)

    if blocks:
        on_spans(work, total.size)
