"""The commands `consortium study ...`: check, build, submit, start, watch, stop."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from consortium.protocol.cli import group
from consortium.protocol.errors import ConsortiumError, InputError
from consortium.server.server_cli import Folder, Json, Url

study = group()

Name = Annotated[str, typer.Argument(help="The study's name.")]


@study.callback()
def _study() -> None:
    """Check a study file, hand it to a federation, and follow it.

    Example: consortium study check study.toml
    """


@study.command()
def check(
    path: Annotated[Path, typer.Argument(metavar="STUDY", help="The study file (TOML).")],
    as_json: Json = False,
) -> None:
    """Read a study file and say what it does, what of the records leaves a site and what privacy that costs after each
    round; or everything that is wrong with it.

    Example: consortium study check study.toml
    """
    from consortium.privacy import statement
    from consortium.protocol.code import files
    from consortium.protocol.study import Study

    loaded = Study.load(path)
    files(loaded.references, loaded.folder)  # looked for and read, not run
    privacy = statement.statement(loaded)
    summary = {**_summary(loaded), "privacy": privacy}
    if as_json:
        typer.echo(json.dumps(summary))
        return
    for key, value in summary.items():
        if key != "privacy":
            typer.echo(f"{key:12} {value}")
    typer.echo(statement.text(privacy))
    following = f"simulate {path} --data FILE ..." if loaded.app is None else f"study build {path}"
    typer.echo(f"\nNext: consortium {following}")


@study.command()
def build(
    path: Annotated[Path, typer.Argument(metavar="STUDY", help="The study file (TOML).")],
    out: Annotated[Path | None, typer.Option(help="The bundle's file (the study's name with .fab).")] = None,
    as_json: Json = False,
) -> None:
    """Make a study and its own code one file, a bundle, which sites approve by its SHA-256. Nothing of it is run.

    The same study gives the same bytes on any machine. The same bundle is simulated and submitted.

    Example: consortium study build study.toml --out study.fab
    """
    from consortium.protocol import bundle

    made = bundle.build(path)
    place = out or path.with_name(made.study.name + bundle.SUFFIX)
    if place.suffix != bundle.SUFFIX:
        raise InputError(f"--out: got {place}; a file name that ends in {bundle.SUFFIX} would be right")
    try:
        place.write_bytes(made.content)
    except OSError as error:
        raise InputError(f"{place}: cannot be written ({error.strerror}); give another --out") from error
    if as_json:
        about = {"study": made.study.name, "bundle": made.digest, "path": str(place)}
        typer.echo(json.dumps({**about, "files": list(made.files), "imports": list(made.imports)}))
        return
    typer.echo(f"{place}: study {made.study.name}, bundle {made.digest}")
    typer.echo(f"code         {', '.join(made.files) or 'none of its own'}")
    if made.imports:
        typer.echo(f"imports      {', '.join(made.imports)}")
    typer.echo(f"\nNext: consortium study submit {place}")


@study.command()
def submit(
    path: Annotated[Path, typer.Argument(metavar="STUDY", help="A bundle, or a study file to build it of.")],
    folder: Folder = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Hand a study to the server, as a bundle. Nothing runs before it is started.

    Example: consortium study submit study.fab --dir fed
    """
    from base64 import b64encode

    from consortium.protocol import bundle
    from consortium.server.admin_client import connect

    made = bundle.load(path)
    said = connect(folder, url).post("/v1/studies", bundle=b64encode(made.content).decode())
    if as_json:
        typer.echo(json.dumps(said))
        return
    typer.echo(f"study {said['study']}: submitted, bundle {said['bundle']}")
    typer.echo(f"\nNext: consortium study start {said['study']}{_same(folder, url)}")


@study.command()
def start(name: Name, folder: Folder = None, url: Url = None, as_json: Json = False) -> None:
    """Start a run of a submitted study. It waits until enough sites are connected.

    Example: consortium study start breast-cancer --dir fed
    """
    from consortium.server.admin_client import connect, name_in_path

    said = connect(folder, url).post(f"/v1/studies/{name_in_path(name)}/start")
    if as_json:
        typer.echo(json.dumps(said))
        return
    typer.echo(f"run {said['run']}: started")
    typer.echo(f"\nNext: consortium study watch {name}{_same(folder, url)}")


