"""Sums: the golden mean, the fixed order of additions, bounds, and what is left untouched."""

import tracemalloc
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consortium.protocol.errors import InputError
from consortium.protocol.layout import Vector
from consortium.strategies import chunks, means
from consortium.strategies.base import BLOCK, BlockSum, Contribution, Reducer
from consortium.strategies.means import (
    accumulate,
    block_sum,
    follow,
    include,
    mean,
    norm_bounded,
    weighted_mean,
)

GOLDEN = np.array(
    [[1, 2, 3], [4, 5, 6], [7, 8, 9], [2, 2, 2], [3, 3, 3], [50, -50, 0], [2.5, 3.5, 4.5]], np.float32
)
SUMS: dict[str, Callable[[], Reducer]] = {
    "mean": mean,
    "weighted": weighted_mean,
    "bounded": lambda: norm_bounded(0.7),
    "bounded, uniform": lambda: norm_bounded(0.7, weighted=False),
}
DTYPES = ("float32", "float64")


def contributions(
    updates: Sequence[Vector], weights: Sequence[float] | None = None, slots: Sequence[int] | None = None
) -> list[Contribution]:
    """Updates as contributions; weights of 1 and slots 0, 1, 2, ... where none are given."""
    n = len(updates)
    return [
        Contribution(slot, update, weight, float(np.linalg.norm(update.astype(np.float64))))
        for slot, update, weight in zip(slots or range(n), updates, weights or [1.0] * n, strict=True)
    ]


def reduced(reducer: Reducer, parts: Sequence[Contribution | BlockSum], size: int, dtype: Any) -> Vector:
    state = reducer.init(size, np.dtype(dtype))
    for part in parts:
        state = reducer.add(state, part)
    return reducer.finish(state)


def random_cohort(seed: int, asked: int, size: int, dtype: str, dropped: float = 0.2) -> list[Contribution]:
    rng = np.random.default_rng(seed)
    slots = [slot for slot in range(asked) if rng.random() >= dropped] or [asked - 1]
    updates = [(rng.standard_normal(size) * 10.0 ** rng.uniform(-3, 3)).astype(dtype) for _ in slots]
    return contributions(updates, [float(w) for w in rng.uniform(0.1, 500, len(slots))], slots)


def one_by_one(reducer: Reducer, parts: Sequence[Contribution], size: int, dtype: str) -> Vector:
    """The order of sums of `base`, spelt out without pieces, threads or deferral."""
    assert reducer.scale is not None
    assert reducer.weight is not None
    total, divisor = np.zeros(size, dtype), 0.0
    for _, members in groupby(parts, key=lambda c: c.slot // BLOCK):
        block, weight = np.zeros(size, dtype), 0.0
        for member in members:
            block = block + member.update * np.dtype(dtype).type(reducer.scale(member))
            weight += reducer.weight(member)
        total, divisor = total + block, divisor + weight
    return np.asarray(total / np.dtype(dtype).type(divisor))


def test_golden_mean() -> None:
    """The mean of seven known vectors is the known one."""
    found = reduced(mean(), contributions(list(GOLDEN)), 3, "float32")
    np.testing.assert_allclose(found, [9.9286, -3.7857, 3.9286], atol=5e-5)
    assert found.dtype == np.float32


def test_weighted_mean() -> None:
    """The weighted mean is sum(w * x) / sum(w)."""
    weights = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    found = reduced(weighted_mean(), contributions(list(GOLDEN), weights), 3, "float32")
    np.testing.assert_allclose(found, np.average(GOLDEN, axis=0, weights=weights), rtol=1e-6)


def test_equal_weights_are_the_uniform_mean() -> None:
    """With all weights 8 the weighted mean has the bits of the uniform one (a power of two rounds nothing)."""
    uniform = reduced(mean(), contributions(list(GOLDEN)), 3, "float32")
    weighted = reduced(weighted_mean(), contributions(list(GOLDEN), [8.0] * 7), 3, "float32")
    np.testing.assert_array_equal(uniform, weighted)


def test_norm_bound() -> None:
    """Long updates are scaled to the bound, short and zero ones stay, and the divisor is the unscaled weight."""
    parts = contributions([np.array(v, np.float64) for v in ([3, 4], [0.3, 0.4], [0, 0])], [2.0, 1.0, 1.0])
    found = reduced(norm_bounded(1.0), parts, 2, "float64")
    np.testing.assert_allclose(found, (2 * np.array([0.6, 0.8]) + np.array([0.3, 0.4])) / 4, rtol=1e-15)


def test_a_norm_that_was_not_measured_never_passes_a_bound() -> None:
    """A rule that looks at norms says so; given none, its result is no number rather than one without a bound."""
    assert norm_bounded(1.0).norms
    assert not weighted_mean().norms
    part = Contribution(0, np.array([3.0, 4.0]), 1.0, float("nan"))
    assert np.isnan(reduced(norm_bounded(1.0), [part], 2, "float64")).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SUMS)
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), asked=st.integers(1, 70), size=st.integers(0, 40))
def test_same_bits_as_one_by_one(name: str, dtype: str, seed: int, asked: int, size: int) -> None:
    """With members left out anywhere, the result has the bits of plain additions in the documented order."""
    parts = random_cohort(seed, asked, size, dtype)
    found = reduced(SUMS[name](), parts, size, dtype)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, one_by_one(SUMS[name](), parts, size, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SUMS)
