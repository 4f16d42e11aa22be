"""A site's table, in the study's columns: from CSV, Parquet or SQL, through the site's mapping.

Everything that is wrong with the columns is reported at once, and no message holds a cell (see `client.columns`).
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray
from sqlalchemy.engine import CursorResult

from consortium.client.columns import Column, called, convert
from consortium.client.mapping import SiteMapping, SourceMap, count, database, parse
from consortium.client.skipping import CELLS, Fault, Skipped, counted, skippable
from consortium.client.task import Source
from consortium.protocol.database import queried as rows_of
from consortium.protocol.errors import InputError, nearest

T = TypeVar("T")
_log = logging.getLogger(__name__)
CSV = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
PARQUET = (".parquet", ".pq")
_KINDS = f"{', '.join(CSV)} or {', '.join(PARQUET)}"


@dataclass(frozen=True)
class _Table:
    """A table not yet read: what it is called in errors, its columns' names, and what loads some of them.

    malformed: numbers, from 0, of the rows that `load` skipped as they have more or fewer cells than the header.
    """

    where: str
    names: Sequence[str]
    load: Callable[[Sequence[str]], pd.DataFrame]
    malformed: Sequence[int] = ()


def read(source: Source, columns: Sequence[Column]) -> pd.DataFrame:
    """The site's table in these columns, in this order; rows as in the file. Raises as `read_some`."""
    return read_some(source, columns, 0.0)[0]


def read_some(source: Source, columns: Sequence[Column], tolerance: float) -> tuple[pd.DataFrame, Skipped]:
    """The site's table in these columns, in this order, without the rows that cannot be read, at most the share
    `tolerance` (0 to 1), and how many these are. Rows are as in the file; the index has their numbers there, from 0.

    Raises:
        InputError: the mapping is wrong; the file is missing, empty, unreadable or of an unknown kind; the database
            refuses; or every mistake in columns and cells.
    """
    mapping = parse(source.mapping, f"site '{source.site}', mapping")
    table = _open(source, mapping, lenient=tolerance > 0)
    problems = [Fault(text) for text in _absent(columns, mapping, table.names)]
    present = [column for column in columns if list(table.names).count(mapping.local(column.name)) == 1]
    frame = table.load(list(dict.fromkeys(mapping.local(column.name) for column in present)))
    if present and not len(frame):
        problems.append(Fault("the table has no rows"))
    done = {}
    for column in present:
        cells = frame[mapping.local(column.name)]
        done[column.name], found = convert(column, cells, mapping, table.where, every=tolerance > 0)
        problems += found
    rows, malformed = len(frame), len(table.malformed)
    bad = skippable(problems, rows, tolerance, malformed)
    if bad is None or (malformed and not present):
        raise _refused(table.where, problems, tolerance, rows, malformed)
    skipped = counted(problems, rows, {CELLS: malformed} if malformed else {})
    places = _places(rows + malformed, source.gaps)
    if not skipped.count:
        return pd.DataFrame(done, index=places if source.gaps else None), skipped
    _log.warning("%s: %s", table.where, skipped)
    numbers = places[np.setdiff1d(np.arange(rows + malformed), table.malformed)]
    return pd.DataFrame(done, index=numbers)[~bad], skipped


def _refused(
    where: str, problems: Sequence[Fault], tolerance: float, rows: int, malformed: int
) -> InputError:
    found = [problem.text for problem in problems]
    if malformed:
        found.insert(0, f"{malformed} of {count(rows + malformed, 'row')} are {CELLS}")
    lines = "\n".join(f"  {problem}" for problem in found)
    right = "Correct the table, or the site's mapping (docs/data.md), and try again"
    most = f"; the study tolerates {tolerance:.2%} of the rows" if tolerance else ""
    return InputError(f"{where}: {count(len(found), 'mistake')}{most}\n{lines}\n{right}")


def names(source: Source) -> list[str]:
    """The names of the columns of a site's table, as they are there.

    Raises:
        InputError: as `read`, where the table cannot be opened.
    """
    return list(_open(source, parse(source.mapping, f"site '{source.site}', mapping")).names)


def _open(source: Source, mapping: SiteMapping, *, lenient: bool = False) -> _Table:
    """lenient: rows of a file that have more or fewer cells than its header are skipped."""
    where = f"site '{source.site}'"
    if source.table is not None:
        if not isinstance(source.table, pd.DataFrame):
            raise InputError(
                f"{where}: the table in memory is a {type(source.table).__name__}; give a DataFrame"
            )
        frame: pd.DataFrame = source.table
        return _Table(
            f"{where}, table in memory", [str(n) for n in frame.columns], lambda names: frame[list(names)]
        )
    if mapping.source.sql is not None:
        if source.path is not None:
            raise InputError(f"{where}: has the file {source.path} and sql in its mapping; keep one of them")
        return _sql(where, mapping.source)
    if source.path is None:
        raise InputError(f"{where}: has no data; give a file, or sql under [source] in its mapping")
    return _file(f"{where}, {source.path}", source.path, mapping.source, lenient)


def _file(where: str, path: Path, how: SourceMap, lenient: bool) -> _Table:
    if not path.is_file():
        raise InputError(f"{where}: there is no such file; give the path of a {_KINDS} file")
    kind = path.name.lower()
    if not kind.endswith(CSV + PARQUET):
        raise InputError(f"{where}: this kind of file is not known; give a {_KINDS} file")
    if path.stat().st_size == 0:
        raise InputError(f"{where}: the file is empty; give one with names of columns and rows")
    return _parquet(where, path) if kind.endswith(PARQUET) else _csv(where, path, how, lenient)


