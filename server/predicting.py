"""Predictions for a file of rows, a part at a time: memory does not grow with it, and what is written is whole."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from consortium.protocol.errors import InputError
from consortium.server.columns import beyond, looked, reading_arrays

if TYPE_CHECKING:
    from consortium.server.model import Model

CHUNK = 50_000
"""Rows of a table that are in memory at once."""
TENSORS = 1024
"""Rows of an array that are in memory at once."""
SHOWN = 20
"""Problems that are told; all rows are counted."""


@dataclass(frozen=True)
class Report:
    """What became of a file. problems: why rows have no prediction, the first few. beyond: see `columns.beyond`."""

    rows: int
    bad_rows: int
    problems: tuple[str, ...]
    beyond: Mapping[str, int]


def predict_file(model: Model, source: Path, out: Path, strict: bool) -> Report:
    """Predict for every row of `source`, in order, into `out`, which is whole or not there.

    source: CSV, TSV or Parquet; .npy or .npz for a model of one tensor. out: Parquet where its name says so, else CSV.
    A row that the model cannot take gets empty cells, or with `strict` ends it all.

    Raises:
        InputError: the file is not as its name says, lacks columns, cannot be read or written; or `strict` refuses it.
    """
    inputs = model.contract["inputs"]
    tensor = inputs[0]["kind"] == "tensor"
    return predict_rows(
        model, _tensors(inputs[0], source) if tensor else _tables(source), str(source), out, strict
    )


def predict_query(model: Model, query: Query, out: Path, strict: bool) -> Report:
    """As `predict_file`, for every row of a query's result, in its order. Cells come out as the texts that they are.

    Raises:
        InputError: as `predict_file`; or the database cannot be reached, refuses, or the URL holds a password.
    """
    if model.contract["inputs"][0]["kind"] == "tensor":
        raise InputError("--sql: this model takes one array; give an .npy or .npz file (--in)")
    return predict_rows(model, _queried(query), "the query", out, strict)


@dataclass(frozen=True)
class Query:
    """sql: the query. url: of the database, or env:NAME or file:PATH of it. password: env:NAME or file:PATH."""

    sql: str
    url: str
    password: str | None = None


def _queried(query: Query) -> Generator[pd.DataFrame, None, None]:
    """The query's result in chunks of texts, as a CSV of it would hold them; one empty chunk where it has no rows."""
    from consortium.protocol import database

    url = database.url_of(query.url, query.password, ("--url", "--password"))
    with database.queried(url, query.sql, ("--sql", "--url"), part=CHUNK) as result:
        names, some = [str(name) for name in result.keys()], False  # noqa: SIM118 - it is no mapping
        while rows := result.fetchmany(CHUNK):
            some = True
            yield pd.DataFrame([[_text(cell) for cell in row] for row in rows], columns=names, dtype=object)
        if not some:
            yield pd.DataFrame(columns=names, dtype=object)


def _text(cell: Any) -> str:
    if cell is None:
        return ""
    return ("true" if cell else "false") if isinstance(cell, bool) else str(cell)


def predict_rows(
    model: Model, chunks: Generator[Any, None, None], source: str, out: Path, strict: bool
) -> Report:
    """As `predict_file`, for rows that come in chunks. source: what they are called."""
    inputs = model.contract["inputs"]
    tensor = inputs[0]["kind"] == "tensor"
    taken = {one["name"] for one in inputs}
    rows, bad_rows, problems, outside = 0, 0, [], dict[str, int]()
    try:
        with closing(chunks), _written(out) as write, _progress(source) as advance:
            for chunk in chunks:
                if tensor:
                    write(model.predict(chunk, first_row=rows + 1))
                    rows += len(chunk)
                    advance(len(chunk))
                    continue
                arrays, faults = looked(inputs, chunk)
                bad = np.zeros(len(chunk), bool)
                for fault in faults:
                    bad |= fault.rows
                    problems.append(fault.said(rows + 1))
                if strict and faults:
                    lines = "\n".join(f"  {problem}" for problem in problems)
                    raise InputError(
                        f"{source}: rows without a prediction; nothing was written (--strict)\n{lines}"
                    )
                for name, count in beyond(inputs, arrays).items():
                    outside[name] = outside.get(name, 0) + count
                others = chunk.drop(columns=[name for name in chunk if name in taken])
                write(_beside(others, _answers(model, arrays, bad)))
                rows, bad_rows = rows + len(chunk), bad_rows + int(bad.sum())
                advance(len(chunk))
    except OSError as error:
        raise InputError(
            f"{error.filename or out}: {error.strerror}; correct the path or its permissions"
        ) from error
    more = [f"and {len(problems) - SHOWN} more problems"] if len(problems) > SHOWN else []
    return Report(rows, bad_rows, (*problems[:SHOWN], *more), outside)


