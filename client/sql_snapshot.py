"""A query's result, written to a Parquet file: the one program at a site that sees the database's password.

    python -m consortium.client.sql_snapshot < REQUEST

The request is a JSON object: `site`, `mapping` (a document with sql and url under [source]), `path` of the file, `key`
(hex), what that is encrypted under, or "", and `excluded` (`client/exclusions.py`), whose rows are not written and
whose numbers go to stdout, as a JSON list. The password is where the mapping says, in the environment or a file; it is
in no argument and in nothing that is written.

Every cell is written as the text by which it would be read straight from the database (`client/columns.py`), so a site
learns the same, bit for bit, from the snapshot.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from consortium.client.columns import text_of
from consortium.client.copy_without import key_of, place
from consortium.client.exclusions import Exclusions
from consortium.client.mapping import parse
from consortium.client.sealed_copy import writing
from consortium.client.tables import queried
from consortium.protocol.errors import ConsortiumError, InputError
from consortium.protocol.lifeline import end_with
from consortium.protocol.sealed import DataKey

CHUNK = 20_000
"""Rows that are in memory at once."""


def main() -> int:
    """Write one snapshot; returns the exit code, with the reason on stderr."""
    try:
        request = json.load(sys.stdin)
        end_with(request["parent"])
        excluded = Exclusions.parse(request["excluded"])
        gaps = write(request["site"], request["mapping"], Path(request["path"]), excluded, key_of(request))
    except ConsortiumError as error:
        print("\n".join([str(error), *getattr(error, "__notes__", ())]), file=sys.stderr)
        return error.exit_code
    except Exception as error:  # noqa: BLE001 - a driver may raise anything, and its text may hold a record
        print(f"the snapshot could not be written ({type(error).__name__})", file=sys.stderr)
        return 1
    print(json.dumps(gaps))
    return 0


def write(
    site: str, mapping: dict[str, Any], path: Path, excluded: Exclusions, key: DataKey | None = None
) -> list[int]:
    """Run the mapping's query and write its result to `path`, mode 0400, without the rows that are excluded; their
    numbers, from 0. key: what it is encrypted under.

    Raises:
        InputError: the mapping or the database is not in order, or a cell is a list or the like.
    """
    where, gaps = f"site '{site}'", list[int]()
    with queried(where, parse(mapping, f"{where}, mapping").source) as result:
        names = [str(name) for name in result.keys()]  # noqa: SIM118 - it is no mapping
        at = place(f"{where}, source.sql", names, excluded.column) if excluded.digests else None
        schema = pa.schema([(name, pa.string()) for name in names])
        with writing(path, key) as file, pq.ParquetWriter(file, schema) as writer:
            for table in _tables(result, schema, at, excluded, gaps):
                writer.write_table(table)
    return gaps


def _tables(
    result: Any, schema: pa.Schema, at: int | None, excluded: Exclusions, gaps: list[int]
) -> Iterator[pa.Table]:
    """The result in parts, without the excluded rows, whose numbers are added to `gaps`. at: where their column is."""
    seen = 0
    while rows := result.fetchmany(CHUNK):
        if at is not None:
            out = {
                i for i, row in enumerate(rows) if not pd.isna(row[at]) and excluded.covers(text_of(row[at]))
            }
            gaps += [seen + i for i in sorted(out)]
            seen += len(rows)
            rows = [row for i, row in enumerate(rows) if i not in out]
        if not rows:
            continue
        columns: Sequence[Sequence[Any]] = list(zip(*rows, strict=True))
        arrays = [
            pa.array([_text(cell, name) for cell in column], pa.string())
            for column, name in zip(columns, schema.names, strict=True)
        ]
        yield pa.Table.from_arrays(arrays, schema=schema)


def _text(cell: Any, name: str) -> str | None:
    if isinstance(cell, list | tuple | dict | set):
        raise InputError(
            f"column '{name}' of the query holds lists or other nested cells; give it single values"
        )
    return None if pd.isna(cell) else text_of(cell)


if __name__ == "__main__":
    raise SystemExit(main())
