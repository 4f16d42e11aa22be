"""The commands `consortium server ...`: the program that an admin runs, and its roster."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from consortium.protocol.cli import group

server = group()

NewFolder = Annotated[Path, typer.Option("--dir", help="The server's own folder.")]
Folder = Annotated[
    Path | None,
    typer.Option("--dir", help="The server's folder, on its machine. Else CONSORTIUM_SERVER_DIR, or here."),
]
Url = Annotated[str | None, typer.Option("--server", help="https://HOST:PORT of an admin door elsewhere.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document.")]


@server.callback()
def _server() -> None:
    """Run the server of a federation, and decide who belongs to it.

    Example: consortium server init --dir fed --name lung --host fed.example.org
    """


@server.command()
def init(
    folder: NewFolder,
    name: Annotated[str, typer.Option("--name", help="The federation's name, such as lung-cancer.")],
    host: Annotated[
        str, typer.Option("--host", help="The name or address by which sites reach this server.")
    ],
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Of the site door.")] = 9440,
    admin_port: Annotated[int, typer.Option("--admin-port", min=0, max=65535, help="On loopback.")] = 9441,
    enrol_port: Annotated[int, typer.Option("--enrol-port", min=0, max=65535, help="Of enrolment.")] = 9442,
    bind: Annotated[str, typer.Option("--bind", help="The address that sites' doors listen on.")] = "0.0.0.0",  # noqa: S104 - sites come from elsewhere
    key_file: Annotated[
        Path | None,
        typer.Option("--key-file", help="What private keys are encrypted under. Default: DIR.key"),
    ] = None,
    passphrase: Annotated[
        bool,
        typer.Option("--passphrase", help="Encrypt under a passphrase (asked, or CONSORTIUM_PASSPHRASE)."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a federation: its root, its certificates and keys, its configuration, a token for you.

    Example: consortium server init --dir fed --name lung --host fed.example.org
    """
    from consortium.server.federation import Federation

    before = (folder / "admin.token").exists()  # it is made last
    made = Federation.init(
        folder,
        name=name,
        host=host,
        port=port,
        admin_port=admin_port,
        enrol_port=enrol_port,
        bind=bind,
        key_file=key_file,
        use_passphrase=passphrase,
        now=time.time(),
    )
    if as_json:
        said = {
            "federation": name,
            "dir": str(folder),
            "root": made.root_fingerprint,
            "host": host,
            "port": port,
        }
        typer.echo(json.dumps(said))
        return
    kept = "your passphrase" if not made.config.key_file else made.config.key_file
    typer.echo(f"federation {name}: {'was made before, and is whole' if before else 'made'} in {folder}")
    typer.echo(f"root       {made.root_fingerprint}  (SHA-256; sites compare it)")
    typer.echo(f"keys       encrypted under {kept}; keep a copy of it and of {folder}, apart from each other")
    typer.echo(
        "root.key   signs successors only: move it off this machine when you like, put it back to rotate"
    )
    typer.echo(f"\nNext: consortium server start --dir {folder}")


@server.command()
def start(folder: NewFolder) -> None:
    """Run the server until it is told to end (Ctrl-C, SIGTERM). Unfinished runs go on.

    Example: consortium server start --dir fed
    """
    import logging

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    from consortium.server.serve import serve

    serve(folder)


