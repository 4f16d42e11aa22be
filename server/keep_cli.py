"""The commands `consortium server backup`, `restore` and `check`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from consortium.server.server_cli import Json, NewFolder, server

__all__ = ["server"]


@server.command()
def backup(
    folder: NewFolder,
    out: Annotated[Path, typer.Option("--out", help="A new file, or a folder to put one into.")],
    as_json: Json = False,
) -> None:
    """Write all that the server keeps into one file; it may run meanwhile. Keep the key file apart from it.

    Example: consortium server backup --dir fed --out /backups
    """
    from consortium.server.backup import back_up

    made = back_up(folder, out)
    if as_json:
        said = {
            "federation": made.federation,
            "file": str(made.path),
            "bytes": made.size,
            "created": int(made.created),
        }
        typer.echo(json.dumps({**said, "files": made.files, "epoch": made.epoch}))
        return
    typer.echo(f"federation {made.federation}: {made.files} files, {made.size} bytes in {made.path}")
    typer.echo("The key file or passphrase is not in it; without it nobody can restore it, you neither.")


@server.command()
def restore(
    file: Annotated[Path, typer.Argument(help="What `consortium server backup` wrote.", metavar="FILE")],
    folder: NewFolder,
    key_file: Annotated[
        Path | None, typer.Option("--key-file", help="The federation's key file. Default: DIR.key")
    ] = None,
    as_json: Json = False,
) -> None:
    """Lay out a backup as a new folder, here or on another machine. No site joins anew; each is told, signed.

    Example: consortium server restore lung.backup --dir fed --key-file fed.key
    """
    from consortium.server.backup import restore as lay_out

    made = lay_out(file, folder, key_file)
    if as_json:
        said = {"federation": made.federation, "dir": str(made.path), "created": int(made.created)}
        typer.echo(json.dumps({**said, "files": made.files, "epoch": made.epoch}))
        return
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(made.created))
    typer.echo(f"federation {made.federation}: restored as of {since} in {made.path}, epoch {made.epoch}")
    typer.echo(
        "Runs go on from their last round of then. Never start the folder of before again: sites refuse it."
    )
    typer.echo(
        "A site that joined, or renewed its certificate, after that is not on the roster. The server's log will name "
        f"it; invite it again: consortium server invite SITE --dir {made.path}"
    )
    typer.echo(f"\nNext: consortium server start --dir {made.path}")


@server.command()
def check(folder: NewFolder, as_json: Json = False) -> None:
    """Check keys, certificates, the database and every checkpoint; exit code 4 where something is damaged.

    Example: consortium server check --dir fed
    """
    from consortium.server.check import check as look

    found = look(folder)
    if as_json:
        typer.echo(json.dumps({"federation": found.federation, "ok": True, "checkpoints": found.checkpoints}))
        return
    for run, number in found.checkpoints.items():
        typer.echo(f"run {run}: round {number}, whole")
    typer.echo(
        f"federation {found.federation}: keys, database and {len(found.checkpoints)} checkpoints are whole"
    )
