"""The command `consortium simulate`."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from consortium.protocol.errors import InputError

if TYPE_CHECKING:
    from consortium.protocol.study import Study
    from consortium.simulations.experiment import Experiment
    from consortium.simulations.faults import Fault

_DATA = "CSV or Parquet files, or folders with data and perhaps mapping.toml: a site each; one is a table to split."
_PARTITION = "How one table is split: iid, dirichlet:ALPHA, shards:K, quantity:ALPHA or column:NAME (iid)."
_FAULT = "A scripted fault, SITE:KIND or SITE:KIND:ROUNDS: site-2:drop:3-5,8."


def simulate(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="The study file (TOML), or a bundle of it.")],
    more: Annotated[list[Path] | None, typer.Argument(metavar="PATH...", hidden=True)] = None,
    data: Annotated[list[Path] | None, typer.Option("--data", metavar="PATH...", help=_DATA)] = None,
    sites: Annotated[int | None, typer.Option(help="How many sites one table is split into (4).")] = None,
    partition: Annotated[str | None, typer.Option(metavar="SPEC", help=_PARTITION)] = None,
    compare: Annotated[
        str, typer.Option(metavar="NAME,NAME", help="Strategies in place of the study's.")
    ] = "",
    epsilon: Annotated[
        str,
        typer.Option(metavar="E,E,inf", help="Levels of privacy in place of the study's: 0.5,1,2,4,8,inf."),
    ] = "",
    seeds: Annotated[int, typer.Option(help="How many seeds, counting up from the study's.")] = 1,
    rounds: Annotated[int | None, typer.Option(help="Rounds, in place of the study's.")] = None,
    fault: Annotated[list[str] | None, typer.Option(metavar="SPEC", help=_FAULT)] = None,
    without: Annotated[
        list[str] | None, typer.Option(metavar="SITE", help="A site to leave out; may be repeated.")
    ] = None,
    baselines: Annotated[bool, typer.Option(help="Train each site alone and all rows together too.")] = True,
    attacks: Annotated[
        bool, typer.Option("--attacks", help="Attack each model and its updates, and report what they show.")
    ] = False,
    processes: Annotated[
        int | None, typer.Option(help="Processes (one a core); the result is the same.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the results (results/STUDY-TIME).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Run a study on this machine, over the files of several sites or over one table that is split.

    Prints the table local-only, federated, pooled; writes a folder with a report and all that another run needs.

    Exits with 1 where a run failed, with 2 where the input is wrong; Ctrl-C keeps the runs that are done.

    Examples:

    consortium simulate study.toml --data north.csv south.csv east.csv

    consortium simulate study.toml --data all.csv --partition dirichlet:0.5 --compare fedavg,fedprox --seeds 5

    consortium simulate study.toml --data all.csv --epsilon 0.5,1,2,4,8,inf --seeds 5 --attacks
    """
    files = _files(data or [], more or [], compare)
    faults = [parse_fault(spec) for spec in fault or []]

    from consortium.protocol.bundle import opened

    with opened(study) as loaded:
        _simulate(
            loaded, files, sites=sites, partition=partition, compare=compare, epsilon=epsilon, seeds=seeds,
            rounds=rounds, faults=faults, specs=fault or [], without=without or [], baselines=baselines,
            attacks=attacks, processes=processes, out=out, as_json=as_json,
        )  # fmt: skip


def _simulate(
    loaded: Study,
    files: list[Path],
    *,
    sites: int | None,
    partition: str | None,
    compare: str,
    epsilon: str,
    seeds: int,
    rounds: int | None,
    faults: list[Fault],
    specs: list[str],
    without: list[str],
    baselines: bool,
    attacks: bool,
    processes: int | None,
    out: Path | None,
    as_json: bool,
) -> None:
    if rounds is not None:
        loaded = loaded.with_(study={"rounds": rounds})
    _strike(faults, loaded.rounds)

    from consortium.simulations import experiment, progress, report
    from consortium.simulations.privacy_levels import epsilons
    from consortium.simulations.sites import gather

    levels = epsilons(epsilon) if epsilon else []
    names = [name for part in compare.split(",") if (name := part.strip())]
    with contextlib.redirect_stdout(sys.stderr):  # what the study's own code prints is no result
        experiment.check(loaded, names, seeds, levels)
        found = gather(loaded, files, sites, partition, seed=loaded.seed, without=without)
        folder = report.new_folder(out or _default(loaded))
        try:
            with progress.progress(loaded.name) as watch:
                done = experiment.experiment(
                    loaded, found, compare=names, epsilons=levels, seeds=seeds, processes=processes, faults=faults,
                    baselines=baselines, attacks=attacks, watch=watch,
                )  # fmt: skip
        except BaseException:
            with contextlib.suppress(OSError):
                folder.rmdir()  # nothing is in it
            raise
    options = [f"--sites={sites}"] * (sites is not None) + [f"--partition={partition}"] * bool(partition)
    options += [f"--compare={','.join(names)}"] * bool(names) + [f"--seeds={seeds}"]
    options += [f"--epsilon={epsilon}"] * bool(levels)
    options += [f"--without={site}" for site in without]
    options += [f"--fault={spec}" for spec in specs] + ["--no-baselines"] * (not baselines)
    options += ["--attacks"] * attacks
    try:
        page = report.write(done, folder, report.Origin(options, files))
    except Exception:
        _print(done, None, as_json)  # what was computed is not lost
        raise
    _print(done, page, as_json)
    if done.stopped:
        raise typer.Exit(130)
    if done.status == "failed":
        raise typer.Exit(1)


