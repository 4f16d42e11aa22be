"""The commands `consortium client audit ...`: what happened at this site."""

from __future__ import annotations

import json
import time

import typer

from consortium.client.options import Folder, Json, home_in
from consortium.protocol.audit_options import Kind, Limit, Lines, Out, Run, Since

audit = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@audit.callback()
def _audit() -> None:
    """Show, check and hand over the log of what happened here: who asked what, what was approved, what left.

    Example: consortium client audit show --since 7d --dir site
    """


@audit.command()
def show(
    folder: Folder,
    since: Since = "",
    run: Run = "",
    kind: Kind = "",
    limit: Limit = 0,
    as_json: Lines = False,
) -> None:
    """Show entries, the oldest first.

    Example: consortium client audit show --run breast-cancer.1 --dir site
    """
    from consortium.client.audit import log_name
    from consortium.protocol import audit_view, chain
    from consortium.protocol.audit import segments

    home = home_in(folder)
    chosen = audit_view.Filter(audit_view.since(since, time.time()), run, kind, limit)
    name = log_name(home, home.identity(home.lock()).public_key())
    for entry in chosen.of(chain.entries(segments(home.audit), name)):
        typer.echo(json.dumps(audit_view.document(entry)) if as_json else audit_view.line(entry))


@audit.command()
def verify(folder: Folder, as_json: Json = False) -> None:
    """Check every entry of this site's log. Exit code 4 where one is not as it was written, or is missing.

    Example: consortium client audit verify --dir site
    """
    from consortium.client.audit import verify as check

    home = home_in(folder)
    head = check(home, home.identity(home.lock()).public_key())
    if as_json:
        typer.echo(json.dumps({"entries": head.sequence, "head": head.text}))
        return
    typer.echo(f"sound: {head.sequence} entries")


@audit.command()
def export(folder: Folder, out: Out, since: Since = "", run: Run = "", kind: Kind = "") -> None:
    """Write entries, as they are signed, into a file, for an auditor. All of them can be checked, some only be read.

    Example: consortium client audit export --out audit.jsonl --dir site
    """
    from consortium.client.audit import log_name
    from consortium.protocol import audit_view

    home = home_in(folder)
    chosen = audit_view.Filter(audit_view.since(since, time.time()), run, kind)
    name = log_name(home, home.identity(home.lock()).public_key())
    typer.echo(f"{out}: {audit_view.export(home.audit, out, chosen, name)} entries of '{name}'")
