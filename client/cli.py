"""The commands `consortium client ...`: what a site's operator types."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from consortium.client.audit_cli import audit
from consortium.client.data_cli import data
from consortium.client.evidence_cli import evidence
from consortium.client.ledger_cli import ledger
from consortium.client.model_cli import model
from consortium.client.options import Folder, Json, home_in
from consortium.client.review_cli import approve, reject, review
from consortium.protocol.cli import group

if TYPE_CHECKING:
    from consortium.client.home import Home

client = group()
client.add_typer(audit, name="audit")
client.add_typer(data, name="data")
client.add_typer(ledger, name="ledger")
client.add_typer(model, name="model")
for command in (review, approve, reject, evidence):
    client.command()(command)


@client.callback()
def _client() -> None:
    """Take part in a federation from a site: join once, say what may run over which data, keep the agent running.

    Example: consortium client join --dir site
    """


@client.command()
def join(
    folder: Folder,
    code_file: Annotated[
        Path | None,
        typer.Option(
            "--code-file", help="A file with the join code. Else it is asked for, or read from stdin."
        ),
    ] = None,
    proxy: Annotated[
        str | None,
        typer.Option("--proxy", help="http://HOST:PORT of an HTTP proxy. Default: the environment's."),
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option("--key-file", help="What private keys are encrypted under. Default: DIR.key"),
    ] = None,
    passphrase: Annotated[
        bool,
        typer.Option("--passphrase", help="Encrypt under a passphrase (asked, or CONSORTIUM_PASSPHRASE)."),
    ] = False,
) -> None:
    """Join a federation with the code that its admin gave you. Interrupted, the same command completes it.

    Example: consortium client join --dir site --code-file code.txt
    """
    from consortium.client.joining import join as join_federation
    from consortium.client.policy import write_template

    joined = join_federation(
        _code(code_file), folder, key_file=key_file, use_passphrase=passphrase, proxy=proxy
    )
    config = joined.home.config
    write_template(joined.home.policy_file)
    typer.echo(f"site {config.site} has joined federation {config.federation}")
    typer.echo(f"identity  {joined.identity}  (SHA-256 of the site's public key)")
    typer.echo(
        f"keys      encrypted under {config.key_file or 'your passphrase'}; keep a copy apart from {folder}"
    )
    if joined.problem:
        typer.echo(f"but the site door could not be reached yet: {joined.problem}", err=True)
    typer.echo(f"\nNext: consortium client data add NAME --source FILE --map mapping.toml --dir {folder}")
    typer.echo(f"      say what may run in {joined.home.policy_file}")
    typer.echo(f"      consortium client start --dir {folder}")


def _code(file: Path | None) -> str:
    """The join code: from a file, typed without being shown, or from stdin; never an argument, which others can see."""
    from consortium.protocol.errors import InputError

    if file is not None:
        try:
            return file.read_text(encoding="utf-8")[:8192]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: cannot be read; give the file that holds the join code") from error
    if sys.stdin.isatty():
        return str(typer.prompt("Join code", hide_input=True))
    return sys.stdin.read(8192)


@client.command()
def leave(
    folder: Folder,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Leave the federation: the server takes the site off its roster. To come back it needs a new code.

    Example: consortium client leave --dir site
    """
    from consortium.client.leaving import leave as leave_federation

    home = home_in(folder)
    name = home.config.federation
    if not yes and sys.stdin.isatty():
        typer.confirm(f"Leave federation {name}?", abort=True)
    leave_federation(home, home.lock())
    typer.echo(f"site {home.config.site} has left federation {name}; {folder} can be removed")


