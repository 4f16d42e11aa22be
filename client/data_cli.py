"""The commands `consortium client data ...`: the data that this site has registered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from consortium.client.options import Folder, Json, home_in
from consortium.protocol.cli import group

data = group()

Name = Annotated[str, typer.Argument(help="The data set's name: small letters, digits, - and _.")]


@data.callback()
def _data() -> None:
    """Say where this site's data lie. Data and mapping stay here; the policy says what may run over them.

    Example: consortium client data add patients --source patients.csv --map mapping.toml --dir site
    """


@data.command()
def add(
    name: Name,
    source: Annotated[
        str, typer.Option("--source", help="A file or folder; sql where the mapping has a query.")
    ],
    folder: Folder,
    mapping: Annotated[Path | None, typer.Option("--map", help="The mapping (TOML); it is copied.")] = None,
) -> None:
    """Register a data set, with its mapping.

    Example: consortium client data add patients --source patients.csv --map mapping.toml --dir site
    """
    from consortium.client.audit import noted
    from consortium.client.datasets import Datasets

    home = home_in(folder)
    home.config  # noqa: B018 - refuses a folder that is no client's
    made = Datasets(home).add(name, source, mapping)
    noted(home, "data added", {"data": name, **made.digests()})
    typer.echo(f"data {name}: registered")
    typer.echo(f"\nNext: consortium client data check {name} --dir {folder}")
    typer.echo(f'      allow studies over it by data = "{name}" in {home.policy_file}')


@data.command("list")
def list_(folder: Folder, as_json: Json = False) -> None:
    """List the registered data sets.

    Example: consortium client data list --dir site
    """
    from consortium.client.datasets import Datasets
    from consortium.client.exclusions import read

    found: list[dict[str, Any]] = [
        {
            "name": one.name,
            "source": "sql" if one.source is None else str(one.source),
            "excluded": len(read(one.folder).digests),
        }
        for one in Datasets(home_in(folder)).all()
    ]
    if as_json:
        typer.echo(json.dumps(found))
        return
    for one in found:
        excluded = f"  ({one['excluded']} ids excluded)" if one["excluded"] else ""
        typer.echo(f"{one['name']:20} {one['source']}{excluded}")
    if not found:
        typer.echo(f"none; to add one: consortium client data add NAME --source FILE --dir {folder}")


@data.command()
def remove(name: Name, folder: Folder) -> None:
    """Take a data set out of the registry. Its source is untouched; its holdout key stays, for when it comes back.

    Example: consortium client data remove patients --dir site
    """
    from consortium.client.audit import noted
    from consortium.client.datasets import Datasets

    home = home_in(folder)
    Datasets(home).remove(name)
    noted(home, "data removed", {"data": name})
    typer.echo(
        f"data {name}: removed; its holdout key stays, so that held-out rows stay held out if it is added again"
    )


@data.command()
def exclude(
    name: Name,
    ids: Annotated[Path, typer.Option("--ids", metavar="FILE", help="A text file with an id a line.")],
    folder: Folder,
    column: Annotated[
        str, typer.Option(help="The table's own column of the ids; needed for the first list.")
    ] = "",
    undo: Annotated[bool, typer.Option("--undo", help="Take these ids off the list again.")] = False,
) -> None:
    """Leave persons or records out of every run that begins from now on: training, statistics and holdout.

    The ids are kept as keyed digests and never leave the site. Runs under way keep the rows that they began with; what
    was learned before stays learned: see `consortium model affected-by` and `consortium study rerun`.

    Example: consortium client data exclude patients --column patient_id --ids withdrawn.txt --dir site
    """
    from consortium.client import exclusions
    from consortium.client.audit import noted
    from consortium.client.data_check import check_exclusions
    from consortium.client.datasets import Datasets

    home = home_in(folder)
    found = Datasets(home).get(name)
    given = exclusions.ids_in(ids)
    if not undo:
        check_exclusions(found, home.config.site, column or exclusions.read(found.folder).column)
    listed, changed = exclusions.change(found.folder, column, given, undo=undo)
    about = {"data": name, "ids": changed, "undone": undo, "excluded": len(listed.digests)}
    noted(home, "data excluded", about)
    what = "taken off the list" if undo else "new on the list"
    typer.echo(f"data {name}: {changed} ids {what}, {len(listed.digests)} are excluded, from the next run on")
    typer.echo(f"{ids} is not needed any more: delete it")
    typer.echo(f"\nNext: consortium client data check {name} --dir {folder}")


@data.command()
def check(
    name: Name,
    folder: Folder,
    study: Annotated[
        Path | None, typer.Option("--study", help="Check that this study can use the data.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Read a data set as a study would, and say everything that is wrong with it or its mapping.

    Example: consortium client data check patients --study study.toml --dir site
    """
    from consortium.client.data_check import check as check_data
    from consortium.client.data_check import study_in
    from consortium.client.datasets import Datasets

    home = home_in(folder)
    found = check_data(Datasets(home).get(name), home.config.site, study_in(study), home.spool)
    if as_json:
        typer.echo(json.dumps(found))
        return
    if found["excluded_ids"]:
        typer.echo(
            f"data {name}: {found['excluded_ids']} ids are excluded, and {found['excluded_rows']} rows are theirs"
        )
    if "rows" in found:
        typer.echo(f"data {name}: {found['rows']} rows can be used by study {found['study']}")
    elif "columns" in found:
        typer.echo(
            f"data {name}: can be read, {found['columns']} columns, and has every column of its mapping"
        )
    else:
        typer.echo(f"data {name}: is there; give --study to read it as a study would")
