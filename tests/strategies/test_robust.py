"""Robust rules: golden vectors, bounds under one arbitrary update, Krum's arithmetic, what is left untouched."""

import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consortium.protocol.errors import InputError
from consortium.protocol.layout import Vector
from consortium.strategies import chunks, robust
from consortium.strategies.base import BlockSum, Contribution, Reducer
from consortium.strategies.robust import coordinatewise, krum, krum_scores, median, multikrum, trimmed_mean

GOLDEN = np.array(
    [[1, 2, 3], [4, 5, 6], [7, 8, 9], [2, 2, 2], [3, 3, 3], [50, -50, 0], [2.5, 3.5, 4.5]], np.float32
)
RULES = {
    "median": median(),
    "trimmed": trimmed_mean(1),
    "krum": krum(1),
    "multikrum": multikrum(1, 3),
}
FLOATS = st.floats(allow_nan=False, allow_infinity=False, width=32)


def contributions(updates: Sequence[Vector] | Vector) -> list[Contribution]:
    return [
        Contribution(slot, update, 1.0, float(np.linalg.norm(update.astype(np.float64))))
        for slot, update in enumerate(updates)
    ]


def reduced(reducer: Reducer, updates: Sequence[Vector] | Vector) -> Vector:
    state = reducer.init(updates[0].size, updates[0].dtype)
    for contribution in contributions(updates):
        state = reducer.add(state, contribution)
    return reducer.finish(state)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("reducer", "expected"),
    [
        (median(), [3, 3, 3]),
        (trimmed_mean(1), [3.7, 3.1, 3.7]),
        (krum(1), [3, 3, 3]),
        (multikrum(1, 6), [3.25, 3.9167, 4.5833]),
    ],
)
def test_golden(reducer: Reducer, expected: list[float], dtype: str) -> None:
    """Median, trimmed mean, Krum and Multi-Krum of seven known vectors are the known ones, in the updates' dtype."""
    found = reduced(reducer, GOLDEN.astype(dtype))
    np.testing.assert_allclose(found, expected, atol=5e-5)
    assert found.dtype == dtype


@pytest.mark.parametrize("n", range(1, 12))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_median_of_even_and_odd(n: int, dtype: str) -> None:
    """The median agrees with numpy's for every number of updates from one."""
    updates = np.random.default_rng(n).standard_normal((n, 33)).astype(dtype)
    np.testing.assert_allclose(reduced(median(), updates), np.median(updates, axis=0), rtol=1e-6)


