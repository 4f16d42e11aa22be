"""Epsilon of sampled Gaussians by a numerical accountant of its own, which shares nothing with the one that ships.

The privacy loss of one step is put on a grid by its distribution function, tilted by exp(t loss) so that the mass lies
where epsilon is (so that no delta is too small for a double), and composed with itself by one Fourier transform:

    delta(e) = M(t)^k  sum over y of  tilted(y) exp(-t y) (1 - exp(e - y))+

for both directions of "add or remove one" (arXiv 2106.02848 has the losses; the tilt is the saddle point's of
2209.15596). Cells are taken at their centres, so the error is of second order in the grid; no bound is proved, which a
peer needs not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize_scalar
from scipy.special import logsumexp
from scipy.stats import norm

Vector = NDArray[np.float64]
MOST_CELLS = 1 << 22


@dataclass(frozen=True)
class _Step:
    """One step. removed: the losses of a unit that was there over one that was not, else the other way round."""

    sigma: float
    rate: float
    removed: bool

    def loss(self, x: Vector) -> Vector:
        """Of a noised sum x: log of (1 - rate) + rate exp((2 x - 1) / (2 sigma^2)), or its negative."""
        tilt = (2 * x - 1) / (2 * self.sigma**2)
        found: Vector = np.logaddexp(math.log1p(-self.rate), math.log(self.rate) + tilt)
        sign = 1.0 if self.removed else -1.0
        signed: Vector = sign * found
        return signed

    def density(self, x: Vector) -> Vector:
        """Its logarithm, under what the losses are of."""
        found: Vector = (
            norm.logpdf(x / self.sigma) - math.log(self.sigma) + (self.loss(x) if self.removed else 0.0)
        )
        return found


@dataclass(frozen=True)
class _Tilted:
    """A step under exp(t loss): the logarithm of its normaliser, moments of the loss, and where its mass lies."""

    log_moment: float
    mean: float
    spread: float
    low: float
    high: float


def epsilon(sigma: float, rate: float, count: int, delta: float, cells: int = 240) -> float:
    """The larger of both directions. cells: of the grid, per deviation of one (tilted) step's loss."""
    return max(_epsilon(_Step(sigma, rate, removed), count, delta, cells) for removed in (True, False))


def _epsilon(one: _Step, count: int, delta: float, cells: int) -> float:
    found = minimize_scalar(
        lambda s: (count * _tilted(one, math.exp(s)).log_moment - math.log(delta)) / math.exp(s),
        bounds=(-3.0, 10.0),
        method="bounded",
    )
    t = math.exp(float(found.x))
    tilted = _tilted(one, t)
    wide = 24 * tilted.spread * math.sqrt(count) + 2 * (tilted.high - tilted.low)
    step = max(tilted.spread / cells, wide / MOST_CELLS)
    numbers = np.arange(math.floor(tilted.low / step) - 1, math.ceil(tilted.high / step) + 2)
    masses = np.exp(
        _masses(one, (numbers * step).astype(np.float64), step) + t * numbers * step - tilted.log_moment
    )
    return _solved(numbers, masses / masses.sum(), count, t, count * tilted.log_moment, delta, step, wide)


def _tilted(one: _Step, t: float) -> _Tilted:
    """By quadrature over the noised sum, wherever exp(t loss) moves it."""
    furthest = 12 * one.sigma + max(1.0, t + 1)
    x = np.linspace(-furthest, furthest, 200_001)
    losses = one.loss(x)
    weights = one.density(x) + t * losses + math.log(x[1] - x[0])
    log_moment = float(logsumexp(weights))
    shares = np.exp(weights - log_moment)
    mean = float(shares @ losses)
    inside = losses[weights - weights.max() > -42]
    spread = math.sqrt(float(shares @ (losses - mean) ** 2))
    return _Tilted(log_moment, mean, spread, float(inside.min()), float(inside.max()))


def _solved(
    places: NDArray[np.int64],
    tilted: Vector,
    count: int,
    t: float,
    scale: float,
    delta: float,
    step: float,
    wide: float,
) -> float:
    size = 1 << math.ceil(math.log2(wide / step))
    mean = float(tilted @ places)
    ring = np.zeros(size)
    np.add.at(ring, places % size, tilted)
    whole = np.fft.irfft(np.fft.rfft(ring) ** count, size)
    middle = round(count * mean)
    index = np.arange(middle - size // 2, middle + size // 2)
    mass, losses = np.maximum(whole[index % size], 0.0), index * step

    def over(e: float) -> float:
        beyond = losses > e
        y = losses[beyond]
        terms = np.log(np.maximum(mass[beyond], 1e-300)) + scale - t * y + np.log(-np.expm1(e - y))
        return (float(logsumexp(terms)) if y.size else -math.inf) - math.log(delta)

    low, high = 0.0, float(losses[-2])
    if over(low) <= 0:
        return 0.0
    return float(brentq(over, low, high, xtol=1e-9))


def _masses(one: _Step, centres: Vector, step: float) -> Vector:
    """The logarithm of the mass in each cell, by the distribution function."""
    edges = np.append(centres - step / 2, centres[-1] + step / 2)
    losses, sigma = (edges if one.removed else -edges), one.sigma
    ratio = np.maximum(np.expm1(losses) + one.rate, 0.0) / one.rate
    with np.errstate(divide="ignore"):
        x = sigma**2 * np.log(ratio) + 0.5  # -inf where no sum has so low a loss
    if not one.removed:  # losses fall as x grows
        return _between(norm.logcdf(x / sigma), norm.logsf(x / sigma))
    without, inside = math.log1p(-one.rate), math.log(one.rate)
    above = np.logaddexp(without + norm.logsf(x / sigma), inside + norm.logsf((x - 1) / sigma))
    below = np.logaddexp(without + norm.logcdf(x / sigma), inside + norm.logcdf((x - 1) / sigma))
    return _between(above, below)


def _between(above: Vector, below: Vector) -> Vector:
    """log of the mass between edges, from the smaller of both tails: of differences of near ones nothing is left."""
    with np.errstate(divide="ignore", invalid="ignore"):
        upper = above[:-1] + np.log(-np.expm1(np.minimum(above[1:] - above[:-1], 0.0)))
        lower = below[1:] + np.log(-np.expm1(np.minimum(below[:-1] - below[1:], 0.0)))
        found = np.where(above[:-1] < below[1:], upper, lower)
    return np.where(np.isnan(found), -np.inf, found)
