"""The command `consortium demo`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from consortium.simulations.demo import Demo


def demo(
    folder: Annotated[Path, typer.Option("--dir", help="Where it may make a new folder.")] = Path(
        "consortium-demo"
    ),
    sites: Annotated[int, typer.Option(min=2, max=16, help="How many hospitals.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="How many rounds.")] = 10,
    serve: Annotated[
        bool, typer.Option("--serve", help="Go on: gate the model, serve it at a site, ask it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """A whole federation on this machine, from certificates to a served model.

    A server, and a client for each hospital, which joins by a one-time code; TLS 1.3 with client certificates, on
    loopback. The data are scikit-learn's breast-cancer table, split artificially. Takes half a minute.

    Example: consortium demo --sites 4 --rounds 10
    """
    started = time.monotonic()

    def say(line: str) -> None:
        typer.echo(f"{time.monotonic() - started:5.1f} s  {line}", err=True)

    say("loading")
    from consortium.simulations.demo import run_demo
    from consortium.simulations.hospitals import study_of

    done = run_demo(folder, study_of(rounds), sites, say, serve=serve)
    typer.echo(json.dumps(done.document()) if as_json else _page(done))


def _page(done: Demo) -> str:
    lines = [
        "",
        f"{'hospital':<14}{'training rows':>14}{'test rows':>11}{'alone':>9}{'federated, here':>17}",
        *(
            f"{one.name:<14}{one.training:>14}{one.test:>11}{_number(one.alone):>9}{_number(one.here):>17}"
            for one in done.hospitals
        ),
        "",
        f"AUROC on the test rows of all {len(done.hospitals)} hospitals, after {done.rounds} rounds of {done.strategy}",
        f"  local-only  {done.local:.4f}   the mean of the models that each trained alone",
        f"  federated   {done.federated:.4f}   no row left its hospital",
        f"  pooled      {done.pooled:.4f}   all rows in one room",
        "Real patients of one clinic, split artificially.",
        "",
        "A fresh process, without training code, on raw rows: probability of malignant (and what it was)",
        *(
            f"  {person}  {value:.3f}  {'malignant' if truth else 'benign'}"
            for person, value, truth in done.predictions
        ),
        *(_answers(done) if done.served is not None else ()),
        "",
        f"model    {done.model}",
        f"digest   {done.digest}",
        f"all      {done.folder}",
        f"seconds  {done.seconds:.1f}",
        "",
        f"Next: consortium model show {done.model}",
    ]
    return "\n".join(lines)


def _answers(done: Demo) -> list[str]:
    """What the served model said, and where it comes from."""
    served = done.served
    assert served is not None
    asked = zip(done.predictions, served.probabilities, strict=True)
    return [
        "",
        f"Gated at {', '.join(served.gate['sites'])}, promoted, pulled by {served.site} and served there.",
        f"Served over TLS as {served.version}: {len(served.probabilities)} rows in {served.seconds * 1e3:.0f} ms, "
        f"prediction {served.prediction}",
        *(f"  {person}  {value:.3f}" for (person, _, _), value in asked),
        f"made by {len(served.lineage['rounds'])} rounds of {', '.join(served.lineage['sites'])};",
        f"signed by federation '{served.lineage['federation']}', bundle {served.bundle[:16]}",
        f"Serve it again: consortium client model serve {served.version.partition('@')[0]} --dir "
        f"{done.folder / 'clients' / served.site}",
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
