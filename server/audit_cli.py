"""The commands `consortium server audit ...`: what happened at the server. They read its folder, also while it runs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from consortium.protocol.audit_options import Kind, Limit, Lines, Out, Run, Since
from consortium.protocol.cli import group
from consortium.server.keep_cli import server
from consortium.server.server_cli import Json, NewFolder

if TYPE_CHECKING:
    from consortium.server.federation import Federation

__all__ = ["server"]

audit = group()
server.add_typer(audit, name="audit")


@audit.callback()
def _audit() -> None:
    """Show, check and hand over the log of what happened here: who joined, what was asked, what was committed.

    Example: consortium server audit show --since 7d --dir fed
    """


def _opened(folder: Path) -> tuple[Federation, str]:
    """The federation, and the name of its log."""
    from consortium.protocol.audit import name_at_server
    from consortium.server.federation import Federation

    found = Federation.open(folder)
    return found, name_at_server(found.config.name, found.root_fingerprint)


@audit.command()
def show(
    folder: NewFolder,
    since: Since = "",
    run: Run = "",
    kind: Kind = "",
    limit: Limit = 0,
    as_json: Lines = False,
) -> None:
    """Show entries, the oldest first.

    Example: consortium server audit show --run breast-cancer.1 --dir fed
    """
    from consortium.protocol import audit_view, chain
    from consortium.protocol.audit import FOLDER, segments

    chosen = audit_view.Filter(audit_view.since(since, time.time()), run, kind, limit)
    federation, name = _opened(folder)
    for entry in chosen.of(chain.entries(segments(federation.folder / FOLDER), name)):
        typer.echo(json.dumps(audit_view.document(entry)) if as_json else audit_view.line(entry))


@audit.command()
def verify(folder: NewFolder, as_json: Json = False) -> None:
    """Check every entry of the server's log, that it has what the sites have countersigned, that it agrees with the
    database and the registry of models, and every decision of a site. Exit code 4 where one is not as it was
    written, or is missing.

    Example: consortium server audit verify --dir fed
    """
    from consortium.server.audit_check import check

    federation, _ = _opened(folder)
    found = check(federation)
    if as_json:
        said = {"entries": found.head.sequence, "head": found.head.text, "events": found.events}
        sites = {site: head.text for site, head in found.sites.items()}
        typer.echo(
            json.dumps({**said, "decisions": found.decisions, "acts": found.acts, "countersigned": sites})
        )
        return
    by = ", ".join(f"{site} up to {head.sequence}" for site, head in found.sites.items())
    typer.echo(
        f"sound: {found.head.sequence} entries, {found.events} events, {found.decisions} decisions, {found.acts} acts "
        f"on models; countersigned by {by or 'nobody yet'}"
    )


@audit.command()
def export(folder: NewFolder, out: Out, since: Since = "", run: Run = "", kind: Kind = "") -> None:
    """Write entries, as they are signed, into a file, for an auditor. All of them can be checked, some only be read.

    Example: consortium server audit export --out audit.jsonl --dir fed
    """
    from consortium.protocol import audit_view
    from consortium.protocol.audit import FOLDER

    federation, name = _opened(folder)
    chosen = audit_view.Filter(audit_view.since(since, time.time()), run, kind)
    count = audit_view.export(federation.folder / FOLDER, out, chosen, name)
    typer.echo(f"{out}: {count} entries of '{name}'")