@study.command()
def rerun(
    name: Annotated[str, typer.Argument(help="The study's name, for its latest run, or a run's.")],
    without: Annotated[list[str], typer.Option(metavar="SITE", help="A site to leave out; may be repeated.")],
    folder: Folder = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Run a study anew, the very bundle of a run before, without a site: as if it had never joined.

    The site is asked nothing, and unless the study is private or draws cohorts the model is, bit for bit, that of a run
    which the site never joined. `consortium model affected-by SITE` names the models that hold its updates.

    Example: consortium study rerun breast-cancer --without hospital-2 --dir fed
    """
    from consortium.server.admin_client import connect, name_in_path

    said = connect(folder, url).post(f"/v1/studies/{name_in_path(name)}/rerun", without=without)
    if as_json:
        typer.echo(json.dumps(said))
        return
    typer.echo(f"run {said['run']}: started, as {said['of']}, without {', '.join(said['without'])}")
    for note in said["notes"]:
        typer.echo(f"note: {note}")
    study_name = said["run"].rpartition(".")[0]
    typer.echo(f"\nNext: consortium study watch {study_name}{_same(folder, url)}")


@study.command()
def watch(name: Name, folder: Folder = None, url: Url = None, as_json: Json = False) -> None:
    """Follow a study's latest run until it is over; exit code 1 where it failed. --json prints a JSON line an event.
    A server that restarts is waited for, ten minutes at most.

    On a terminal a table below the events shows each site: what it does now, when it counted last, its last error.

    Example: consortium study watch breast-cancer --dir fed
    """
    from rich.console import Console

    from consortium.server import watch as watching
    from consortium.server.admin_client import connect

    console, admin = Console(), connect(folder, url)
    live = console.is_terminal and not as_json

    def event(one: dict[str, Any]) -> None:
        text = json.dumps(one) if as_json else line(one)
        console.print(text, markup=False, highlight=False, soft_wrap=True) if live else typer.echo(text)

    def away(text: str) -> None:
        typer.echo(text, err=True)

    state, why, told = "", "", False
    with watching.board(admin, name, console) if live else nullcontext(lambda: None) as update:
        for found in admin.events(name, away, look=watching.LOOK_EVERY if live else None):
            for one in found["events"]:
                event(one)
            update()
            state, why = found["state"], found["why"]
            if found["run"] is None and not told:
                away(f"not started yet; start it: consortium study start {name}{_same(folder, url)}")
                told = True
    if state == "failed":
        raise ConsortiumError(f"study '{name}': failed; {why}")
    if not as_json:
        typer.echo(f"\nNext: consortium study show {name}{_same(folder, url)}")


def _same(folder: Path | None, url: str | None) -> str:
    """The options of a next command that reaches the same server."""
    return (f" --dir {folder}" if folder else "") + (f" --server {url}" if url else "")


def _command(action: str, what: str) -> None:
    """One of the commands that tell a run something."""

    def tell(name: Name, folder: Folder = None, url: Url = None, as_json: Json = False) -> None:
        from consortium.server.admin_client import connect, name_in_path

        said = connect(folder, url).post(f"/v1/studies/{name_in_path(name)}/{action}")
        typer.echo(json.dumps(said) if as_json else f"run {said['run']}: {said['state']}")

    tell.__doc__ = f"{what}\n\nExample: consortium study {action} breast-cancer --dir fed"
    study.command(name=action)(tell)


_command("stop", "End a study's run for good; what was committed stays.")
_command("pause", "Let the round under way end, and ask for no other until `resume`.")
_command("resume", "Go on with a paused run.")


@study.command()
def show(name: Name, folder: Folder = None, url: Url = None, as_json: Json = False) -> None:
    """Show how a study's latest run stands: state, round, metrics, each site's last error, where the model lies.

    Example: consortium study show breast-cancer --dir fed
    """
    from consortium.server.admin_client import connect, name_in_path

    said = connect(folder, url).get(f"/v1/studies/{name_in_path(name)}")
    typer.echo(json.dumps(said) if as_json else _page(said))


@study.command(name="list")
def list_(folder: Folder = None, url: Url = None, as_json: Json = False) -> None:
    """List the submitted studies and how their latest runs stand.

    Example: consortium study list --dir fed
    """
    from consortium.server.admin_client import connect

    said = connect(folder, url).get("/v1/studies")
    if as_json:
        typer.echo(json.dumps(said))
        return
    for one in said["studies"]:
        typer.echo(f"{one['name']:<32} {one['state']:<20} {one['digest'][:16]}")
    if not said["studies"]:
        typer.echo("no study yet; submit one: consortium study submit study.toml")


def line(event: dict[str, Any]) -> str:
    """An event of a run, on one line."""
    if event["kind"] == "evaluation":
        known = [f"{name} {value:.4f}" for name, value in event["pooled"].items() if value is not None]
        return (
            f"model after round {event['round']}: {', '.join(known) or 'no metric'} at the sites' test rows"
        )
    if event["kind"] == "round":
        what = f"round {event['round']}" if event["round"] else "statistics for preprocessing"
        left_out = "".join(f"; left out: {site} ({why})" for site, why in event["left_out"].items())
        left_out += "".join(f"; {site} is {why}" for site, why in event.get("aside", {}).items())
        left_out += "".join(f"; {site} {note}" for site, note in event.get("notes", {}).items())
        void = f"; void: {event['void']}" if event["void"] else ""
        counted = f"{len(event['admitted'])} of {len(event['asked'])} answers"
        return f"{what}: {counted}, {event['seconds']:.2f} s{left_out}{void}"
    if event["kind"] == "late":
        return f"late: {event['site']}'s answer to round {event['round']} came after the round was closed"
    return _stands(event["state"], event["why"])


def _stands(state: str, why: str) -> str:
    return f"{state}: {why}" if why else state


def _page(said: dict[str, Any]) -> str:
    lines = [
        f"study       {said['study']}, {said['digest']}",
        f"run         {said['run'] or 'none yet'}  {_stands(said['state'], said['why'])}",
        f"since       {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(said['since']))}",
    ]
    if said["without"]:
        lines.append(f"without     {', '.join(said['without'])}")
    if said["run"]:
        lines.append(f"round       {said['round']} of {said['rounds']}")
    for site, one in said["sites"].items():
        error = f"; last error: {one['last_error']}" if one["last_error"] else ""
        error += f"; {one['late']} answers came late" if one["late"] else ""
        error += f"; {one['set_aside']}" if one["set_aside"] else ""
        error += f"; {one['note']}" if one["note"] else ""
        lines.append(
            f"site        {site:<24} {one['state']}; counted last in round {one['last_round']}{error}"
        )
    if said["evaluation"]:
        known = [f"{k} {v:.4f}" for k, v in said["evaluation"]["pooled"].items() if v is not None]
        lines.append(f"metrics     {', '.join(known)} (model after round {said['evaluation']['round']})")
    if told := said.get("privacy"):
        epsilon = "no bound" if told["epsilon"] is None else f"epsilon {told['epsilon']:.3f}"
        lines.append(
            f"privacy     {told['releases']} noised rounds published, all runs together: {epsilon} at delta "
            f"{told['delta']:g} per {told['unit']} ({told['relation']}; {told['sampling']})"
        )
    if said["model"]:
        lines += [f"model       {said['model']}", "", f"Next: consortium model show {said['model']}"]
    return "\n".join(lines)


def _summary(study: Any) -> dict[str, Any]:
    if study.app is not None:
        about = {
            "serverapp": study.app.serverapp,
            "clientapp": study.app.clientapp,
            "config": study.app.config,
        }
        sites = f"at least {study.cohort.min_sites} answers a round"
        return {"study": study.name, "digest": study.digest, **about, "rounds": study.rounds, "cohort": sites}
    training = study.training
    local = (
        f"{training.local_steps} steps" if training.local_steps else f"{training.local_epochs or 1} epoch(s)"
    )
    size, spare = study.cohort.size, f" and {study.cohort.spare} more" if study.cohort.spare else ""
    return {
        "study": study.name,
        "digest": study.digest,
        "task": study.task,
        "rounds": study.rounds,
        "local": f"{local} of {training.optimizer}, lr {training.lr}, batches of {training.batch_size}",
        "strategy": study.strategy.table(),
        "cohort": f"{size or 'all'} sites a round{spare}, at least {study.cohort.min_sites} answers"
        if study.cohort.sampling_rate is None
        else f"each site in each round with probability {study.cohort.sampling_rate:g}, sums divided by {size}",
        "evaluation": f"{study.metric or 'no metric'}, the {study.evaluation.select} model is kept",
        "export": study.export.formats,
    }
