"""The commands `consortium client model ...`: the federation's models at a site."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from consortium.client.options import Folder, Json, home_in
from consortium.protocol.cli import group

if TYPE_CHECKING:
    from consortium.client.home import Home

Name = Annotated[str, typer.Argument(help="The model's name in the federation's registry.")]
LOOK_EVERY = 0.5
"""Seconds between two looks at whether what is served may still be."""
ENDING = 15.0

model = group()


@model.callback()
def _model() -> None:
    """Get the federation's models, and use them at the site: without the server for up to seven days.

    Example: consortium client model pull lung --dir site
    """


@model.command()
def pull(name: Name, folder: Folder, as_json: Json = False) -> None:
    """Fetch the champion of a model; an interrupted pull goes on where it was. Nothing is parsed before it is verified.

    Example: consortium client model pull lung --dir site
    """
    from consortium.client import models
    from consortium.client.audit import site_audit

    home = home_in(folder)
    lock = home.lock()
    note = site_audit(home, home.identity(lock)).note
    connection = home.connection(lock)
    try:
        said = models.pull(home, connection, name, note, _shown if sys.stderr.isatty() else lambda *_: None)
    finally:
        connection.close()
    place = models.folder_of(home, name) / str(said.version)
    if as_json:
        about = {"name": name, "version": said.version, "bundle": said.bundle, "path": str(place)}
        typer.echo(json.dumps({**about, "good_until": said.until}))
        return
    typer.echo(
        f"{name}@{said.version}: is in {place}, bundle {said.bundle[:12]}, good until {_day(said.until)}"
    )
    typer.echo(f"next: consortium client model verify {name} --dir {folder}")


@model.command()
def verify(name: Name, folder: Folder, as_json: Json = False) -> None:
    """Check every file of the pulled model, its signature by this federation, and that it may be used now.

    Example: consortium client model verify lung --dir site
    """
    _become(home_in(folder), "verify", name, *(["--json"] if as_json else []))


@model.command()
def predict(
    name: Name,
    folder: Folder,
    source: Annotated[Path, typer.Option("--in", help="Raw rows: CSV, Parquet, or .npy and .npz.")],
    out: Annotated[Path, typer.Option("--out", help="The file to write: CSV, or Parquet by its name.")],
    strict: Annotated[
        bool, typer.Option("--strict", help="Write nothing if a row cannot be predicted.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Predict for every row of a file with the pulled model, as `consortium model predict` does.

    Example: consortium client model predict lung --dir site --in patients.csv --out predictions.csv
    """
    words = [
        "--in",
        source,
        "--out",
        out,
        *(["--strict"] if strict else []),
        *(["--json"] if as_json else []),
    ]
    _become(home_in(folder), "predict", name, *words)


@model.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(context: typer.Context, name: Name, folder: Folder) -> None:
    """Serve the pulled model at the site, as `consortium model serve` does; its further options are handed on.

    The server need not be reachable. It ends when the model is withdrawn (exit code 4), at the agent's next look, or
    when the server was not reached for seven days (3); a version that is pulled meanwhile is served from then on.

    Example: consortium client model serve lung --dir site --port 8443
    """
    from consortium.client import models
    from consortium.protocol.credentials import fingerprint
    from consortium.protocol.errors import ConsortiumError

    home = home_in(folder)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    while not ended.is_set():
        place = models.usable(home, name, time.time())
        words = ["serve", place, "--dir", home.folder / "serving", "--root", fingerprint(home.root)]
        child = subprocess.Popen(models.program(*words, *context.args))
        try:
            while not ended.wait(LOOK_EVERY) and child.poll() is None:
                if models.usable(home, name, time.time()) != place:
                    typer.echo(f"{name}: another version is here; it is served now", err=True)
                    break
            if child.returncode is not None and not ended.is_set():
                if child.returncode:
                    raise typer.Exit(child.returncode if child.returncode > 0 else ConsortiumError.exit_code)
                return
        finally:
            _end(child)


@model.command()
def review(
    name: Name,
    folder: Folder,
    version: Annotated[int, typer.Option("--version", help="The version; else the candidate.")] = -1,
) -> None:
    """Fetch a version to look at: its model card, with how it was judged and what protects the records.

    Example: consortium client model review lung --dir site
    """
    from consortium.client import models

    home = home_in(folder)
    connection = home.connection(home.lock())
    try:
        place, said = models.fetch(home, connection, name, version)
    finally:
        connection.close()
    typer.echo((place / "MODEL_CARD.md").read_text(encoding="utf-8"))
    typer.echo(f"{name}@{said.version}, bundle {said.bundle}, in {place}")
    typer.echo(f"next: consortium client model approve {name} --version {said.version} --dir {folder}")


@model.command()
def approve(
    name: Name,
    folder: Folder,
    version: Annotated[int, typer.Option("--version", help="The version; else the candidate.")] = -1,
    as_json: Json = False,
) -> None:
    """Approve a version in the site's name: it is fetched, compared, and its manifest signed with the site's key.

    Where the study asks for approvals ([export] approvals), a model is not used before it has so many.

    Example: consortium client model approve lung --dir site
    """
    from consortium.client import models
    from consortium.client.audit import site_audit

    home = home_in(folder)
    lock = home.lock()
    key = home.identity(lock)
    connection = home.connection(lock)
    try:
        _, said = models.fetch(home, connection, name, version)
        approved = models.approve(home, connection, key, said, site_audit(home, key).note)
    finally:
        connection.close()
    if as_json:
        about = {"name": name, "version": said.version, "bundle": said.bundle, "approved": approved}
        typer.echo(json.dumps(about))
        return
    typer.echo(
        f"{name}@{said.version}: approved, bundle {said.bundle[:12]}; sites so far: {', '.join(approved)}"
    )


def _end(child: subprocess.Popen[bytes]) -> None:
    """Let requests under way be answered, then end it."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(ENDING)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _become(home: Home, command: str, name: str, *words: object) -> None:
    """Become `consortium model COMMAND` over the pulled bundle, if it may be used now."""
    from consortium.client import models
    from consortium.protocol.credentials import fingerprint

    place = models.usable(home, name, time.time())
    line = models.program(command, place, "--root", fingerprint(home.root), *words)
    sys.stdout.flush()
    os.execv(line[0], line)  # noqa: S606 - there is no shell to want


def _shown(done: int, whole: int) -> None:
    """On a terminal: how much is here."""
    end = "\n" if done == whole else "\r"
    sys.stderr.write(f"{done / 1e6:.1f} of {whole / 1e6:.1f} MB{end}")


def _day(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at))
