"""The commands that make a bundle in 8 bits: `consortium model ranges | quantize`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

Bundle = Annotated[
    Path, typer.Argument(metavar="PATH", help="An exported model, or REGISTRY/NAME[@VERSION].")
]
Root = Annotated[
    str | None,
    typer.Option("--root", help="Fingerprint of the root of the federation that must have signed it."),
]
Unsigned = Annotated[bool, typer.Option("--unsigned", help="Take a simulation's model too.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands to `consortium model`."""
    app.command()(ranges)
    app.command()(quantize)


def ranges(
    path: Bundle,
    data: Annotated[Path, typer.Option("--data", help="This site's rows: an .npz file with x and y.")],
    out: Annotated[
        Path, typer.Option("--out", help="The file to write, which is handed to whoever quantises.")
    ],
    root: Root = None,
    unsigned: Unsigned = False,
) -> None:
    """Write the range of each activation of a model over this site's rows: what 8 bits are calibrated by.

    It is a release, to be handed over knowingly: the smallest and largest numbers over the rows, and how many they are.
    A differentially private model is refused.

    Example: consortium model ranges pulled/shapes --data holdout.npz --out hospital-1.json --root 3f1c...
    """
    from consortium.protocol.files import write_private
    from consortium.server import int8_bundle

    folder = _checked(path, root, unsigned)
    int8_bundle.refuse_private(folder)
    found = _calibration(folder, data)
    write_private(out, (json.dumps(found, indent=2) + "\n").encode())
    typer.echo(f"{out}: ranges of {len(found['ranges'])} activations over {found['rows']} rows")
    typer.echo(f"\nNext: consortium model quantize {path} --ranges {out} --data {data} --out int8")


def quantize(
    path: Bundle,
    data: Annotated[
        list[Path],
        typer.Option("--data", help="Labelled rows to judge it by (.npz with x and y); repeatable."),
    ],
    out: Annotated[Path, typer.Option("--out", help="The new folder to write.")],
    given: Annotated[
        list[Path] | None,
        typer.Option(
            "--ranges", help="Ranges of a site, repeatable; without any, those of --data are taken."
        ),
    ] = None,
    root: Root = None,
    unsigned: Unsigned = False,
    folder: Annotated[
        Path | None, typer.Option("--dir", help="The server's folder: the federation signs the new bundle.")
    ] = None,
) -> None:
    """Make a bundle in 8 bits from a bundle: static ranges, weights of a channel each.

    Refused, exit code 3, where it gets more than one row in a hundred wrong that the original gets right, or is not a
    third of its size. It is a bundle like any other: register it, and have the sites gate it.

    Example: consortium model quantize out/model --data north.npz --data south.npz --out out/int8 --unsigned
    """
    from consortium.server import int8_bundle
    from consortium.server.model import load_model

    bundle = _checked(path, root, unsigned)
    model = load_model(bundle)
    judges = [int8_bundle.read(one, model) for one in data]
    int8_bundle.refuse_private(bundle)
    found = [int8_bundle.calibration_in(one) for one in given or []]
    sign = None
    if folder is not None:
        from consortium.server.federation import Federation

        sign = int8_bundle.signer_of(bundle, Federation.open(folder))
    found = found or [int8_bundle.calibration(model, one) for one in judges]
    about = int8_bundle.quantize(bundle, found, judges, out, sign)
    judged, size = about["judged"], about["bytes"]
    typer.echo(
        f"{out}: int8, {size['fp32'] / size['int8']:.1f} times smaller; {judged['accuracy_int8']:.2%} of "
        f"{judged['rows']} rows right, fp32 {judged['accuracy_fp32']:.2%}"
    )
    more = "" if sign is not None else " --unsigned"
    typer.echo(f"\nNext: consortium model register {out} --registry models{more}")


def _calibration(folder: Path, data: Path) -> dict[str, Any]:
    from consortium.server import int8_bundle
    from consortium.server.model import load_model

    model = load_model(folder)
    return int8_bundle.calibration(model, int8_bundle.read(data, model))


def _checked(path: Path, root: str | None, unsigned: bool) -> Path:
    from consortium.server import seal
    from consortium.server.serving.registry import locate

    folder = locate(str(path), time.time)
    roots = seal.fingerprints(() if root is None else (root,))
    seal.check_signer(folder, seal.read(folder, root), roots, unsigned)
    return folder
