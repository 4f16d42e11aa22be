"""One column of a site's table, turned into the study's: missing markers, then codes, or scale and offset.

What is wrong is returned as text, never raised, so that a person reads all of it at once. A text names columns, counts
and row numbers (the first row of data is row 1), and never a cell: a site's refusal travels to the server.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from consortium.client.mapping import Cell, SiteMapping, count
from consortium.client.skipping import NO_CODE, NO_NUMBER, NO_VALUE, OUTSIDE, Fault
from consortium.protocol.errors import nearest

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Column:
    """One of the study's columns, as a task asks for it.

    values: the study's values of a categorical column, which is read as the index of its value: float64, -1 for a
        value not listed, NaN for none. Empty for a number (float64, NaN for none).
    text: it is read as text, whatever it holds (None for none).
    range: lower and upper end of a number, in the study's unit.
    closed: a value not listed, or a number outside the range, is an error.
    needed: no cell may be missing.
    """

    name: str
    values: tuple[str, ...] = ()
    text: bool = False
    range: tuple[float, float] | None = None
    closed: bool = False
    needed: bool = False


def called(column: Column, mapping: SiteMapping) -> str:
    """What a column is called in messages."""
    local = mapping.local(column.name)
    return f"column '{column.name}'" + ("" if local == column.name else f" (here '{local}')")


def convert(
    column: Column, cells: pd.Series[Any], mapping: SiteMapping, where: str, *, every: bool = False
) -> tuple[NDArray[Any], list[Fault]]:
    """The column (n,) in the study's form, and what is wrong with it; use it only where nothing is.

    where: the site and its file, for what is strange but not wrong and goes to the log. every: give every fault of
    every row, also where those that were found first may be the cause of it.
    """
    how, markers = mapping.of(column.name), mapping.markers(column.name)
    problems: list[Fault] = []
    if (column.values or column.text) and (how.scale != 1 or how.offset != 0):
        problems.append(Fault("is not a number in this study; take scale and offset out of the mapping"))
    if column.values or column.text or how.codes is not None:
        result, found = _coded(column, cells, how.codes, markers, every)
    else:
        result, found = _numbers(cells, markers, mapping.source.decimal)
        result = result * how.scale + how.offset
    problems += found
    if every or not problems:
        problems += _limits(column, f"{where}: {called(column, mapping)}", result)
    name = called(column, mapping)
    return result, [replace(problem, text=f"{name}: {problem.text}") for problem in problems]


def _limits(column: Column, name: str, result: NDArray[Any]) -> list[Fault]:
    """Cells without a value where the study needs one, and numbers outside the range."""
    problems = []
    none = pd.isna(result)
    if column.needed and none.any():
        text = f"{_rows(none)} without a value, which this study refuses; leave such rows out"
        problems.append(Fault(text, np.asarray(none), NO_VALUE))
    elif len(none) and none.all():
        _log.warning("%s: no row has a value", name)
    if column.range is not None:
        low, high = column.range
        outside = (result < low) | (result > high)
        if column.closed and outside.any():
            right = f"outside the study's range [{low:g}, {high:g}]; check the unit, or leave such rows out"
            problems.append(Fault(f"{_rows(outside)} {right}", outside, OUTSIDE))
        elif 2 * outside.sum() > (~none).sum():
            _log.warning(
                "%s: most values lie outside the study's range [%g, %g]; check the unit", name, low, high
            )
    if column.values and len(result) and (result == -1).all():
        _log.warning("%s: no value is one of the study's; the mapping may lack codes", name)
    return problems


def _rows(wrong: NDArray[np.bool_]) -> str:
    """How many rows are wrong, and the numbers of the first five."""
    numbers = (np.flatnonzero(wrong) + 1).tolist()
    some = ", ".join(map(str, numbers[:5])) + (" ..." if len(numbers) > 5 else "")
    one = len(numbers) == 1
    return f"{len(numbers)} of {count(len(wrong), 'row')} ({'row' if one else 'rows'} {some}) {'is' if one else 'are'}"


def _numbers(
    cells: pd.Series[Any], markers: Sequence[Cell], decimal: str
) -> tuple[NDArray[np.float64], list[Fault]]:
    """Numbers, NaN for none, and which cells are neither a finite number nor missing."""
    if pd.api.types.is_numeric_dtype(cells.dtype):
        numbers = cells.to_numpy(np.float64, na_value=np.nan)
        empty = np.isnan(numbers)
    else:
        text = cells.astype(str)
        if decimal == ",":
            text = text.str.replace(",", ".", regex=False)
        numbers = pd.to_numeric(text, errors="coerce").to_numpy(np.float64, copy=True)
        rest = np.flatnonzero(np.isnan(numbers))  # only these few are looked at as text
        named = {str(marker) for marker in markers} | {""}
        empty = np.zeros(len(cells), bool)
        empty[rest] = cells.iloc[rest].isna() | cells.iloc[rest].astype(str).str.strip().isin(named)
    empty |= np.isin(numbers, [n for marker in markers if (n := _number(text_of(marker))) is not None])
    bad = ~empty & ~np.isfinite(numbers)
    right = "not a finite number; correct them, or say what they mean with codes or missing in the mapping"
    faults = [Fault(f"{_rows(bad)} {right}", bad, NO_NUMBER)] if bad.any() else []
    return np.where(empty, np.nan, numbers), faults


def _coded(
    column: Column,
    cells: pd.Series[Any],
    codes: Mapping[str, Cell] | None,
    markers: Sequence[Cell],
    every: bool,
) -> tuple[NDArray[Any], list[Fault]]:
    """The column by its distinct cells: as index of a value, as text, or as number by the mapping's codes."""
    try:
        row_of, uniques = pd.factorize(cells)
    except TypeError:
        return np.full(len(cells), np.nan), [
            Fault("holds lists or other nested cells; give it single values")
        ]
    known = _Lookup({value: i for i, value in enumerate(column.values)})
    problems = [Fault(text) for text in _leading_nowhere(column, codes, known)]
    texts, uncoded = _canonical([text_of(value) for value in uniques], codes, markers)
    if uncoded[row_of].any():
        text = f"{_rows(uncoded[row_of])} coded in a way that the mapping's codes do not list; add it there"
        problems.append(Fault(text, uncoded[row_of], NO_CODE))
    if column.text:
        return np.array([*texts, None], object)[row_of], problems
    found = [math.nan if t is None else known.find(t, -1.0) if column.values else _number(t) for t in texts]
    strange = np.array([*(f is None or (column.closed and f == -1) for f in found), False])
    if (every or not problems) and strange[row_of].any():
        right = f"one of {_some(column.values)}" if column.values else "a number"
        text = f"{_rows(strange[row_of])} not a value that the study knows; by codes in the mapping: {right}"
        problems.append(Fault(text, strange[row_of], NO_CODE))
    return np.array([*found, math.nan], np.float64)[row_of], problems