@settings(deadline=None, max_examples=30)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1), asked=st.integers(1, 70))
def test_arrival_and_split_change_no_bit(
    name: str, dtype: str, data: st.DataObject, seed: int, asked: int
) -> None:
    """Any arrival order, sorted by slot, with any blocks summed where they were made, gives the same bits."""
    reducer, parts = SUMS[name](), random_cohort(seed, asked, 5, dtype)
    expected = reduced(reducer, parts, 5, dtype)
    arrived = data.draw(st.permutations(parts))
    mixed: list[Contribution | BlockSum] = []
    for _, members in groupby(sorted(arrived, key=lambda c: c.slot), key=lambda c: c.slot // BLOCK):
        block = list(members)
        mixed += [block_sum(reducer, block)] if data.draw(st.booleans()) else block
    assert reduced(reducer, mixed, 5, dtype).tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SUMS)
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), asked=st.integers(1, 100), folded=st.integers(0, 7))
def test_blocks_folded_beforehand_change_no_bit(
    name: str, dtype: str, seed: int, asked: int, folded: int
) -> None:
    """The first blocks added up where they were made, and the others after them, give the bits of all one by one."""
    reducer, parts = SUMS[name](), random_cohort(seed, asked, 5, dtype)
    blocks = [block_sum(reducer, list(some)) for _, some in groupby(parts, key=lambda c: c.slot // BLOCK)]
    expected = reduced(reducer, blocks, 5, dtype)
    whole: BlockSum | None = None
    for one in blocks[:folded]:
        whole = follow(whole, one)
    found = reduced(reducer, [*([whole] if whole else []), *blocks[folded:]], 5, dtype)
    assert found.tobytes() == expected.tobytes()
    if whole is not None:
        assert whole.count == sum(one.count for one in blocks[:folded])


def test_order_matters_to_bits() -> None:
    """Another order of the same sites gives other bits, so the tests above compare something."""
    parts = random_cohort(1, 40, 1000, "float32", dropped=0.0)
    updates = [part.update for part in parts]
    turned = contributions(updates[::-1])
    first, second = (reduced(mean(), p, 1000, "float32") for p in (contributions(updates), turned))
    assert (first != second).mean() > 0.1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SUMS)
def test_pieces_and_threads_change_no_bit(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vector long enough for several pieces and threads gives the bits of one by one, for any cut."""
    size = 3 * chunks.SPAN // 2 + 13
    parts = random_cohort(5, 20, size, dtype)
    reducer = SUMS[name]()
    expected = one_by_one(reducer, parts, size, dtype)
    np.testing.assert_array_equal(reduced(reducer, parts, size, dtype), expected)
    blocks = [
        block_sum(reducer, list(members)) for _, members in groupby(parts, key=lambda c: c.slot // BLOCK)
    ]
    np.testing.assert_array_equal(reduced(reducer, blocks, size, dtype), expected)
    monkeypatch.setattr(chunks, "SPAN", 100_003)
    monkeypatch.setattr(means, "SUM_BYTES", 9_999 * 8)
    monkeypatch.setattr(means, "PENDING", 1)
    np.testing.assert_array_equal(reduced(reducer, parts, size, dtype), expected)


@pytest.mark.parametrize("summed", [False, True])
def test_zeros_have_one_sign(summed: bool) -> None:
    """Updates of nothing but -0.0 give 0.0, summed here or where they were made."""
    parts = contributions([np.full(3, -0.0, np.float32)] * 2, [2.0, 1.0])
    found = reduced(weighted_mean(), [block_sum(weighted_mean(), parts)] if summed else parts, 3, "float32")
    assert found.tobytes() == np.zeros(3, np.float32).tobytes()


def test_threads_are_used() -> None:
    """A long vector is worked on by spans that cover it once."""
    seen: list[tuple[int, int]] = []
    chunks.on_spans(lambda start, stop: seen.append((start, stop)), 2 * chunks.SPAN + 1)
    spans = [(0, chunks.SPAN), (chunks.SPAN, 2 * chunks.SPAN), (2 * chunks.SPAN, 2 * chunks.SPAN + 1)]
    assert sorted(seen) == spans


def test_include_right_after_each_client() -> None:
    """A block built up member by member, the update's memory being used again, equals the block at once."""
    parts = random_cohort(3, 16, 50, "float32")
    reducer = norm_bounded(0.5)
    resident = np.empty(50, np.float32)
    partial = None
    for part in parts:
        resident[:] = part.update
        partial = include(reducer, partial, Contribution(part.slot, resident, part.weight, part.norm))
    expected = block_sum(reducer, parts)
    assert partial is not None
    np.testing.assert_array_equal(partial.total, expected.total)
    assert (partial.block, partial.weight, partial.count) == (0, expected.weight, len(parts))
    assert expected.weight == pytest.approx(sum(part.weight for part in parts))


def test_accumulate() -> None:
    """accumulate adds scale * update in place, with any scale and scratch, and leaves the update alone."""
    update = np.arange(5, dtype=np.float32)
    update.flags.writeable = False
    for scale in (1.0, 0.25, 0.0):
        for scratch in (None, np.empty(2, np.float32), np.empty(9, np.float32)):
            total = np.ones(5, np.float32)
            accumulate(total, update, scale, scratch)
            np.testing.assert_array_equal(total, 1 + scale * update)


@pytest.mark.parametrize("name", SUMS)
def test_memory_mapped_updates(name: str, tmp_path: Path) -> None:
    """Read-only memory maps are reduced like arrays, and the files stay as they were."""
    parts = random_cohort(9, 20, 100, "float32")
    mapped = []
    for part in parts:
        path = tmp_path / f"{part.slot}.bin"
        path.write_bytes(part.update.tobytes())
        mapped.append(Contribution(part.slot, np.memmap(path, np.float32, "r"), part.weight, part.norm))
    found = reduced(SUMS[name](), mapped, 100, "float32")
    np.testing.assert_array_equal(found, reduced(SUMS[name](), parts, 100, "float32"))
    assert all((tmp_path / f"{part.slot}.bin").read_bytes() == part.update.tobytes() for part in parts)


@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3),
    st.floats(0.01, 100),
    st.floats(0.1, 1000),
)
def test_norm_bound_holds(attack: list[float], bound: float, weight: float) -> None:
    """Whatever one site sends, a norm-bounded mean moves by at most bound * weight / sum of weights."""
    honest = [np.array(v, np.float64) for v in GOLDEN[:5]]
    weights = [*[10.0] * 5, weight]
    results = [
        reduced(norm_bounded(bound), contributions([*honest, np.array(last)], weights), 3, "float64")
        for last in (attack, [0.0] * 3)
    ]
    moved = np.linalg.norm(results[0] - results[1])
    assert moved <= bound * weight / (50 + weight) * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize(
    ("reducer", "n", "expected"),
    [
        (mean(), 4, 0.25),
        (norm_bounded(1.0, weighted=False), 4, 0.25),
        (norm_bounded(9.0, weighted=False), 4, 0.25),
    ],
)
def test_sensitivity_is_reached(reducer: Reducer, n: int, expected: float) -> None:
    """One update of norm 1 replaced by zero moves the result by exactly the stated sensitivity."""
    unit, zero = np.array([0.6, 0.8]), np.zeros(2)
    with_, without = (
        reduced(reducer, contributions([v] + [zero] * (n - 1)), 2, "float64") for v in (unit, zero)
    )
    assert reducer.sensitivity(n) == expected
    assert np.linalg.norm(with_ - without) == pytest.approx(expected)