def _answers(model: Model, arrays: Mapping[str, NDArray[Any]], bad: NDArray[np.bool_]) -> pd.DataFrame:
    """A row a row of the chunk; NaN where it is bad."""
    if not bad.any():
        return pd.DataFrame(model.answers(arrays, len(bad)))
    good = {name: array[~bad] for name, array in arrays.items()}
    found = pd.DataFrame(model.answers(good, int((~bad).sum())), index=np.flatnonzero(~bad))
    return found.reindex(range(len(bad)))


def _beside(others: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    twice = sorted({str(name) for name in others} & {str(name) for name in found})
    if twice:
        raise InputError(
            f"the table already has columns {', '.join(twice)}; rename them, the predictions take these names"
        )
    return pd.concat([others.reset_index(drop=True), found.reset_index(drop=True)], axis=1)


@contextmanager
def _written(out: Path) -> Iterator[Any]:
    """A function that adds a frame to the file `out`, which takes its name when the block ends well."""
    partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        if out.suffix == ".parquet":
            with _parquet(partial) as write:
                yield write
        else:
            with partial.open("w", encoding="utf-8", newline="") as file:
                yield lambda frame: frame.to_csv(file, index=False, header=file.tell() == 0)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    writer: pq.ParquetWriter | None = None

    def write(frame: pd.DataFrame) -> None:
        nonlocal writer
        table = pa.Table.from_pandas(frame, schema=writer and writer.schema, preserve_index=False)
        if writer is None:
            writer = pq.ParquetWriter(path, table.schema)
        writer.write_table(table)

    try:
        yield write
    finally:
        if writer is not None:
            writer.close()


@contextmanager
def _progress(what: str) -> Iterator[Any]:
    """A function that is told how many rows are done; on a terminal they are shown."""
    if not sys.stderr.isatty():
        yield lambda rows: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    shown = TextColumn("{task.description}: {task.completed:,.0f} rows")
    with Progress(
        SpinnerColumn(), shown, TimeElapsedColumn(), console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda rows: bar.advance(task, rows)


def _tables(source: Path) -> Generator[pd.DataFrame, None, None]:
    """A table in chunks; one empty chunk where it has no rows."""
    try:
        if source.suffix == ".parquet":
            with pq.ParquetFile(source) as file:
                if file.metadata.num_rows == 0:
                    yield file.schema_arrow.empty_table().to_pandas()
                for batch in file.iter_batches(CHUNK):
                    yield batch.to_pandas()
            return
        # Text as it stands: the model says per column what is a number, and ids come out as they went in.
        separator = "\t" if ".tsv" in source.suffixes else ","
        with pd.read_csv(source, sep=separator, dtype=str, keep_default_na=False, chunksize=CHUNK) as reader:
            yield from reader
    except (pa.ArrowInvalid, pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise InputError(
            f"{source}: is not a table as its name says ({str(error).splitlines()[0]})"
        ) from error


def _tensors(one: Mapping[str, Any], source: Path) -> Generator[Any, None, None]:
    """The rows of an array file in chunks; an .npy file is mapped, an .npz file is read whole."""
    if source.suffix not in (".npy", ".npz"):
        raise InputError(f"{source}: this model takes one array; give an .npy or .npz file")
    with reading_arrays(source):
        loaded = np.load(source, allow_pickle=False, mmap_mode="r" if source.suffix == ".npy" else None)
        if source.suffix == ".npz":
            loaded = _only(one["name"], source, loaded)
    loaded = np.atleast_1d(loaded)
    for start in range(0, max(len(loaded), 1), TENSORS):
        yield loaded[start : start + TENSORS]


def _only(wanted: str, source: Path, archive: Any) -> NDArray[Any]:
    """The array of that name in an .npz file, or the only one there."""
    names = list(archive.files)
    if wanted not in names and len(names) != 1:
        raise InputError(f"{source}: holds {', '.join(names)}; one array called '{wanted}' is needed")
    found: NDArray[Any] = archive[wanted if wanted in names else names[0]]
    return found