@pytest.mark.parametrize("trim", [0, 1, 4])
def test_trimmed_mean_cuts_at_each_end(trim: int) -> None:
    """The trimmed mean is the mean of the sorted values without `trim` at each end, for even and odd numbers."""
    for n in (2 * trim + 1, 2 * trim + 2, 17):
        updates = np.random.default_rng(n).standard_normal((n, 33)).astype(np.float64)
        expected = np.sort(updates, axis=0)[trim : n - trim].mean(axis=0)
        np.testing.assert_allclose(reduced(trimmed_mean(trim), updates), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("name", RULES)
def test_tiny_vectors(name: str, size: int) -> None:
    """Vectors of one number, and of none, are reduced."""
    updates = np.arange(5 * size, dtype=np.float32).reshape(5, size)
    assert reduced(RULES[name], updates).shape == (size,)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("reducer", [median(), trimmed_mean(2)])
def test_pieces_and_threads_change_no_bit(
    reducer: Reducer, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vector worked on in one piece by one thread, and in odd pieces by several, gives the same bits."""
    updates = np.random.default_rng(0).standard_normal((9, 20_011)).astype(dtype)
    at_once = reduced(reducer, updates)
    monkeypatch.setattr(chunks, "SPAN", 3_001)
    monkeypatch.setattr(robust, "GATHER_BYTES", 9 * 8 * 407)
    monkeypatch.setattr(robust, "SORT_BYTES", 9 * 8 * 101)
    assert reduced(reducer, updates).tobytes() == at_once.tobytes()


@given(
    st.lists(st.lists(FLOATS, min_size=3, max_size=3), min_size=3, max_size=9),
    st.lists(FLOATS, min_size=3, max_size=3),
)
def test_median_stays_among_the_honest(honest: list[list[float]], attack: list[float]) -> None:
    """One arbitrary update leaves every coordinate of the median within the range of the honest values."""
    values = np.array(honest, np.float32)
    found = reduced(median(), np.vstack([values, np.array([attack], np.float32)]))
    assert (found >= values.min(axis=0)).all()
    assert (found <= values.max(axis=0)).all()


@given(
    st.lists(
        st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=3, max_size=3), min_size=4, max_size=9
    ),
    st.lists(FLOATS, min_size=6, max_size=6),
)
def test_trimmed_mean_stays_among_the_honest(honest: list[list[float]], attack: list[float]) -> None:
    """Two arbitrary updates leave a mean trimmed by two within the range of the honest values, up to rounding."""
    values = np.array(honest, np.float32)
    attacks = np.array(attack, np.float32).reshape(2, 3)
    found = reduced(trimmed_mean(2), np.vstack([values, attacks])).astype(np.float64)
    slack = 1e-6 * np.abs(values).max(axis=0) + 1e-44
    assert (found >= values.min(axis=0) - slack).all()
    assert (found <= values.max(axis=0) + slack).all()


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(FLOATS, min_size=4, max_size=4), st.integers(0, 6))
def test_krum_result_is_near_the_honest(seed: int, attack: list[float], place: int) -> None:
    """With one arbitrary update among seven, Krum gives a given update no farther from the honest than they are."""
    honest = np.random.default_rng(seed).standard_normal((6, 4)).astype(np.float32)
    updates = np.insert(honest, place, np.array(attack, np.float32), axis=0)
    found = reduced(krum(1), updates)
    assert any((found == update).all() for update in updates)
    apart = np.linalg.norm(honest[:, None].astype(float) - honest, axis=2)
    assert np.linalg.norm(honest.astype(float) - found, axis=1).min() <= apart.max() * (1 + 1e-6)


def exact_scores(updates: Vector, neighbours: int) -> Vector:
    """Krum's scores by subtraction in float64, one pair after the other."""
    wide = updates.astype(np.float64)
    distances = [[float(np.sum((a - b) ** 2)) for b in wide] for a in wide]
    return np.array([sum(sorted(row)[1 : neighbours + 1]) for row in distances])


@pytest.mark.parametrize("offset", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("attack", [0.0, 1e2, 1e9])
def test_krum_where_updates_are_small_beside_what_they_share(offset: float, attack: float) -> None:
    """In float32, scores are right to 1 % although updates differ by 1e-4 of what all share, and some lie far out."""
    rng = np.random.default_rng(3)
    updates = (offset + 1e-4 * max(offset, 1.0) * rng.standard_normal((15, 4_000))).astype(np.float32)
    updates[[4, 9]] += np.float32(attack)
    scores = krum_scores(contributions(updates), 11)
    expected = exact_scores(updates, 11)
    honest = [i for i in range(15) if i not in (4, 9)] if attack else list(range(15))
    np.testing.assert_allclose(scores[honest], expected[honest], rtol=1e-2)
    if attack:
        assert np.argsort(scores)[-2:].tolist() == [4, 9] or np.argsort(scores)[-2:].tolist() == [9, 4]
    assert np.argmin(scores) == np.argmin(expected)


def test_krum_with_a_liar_of_median_norm() -> None:
    """Scores are right also where the first centre is a lie, as far out as what the honest share is long."""
    rng = np.random.default_rng(3)
    longer = 1 + 1e-5 * np.arange(15)[:, None]
    updates = (1e4 * longer + rng.standard_normal((15, 4_000))).astype(np.float32)
    norms = np.linalg.norm(updates.astype(np.float64), axis=1)
    updates[4] = -1e4
    updates[4] *= np.float32(np.median(np.delete(norms, 4)) / np.linalg.norm(updates[4].astype(np.float64)))
    given = contributions(updates)
    assert int(np.argsort([c.norm for c in given])[7]) == 4, "the lie is not of median norm"
    scores = krum_scores(given, 12)
    honest = np.delete(np.arange(15), 4)
    np.testing.assert_allclose(scores[honest], exact_scores(updates, 12)[honest], rtol=1e-2)


def test_plain_products_would_pick_wrongly() -> None:
    """Without centring the pick at updates of 1e-4 of the parameters is wrong, so the test above can fail."""
    rng = np.random.default_rng(3)
    updates = (1e4 + rng.standard_normal((15, 4_000))).astype(np.float32)
    gram = (updates @ updates.T).astype(np.float32)
    squares = np.diagonal(gram)
    distances = squares[:, None] + squares[None, :] - 2 * gram
    np.fill_diagonal(distances, np.inf)
    plain = np.sort(distances, axis=1)[:, :11].sum(axis=1)
    assert np.argmin(plain) != np.argmin(exact_scores(updates, 11))


def test_krum_with_values_at_the_end_of_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finite values whose products overflow, in some pieces to inf and in others to -inf, are the farthest."""
    rng = np.random.default_rng(0)
    updates = (100 * rng.standard_normal((7, 4_000))).astype(np.float32)
    updates[[2, 5]] = 3e38 * np.sign(rng.standard_normal((2, 4_000)))
    monkeypatch.setattr(robust, "GRAM_BYTES", 1)
    scores = krum_scores(contributions(updates), 3)
    honest = [0, 1, 3, 4, 6]
    np.testing.assert_allclose(scores[honest], exact_scores(updates, 3)[honest], rtol=1e-4)
    assert np.isposinf(scores[[2, 5]]).all()


def test_krum_ties_go_to_the_first_name() -> None:
    """Of equally good updates the first in site-name order is taken."""
    cross = np.array([[1, 0], [-1, 0], [0, 1], [0, -1], [0, 0], [0, 0]], np.float32)
    np.testing.assert_array_equal(reduced(krum(1), cross[:4].repeat(2, axis=0)), [1, 0])
    np.testing.assert_array_equal(reduced(multikrum(0, 1), cross[[1, 0, 2, 3]]), [-1, 0])


def test_multikrum_by_default_keeps_as_many_as_it_compares() -> None:
    """Left out, keep is n - f - 2; kept updates count the same, whatever their weight."""
    chosen = np.argsort(exact_scores(GOLDEN, 4), kind="stable")[:4]
    np.testing.assert_allclose(reduced(multikrum(1), GOLDEN), GOLDEN[chosen].mean(axis=0), rtol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_weights_are_ignored(name: str) -> None:
    """A site cannot count for more by claiming a larger weight."""
    results = []
    for claims in ([1.0] * 7, [1e9, 1.0, 5.0, 1e3, 2.0, 7.0, 1e-3]):
        state = RULES[name].init(3, np.dtype(np.float32))
        for c, claim in zip(contributions(GOLDEN), claims, strict=True):
            state = RULES[name].add(state, Contribution(c.slot, c.update, claim, c.norm))
        results.append(RULES[name].finish(state))
    np.testing.assert_array_equal(results[0], results[1])


@pytest.mark.parametrize("name", RULES)
def test_memory_mapped_updates_stay(name: str, tmp_path: Path) -> None:
    """Read-only memory maps are reduced like arrays, and the files stay as they were."""
    path = tmp_path / "updates.bin"
    path.write_bytes(GOLDEN.tobytes())
    mapped = np.memmap(path, np.float32, "r", shape=GOLDEN.shape)
    np.testing.assert_array_equal(reduced(RULES[name], mapped), reduced(RULES[name], GOLDEN))
    assert path.read_bytes() == GOLDEN.tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_memory_is_pieces_and_the_result(name: str) -> None:
    """Beyond the updates, 30 of 4 MB, a rule takes the result and some pieces: less than 30 MB."""
    updates = np.random.default_rng(0).standard_normal((30, 1_000_000), np.float32)
    given = contributions(updates)
    tracemalloc.start()
    state = RULES[name].init(1_000_000, np.dtype(np.float32))
    for contribution in given:
        state = RULES[name].add(state, contribution)
    RULES[name].finish(state)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6


@pytest.mark.parametrize(
    ("reducer", "minimum"),
    [
        (median(), 1),
        (trimmed_mean(2), 5),
        (krum(1), 5),
        (krum(3), 9),
        (multikrum(1, 3), 5),
        (multikrum(1, 8), 8),
    ],
)
def test_minimum(reducer: Reducer, minimum: int) -> None:
    """The fewest updates are 2 * trim + 1, 2f + 3 and `keep`; one fewer is refused, that many are not."""
    assert reducer.minimum == minimum
    updates = np.random.default_rng(0).standard_normal((minimum, 2))
    assert reduced(reducer, updates).shape == (2,)
    if minimum > 1:
        with pytest.raises(InputError, match=f"at least {minimum} updates, got {minimum - 1}"):
            reduced(reducer, updates[1:])


@pytest.mark.parametrize("name", RULES)
def test_no_sensitivity_and_no_block_sums(name: str) -> None:
    """Robust rules state no sensitivity and take no sums."""
    reducer = RULES[name]
    assert reducer.sensitivity(10) is None
    assert reducer.scale is None
    with pytest.raises(InputError, match="not a sum"):
        reducer.add(reducer.init(1, np.dtype(np.float32)), BlockSum(0, np.zeros(1, np.float32), 1.0, 1))


def test_a_rule_of_ones_own() -> None:
    """`coordinatewise` takes any rule over the values of one coordinate, here their range."""
    spread = coordinatewise(lambda block: np.asarray(np.ptp(block, axis=1)), minimum=2)
    np.testing.assert_array_equal(reduced(spread, GOLDEN), [49, 58, 9])


@pytest.mark.parametrize(
    ("make", "parameter"),
    [
        (lambda: trimmed_mean(-1), "trim"),
        (lambda: krum(-1), "byzantine"),
        (lambda: multikrum(1, 0), "keep"),
    ],
)
def test_out_of_range(make: Callable[[], Reducer], parameter: str) -> None:
    """A parameter out of range is refused at construction, by name."""
    with pytest.raises(InputError, match=f"{parameter}: got"):
        make()
