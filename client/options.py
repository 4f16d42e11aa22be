"""What the commands of `consortium client` have in common."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from consortium.client.home import Home

Folder = Annotated[Path, typer.Option("--dir", help="The client's own folder.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document.")]


def home_in(folder: Path) -> Home:
    """The client's folder."""
    from consortium.client.home import Home

    return Home(folder)
