"""The commands `consortium client audit ...`: what happened at this site."""

from __future__ import annotations

import json
import time

import typer

from consortium.client.options import Folder, Json, home_in
from consortium.protocol.audit_options import Kind, Limit, Lines, Out, Run, Since
from consortium.protocol.cli import group

audit = group()


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
    """Check every entry of this site's audit log, decisions and privacy ledger, and that nothing is missing of what the
    server has seen. Exit code 4 where one is not as it was written, or is missing.

    The server is asked where it can be reached; else what it countersigned last is compared.

    Example: consortium client audit verify --dir site
    """
    from consortium.client.audit import verify_all
    from consortium.client.heads import countersigned

    home = home_in(folder)
    lock = home.lock()
    seen = countersigned(home, lock)
    found = verify_all(home, home.identity(lock).public_key(), seen.seen, seen.earlier)
    if as_json:
        ends = {log: head.text for log, head in found.items()}
        entries = found["audit"].sequence
        typer.echo(json.dumps({"entries": entries, "heads": ends, "server_asked": seen.asked}))
        return
    by = (
        "the server of now" if seen.asked else "what the server countersigned last (it cannot be reached now)"
    )
    counts = ", ".join(f"{head.sequence} of the {log} log" for log, head in found.items())
    typer.echo(f"sound: {counts}; compared with {by}")


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
