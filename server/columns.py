"""What a caller hands over, as the arrays that an exported graph takes; or all that is wrong with it, at once."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from consortium.protocol.errors import InputError, nearest

MISSING = ("", "NA", "N/A", "NaN", "nan", "null", "NULL")
"""Texts that mean "no value", as at a site whose mapping names no others."""

Table = pd.DataFrame | Mapping[str, Any] | NDArray[Any]


def as_frame(table: Table) -> pd.DataFrame:
    """The table as a data frame."""
    if isinstance(table, pd.DataFrame):
        return table
    if not isinstance(table, Mapping):
        raise InputError(
            f"predict: this model takes columns by name, not {type(table).__name__}; give a data frame"
        )
    try:
        return pd.DataFrame(dict(table))
    except ValueError as error:
        raise InputError(f"predict: the columns do not make a table ({error})") from error


@contextmanager
def reading_arrays(path: Path) -> Iterator[None]:
    """Raises InputError where numpy cannot read the .npy or .npz file at `path` in the block."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); correct the path or its permissions"
        ) from error
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        right = "write it again with numpy.save or numpy.savez, without arrays of objects"
        raise InputError(f"{path}: is damaged, empty or no such file as its name says; {right}") from error


def tensor(one: Mapping[str, Any], table: Table) -> NDArray[Any]:
    """The one tensor of a model without columns: (n, *shape), finite."""
    name, shape = one["name"], tuple(one["shape"])
    if isinstance(table, pd.DataFrame):
        raise InputError(
            f"predict: this model takes one array (n, {_by(shape)}) called '{name}', not a table"
        )
    if isinstance(table, Mapping):
        if name not in table:
            raise InputError(f"predict: there is no '{name}'{nearest(name, map(str, table))}")
        table = table[name]
    array = np.asarray(table)
    if array.shape[1:] != shape or array.ndim != len(shape) + 1:
        raise InputError(
            f"predict: '{name}' has shape ({_by(array.shape)}); (n, {_by(shape)}) would be right"
        )
    right = np.dtype(one["dtype"])
    # Whole numbers are not taken for a share of 255, nor fractions for whole numbers.
    if array.dtype.kind not in ("iu" if right.kind in "iu" else "f"):
        raise InputError(f"predict: '{name}' holds {array.dtype}; {right} would be right")
    array = np.ascontiguousarray(array, one["dtype"])
    if not np.isfinite(array).all():
        rows = ~np.isfinite(array.reshape(len(array), -1)).all(1)
        raise InputError(f"predict: '{name}': {_rows(rows, 1)} NaN or infinite numbers")
    low, high = float(one.get("min", -math.inf)), float(one.get("max", math.inf))
    if array.size and not (low <= array.min() and array.max() <= high):
        found = f"{array.min():g} to {array.max():g}"
        raise InputError(f"predict: '{name}' holds {found}; numbers from {low:g} to {high:g} would be right")
    return array


def _by(shape: Sequence[int]) -> str:
    return ", ".join(map(str, shape))


@dataclass(frozen=True)
class Fault:
    """Rows of a column that the model cannot take, (n,), and why."""

    column: str
    what: str
    rows: NDArray[np.bool_]

    def said(self, first_row: int) -> str:
        """In words, with the numbers of the first rows."""
        return f"column '{self.column}': {_rows(self.rows, first_row)} {self.what}"


def columns(
    inputs: Sequence[Mapping[str, Any]], frame: pd.DataFrame, first_row: int
) -> dict[str, NDArray[Any]]:
    """The graph's inputs, (n, 1) each; all that is wrong is said at once."""
    arrays, faults = looked(inputs, frame)
    if faults:
        raise _unfit([fault.said(first_row) for fault in faults])
    return arrays


