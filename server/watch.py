"""`study watch` on a terminal: a table of the sites below the events, as they stand now."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from consortium.server.admin_client import Admin, name_in_path

LOOK_EVERY = 1.0
"""Seconds between two looks at the sites, on a terminal."""


@contextmanager
def board(admin: Admin, name: str, console: Console) -> Iterator[Callable[[], None]]:
    """On a terminal: a table of the sites while the block lasts, which is brought up to date by what this gives."""
    with Live(console=console, auto_refresh=False) as live:

        def update() -> None:
            live.update(table(admin.get(f"/v1/studies/{name_in_path(name)}")), refresh=True)

        yield update


def table(said: dict[str, Any]) -> Group:
    """A document of `study show`: how the run stands, and a table of its sites."""
    why = f": {said['why']}" if said["why"] else ""
    since = time.strftime("%H:%M:%S", time.localtime(said["since"]))
    head = f"{said['run'] or said['study']}, round {said['round']} of {said['rounds']}"
    head += f", {said['state']}{why} (since {since})"
    found = Table("site", "now", "counted last", "late", "last error")
    for site, about in said["sites"].items():
        error = about["set_aside"] or about["last_error"] or ""
        row = (site, about["state"], f"round {about['last_round']}", str(about["late"] or ""), error)
        found.add_row(*(escape(one) for one in row))
    return Group(escape(head), found)
