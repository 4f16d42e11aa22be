"""Server optimizers: how one reduced update, here D, moves the model x. All arithmetic is in the model's dtype.

The adaptive ones are Algorithm 2 of "Adaptive Federated Optimization" (arXiv 2003.00295), without bias correction:

    m = beta1 * m + (1 - beta1) * D
    v = v + D^2                                        adagrad
    v = beta2 * v + (1 - beta2) * D^2                  adam
    v = v - (1 - beta2) * D^2 * sign(v - D^2)          yogi
    x = x + lr * m / (sqrt(v) + tau)                   at first m = 0, v = tau^2

Defaults are those of FLamby's published tables (beta1 0.9, beta2 0.999, tau 1e-8). The paper recommends beta2 0.99 and
tau 1e-3: with a tiny tau the first steps are about lr * (1 - beta1) / sqrt(1 - beta2) in every coordinate, however
small the update.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from consortium.protocol.layout import Vector
from consortium.strategies.base import OptimizerState, ServerOptimizer, require
from consortium.strategies.chunks import CACHE_BYTES, on_spans, pieces

Moment = Callable[[Vector, Vector], Vector]
"""(v, D^2) -> next v, 1-D of one size and dtype; it may write into D^2."""


_Into = Callable[[Vector, OptimizerState, OptimizerState, Vector, Vector], None]
"""(next model, next state, both written over; state, model, update) -> None. The next state may be the state, the next
model the update."""


def sgd(lr: float = 1.0) -> ServerOptimizer:
    """x = x + lr * D. With lr 1 the model becomes the mean of the sites' models.

    Raises:
        InputError: unless lr > 0 and finite.
    """
    _require_lr(lr)

    def step(state: OptimizerState, model: Vector, update: Vector) -> tuple[Vector, OptimizerState]:
        moved = np.multiply(update, np.array(lr, model.dtype))
        return np.add(model, moved, moved), state

    def step_over(state: OptimizerState, model: Vector, update: Vector) -> tuple[Vector, OptimizerState]:
        factor = np.array(lr, model.dtype)

        def work(start: int, stop: int) -> None:
            for i in pieces(start, stop, CACHE_BYTES // model.itemsize):
                if lr != 1.0:  # else the same bits
                    np.multiply(update[i], factor, update[i])
                np.add(model[i], update[i], update[i])

        on_spans(work, model.size)
        return update, state

    return ServerOptimizer(lambda model: {}, step, step_over)


def momentum(lr: float = 1.0, beta: float = 0.9) -> ServerOptimizer:
    """FedAvgM: v = beta * v + D; x = x + lr * v (arXiv 1909.06335, section 4.2). State: "v".

    Raises:
        InputError: unless lr > 0 and finite, 0 <= beta < 1.
    """
    _require_lr(lr)
    require(0 <= beta < 1, "beta", beta, "a number at least 0 and below 1")

    def into(
        moved: Vector, after: OptimizerState, state: OptimizerState, model: Vector, update: Vector
    ) -> None:
        velocity = np.multiply(state["v"], np.array(beta, model.dtype), after["v"])
        np.add(velocity, update, velocity)
        np.multiply(velocity, np.array(lr, model.dtype), moved)
        np.add(model, moved, moved)

    return _both(lambda model: {"v": np.zeros_like(model)}, into)


def adagrad(lr: float, beta1: float = 0.9, tau: float = 1e-8) -> ServerOptimizer:
    """FedAdagrad (see the module's text). State: "m", "v".

    Raises:
        InputError: unless lr > 0, 0 <= beta1 < 1, tau >= 1e-12, all finite.
    """

    def second(v: Vector, square: Vector) -> Vector:
        return v + square

    return _adaptive(second, lr, beta1, tau)


def adam(lr: float, beta1: float = 0.9, beta2: float = 0.999, tau: float = 1e-8) -> ServerOptimizer:
    """FedAdam (see the module's text). State: "m", "v".

    Raises:
        InputError: unless lr > 0, 0 <= beta1, beta2 < 1, tau >= 1e-12, all finite.
    """
    require(0 <= beta2 < 1, "beta2", beta2, "a number at least 0 and below 1")

    def second(v: Vector, square: Vector) -> Vector:
        return beta2 * v + (1 - beta2) * square

    return _adaptive(second, lr, beta1, tau)


def yogi(lr: float, beta1: float = 0.9, beta2: float = 0.999, tau: float = 1e-8) -> ServerOptimizer:
    """FedYogi (see the module's text). State: "m", "v".

    Raises:
        InputError: unless lr > 0, 0 <= beta1, beta2 < 1, tau >= 1e-12, all finite.
    """
    require(0 <= beta2 < 1, "beta2", beta2, "a number at least 0 and below 1")

    def second(v: Vector, square: Vector) -> Vector:
        return np.asarray(v - (1 - beta2) * square * np.sign(v - square))

    return _adaptive(second, lr, beta1, tau)


def _require_lr(lr: float) -> None:
    require(0 < lr < math.inf, "lr", lr, "a number above 0")


def _adaptive(second: Moment, lr: float, beta1: float, tau: float) -> ServerOptimizer:
    _require_lr(lr)
    require(0 <= beta1 < 1, "beta1", beta1, "a number at least 0 and below 1")
    # Below that tau^2 is zero in float32, and a coordinate that never moved would be 0 / 0.
    require(1e-12 <= tau < math.inf, "tau", tau, "a number at least 1e-12")

    def init(model: Vector) -> OptimizerState:
        return {"m": np.zeros_like(model), "v": np.full_like(model, tau**2)}

    def into(
        moved: Vector, after: OptimizerState, state: OptimizerState, model: Vector, update: Vector
    ) -> None:
        m, v = after["m"], after["v"]

        def work(start: int, stop: int) -> None:
            for i in pieces(start, stop, CACHE_BYTES // model.itemsize):
                m[i] = beta1 * state["m"][i] + (1 - beta1) * update[i]
                v[i] = second(state["v"][i], np.square(update[i]))
                moved[i] = model[i] + lr * m[i] / (np.sqrt(v[i]) + tau)

        on_spans(work, model.size)

    return _both(init, into)


def _both(init: Callable[[Vector], OptimizerState], into: _Into) -> ServerOptimizer:
    """An optimizer of a function that works in place."""

    def step(state: OptimizerState, model: Vector, update: Vector) -> tuple[Vector, OptimizerState]:
        moved, after = np.empty_like(model), {name: np.empty_like(one) for name, one in state.items()}
        into(moved, after, state, model, update)
        return moved, after

    def step_over(state: OptimizerState, model: Vector, update: Vector) -> tuple[Vector, OptimizerState]:
        # what a checkpoint gave is read-only
        after = {name: one if one.flags.writeable else np.empty_like(one) for name, one in state.items()}
        into(update, after, state, model, update)
        return update, after

    return ServerOptimizer(init, step, step_over)
