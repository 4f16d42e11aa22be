"""How fast an address may open connections that are not admitted: a bucket of tokens for each (RFC 2697)."""

from __future__ import annotations

import time
from collections.abc import Callable

_MANY = 1024
"""Buckets, beyond which those that are full again are forgotten."""


class Pace:
    """rate: tokens a second for each key. burst: tokens that a key has at first, and at most. For one thread at a time.

    clock: seconds, of any origin.
    """

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._buckets: dict[str, tuple[float, float]] = {}  # tokens, and when there were so many
        self._many = _MANY

    def take(self, key: str) -> bool:
        """Take a token; False where there is none."""
        tokens = self._tokens(key)
        if tokens < 1.0:
            return False
        self._keep(key, tokens - 1.0)
        return True

    def give_back(self, key: str) -> None:
        """The last token was taken for nothing that counts."""
        self._keep(key, min(self._tokens(key) + 1.0, float(self._burst)))

    def __len__(self) -> int:
        return len(self._buckets)

    def _tokens(self, key: str) -> float:
        tokens, at = self._buckets.get(key, (float(self._burst), 0.0))
        return min(tokens + (self._clock() - at) * self._rate, float(self._burst))

    def _keep(self, key: str, tokens: float) -> None:
        self._buckets[key] = (tokens, self._clock())
        if len(self._buckets) > self._many:
            full = [one for one in self._buckets if self._tokens(one) >= self._burst]
            for one in full:
                del self._buckets[one]
            self._many = max(_MANY, 2 * len(self._buckets))