@server.command()
def invite(
    site: Annotated[str, typer.Argument(help="The site's name: small letters, digits, hyphens.")],
    hours: Annotated[float, typer.Option("--hours", help="How long the code can be used.")] = 72.0,
    folder: Folder = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Make a one-time code with which a site joins. It is printed once; hand it over by a safe way.

    Example: consortium server invite hospital-1 --dir fed
    """
    from consortium.server.admin_client import connect, name_in_path

    said = connect(folder, url).post(f"/v1/sites/{name_in_path(site)}/invite", hours=hours)
    if as_json:
        typer.echo(json.dumps(said))
        return
    typer.echo(said["code"])
    until = time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(said["expires"]))
    typer.echo(f"\nFor {site}, once, until {until}. There: consortium client join --dir DIR", err=True)


@server.command()
def sites(folder: Folder = None, url: Url = None, as_json: Json = False) -> None:
    """List the sites: who belongs to the federation, who is connected.

    Example: consortium server sites --dir fed
    """
    from consortium.server.admin_client import connect

    said = connect(folder, url).get("/v1/sites")
    typer.echo(json.dumps(said) if as_json else _sites(said["sites"]))


@server.command()
def revoke(
    site: Annotated[str, typer.Argument(help="The site's name.")],
    folder: Folder = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Shut a site out: its certificates and connections end now. It may be invited again later.

    Example: consortium server revoke hospital-1 --dir fed
    """
    from consortium.server.admin_client import connect, name_in_path

    said = connect(folder, url).post(f"/v1/sites/{name_in_path(site)}/revoke")
    typer.echo(json.dumps(said) if as_json else f"{site}: revoked")


@server.command()
def rotate(
    sites: Annotated[
        bool, typer.Option("--sites", help="Ask every site to renew its certificate instead.")
    ] = False,
    folder: Folder = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Replace the server's certificate, issuing authority and instruction key, signed by the root. Nobody joins anew.

    Example: consortium server rotate --dir fed
    """
    from consortium.server.admin_client import connect

    said = connect(folder, url).post("/v1/rotate", sites=sites)
    if as_json:
        typer.echo(json.dumps(said))
    elif sites:
        typer.echo(f"asked to renew: {', '.join(said['renewing']) or 'nobody, no site has joined'}")
    else:
        typer.echo(f"rotated; the sites take the new keys with their next request (serial {said['trust']})")


@server.command()
def token(
    name: Annotated[str, typer.Argument(help="Whose it is, for the log.")],
    role: Annotated[str, typer.Option("--role", help="viewer, researcher or admin.")] = "viewer",
    folder: Folder = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Make a token for the admin door, printed once. A name that has one gets another in its place.

    Example: consortium server token alice --role researcher --dir fed
    """
    from consortium.server.admin_client import connect, name_in_path

    said = connect(folder, url).post(f"/v1/tokens/{name_in_path(name)}", role=role)
    typer.echo(json.dumps(said) if as_json else said["token"])


@server.command()
def status(folder: Folder = None, url: Url = None, as_json: Json = False) -> None:
    """Say how the server stands: doors, sites, runs.

    Example: consortium server status --dir fed
    """
    from consortium.server.admin_client import connect

    said = connect(folder, url).get("/v1/status")
    if as_json:
        typer.echo(json.dumps(said))
        return
    doors = said["doors"]
    typer.echo(f"federation  {said['federation']}, root {said['root']}")
    typer.echo(
        f"doors       sites {doors['site']}, admin {doors['admin']}, enrolment {doors['enrolment'] or 'closed'}"
    )
    typer.echo(_sites(said["sites"]))
    for run in said["runs"]:
        why = f": {run['why']}" if run["why"] else ""
        typer.echo(f"run         {run['run']}  {run['state']}{why}, round {run['round']} of {run['rounds']}")


def _sites(sites: list[dict[str, Any]]) -> str:
    lines = []
    for one in sites:
        here = "paused" if one["paused"] else "connected" if one["connected"] else "not connected"
        state = f"{one['status']}, {here}" if one["status"] == "joined" else one["status"]
        since = f" since {_when(one['seen'])}" if one["seen"] else ""
        expires = (
            f"; certificate until {_when(one['certificate_expires'])}" if one["certificate_expires"] else ""
        )
        error = f"; last error: {one['last_error']}" if one["last_error"] else ""
        lines.append(f"site        {one['name']:<24} {state}{since}{expires}{error}")
    return "\n".join(lines) or "no site yet; invite one: consortium server invite SITE"


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