def looked(
    inputs: Sequence[Mapping[str, Any]], frame: pd.DataFrame
) -> tuple[dict[str, NDArray[Any]], list[Fault]]:
    """The graph's inputs, (n, 1) each, and the rows that it cannot take.

    Raises:
        InputError: columns are absent or doubled.
    """
    names = [str(name) for name in frame.columns]
    problems = [
        f"column '{one['name']}': there is no such column{nearest(one['name'], names)}"
        if one["name"] not in names
        else f"column '{one['name']}': {names.count(one['name'])} columns have this name"
        for one in inputs
        if names.count(one["name"]) != 1
    ]
    if problems:
        raise _unfit(problems)
    arrays: dict[str, NDArray[Any]] = {}
    faults: list[Fault] = []
    for one in inputs:
        cells = frame.iloc[:, names.index(one["name"])]
        values, missing, wrong = (_numbers if one["kind"] == "numeric" else _texts)(one, cells)
        if wrong.any():
            faults.append(Fault(one["name"], "not a finite number", wrong))
        if one.get("missing") == "refuse" and missing.any():
            faults.append(Fault(one["name"], "no value, which this model refuses", missing))
        arrays[one["name"]] = values.reshape(-1, 1)
    return arrays, faults


def beyond(inputs: Sequence[Mapping[str, Any]], arrays: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    """By column how many values the model clips to the declared range, or takes for none of the listed codes."""
    found = {}
    for one in inputs:
        values = arrays[one["name"]]
        if one["kind"] == "numeric":
            low, high = np.array([one["min"], one["max"]]).astype(values.dtype)
            found[one["name"]] = int(((values < low) | (values > high)).sum())
        else:
            found[one["name"]] = int((~np.isin(values.astype(str), [*map(str, one["values"]), ""])).sum())
    return {name: count for name, count in found.items() if count}


def _unfit(problems: Sequence[str]) -> InputError:
    lines = "\n".join(f"  {problem}" for problem in problems)
    return InputError(
        f"predict: the table does not fit the model\n{lines}\nSee what it takes with: consortium model show"
    )


Cells = tuple[NDArray[Any], NDArray[np.bool_], NDArray[np.bool_]]
"""Values as the graph takes them, which are missing, which are wrong."""


def _numbers(one: Mapping[str, Any], cells: pd.Series[Any]) -> Cells:
    if pd.api.types.is_numeric_dtype(cells.dtype) and not pd.api.types.is_complex_dtype(cells.dtype):
        numbers = cells.to_numpy(np.float64, na_value=np.nan)
        missing = np.isnan(numbers)
    else:
        text = cells.astype(str).str.strip()
        missing = cells.isna().to_numpy(bool) | text.isin(MISSING).to_numpy(bool)
        numbers = pd.to_numeric(text.mask(missing), errors="coerce").to_numpy(np.float64)
    # A number beyond the dtype's range becomes infinite, and is then clipped as any other.
    with np.errstate(over="ignore"):
        return numbers.astype(one["dtype"]), missing, ~missing & ~np.isfinite(numbers)


def _texts(one: Mapping[str, Any], cells: pd.Series[Any]) -> Cells:
    """Codes as the study lists them: "1.0" and 1 are "1", blanks around are gone; missing is the empty text."""
    listed = {str(value): str(value) for value in one["values"]}
    by_number: dict[float | None, str] = {}
    by_number |= {number: text for text in listed if (number := _number(text)) is not None}
    place, uniques = pd.factorize(cells)
    texts = [_text(value) for value in uniques]
    found = ["" if t in MISSING else listed.get(t) or by_number.get(_number(t), t) for t in texts]
    values = np.array([*found, ""], object)[place]  # place -1, a cell without a value, is the last
    return values, values == "", np.zeros(len(values), bool)


def _text(value: object) -> str:
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value).strip()


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _rows(wrong: Iterable[Any], first: int) -> str:
    """How many rows are meant, and the numbers of the first five: "2 rows (3, 7) have"."""
    numbers = (np.flatnonzero(np.asarray(wrong)) + first).tolist()
    some = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
    return f"{len(numbers)} row{'' if len(numbers) == 1 else 's'} ({some}):"
