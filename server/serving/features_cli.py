"""The commands over the features that a served model keeps: `consortium model features read | purge`."""

from __future__ import annotations

import getpass
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from consortium.protocol.cli import group

if TYPE_CHECKING:
    from consortium.server.serving.features import Features

features = group()


@features.callback()
def _features() -> None:
    """Read and delete the features that `model serve --keep-features DAYS` keeps. Each use is written into the audit.

    Example: consortium model features read 3-5f0c... --dir serving --why "complaint 17"
    """


Dir = Annotated[Path, typer.Option("--dir", help="The serving program's folder.")]
Why = Annotated[str, typer.Option("--why", help="The reason, which is kept in the audit.")]


@features.command()
def read(
    prediction: Annotated[str, typer.Argument(help="The prediction's id, as its answer has it.")],
    folder: Dir,
    why: Why,
) -> None:
    """Show what a prediction was computed from, as one JSON document; its `inputs` can be asked with again.

    Example: consortium model features read 3-5f0c... --dir serving --why "complaint 17"
    """
    kept = _open(folder)
    _note(folder, "read", [prediction], why)
    typer.echo(json.dumps(asdict(kept.read(prediction)), indent=1, ensure_ascii=False))
    kept.close()


@features.command()
def purge(
    predictions: Annotated[list[str], typer.Argument(metavar="PREDICTION...", help="Ids of predictions.")],
    folder: Dir,
    why: Why,
) -> None:
    """Delete what was kept of predictions before its time, all of them or none. Serving may go on meanwhile.

    Example: consortium model features purge 3-5f0c... --dir serving --why "the patient asked for it"
    """
    kept = _open(folder)
    _note(folder, "purge", predictions, why)
    kept.purge(predictions)
    kept.close()
    count = len(set(predictions))
    typer.echo(f"the features of {count} prediction{'' if count == 1 else 's'} are deleted")


def _open(folder: Path) -> Features:
    from consortium.protocol import keys
    from consortium.server.serving.features import Features
    from consortium.server.serving.listening import key_file

    return Features(folder, keys.key_file(key_file(folder)), time.time, None)


def _note(folder: Path, act: str, predictions: list[str], why: str) -> None:
    """Write down who wants what and why, before it is done: what cannot be written down is not."""
    from consortium.server.serving.desk import Desk

    desk = Desk(folder / "records", time.time)
    for one in predictions:
        desk.note(
            {"act": f"features {act}", "by": getpass.getuser(), "prediction": one[:80], "why": why[:1000]}
        )