@pytest.mark.parametrize("reducer", [weighted_mean(), norm_bounded(1.0, weighted=True)])
def test_no_sensitivity_with_weights(reducer: Reducer) -> None:
    """Weighted means state no sensitivity."""
    assert reducer.sensitivity(5) is None


def test_one_update_and_one_number() -> None:
    """A single update of one number, and a vector of none, are reduced to themselves."""
    one = contributions([np.array([2.5], np.float32)], [3.0])
    none = contributions([np.zeros(0, np.float32)])
    for make in SUMS.values():
        assert reduced(make(), none, 0, "float32").shape == (0,)
    assert reduced(weighted_mean(), one, 1, "float32").tolist() == [2.5]


def test_nothing_to_reduce() -> None:
    """A mean of nothing and a block's sum of nothing are refused, not NaN."""
    with pytest.raises(InputError, match="at least one update"):
        reduced(mean(), [], 3, "float32")
    with pytest.raises(InputError, match="at least one update"):
        block_sum(mean(), [])


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan"), float("inf")])
def test_bound_out_of_range(bound: float) -> None:
    """A bound that is no length is refused at construction, naming the parameter."""
    with pytest.raises(InputError, match="bound: got"):
        norm_bounded(bound)


def test_memory_of_a_mean_is_one_model() -> None:
    """Reducing 64 updates of 8 MB takes less than three such vectors beyond the updates."""
    size = 2_000_000
    update = np.ones(size, np.float32)
    parts = [Contribution(slot, update, 2.0, 1.0) for slot in range(64)]
    tracemalloc.start()
    reduced(weighted_mean(), parts, size, "float32")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * update.nbytes
