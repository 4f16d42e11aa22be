"""The commands that keep models by version: `consortium model register | list | promote | rollback | withdraw`."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from consortium.server.serving.registry import Registry
    from consortium.server.serving.versions import Shelf

Folder = Annotated[Path, typer.Option("--registry", help="The registry's folder.")]
Which = Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="A model, or one version of it.")]
Why = Annotated[str, typer.Option("--why", help="The reason, which is kept.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands to `consortium model`."""
    for command in (register, list_, promote, rollback, withdraw, affected_by):
        app.command(name=command.__name__.rstrip("_").replace("_", "-"))(command)


def register(
    path: Annotated[Path, typer.Argument(help="The folder of an exported model.")],
    registry: Folder,
    name: Annotated[str, typer.Option("--name", help="The model's name there; the study's by default.")] = "",
    root: Annotated[
        str | None, typer.Option("--root", help="Fingerprint of the root that must have signed it.")
    ] = None,
    unsigned: Annotated[bool, typer.Option("--unsigned", help="Take a simulation's model too.")] = False,
    track: Annotated[
        str | None, typer.Option("--track", metavar="URI", help="An MLflow registry that gets it too.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Copy a bundle into a registry, verified, as the next version of its model and the candidate.

    With --track it is a version in MLflow's registry too, with its lineage as tags (pip install 'consortium[track]').

    Example: consortium model register fed/runs/lung.1/model --registry models --root 3f1c...
    """
    from consortium.server import seal
    from consortium.server.model import load_model
    from consortium.server.serving.registry import Registry, split

    roots = seal.fingerprints(() if root is None else (root,))
    name = name or str(load_model(path, root=root).contract["study"]["name"])

    def check(copy: Path) -> str:
        loaded = load_model(copy, root=root)
        seal.check_signer(copy, seal.read(copy), roots, unsigned)
        return str(loaded.contract["model"])

    tracked = None
    if track is not None:
        from consortium.server.serving import track as tracking

        split(name)
        check(path)
        tracked = tracking.record(track, path, name)
    version = Registry(registry, time.time).register(path, name, check)
    if as_json:
        said = {"name": name, "version": version.number, "bundle": version.bundle}
        typer.echo(json.dumps(said if tracked is None else {**said, "mlflow": tracked}))
        return
    if tracked is not None:
        typer.echo(f"MLflow: {name}, version {tracked}, alias candidate")
    typer.echo(
        f"{name}@{version.number}: is the candidate; next: consortium model promote {name} --registry {registry}"
    )


def list_(
    registry: Annotated[Path, typer.Argument(help="The registry's folder.")], as_json: Json = False
) -> None:
    """Show the models of a registry, their versions, aliases and latest acts.

    Example: consortium model list models
    """
    from dataclasses import asdict

    state = _registry(registry).state()
    if as_json:
        models = {name: asdict(shelf) for name, shelf in state.models.items()}
        typer.echo(
            json.dumps({"models": models, "history": [asdict(one) for one in state.history]}, indent=2)
        )
        return
    for name, shelf in sorted(state.models.items()):
        for one in shelf.versions:
            aliases = [a for a in ("champion", "candidate") if getattr(shelf, a) == one.number]
            marks = f"withdrawn: {one.why}" if one.withdrawn else ", ".join(aliases)
            typer.echo(
                f"{name}@{one.number:<4} {_day(one.registered)}  model {one.model[:12]}  {marks}".rstrip()
            )
    for act in state.history[-5:]:
        why = f": {act.why}" if act.why else ""
        typer.echo(f"  {_day(act.at)}  {act.act} {act.model}@{act.version} by {act.by}{why}")


def promote(
    which: Which,
    registry: Folder,
    why: Why = "",
    ungated: Annotated[
        bool,
        typer.Option("--ungated", help="In a federation's registry: without a passed gate; needs --why."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Make the candidate, or the version that is named, the champion: what is served.

    In a federation's own registry (DIR/models) it must have passed its gate: consortium model gate.

    Example: consortium model promote breast-cancer --registry models
    """
    from consortium.server.serving.registry import split

    name, number = split(which)
    _said(name, _registry(registry).promote(name, number, why, ungated), as_json)


def rollback(
    name: Annotated[str, typer.Argument(help="A model.")],
    registry: Folder,
    why: Why = "",
    as_json: Json = False,
) -> None:
    """Make the champion of before the champion again.

    Example: consortium model rollback breast-cancer --registry models --why "worse at hospital-2"
    """
    _said(name, _registry(registry).rollback(name, why), as_json)


def withdraw(which: Which, registry: Folder, why: Why, as_json: Json = False) -> None:
    """Take a version out of use for good: wherever it is served or opened, it is refused from then on.

    Example: consortium model withdraw breast-cancer@2 --registry models --why "trained on wrong units"
    """
    from consortium.protocol.errors import InputError
    from consortium.server.serving.registry import split

    name, number = split(which)
    if number is None:
        raise InputError(f"{name}: which version? for example: consortium model withdraw {name}@1 --why TEXT")
    found = _registry(registry)
    shelf = found.withdraw(name, number, why)
    _said(name, shelf, as_json)
    gone = shelf.version(number)
    for other, those in found.state().models.items():
        for one in those.versions:
            if gone is not None and one.model == gone.model and not one.withdrawn:
                typer.echo(
                    f"{other}@{one.number}: comes from the same model and is in use still; see whether it should be "
                    f"withdrawn, too: consortium model withdraw {other}@{one.number} --registry {registry} --why TEXT",
                    err=True,
                )


def affected_by(
    site: Annotated[str, typer.Argument(help="A site's name.")], registry: Folder, as_json: Json = False
) -> None:
    """Show which versions hold updates of a site, and which of them are live. Withdrawn ones are looked at too.

    Runs know a site by its name alone: of one that came back under another name ask for both. Exit code 4: a version
    could not be read, and may hold updates of it as well.

    Example: consortium model affected-by hospital-2 --registry models
    """
    from consortium.protocol.errors import IntegrityError
    from consortium.server.serving.affected import affected_by as ask

    found = ask(_registry(registry), site)
    if as_json:
        versions = [dict(one) for one in found.versions]
        said = {"site": site, "versions": versions, "sites": found.sites, "damaged": found.damaged}
        typer.echo(json.dumps(said, indent=2))
    else:
        for one in found.versions:
            typer.echo(_affected(one))
        if not found.versions:
            others = ", ".join(found.sites) or "none"
            typer.echo(
                f"no version holds updates of '{site}'; sites that versions here hold something of: {others}"
            )
    if found.damaged:
        raise IntegrityError("; ".join(found.damaged))


def _affected(one: Mapping[str, Any]) -> str:
    marks = ", ".join([*(["withdrawn"] if one["withdrawn"] else []), *one["aliases"]]) or "not live"
    rounds = ", ".join(map(str, one["rounds"])) or "none, its statistics alone"
    if not one["told"]:
        rounds = "not told, as cohorts were drawn"
    return f"{one['name']}@{one['version']}  {marks}; rounds {rounds}"


def _registry(folder: Path) -> Registry:
    from consortium.server.serving.registry import Registry

    return Registry(folder, time.time)


def _said(name: str, shelf: Shelf, as_json: bool) -> None:
    found: dict[str, Any] = {"name": name, "champion": shelf.champion, "candidate": shelf.candidate}
    if as_json:
        typer.echo(json.dumps(found))
        return
    champion = f"{name}@{shelf.champion} is the champion" if shelf.champion else f"{name} has no champion now"
    typer.echo(f"{champion}; " + (f"candidate: {shelf.candidate}" if shelf.candidate else "no candidate"))


def _day(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