def _files(data: Sequence[Path], more: Sequence[Path], compare: str) -> list[Path]:
    """The data files: those of --data, and what follows the first of them as arguments."""
    from consortium.protocol.vocabulary import check_strategy

    for word in more:
        if compare and not word.exists() and not check_strategy({"name": str(word)}):
            right = f"strategies are joined by commas: --compare {compare},{word}"
            raise InputError(f"{word}: not expected here; {right}")
        if not data:
            raise InputError(f"{word}: not expected here; data follow --data: --data {word}")
    return [*data, *more]


def _strike(faults: Sequence[Fault], rounds: int) -> None:
    """Refuse a fault whose rounds are all beyond the study's."""
    for fault in faults:
        if fault.rounds is not None and not any(1 <= number <= rounds for number in fault.rounds):
            when = f"{min(fault.rounds)} to {max(fault.rounds)}"
            raise InputError(
                f"--fault: {fault.site}:{fault.kind} strikes in no round: {when} given, of {rounds} rounds"
            )


def parse_fault(spec: str) -> Fault:
    """The fault of a text: "site-2:nan", or with rounds "site-2:drop:3-5,8".

    Raises:
        InputError: it has another form, or there is no such kind.
    """
    from consortium.simulations.faults import Fault

    right = "SITE:KIND or SITE:KIND:ROUNDS would be right, such as site-2:drop:3-5,8"
    site, colon, rest = spec.partition(":")
    kind, _, rounds = rest.partition(":")
    if not (site and colon and kind):
        raise InputError(f"--fault: {spec!r} given; {right}")
    chosen: set[int] = set()
    for part in rounds.split(",") if rounds else ():
        first, dash, last = part.partition("-")
        ends = (first, last if dash else first)
        if not all(end.isascii() and end.isdigit() and len(end) < 8 for end in ends):
            raise InputError(f"--fault: {spec!r} given; {right}")
        if int(ends[0]) > int(ends[1]):
            raise InputError(f"--fault: {spec!r} given, whose rounds run backwards; {right}")
        chosen |= set(range(int(ends[0]), int(ends[1]) + 1))
    when: Collection[int] | None = frozenset(chosen) if rounds else None
    return Fault(site, kind, when)  # type: ignore[arg-type] # it checks the kind itself


def _default(study: Study) -> Path:
    from datetime import datetime

    stem = f"{study.name}-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
    names = [stem, *(f"{stem}-{number}" for number in range(2, 100))]
    return next(
        (path for name in names if not (path := Path("results") / name).exists()), Path("results") / stem
    )


def _print(done: Experiment, page: Path | None, as_json: bool) -> None:
    """The outcome. page: None where it could not be written."""
    from consortium.simulations import attacked, report, table

    if as_json:
        where = {"out": page and str(page.parent), "report": page and str(page)}
        typer.echo(json.dumps({**report.document(done), **where}))
    else:
        seeds = (
            f"{len(done.seeds)} seeds, mean ± half of the 95 % interval" if len(done.seeds) > 1 else "1 seed"
        )
        sites = done.sites
        typer.echo(
            f"{done.study.name}: {len(sites.sources) if sites else 0} sites, {done.study.rounds} rounds, {seeds}"
        )
        typer.echo(f"Sites: {sites.origin if sites else ''}.\n")
        typer.echo(table.text(table.rows(done)) or table.nothing(done))
        judged = table.judged(done)
        typer.echo(f"\n{judged}" if judged else "")
        for line in attacked.lines(done):
            typer.echo(line)
        typer.echo(f"{done.seconds:.1f} s" + (f"; report: {page}" if page else ""))
    for trial in done.trials:
        if trial.result.status != "finished":
            typer.echo(
                f"{trial.strategy}, seed {trial.seed}: {trial.result.status}: {trial.result.outcome.why}"
                + (f". All rounds: {page.parent / 'rounds.jsonl'}" if page else ""),
                err=True,
            )
    if done.stopped:
        typer.echo(f"stopped; {len(done.trials)} runs were done, and only these are in the results", err=True)
