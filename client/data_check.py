"""`consortium client data check`: whether a data set can be read, and by a study, before any server asks."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from consortium.client import exclusions, mapping, tables
from consortium.client.copy_without import NO_TABLE, place
from consortium.client.datasets import Dataset
from consortium.client.snapshot import Snapshots
from consortium.client.task import Source, task_of
from consortium.protocol.errors import InputError, RefusedError, nearest
from consortium.protocol.files import private_folder
from consortium.protocol.study import Study


def check(data: Dataset, site: str, study: Study | None, spool: Path) -> dict[str, Any]:
    """What was found: the data set's name, how many ids and rows are excluded, and `columns` of a table or `rows` in
    the study. spool: where a copy without the excluded rows is made, and removed.

    Raises:
        InputError: every mistake, with the site's own names of columns; for the operator's eyes.
        RefusedError: the study brings code of its own, which is not run here.
    """
    listed = exclusions.read(data.folder)
    counts = {"excluded_ids": len(listed.digests), "excluded_rows": 0}
    if not listed.digests:
        source = Source(site, path=data.source, mapping=data.mapping(), key=data.key())
        return _found(data, source, study) | counts
    private_folder(spool)
    with TemporaryDirectory(dir=spool) as folder:
        snapshots = Snapshots(site, Path(folder))
        copy = snapshots.lay("check", data)
        source = Source(site, path=copy.path, mapping=copy.mapping, key=copy.key, gaps=copy.gaps)
        return _found(data, source, study) | counts | {"excluded_rows": len(copy.gaps)}


def check_exclusions(data: Dataset, site: str, column: str) -> None:
    """Whether persons or records of a data set can be excluded by that column of its table.

    Raises:
        InputError: it is no table, or has no such column.
    """
    if data.source is not None and not data.source.name.lower().endswith(tables.CSV + tables.PARQUET):
        raise InputError(f"data '{data.name}': {NO_TABLE}")
    if column:
        place(
            f"data '{data.name}'", tables.names(Source(site, data.source, data.mapping(), data.key())), column
        )


def _found(data: Dataset, source: Source, study: Study | None) -> dict[str, Any]:
    if study is not None:
        if not study.built_in:
            raise RefusedError(f"study '{study.name}': brings code of its own, which is not run here")
        return {"data": data.name, "study": study.name, "rows": len(task_of(study).data(source).inputs)}
    if data.source is not None and not data.source.name.lower().endswith(tables.CSV + tables.PARQUET):
        if not data.source.exists():
            raise InputError(f"data '{data.name}': there is no {data.source} any more; put it back")
        return {"data": data.name}
    names = tables.names(source)
    own = mapping.parse(source.mapping)
    wrong = [
        f"columns.{name}: there is no column '{own.local(name)}' in the table{nearest(own.local(name), names) or ''}"
        for name in own.columns
        if own.local(name) not in names
    ]
    if wrong:
        lines = "\n".join(f"  {problem}" for problem in wrong)
        raise InputError(
            f"data '{data.name}': {mapping.count(len(wrong), 'mistake')} in its mapping\n{lines}\nCorrect the mapping, "
            f"then: consortium client data remove {data.name}, and add it again"
        )
    return {"data": data.name, "columns": len(names)}


def study_in(path: Path | None) -> Study | None:
    """The study in a file, None for none."""
    return None if path is None else Study.load(path)
