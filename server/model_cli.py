"""The commands `consortium model ...`: an exported model is verified, shown, used."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from consortium.protocol.cli import group
from consortium.protocol.errors import InputError
from consortium.server import gate_cli, int8_cli
from consortium.server.serving import features_cli, registry_cli, serve_cli

if TYPE_CHECKING:
    from consortium.server.predicting import Report

model = group()


@model.callback()
def _model() -> None:
    """Verify, show and use an exported model; keep models by version; serve them.

    Example: consortium model predict out/model --in patients.csv --out predictions.csv
    """


registry_cli.add_to(model)
serve_cli.add_to(model)
model.add_typer(features_cli.features, name="features")
int8_cli.add_to(model)
model.command()(gate_cli.gate)

Folder = Annotated[
    Path,
    typer.Argument(
        metavar="PATH",
        help="The folder of an exported model, or REGISTRY/NAME[@VERSION], the champion by default.",
    ),
]
Root = Annotated[
    str | None,
    typer.Option("--root", help="Fingerprint of the root of the federation that must have signed it."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document.")]


@model.command()
def verify(path: Folder, root: Root = None, as_json: Json = False) -> None:
    """Check every file, the signature over them, and the weights against the digest of the rounds.

    Example: consortium model verify out/model --root 3f1c...
    """
    from consortium.server import seal
    from consortium.server.model import ONNX, WEIGHTS, load_model, verified, verify_weights

    path = _located(path)
    if root is not None:
        seal.fingerprints((root,))
    files = verified(path, root)
    sealed = seal.read(path, root)
    signer = sealed.signer
    seal.check_approved(path, sealed)
    if ONNX in files:
        load_model(path, root=root)
    if WEIGHTS in files:
        verify_weights(path, files)
    contract = json.loads(files["contract.json"])
    if as_json:
        said = {
            "path": str(path),
            "verified": True,
            "files": sorted(files),
            "model": contract["model"],
            "signer": None if signer is None else {"federation": signer.federation, "root": signer.root},
            "root_expected": root is not None,
            "approvals": {"required": sealed.required, "sites": list(sealed.approved)},
        }
        typer.echo(json.dumps(said, indent=2))
        return
    typer.echo(f"{path}: {len(files)} files are what was exported; model {contract['model']}")
    if sealed.approved:
        typer.echo(f"approved by {', '.join(sealed.approved)}")
    if signer is None:
        typer.echo("signed by nobody: it comes from a simulation, or over Flower")
    elif root is None:
        typer.echo(f"signed by a federation that calls itself '{signer.federation}', root {signer.root}")
        typer.echo(
            "Compare that root with its admin's (consortium server status), or give it: --root FINGERPRINT"
        )
    else:
        typer.echo(f"signed by federation '{signer.federation}', root as expected")


@model.command()
def show(path: Folder, as_json: Json = False) -> None:
    """Show what the model takes and gives, and what made it.

    Example: consortium model show out/model
    """
    from consortium.server.card import about
    from consortium.server.model import verified

    contract = json.loads(verified(_located(path))["contract.json"])
    if as_json:
        typer.echo(json.dumps(contract, indent=2, sort_keys=True))
        return
    study, metrics = contract["study"], contract["metrics"]
    typer.echo(f"study     {study['name']} ({study['task']}), {study['digest']}")
    typer.echo(f"model     {contract['model']}")
    typer.echo(f"made by   {contract['rounds']} rounds of {contract['strategy']}")
    known = [f"{name} {value:.4g}" for name, value in sorted(metrics.items()) if value is not None]
    typer.echo(f"metrics   {', '.join(known) or 'none were computed'}")
    for title, ends in (("takes", contract.get("inputs", ())), ("gives", contract.get("outputs", ()))):
        for place, one in enumerate(ends):
            typer.echo(f"{'' if place else title:<9} {one['name']}: {about(one)}")


@model.command()
def predict(
    path: Folder,
    out: Annotated[Path, typer.Option("--out", help="The file to write: CSV, or Parquet by its name.")],
    source: Annotated[
        Path | None,
        typer.Option("--in", help="Raw rows: CSV, Parquet, or .npy and .npz for a model of one tensor."),
    ] = None,
    sql: Annotated[
        str | None, typer.Option("--sql", metavar="QUERY", help="A query in place of --in; needs --url.")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="The database's URL without a password, or env:NAME or file:PATH that holds it."),
    ] = None,
    password: Annotated[
        str | None, typer.Option(help="Where the database's password lies: env:NAME or file:PATH.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Write nothing if a row cannot be predicted.")
    ] = False,
    root: Root = None,
    as_json: Json = False,
) -> None:
    """Predict for every row of a file, or of a query's result, however long.

    Columns that the model does not take are handed through. A row that the model cannot take gets no prediction, and
    its number is told.

    Example: consortium model predict out/model --in patients.csv --out predictions.csv

    Example: consortium model predict out/model --sql "SELECT * FROM patients" --url env:CLINIC --out predictions.csv
    """
    from consortium.server import seal
    from consortium.server.model import load_model
    from consortium.server.predicting import Query, predict_file, predict_query

    if (source is None) == (sql is None) or (sql is None) != (url is None):
        raise InputError("give either --in FILE, or --sql QUERY and --url URL")
    if password is not None and (url is None or not password.startswith(("env:", "file:"))):
        raise InputError(
            "--password: env:NAME or file:PATH would be right, beside --url; never the password itself"
        )
    started = time.monotonic()
    place = _located(path)
    loaded = load_model(place, root=root)
    seal.check_approved(place, seal.read(place, root))
    if source is not None:
        report = predict_file(loaded, source, out, strict)
    else:
        report = predict_query(loaded, Query(str(sql), str(url), password), out, strict)
    _tell(report, out, loaded.contract["model"], time.monotonic() - started, as_json)


def _tell(report: Report, out: Path, model: str, seconds: float, as_json: bool) -> None:
    """Say what was predicted, and what was not."""
    if as_json:
        said = {
            "rows": report.rows,
            "bad_rows": report.bad_rows,
            "problems": list(report.problems),
            "beyond": dict(report.beyond),
            "out": str(out),
            "model": model,
            "seconds": round(seconds, 3),
        }
        typer.echo(json.dumps(said, indent=2))
        return
    for problem in report.problems:
        typer.echo(f"no prediction: {problem}", err=True)
    for name, count in report.beyond.items():
        typer.echo(
            f"column '{name}': {count} values beyond what the study declares, taken as in training", err=True
        )
    bad = f", {report.bad_rows} rows without one" if report.bad_rows else ""
    said_rows = report.rows - report.bad_rows
    typer.echo(f"{out}: {said_rows} predictions of model {model[:12]}{bad}, {seconds:.1f} s")


def _located(path: Path) -> Path:
    """The bundle's folder that is named."""
    from consortium.server.serving.registry import locate

    return locate(str(path), time.time)
