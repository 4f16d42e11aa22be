"""The command `consortium client evidence`: what an auditor takes home of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from consortium.client.options import Folder, home_in


def evidence(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A run, or a study: its latest run.")],
    out: Annotated[Path, typer.Option("--out", help="A new folder.")],
    folder: Folder,
) -> None:
    """Write a folder that shows what happened in a run: approvals, instructions and what left.
    It holds no records. `python verify.py --root FINGERPRINT` in it checks all of it, without Consortium.

    Example: consortium client evidence breast-cancer.1 --out evidence --dir site
    """
    from consortium.client.evidence import hand_over
    from consortium.protocol.credentials import fingerprint

    home = home_in(folder)
    about = hand_over(home, name, out)
    typer.echo(
        f"{out}: evidence of run {about.run}; check it with: python {out}/verify.py --root {fingerprint(home.root)}"
    )
