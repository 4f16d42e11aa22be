"""Server optimizers against the papers' formulas, written out number by number."""

import math
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from consortium.protocol.errors import InputError
from consortium.protocol.layout import Vector
from consortium.strategies import chunks
from consortium.strategies.base import ServerOptimizer
from consortium.strategies.optimizers import adagrad, adam, momentum, sgd, yogi

LR, BETA1, BETA2, TAU = 0.3, 0.8, 0.95, 0.01
SIZE = 257

Rule = Callable[[list[float]], Iterator[float]]
"""One coordinate: the updates of the rounds -> how far it moves in each."""


def rule_sgd(updates: list[float]) -> Iterator[float]:
    for d in updates:
        yield LR * d


def rule_momentum(updates: list[float]) -> Iterator[float]:
    v = 0.0
    for d in updates:
        v = BETA1 * v + d
        yield LR * v


def adaptive(second: Callable[[float, float], float]) -> Rule:
    def rule(updates: list[float]) -> Iterator[float]:
        m, v = 0.0, TAU * TAU
        for d in updates:
            m = BETA1 * m + (1 - BETA1) * d
            v = second(v, d * d)
            yield LR * m / (math.sqrt(v) + TAU)

    return rule


def sign(x: float) -> float:
    return (x > 0) - (x < 0)


CASES: dict[str, tuple[ServerOptimizer, Rule]] = {
    "sgd": (sgd(LR), rule_sgd),
    "momentum": (momentum(LR, BETA1), rule_momentum),
    "adagrad": (adagrad(LR, BETA1, TAU), adaptive(lambda v, d2: v + d2)),
    "adam": (adam(LR, BETA1, BETA2, TAU), adaptive(lambda v, d2: BETA2 * v + (1 - BETA2) * d2)),
    "yogi": (
        yogi(LR, BETA1, BETA2, TAU),
        adaptive(lambda v, d2: v - (1 - BETA2) * d2 * sign(v - d2)),
    ),
}


def rounds(dtype: str, count: int = 6, size: int = SIZE) -> tuple[Vector, list[Vector]]:
    """A model and updates of several sizes, some zero."""
    rng = np.random.default_rng(11)
    updates = [
        (rng.standard_normal(size) * 10.0 ** rng.integers(-4, 2, size)).astype(dtype) for _ in range(count)
    ]
    for update in updates:
        update[::7] = 0
    return rng.standard_normal(size).astype(dtype), updates


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("float64", 1e-12)])
@pytest.mark.parametrize("name", CASES)
def test_formulas(name: str, dtype: str, tolerance: float) -> None:
    """Over six rounds the model moves as the paper's formula says, in the model's dtype."""
    optimizer, rule = CASES[name]
    start, updates = rounds(dtype)
    model, state = start, optimizer.init(start)
    for update in updates:
        model, state = optimizer.step(state, model, update)
    moves = [sum(rule([float(update[i]) for update in updates])) for i in range(SIZE)]
    np.testing.assert_allclose(model, start.astype(np.float64) + moves, rtol=tolerance, atol=tolerance)
    assert model.dtype == dtype
    assert all(vector.dtype == dtype and vector.shape == (SIZE,) for vector in state.values())


@pytest.mark.parametrize("name", CASES)
def test_arguments_are_not_modified(name: str) -> None:
    """A step writes into none of its arguments and returns none of their memory, so a round can be taken back."""
    optimizer, _ = CASES[name]
    model, updates = rounds("float32")
    state = optimizer.init(model)
    _, state = optimizer.step(state, model, updates[0])
    for array in (model, updates[1], *state.values()):
        array.flags.writeable = False
    moved, after = optimizer.step(state, model, updates[1])
    assert not any(np.shares_memory(moved, old) for old in (model, updates[1], *state.values()))
    assert not any(np.shares_memory(new, old) for new in after.values() for old in state.values())


