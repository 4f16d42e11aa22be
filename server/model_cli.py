"""The commands `consortium model ...`: an exported model is verified, shown, used."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from consortium.protocol.errors import InputError
from consortium.server.serving import registry_cli, serve_cli

if TYPE_CHECKING:
    import pandas as pd

    from consortium.server.model import Model

CHUNK = 50_000
"""Rows of a table that are in memory at once."""

model = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@model.callback()
def _model() -> None:
    """Verify, show and use an exported model; keep models by version; serve them.

    Example: consortium model predict out/model --in patients.csv --out predictions.csv
    """


registry_cli.add_to(model)
serve_cli.add_to(model)

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
    signer = seal.read(path, root).signer
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
        }
        typer.echo(json.dumps(said, indent=2))
        return
    typer.echo(f"{path}: {len(files)} files are what was exported; model {contract['model']}")
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
    source: Annotated[
        Path, typer.Option("--in", help="Raw rows: CSV, Parquet, or .npy and .npz for a model of one tensor.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The CSV file to write.")],
    as_json: Json = False,
) -> None:
    """Predict for every row of a file. Columns that the model does not take (a row's id) are handed through.

    Example: consortium model predict out/model --in patients.csv --out predictions.csv
    """
    from consortium.server.model import load_model

    started = time.monotonic()
    loaded = load_model(_located(path))
    rows = _write(loaded, source, out)
    seconds = time.monotonic() - started
    if as_json:
        said = {
            "rows": rows,
            "out": str(out),
            "model": loaded.contract["model"],
            "seconds": round(seconds, 3),
        }
        typer.echo(json.dumps(said, indent=2))
        return
    typer.echo(f"{out}: {rows} predictions of model {loaded.contract['model'][:12]}, {seconds:.1f} s")


def _located(path: Path) -> Path:
    """The bundle's folder that is named."""
    from consortium.server.serving.registry import locate

    return locate(str(path), time.time)


def _write(loaded: Model, source: Path, out: Path) -> int:
    """Predict chunk by chunk into a file beside `out`, then rename it: `out` is whole or not there."""
    inputs = loaded.contract["inputs"]
    taken = {one["name"] for one in inputs}
    partial = out.with_name(f".{out.name}.partial")
    rows = 0
    try:
        with partial.open("w", encoding="utf-8", newline="") as file:
            for chunk in _tensors(inputs[0], source) if inputs[0]["kind"] == "tensor" else _tables(source):
                found = loaded.predict(chunk, first_row=rows + 1)
                if inputs[0]["kind"] != "tensor":
                    found = _beside(chunk.drop(columns=[name for name in chunk if name in taken]), found)
                found.to_csv(file, index=False, header=rows == 0)
                rows += len(found)
        partial.replace(out)
    except OSError as error:
        raise InputError(
            f"{error.filename or out}: {error.strerror}; correct the path or its permissions"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return rows


def _beside(others: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    import pandas as pd

    twice = sorted({str(name) for name in others} & {str(name) for name in found})
    if twice:
        raise InputError(
            f"the table already has columns {', '.join(twice)}; rename them, the predictions take these names"
        )
    return pd.concat([others.reset_index(drop=True), found.reset_index(drop=True)], axis=1)


def _tables(source: Path) -> Iterator[pd.DataFrame]:
    """A table in chunks; one empty chunk where it has no rows."""
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if source.suffix == ".parquet":
            with pq.ParquetFile(source) as file:
                if file.metadata.num_rows == 0:
                    yield file.schema_arrow.empty_table().to_pandas()
                for batch in file.iter_batches(CHUNK):
                    yield batch.to_pandas()
            return
        # Text as it stands: the model says per column what is a number, and ids come out as they went in.
        separator = "\t" if ".tsv" in source.suffixes else ","
        with pd.read_csv(source, sep=separator, dtype=str, keep_default_na=False, chunksize=CHUNK) as reader:
            yield from reader
    except (pa.ArrowInvalid, pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise InputError(
            f"{source}: is not a table as its name says ({str(error).splitlines()[0]})"
        ) from error


def _tensors(one: Mapping[str, Any], source: Path) -> Iterator[Any]:
    """The rows of an array file in chunks."""
    import numpy as np

    if source.suffix not in (".npy", ".npz"):
        raise InputError(f"{source}: this model takes one array; give an .npy or .npz file")
    try:
        loaded = np.load(source, allow_pickle=False)
    except ValueError as error:
        raise InputError(f"{source}: is not an array file ({error})") from error
    if source.suffix == ".npz":
        names = list(loaded.files)
        if one["name"] not in names and len(names) != 1:
            raise InputError(
                f"{source}: holds {', '.join(names)}; one array called '{one['name']}' is needed"
            )
        loaded = loaded[one["name"] if one["name"] in names else names[0]]
    size = 1024
    for start in range(0, max(len(loaded), 1), size):
        yield loaded[start : start + size]
