"""The command `consortium model gate`: a version is judged at the sites before it may be the champion."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from consortium.server.admin_client import Admin

LOOK_EVERY = 0.5


def gate(
    which: Annotated[
        str,
        typer.Argument(metavar="NAME[@VERSION]", help="A model of the federation's registry; its candidate."),
    ],
    folder: Annotated[Path | None, typer.Option("--dir", help="The server's folder.")] = None,
    server: Annotated[str | None, typer.Option("--server", help="Its admin door: https://HOST:PORT")] = None,
    margin: Annotated[
        float,
        typer.Option("--margin", min=0, help="How much a site or group may fall, in the metric's unit."),
    ] = 0.01,
    minimum: Annotated[
        float | None, typer.Option("--minimum", help="What every site and group must reach.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Judge a version at the sites, on their held-out rows, beside the champion. It must pass to be promoted.

    The very bytes that would be served are evaluated there. It passes only if no site and no group falls by more than
    the margin. The result is signed and kept in the registry. Exit code 3: it did not pass.

    Example: consortium model gate lung --dir fed --margin 0.01
    """
    from consortium.protocol.errors import RefusedError
    from consortium.server.admin_client import connect
    from consortium.server.serving.registry import split

    name, number = split(which)
    result = judged(connect(folder, server), name, number, margin, minimum)
    typer.echo(json.dumps(result, indent=2) if as_json else _said(result))
    if not result["passed"]:
        raise RefusedError(f"{name}@{result['version']}: did not pass; it cannot be promoted")


def judged(
    admin: Admin, name: str, number: int | None, margin: float = 0.01, minimum: float | None = None
) -> dict[str, Any]:
    """Gate a version, the candidate where none is named, and wait for the result.

    Raises:
        ConsortiumError: there is none.
    """
    from consortium.protocol.errors import ConsortiumError
    from consortium.server.admin_client import name_in_path

    path = f"/v1/models/{name_in_path(name)}/gate"
    stand = admin.post(path, version=number, margin=margin, minimum=minimum)
    while stand["state"] == "running":
        time.sleep(LOOK_EVERY)
        stand = admin.get(path)
    if stand["state"] == "failed":
        raise ConsortiumError(f"{name}@{stand['version']}: {stand['error']}")
    found: dict[str, Any] = stand["result"]
    return found


def _said(result: dict[str, Any]) -> str:
    against = result["against"]
    rows = [("site", "group", result["metric"], "champion", "worse by")]
    for one in result["cells"]:
        numbers = (
            "-" if one[key] is None else f"{one[key]:.4f}" for key in ("candidate", "champion", "fall")
        )
        rows.append((one["site"], one["group"], *numbers))
    widths = [max(len(row[place]) for row in rows) for place in range(5)]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    lines += [f"not judged by {site}: {why}" for site, why in result["left_out"].items()]
    beside = f"against version {against['version']}" if against else "there is no champion yet"
    word = "passed" if result["passed"] else "did not pass"
    lines.append(f"{result['model']}@{result['version']}: {word}, margin {result['margin']:g}, {beside}")
    return "\n".join([*lines, *result["why"]])
