"""The commands that serve a model: `consortium model serve | token`."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from consortium.server.serving.host import Settings

Dir = Annotated[
    Path, typer.Option("--dir", help="The serving program's folder: tokens, certificate, records.")
]


def add_to(app: typer.Typer) -> None:
    """Add the commands to `consortium model`."""
    app.command()(serve)
    app.command()(export)
    app.command()(token)


def serve(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="A registry: its champions. Or the folder of one exported model."
        ),
    ],
    folder: Dir,
    host: Annotated[str, typer.Option("--host", help="The address or name to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Of REST; 0: a free one.")] = 8443,
    grpc_port: Annotated[
        int, typer.Option("--grpc-port", min=-1, max=65535, help="Of gRPC; 0: a free one, -1: none.")
    ] = 8444,
    cert: Annotated[
        Path | None,
        typer.Option("--cert", help="The certificate chain (PEM); made in DIR where it is left out."),
    ] = None,
    key: Annotated[Path | None, typer.Option("--key", help="Its private key (PEM).")] = None,
    client_ca: Annotated[
        Path | None,
        typer.Option("--client-ca", help="Callers must show a certificate by this authority (PEM)."),
    ] = None,
    root: Annotated[
        list[str] | None,
        typer.Option(
            "--root", help="Fingerprint of the root of a federation whose models may be served; repeatable."
        ),
    ] = None,
    unsigned: Annotated[bool, typer.Option("--unsigned", help="Serve a simulation's model too.")] = False,
    keep_features: Annotated[
        int | None,
        typer.Option(
            "--keep-features",
            metavar="DAYS",
            min=1,
            max=3650,
            help="Keep the features of each prediction, encrypted, for so many days; by default none is kept.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Say where it listens as one JSON line.")] = False,
) -> None:
    """Serve predictions over TLS: Open Inference Protocol, REST and gRPC, for whoever has a token.

    A registry is followed: a promotion, a rollback or a withdrawal counts within a second, and loses no request.

    Example: consortium model serve models --dir serving --root 3f1c...
    """
    from consortium.protocol.errors import InputError
    from consortium.server import seal
    from consortium.server.serving.host import Settings
    from consortium.server.serving.host import serve as run

    if (cert is None) != (key is None):
        raise InputError("--cert and --key belong together; give both, or neither")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    settings = Settings(
        path=path,
        folder=folder,
        host=host,
        port=port,
        grpc_port=None if grpc_port < 0 else grpc_port,
        certificate=(cert, key) if cert is not None and key is not None else None,
        client_ca=client_ca,
        roots=seal.fingerprints(tuple(root or ())),
        unsigned=unsigned,
        keep_features=keep_features,
    )
    run(settings, lambda about: _say(settings, about, as_json))


def _say(settings: Settings, about: dict[str, Any], as_json: bool) -> None:
    """Where it listens, and what is served there."""
    if as_json:
        typer.echo(json.dumps(about))
        return
    for name, version in about["models"].items():
        typer.echo(f"{name}: " + (f"version {version}" if version else "no version is served; promote one"))
    typer.echo(f"REST   {about['rest']}")
    if about["grpc"]:
        typer.echo(f"gRPC   {about['grpc']}")
    if settings.certificate is None:
        typer.echo(f"root   {settings.folder / 'root.pem'}, which callers trust")
    if settings.keep_features is not None:
        typer.echo(f"the features of every prediction are kept for {settings.keep_features} days, encrypted")
    sys.stdout.flush()


def export(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="An exported model, or REGISTRY/NAME[@VERSION].")
    ],
    to: Annotated[str, typer.Option("--to", help="triton, or kserve.")],
    out: Annotated[Path, typer.Option("--out", help="The new folder to write.")],
    uri: Annotated[str, typer.Option("--uri", help="For kserve: where the cluster finds the folder.")] = "",
    root: Annotated[
        str | None, typer.Option("--root", help="Fingerprint of the root that must have signed it.")
    ] = None,
    unsigned: Annotated[bool, typer.Option("--unsigned", help="Take a simulation's model too.")] = False,
) -> None:
    """Write a verified model for an engine past one machine: a Triton model repository, and KServe's service over it.

    Example: consortium model export models/lung --to kserve --out lung --uri pvc://models/lung --root 3f1c...
    """
    import time

    from consortium.protocol.errors import InputError
    from consortium.server import seal
    from consortium.server.serving import scale_out
    from consortium.server.serving.registry import locate

    if to not in ("triton", "kserve"):
        raise InputError(f"--to: got {to[:40]!r}; triton or kserve would be right")
    roots = seal.fingerprints(() if root is None else (root,))
    files = scale_out.files(locate(str(path), time.time), roots, unsigned, uri if to == "kserve" else None)
    scale_out.write(files, out)
    for name in sorted(files):
        typer.echo(str(out / name))


def token(
    name: Annotated[str, typer.Argument(help="Whose token: a person's or a program's name.")],
    folder: Dir,
    role: Annotated[
        str, typer.Option("--role", help="caller: predictions. monitor: metrics and lineage. admin: both.")
    ] = "caller",
    remove: Annotated[bool, typer.Option("--remove", help="Make that name's token worthless.")] = False,
) -> None:
    """Make a token, which is printed once and kept as its digest, in place of that name's earlier one.

    Example: consortium model token ward-3 --dir serving
    """
    from consortium.server.serving import tokens

    if remove:
        tokens.remove(folder, name)
        typer.echo(f"the token of '{name}' is worthless now")
        return
    typer.echo(tokens.new(folder, name, role))
