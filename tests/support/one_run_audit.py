"""The one-run audit's bound (Steinke, Nasr, Jagielski, arXiv 2305.08846, theorem 5.2 and appendix D)."""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import binom


def epsilon_of_guesses(
    canaries: int, guesses: int, right: int, delta: float, confidence: float = 0.95
) -> float:
    """The largest epsilon that so many right guesses of canaries' coins refute at this confidence; 0 for none."""
    low, high = 0.0, 40.0
    if p_value(canaries, guesses, right, 0.0, delta) >= 1 - confidence:
        return 0.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        refuted = p_value(canaries, guesses, right, middle, delta) < 1 - confidence
        low, high = (middle, high) if refuted else (low, middle)
    return low


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """The chance of at least so many right guesses if the mechanism were (epsilon, delta)-private."""
    chance = 1 / (1 + math.exp(-epsilon))
    beta = float(binom.sf(right - 1, guesses, chance))
    below = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), guesses, chance))  # P[right - i <= X < right]
    alpha = float(np.max(below / np.arange(1, right + 1), initial=0.0))
    return min(1.0, beta + alpha * delta * 2 * canaries)