@client.command()
def restore(folder: Folder, as_json: Json = False) -> None:
    """Go on from an older copy of this folder, where the newest one is lost. No agent may run.

    The ledger and the decisions that it lacks come back from the server, which keeps the ledger's entries encrypted by
    this site. Of the audit log what is lost stays lost; the server notes where, and agrees that it goes on. Exit code 4
    where what was spent cannot be made whole.

    Example: consortium client restore --dir site
    """
    from consortium.client.program import held
    from consortium.client.restoring import restore as make_whole

    home = home_in(folder)
    home.config  # noqa: B018 - refuses a folder that is no client's
    with held(home):
        found = make_whole(home, home.lock())
    lost = None if found.audit is None else {"seen": found.audit.lost.text, "kept": found.audit.kept.text}
    if as_json:
        typer.echo(json.dumps({"ledger": found.ledger, "decisions": found.decisions, "lost_audit": lost}))
        return
    typer.echo(f"ledger     {found.ledger} entries came back from the server")
    typer.echo(f"decisions  {found.decisions} entries came back from the server")
    if found.audit is None:
        typer.echo("audit log  nothing is lost")
    else:
        typer.echo(
            f"audit log  what was shown after entry {found.audit.kept.sequence}, up to entry "
            f"{found.audit.lost.sequence}, is lost; the server has noted it, and it goes on in a new epoch"
        )
    typer.echo(
        f"\nNext: look through {home.policy_file} and the data sets, which are those of the older copy"
    )
    typer.echo(f"      consortium client start --dir {folder}")


@client.command()
def start(
    folder: Folder,
    print_unit: Annotated[
        bool,
        typer.Option("--print-unit", help="Print a hardened systemd unit that does this, and do nothing."),
    ] = False,
) -> None:
    """Run the agent until it is told to end (Ctrl-C, SIGTERM).

    Example: consortium client start --dir site
    """
    home = home_in(folder)
    if print_unit:
        from consortium.client.unit import systemd_unit

        typer.echo(systemd_unit(home), nl=False)
        return
    from consortium.client.program import run

    run(home)


@client.command()
def pause(folder: Folder) -> None:
    """Take no part until `resume`: work under way is ended, nothing new is begun. It lasts over restarts.

    Example: consortium client pause --dir site
    """
    _set(home_in(folder), "pause")
    typer.echo(f"paused; to take part again: consortium client resume --dir {folder}")


@client.command()
def resume(folder: Folder) -> None:
    """Take part again after `pause`.

    Example: consortium client resume --dir site
    """
    _set(home_in(folder), "resume")
    typer.echo("takes part again")


def _set(home: Home, call: str) -> None:
    """Pause or resume; where no agent runs, the next one will find it so."""
    from consortium.client.agent import paused_file
    from consortium.client.control import NotRunning, ask
    from consortium.protocol.files import write_private

    home.config  # noqa: B018 - refuses a folder that is no client's
    try:
        ask(home.socket, call)
    except NotRunning:
        if call == "pause":
            write_private(paused_file(home), b"")
        else:
            paused_file(home).unlink(missing_ok=True)


@client.command()
def status(folder: Folder, as_json: Json = False) -> None:
    """Say how the agent stands: connection, runs, data, certificate. Exit code 1 where no agent runs.

    Example: consortium client status --dir site
    """
    from consortium.client.agent import paused_file
    from consortium.client.control import NotRunning, ask

    home = home_in(folder)
    config = home.config
    try:
        found = ask(home.socket, "status")
    except NotRunning:
        if not as_json:
            raise
        off = {"running": False, "site": config.site, "federation": config.federation}
        typer.echo(json.dumps(off | {"paused": paused_file(home).exists()}))
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps(found))
        return
    for line in _lines(found):
        typer.echo(line)


def _lines(found: dict[str, Any]) -> list[str]:
    when = _time(found["since"])
    how = f"connected since {when}" if found["connected"] else f"not connected since {when}: {found['error']}"
    lines = [
        f"site         {found['site']} in federation {found['federation']}",
        f"server       {found['server']}: {how}",
        f"taking part  {'no, paused' if found['paused'] else 'yes'}",
        f"data         {', '.join(found['data']) or 'none; see: consortium client data add'}",
        f"certificate  until {_time(found['certificate_expires'])}, renewed by itself",
        f"sandbox      {found['sandbox']}",
    ]
    for name, run in found["runs"].items():
        why = f": {run['why']}" if run["why"] else ""
        study = f" of study {run['study']}" if run["study"] else ""
        lines.append(f"run          {name}{study}: {run['kind']} of round {run['round']} {run['state']}{why}")
    return lines


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
