"""Records of many rounds in little memory: tables of numbers by name, as arrays whose names are shared by all of them.

A run keeps a record of every round. As dicts of floats, those of twenty sites take ten kilobytes a round; so, two.
"""

from __future__ import annotations

import sys
from collections.abc import ItemsView, Iterator, Mapping, Sequence, ValuesView
from functools import lru_cache
from typing import Any

import numpy as np


@lru_cache(256)
def _same(names: tuple[str, ...]) -> tuple[str, ...]:
    return names


@lru_cache(64)
def _places(names: tuple[str, ...]) -> dict[str, int]:
    return {name: place for place, name in enumerate(names)}


def shared(names: Sequence[str]) -> tuple[str, ...]:
    """The names, as the very objects that others with the same names have."""
    return _same(tuple(map(sys.intern, names)))


class Numbers(Mapping[str, float]):
    """A dict of floats that does not change."""

    __slots__ = ("_names", "_values")

    def __init__(self, numbers: Mapping[str, float]) -> None:
        self._names = shared(tuple(numbers))
        self._values = np.fromiter(numbers.values(), np.float64, len(numbers))

    def _dict(self) -> dict[str, float]:
        return dict(zip(self._names, self._values.tolist(), strict=True))

    def __getitem__(self, name: str) -> float:
        return float(self._values[_places(self._names)[name]])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def items(self) -> ItemsView[str, float]:
        return self._dict().items()

    def values(self) -> ValuesView[float]:
        return self._dict().values()

    def __repr__(self) -> str:
        return repr(self._dict())


class Table(Mapping[str, Mapping[str, float]]):
    """A dict of dicts of floats, all with the same names in the same order, that does not change."""

    __slots__ = ("_columns", "_rows", "_values")

    def __init__(self, rows: Mapping[str, Mapping[str, float]]) -> None:
        self._rows = shared(tuple(rows))
        self._columns = shared(tuple(next(iter(rows.values()), {})))
        flat = [value for row in rows.values() for value in row.values()]
        self._values = np.array(flat, np.float64).reshape(len(rows), len(self._columns))

    def _dict(self) -> dict[str, Mapping[str, float]]:
        rows = self._values.tolist()
        return {
            name: dict(zip(self._columns, row, strict=True))
            for name, row in zip(self._rows, rows, strict=True)
        }

    def __getitem__(self, name: str) -> Mapping[str, float]:
        row = self._values[_places(self._rows)[name]].tolist()
        return dict(zip(self._columns, row, strict=True))

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def items(self) -> ItemsView[str, Mapping[str, float]]:
        return self._dict().items()

    def values(self) -> ValuesView[Mapping[str, float]]:
        return self._dict().values()

    def __repr__(self) -> str:
        return repr(self._dict())


def table(rows: Mapping[str, Mapping[str, float]]) -> Mapping[str, Mapping[str, float]]:
    """The rows as a `Table`, where all have the same names in the same order; else as they are."""
    return Table(rows) if len({tuple(row) for row in rows.values()}) == 1 else rows


def words(texts: Mapping[str, Any]) -> dict[str, str]:
    """A dict of texts, each the very object that others with the same text have."""
    return {sys.intern(name): sys.intern(str(text)) for name, text in texts.items()}
