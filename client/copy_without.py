"""A table's file copied without the rows of who is excluded: the program that makes such a copy.

    python -m consortium.client.copy_without < REQUEST

The request is a JSON object: `site`, `mapping`, `source` (a CSV or Parquet file), `path` of the copy, `key` (hex), what
that is encrypted under, or "", and `excluded` (`client/exclusions.py`). The copy is a file of the same kind, and each
of its rows is as it was: the same cells, and malformed where it was. It is read and written in parts, so memory does
not grow with the table. The numbers of the rows that were taken out go to stdout, as a JSON list.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from consortium.client.columns import text_of
from consortium.client.exclusions import Exclusions
from consortium.client.mapping import SourceMap, parse
from consortium.client.sealed_copy import writing
from consortium.client.tables import CSV, PARQUET, separator_of
from consortium.protocol.errors import ConsortiumError, InputError
from consortium.protocol.lifeline import end_with
from consortium.protocol.sealed import DataKey

ROWS = 20_000
"""Rows of a Parquet file that are in memory at once."""
csv.field_size_limit(1 << 27)


def main() -> int:
    """Make one copy; returns the exit code, with the reason on stderr."""
    try:
        request = json.load(sys.stdin)
        end_with(request["parent"])
        how = parse(request["mapping"], f"site '{request['site']}', mapping").source
        where = f"site '{request['site']}', {request['source']}"
        excluded = Exclusions.parse(request["excluded"])
        gaps = copy(where, Path(request["source"]), Path(request["path"]), how, excluded, key_of(request))
    except ConsortiumError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except Exception as error:  # noqa: BLE001 - a reader may raise anything, and its text may hold a record
        print(
            f"the copy without the excluded rows could not be made ({type(error).__name__})", file=sys.stderr
        )
        return 1
    print(json.dumps(gaps))
    return 0


def copy(
    where: str, source: Path, path: Path, how: SourceMap, excluded: Exclusions, key: DataKey | None = None
) -> list[int]:
    """Write the file `source` to the new file `path`, mode 0400, without the rows that are excluded; the numbers of
    these, from 0. how: [source] of the mapping. key: what it is encrypted under. where: names the table in errors.

    Raises:
        InputError: it is no table, cannot be read, or has not exactly one column of that name.
    """
    kind = source.name.lower()
    if not kind.endswith(CSV + PARQUET):
        raise InputError(f"{where}: {NO_TABLE}")
    with writing(path, key) as file:
        try:
            if kind.endswith(PARQUET):
                gaps = _parquet(where, source, file, excluded)
            else:
                gaps = _csv(where, source, file, separator_of(source, how), how.encoding, excluded)
        except (OSError, UnicodeError, LookupError, csv.Error, pa.ArrowException) as error:
            raise InputError(f"{where}: cannot be copied ({type(error).__name__}); is it damaged?") from error
    return gaps


def key_of(request: Mapping[str, Any]) -> DataKey | None:
    """What a copy is encrypted under, None for not."""
    return DataKey(bytes.fromhex(request["key"])) if request["key"] else None


NO_TABLE = "rows can be excluded from CSV, Parquet and SQL alone; take the records out of the source itself"


def _parquet(where: str, source: Path, file: BinaryIO, excluded: Exclusions) -> list[int]:
    gaps: list[int] = []
    with pq.ParquetFile(source) as given, pq.ParquetWriter(file, given.schema_arrow) as writer:
        place(where, given.schema_arrow.names, excluded.column)
        at = 0
        for batch in given.iter_batches(ROWS):
            cells = batch.column(batch.schema.names.index(excluded.column)).to_pylist()
            out = [i for i, cell in enumerate(cells) if _covered(cell, excluded)]
            gaps += [at + i for i in out]
            at += len(cells)
            keep = sorted(set(range(len(cells))) - set(out))
            writer.write_batch(batch.take(pa.array(keep, pa.int64())) if out else batch)
    return gaps


def _covered(cell: Any, excluded: Exclusions) -> bool:
    return cell is not None and excluded.covers(text_of(cell))


def _csv(
    where: str, source: Path, file: BinaryIO, separator: str, encoding: str, excluded: Exclusions
) -> list[int]:
    gaps: list[int] = []
    with _opened(source) as raw, io.TextIOWrapper(raw, encoding, newline="") as text:
        packed = gzip.GzipFile(fileobj=file, mode="wb", mtime=0) if _packed(source) else None
        out = io.TextIOWrapper(packed or file, encoding, newline="", write_through=True)
        writer = csv.writer(out, delimiter=separator, lineterminator="\n")
        records = (record for record in csv.reader(text, delimiter=separator) if record)
        header = next(records, [])
        at = place(where, header, excluded.column)
        writer.writerow(header)
        for number, record in enumerate(records):
            if at < len(record) and excluded.covers(text_of(record[at])):
                gaps.append(number)
            else:
                writer.writerow(record)
        out.flush()
        out.detach()
        if packed is not None:
            packed.close()
    return gaps


def _packed(source: Path) -> bool:
    return source.name.lower().endswith(".gz")


@contextmanager
def _opened(source: Path) -> Iterator[BinaryIO]:
    with source.open("rb") as raw:
        if _packed(source):
            with gzip.GzipFile(fileobj=raw) as unpacked:
                yield unpacked  # type: ignore[misc]
        else:
            yield raw


def place(where: str, names: Sequence[str], column: str) -> int:
    """Where the column of ids stands among a table's columns.

    Raises:
        InputError: it is not there once, so nobody could be left out by it.
    """
    found = [i for i, name in enumerate(names) if name.removeprefix("\ufeff") == column]
    if len(found) != 1:
        raise InputError(
            f"{where}: has {len(found) or 'no'} columns '{column}', by which persons or records are excluded; "
            "correct the table: nothing runs over it before"
        )
    return found[0]


if __name__ == "__main__":
    raise SystemExit(main())