@pytest.mark.parametrize("name", CASES)
def test_pieces_and_threads_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One piece or many give the same bits."""
    optimizer, _ = CASES[name]
    model, updates = rounds("float32", 1, 100_001)
    at_once, _ = optimizer.step(optimizer.init(model), model, updates[0])
    monkeypatch.setattr(chunks, "SPAN", 30_011)
    in_pieces, _ = optimizer.step(optimizer.init(model), model, updates[0])
    assert at_once.tobytes() == in_pieces.tobytes()


@pytest.mark.parametrize("lr", [1.0, 0.3])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sgd_over_the_update_gives_the_same_bytes_in_its_memory(lr: float, dtype: str) -> None:
    """For a caller who has no more use of the update; the model is left as it is."""
    model, updates = rounds(dtype, 1)
    before = model.copy()
    right, _ = sgd(lr).step({}, model, updates[0])
    over = sgd(lr).step_over
    assert over is not None
    moved, state = over({}, model, updates[0])
    assert moved.tobytes() == right.tobytes()
    assert moved is updates[0]
    assert model.tobytes() == before.tobytes()
    assert state == {}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("make", [momentum, adagrad, adam, yogi])
def test_a_step_over_the_update_is_the_same_step(make: Any, dtype: str) -> None:
    """Bit for bit over several rounds, the model in the update's memory and the state in its own; the model before is
    not touched, nor is a state that cannot be written, as a checkpoint gives it."""
    optimizer = make(0.1)
    model, updates = rounds(dtype, 4)
    state = optimizer.init(model)
    for one in state.values():
        one.flags.writeable = False
    for number, update in enumerate(updates):
        before = model.tobytes()
        kept = [state[name].tobytes() for name in sorted(state)]
        right, expected = optimizer.step(state, model, update.copy())
        assert [state[name].tobytes() for name in sorted(state)] == kept
        moved, found = optimizer.step_over(state, model, update)
        assert moved is update
        assert moved.tobytes() == right.tobytes()
        assert {k: v.tobytes() for k, v in found.items()} == {k: v.tobytes() for k, v in expected.items()}
        assert model.tobytes() == before
        for name in state:
            assert (found[name] is state[name]) is (number > 0)
        model, state = moved, found


def test_sgd_of_one_gives_the_mean_model() -> None:
    """With a learning rate of 1 the model plus the update is the next model, bit for bit."""
    model, updates = rounds("float32", 1)
    moved, state = sgd().step({}, model, updates[0])
    np.testing.assert_array_equal(moved, model + updates[0])
    assert state == {}


def test_defaults_are_of_the_published_tables() -> None:
    """A first Adam step with beta1 .9, beta2 .999, tau 1e-8 moves about lr * .1 / sqrt(.001), without correction."""
    for dtype in ("float32", "float64"):
        model = np.zeros(1, dtype)
        for optimizer in (adam(0.01), yogi(0.01)):
            moved, _ = optimizer.step(optimizer.init(model), model, np.ones(1, dtype))
            assert float(moved[0]) == pytest.approx(0.01 * 0.1 / math.sqrt(0.001), rel=1e-5)
        moved, _ = adagrad(0.01).step(adagrad(0.01).init(model), model, np.ones(1, dtype))
        assert float(moved[0]) == pytest.approx(0.01 * 0.1, rel=1e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tau", [1e-12, 1e-8])
def test_a_coordinate_that_never_moves_stays(name: str, tau: float) -> None:
    """A zero update moves nothing and makes no NaN, also with the smallest tau in float32."""
    make = {
        "adagrad": lambda: adagrad(1.0, tau=tau),
        "adam": lambda: adam(1.0, tau=tau),
        "yogi": lambda: yogi(1.0, tau=tau),
    }
    optimizer = make[name]() if name in make else CASES[name][0]
    model = np.array([1.5], np.float32)
    moved, _ = optimizer.step(optimizer.init(model), model, np.zeros(1, np.float32))
    np.testing.assert_array_equal(moved, model)


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_tiny_models(name: str, size: int) -> None:
    """Models of one number, and of none, are stepped."""
    optimizer, _ = CASES[name]
    model = np.ones(size, np.float64)
    moved, _ = optimizer.step(optimizer.init(model), model, model)
    assert moved.shape == (size,)


@pytest.mark.parametrize(
    ("name", "models"), [("sgd", 1), ("momentum", 2), ("adagrad", 3), ("adam", 3), ("yogi", 3)]
)
def test_memory_is_what_is_returned(name: str, models: int) -> None:
    """A step takes the memory of what it returns and less than half a model (here 8 MB) more."""
    optimizer, _ = CASES[name]
    model = np.ones(2_000_000, np.float32)
    state = optimizer.init(model)
    tracemalloc.start()
    kept = optimizer.step(state, model, model)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(kept[1]) == models - 1
    assert peak < (models + 0.5) * model.nbytes


@pytest.mark.parametrize(
    ("make", "parameter"),
    [
        (lambda: sgd(0.0), "lr"),
        (lambda: sgd(math.nan), "lr"),
        (lambda: momentum(1.0, 1.0), "beta"),
        (lambda: adam(-1.0), "lr"),
        (lambda: adam(1.0, beta1=1.0), "beta1"),
        (lambda: adam(1.0, beta2=-0.1), "beta2"),
        (lambda: yogi(1.0, beta2=1.0), "beta2"),
        (lambda: adagrad(1.0, tau=0.0), "tau"),
        (lambda: adam(math.inf), "lr"),
    ],
)
def test_out_of_range(make: Callable[[], ServerOptimizer], parameter: str) -> None:
    """A parameter out of range is refused at construction, by name."""
    with pytest.raises(InputError, match=f"^{parameter}: got"):
        make()