def _leading_nowhere(column: Column, codes: Mapping[str, Cell] | None, known: _Lookup) -> list[str]:
    """Codes of the mapping whose value the study does not list; these are the mapping's words, not cells."""
    if codes is None or not column.values:
        return []
    strange = [v for v in dict.fromkeys(map(text_of, codes.values())) if v and known.find(v, None) is None]
    right = f"one of {_some(column.values)}" + ("" if column.closed else ', or "" for none of these')
    return [
        f"codes lead to '{value}', which the study does not list{nearest(value, column.values) or ';'} {right}"
        for value in strange
    ]


def _canonical(
    cells: Sequence[str], codes: Mapping[str, Cell] | None, markers: Sequence[Cell]
) -> tuple[list[str | None], NDArray[np.bool_]]:
    """Each distinct cell as the study's text, None for none; and which have no code (one more: a cell of no value)."""
    missing = _Lookup({text_of(marker): True for marker in markers} | {"": True})
    table = None if codes is None else _Lookup({local: text_of(value) for local, value in codes.items()})
    texts: list[str | None] = []
    for cell in cells:
        coded = table.find(cell, None) if table is not None else cell
        # A code wins over the common markers: NA may well be Namibia.
        if missing.find(cell, False) and (table is None or coded is None):
            texts.append(None)
        else:
            texts.append(coded)
    uncoded = [t is None and not missing.find(c, False) for t, c in zip(texts, cells, strict=True)]
    return texts, np.array([*uncoded, False])


class _Lookup:
    """Values by text, or by number where both are numbers: "1.0" finds "1"."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.exact = options
        self.numbers = {number: v for text, v in options.items() if (number := _number(text)) is not None}

    def find(self, text: str, default: Any) -> Any:
        """The value, or `default`."""
        if text in self.exact:
            return self.exact[text]
        number = _number(text)
        return default if number is None else self.numbers.get(number, default)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def text_of(value: Any) -> str:
    """One text for one meaning: 1.0 is "1", booleans are "true" and "false", blanks around are gone."""
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value).strip()


def _some(values: Sequence[str]) -> str:
    return ", ".join(values[:8]) + (" ..." if len(values) > 8 else "")
