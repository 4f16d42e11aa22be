"""How long to wait before the next try: longer each time, and never the same for many sites at once."""

from __future__ import annotations

import random

FIRST, MOST = 0.1, 5.0
"""Seconds."""


class Backoff:
    """Waits that double from `first` to `most` seconds; each is drawn from the upper half of its span."""

    def __init__(self, first: float = FIRST, most: float = MOST) -> None:
        self._first, self._most = first, most
        self._span = first

    def next(self) -> float:
        """Seconds to wait now."""
        span = self._span
        self._span = min(self._most, span * 2)
        return span * random.uniform(0.5, 1.0)  # noqa: S311 - it spreads load, and guards nothing

    def reset(self) -> None:
        """The next wait is the first one again."""
        self._span = self._first
