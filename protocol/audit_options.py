"""The options that `consortium server audit` and `consortium client audit` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Since = Annotated[str, typer.Option("--since", help="2h, 7d, or a date such as 2026-01-31T08:00.")]
Run = Annotated[str, typer.Option("--run", help="Of this run, or of all runs of this study.")]
Kind = Annotated[str, typer.Option("--kind", help="Of this kind, such as joined, instruction, round.")]
Limit = Annotated[int, typer.Option("--limit", min=0, help="The last so many; 0 for all.")]
Out = Annotated[Path, typer.Option("--out", help="A new file (JSON lines).")]
Lines = Annotated[bool, typer.Option("--json", help="JSON lines.")]