def _parquet(where: str, path: Path) -> _Table:
    def load(names: Sequence[str]) -> pd.DataFrame:
        table = _reading(where, lambda: pa.parquet.read_table(path, columns=list(names)))
        frame: pd.DataFrame = table.to_pandas(ignore_metadata=True)
        return frame

    names: list[str] = _reading(where, lambda: pa.parquet.read_schema(path).names)
    return _Table(where, names, load)


def _csv(where: str, path: Path, how: SourceMap, lenient: bool) -> _Table:
    malformed: list[int] = []

    def skip(row: Any) -> str:
        malformed.append(row.number - 2)  # the header is its row 1
        return "skip"

    separator = separator_of(path, how)
    options = {
        # One thread, as only then a wrong row is known by its number.
        "read_options": pa.csv.ReadOptions(encoding=how.encoding, use_threads=False),
        "parse_options": pa.csv.ParseOptions(
            delimiter=separator, newlines_in_values=True, invalid_row_handler=skip if lenient else None
        ),
    }

    def header() -> list[str]:
        with pa.csv.open_csv(path, **options) as reader:
            return list(reader.schema.names)

    def load(some: Sequence[str]) -> pd.DataFrame:
        malformed.clear()  # what the header's reader found, which reads a block
        # All cells are read as text: guessing types would turn the code 007 into 7.
        convert_options = pa.csv.ConvertOptions(
            include_columns=list(some), column_types=dict.fromkeys(some, pa.string())
        )
        table = _reading(where, lambda: pa.csv.read_csv(path, convert_options=convert_options, **options))
        frame: pd.DataFrame = table.to_pandas()
        return frame

    wide = how.encoding.lower().replace("-", "").replace("_", "").startswith(("utf16", "utf32"))
    if not wide and b"\0" in _reading(where, lambda: _beginning(path)):
        raise InputError(
            f"{where}: holds bytes that no text has; save a spreadsheet as CSV, or set encoding under [source] in the "
            "site's mapping"
        )
    names = _reading(where, header)
    if len(names) == 1 and any(mark in names[0] for mark in ";\t,|"):
        raise InputError(
            f"{where}: the header is one long name; set separator under [source] in the site's mapping"
        )
    return _Table(where, names, load, malformed)


def separator_of(path: Path, how: SourceMap) -> str:
    """What stands between two cells of a CSV or TSV file."""
    return how.separator or ("\t" if ".tsv" in path.name.lower() else ",")


def _places(rows: int, gaps: Sequence[int]) -> NDArray[np.int64]:
    """The numbers (rows,) in the site's own table of the rows of a copy, from which the rows `gaps` were taken out."""
    return np.setdiff1d(np.arange(rows + len(gaps)), gaps)


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return b"" if path.name.lower().endswith(".gz") else file.read(4096)


def _reading(where: str, action: Callable[[], T]) -> T:
    """What `action` reads. A reader's own message may hold a record; only what is harmless is taken from it."""
    try:
        return action()
    except OSError as error:
        if error.strerror:
            raise InputError(
                f"{where}: cannot be read ({error.strerror}); correct its permissions"
            ) from error
        raise InputError(f"{where}: is damaged, or not what its name says; write the file again") from error
    except (LookupError, UnicodeError) as error:
        raise InputError(f"{where}: {_ENCODING}") from error
    except pa.ArrowException as error:
        row = re.search(r"Row #(\d+): Expected \d+ columns, got \d+", str(error))
        if row is not None:
            wrong = f"row {int(row[1]) - 1} has more or fewer cells than the header"
            raise InputError(
                f"{where}: {wrong}; correct it, or quote cells that hold the separator"
            ) from error
        if "UTF8" in str(error):
            raise InputError(f"{where}: {_ENCODING}") from error
        raise InputError(f"{where}: is damaged, or not what its name says; write the file again") from error


_ENCODING = (
    'is not text in its encoding; set encoding under [source] in the site\'s mapping, such as "latin-1"'
)


def _sql(site: str, source: SourceMap) -> _Table:
    with queried(site, source) as result:
        frame = pd.DataFrame(result.fetchall(), columns=list(result.keys()), dtype=object)
    return _Table(
        f"{site}, source.sql", [str(name) for name in frame.columns], lambda names: frame[list(names)]
    )


@contextmanager
def queried(site: str, source: SourceMap) -> Iterator[CursorResult[Any]]:
    """The result of the mapping's query, which is read within the block. site: names the site in errors.

    Raises:
        InputError: the database cannot be reached, or refuses; what it said is a note of the error.
    """
    try:
        url = database(source)
    except InputError as error:
        raise InputError(f"{site}, {error}") from error
    with rows_of(url, source.sql or "", (f"{site}, source.sql", f"{site}, source.url")) as result:
        yield result


def _absent(columns: Sequence[Column], mapping: SiteMapping, names: Sequence[str]) -> list[str]:
    """Columns that the study asks for and the table has not, or twice."""
    times = Counter(names)
    headless = any(re.fullmatch(r"\s*[-+]?[\d.,]*\d([eE][-+]?\d+)?\s*", name) for name in names)
    problems = []
    for column in columns:
        local = mapping.local(column.name)
        if times[local] > 1:
            problems.append(
                f"{called(column, mapping)}: {times[local]} columns have this name; keep one of them"
            )
        elif not times[local]:
            # Without a header line the names are the first record's cells, which no message may hold.
            hint = "" if headless else nearest(local, names) or nearest(column.name, mapping.columns)
            right = f"say under [columns.{column.name}] in the mapping which it is"
            problems.append(f"{called(column, mapping)}: there is no such column{hint or ';'} {right}")
    if problems and headless:
        problems.append("some names of columns are numbers: is the header line missing?")
    return problems
