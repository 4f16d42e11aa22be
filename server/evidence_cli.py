"""The command `consortium server evidence`: what an auditor takes home of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from consortium.server.audit_cli import server
from consortium.server.server_cli import NewFolder

__all__ = ["server"]


@server.command()
def evidence(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A run, or a study: its latest run.")],
    out: Annotated[Path, typer.Option("--out", help="A new folder.")],
    folder: NewFolder,
) -> None:
    """Write a folder that shows what happened in a run: approvals, instructions, commits and the bundle.
    It holds no records. `python verify.py --root FINGERPRINT` in it checks all of it, without Consortium.

    Example: consortium server evidence breast-cancer.1 --out evidence --dir fed
    """
    from consortium.server.evidence import hand_over
    from consortium.server.federation import Federation

    federation = Federation.open(folder)
    about = hand_over(federation, name, out)
    check = f"python {out}/verify.py --root {federation.root_fingerprint}"
    typer.echo(f"{out}: evidence of run {about.run}; check it with: {check}")
