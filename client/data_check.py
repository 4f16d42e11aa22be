"""`consortium client data check`: whether a data set can be read, and by a study, before any server asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from consortium.client import mapping, tables
from consortium.client.datasets import Dataset
from consortium.client.task import Source, task_of
from consortium.protocol.errors import InputError, RefusedError, nearest
from consortium.protocol.study import Study


def check(data: Dataset, site: str, study: Study | None) -> dict[str, Any]:
    """What was found: the data set's name, and `columns` of a table or `rows` in the study.

    Raises:
        InputError: every mistake, with the site's own names of columns; for the operator's eyes.
        RefusedError: the study brings code of its own, which is not run here.
    """
    source = Source(site, path=data.source, mapping=data.mapping(), key=data.key())
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
