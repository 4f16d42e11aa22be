"""The federation's models at a site: pulled from the site door, kept in the site's folder, used while that is right.

    models/NAME/2/              a bundle, as the server has it
    models/NAME/standing.json   what the server said last of the version that is used here (`protocol/delivery.py`)
    models/NAME/.2.part/        a pull that was interrupted; the next one goes on from there

Nothing of a bundle is parsed here: every byte is compared with the server's signed statement. Whoever opens a bundle
then (`consortium model ...`, a program of its own) verifies its own signature. What is pulled, approved, and heard to
be withdrawn is in the site's audit log before it counts.
"""

from __future__ import annotations

import json
import logging
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from consortium.client import fetching
from consortium.client.audit import LONGEST, Note
from consortium.client.home import Home
from consortium.protocol import wire
from consortium.protocol.connection import Connection, StatusError
from consortium.protocol.delivery import MODEL_NAME, Delivery, approval, verified
from consortium.protocol.errors import InputError, IntegrityError, RefusedError
from consortium.protocol.exclusive import alone
from consortium.protocol.files import private_folder, sweep, write_private
from consortium.protocol.signing import APPROVAL, sign

STANDING, WITHDRAWN = "standing.json", "withdrawn.json"
_log = logging.getLogger("consortium.agent")


def folder_of(home: Home, name: str) -> Path:
    """Where a model's versions lie.

    Raises:
        InputError: no model has such a name.
    """
    if not MODEL_NAME.fullmatch(name):
        raise InputError(f"got {name[:80]!r}; a model's name would be right, for example breast-cancer")
    return home.folder / "models" / name


def pull(
    home: Home,
    connection: Connection,
    name: str,
    note: Note,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Delivery:
    """Fetch the champion of a model, unless it is here; what an interrupted pull left is used.

    progress: is told how many bytes of how many are here. note: writes to the audit log.

    Raises:
        InputError: there is no such model; StatusError and the like: the server cannot be reached.
        IntegrityError: it was withdrawn, or what came is not what the server signed; the file is named.
    """
    folder, said = _meant(home, connection, name, 0)
    fetching.fetch_missing(connection, folder, said, progress)
    with alone(folder):
        # While it was fetched, which may be long, it may have been withdrawn.
        document, now = _asked(home, connection, name, said.version)
        _refuse_withdrawn(now)
        note("pulled", _about(now))
        fetching.put(folder, said)
        write_private(folder / STANDING, json.dumps(document).encode())
        sweep(folder, STANDING, WITHDRAWN)
    return now


def _about(said: Delivery) -> dict[str, Any]:
    return {"model": said.model, "version": said.version, "bundle": said.bundle}


def fetch(home: Home, connection: Connection, name: str, version: int) -> tuple[Path, Delivery]:
    """Fetch a version to look at, -1 for the candidate, without using it: its folder, and what the server says of it.

    Raises: as `pull`.
    """
    folder, said = _meant(home, connection, name, version)
    fetching.fetch_missing(connection, folder, said, lambda *_: None)
    with alone(folder):
        return fetching.put(folder, said), said


def approve(
    home: Home, connection: Connection, key: Ed25519PrivateKey, said: Delivery, note: Note
) -> list[str]:
    """Sign a version with the site's identity key, and tell the server; the sites that have approved it then."""
    config = home.config
    text = approval(config.federation, config.site, said.bundle)
    note("model approved", _about(said))
    signature = sign(key, APPROVAL, text).hex()
    about = {"name": said.model, "version": said.version, "signature": signature}
    document = connection.request("POST", wire.MODEL_APPROVALS, {"format": wire.FORMAT, **about}).document()
    return [str(one) for one in wire.field(document, "approved", list)]


def _meant(home: Home, connection: Connection, name: str, version: int) -> tuple[Path, Delivery]:
    """Where a model's versions lie, and what the server says of the one that is meant, if it may be used."""
    place = folder_of(home, name)
    home.accept_trust(connection.request("GET", wire.TRUST).document())
    _, said = _asked(home, connection, name, version)
    _refuse_withdrawn(said)
    private_folder(home.folder / "models")
    return private_folder(place), said


def _refuse_withdrawn(said: Delivery) -> None:
    if said.withdrawn:
        raise IntegrityError(
            f"{said.model}@{said.version}: was withdrawn ({said.withdrawn}); it is not used here"
        )


def _asked(home: Home, connection: Connection, name: str, version: int) -> tuple[dict[str, Any], Delivery]:
    """What the server says of a version now, 0 for the champion: as it came, and read."""
    nonce = secrets.token_hex(32)
    question = {"format": wire.FORMAT, "version": version, "nonce": nonce}
    try:
        document = connection.request("POST", wire.MODELS + quote(name), question).document()
    except StatusError as error:
        if error.status == wire.NOT_SOUND:
            raise IntegrityError(str(error)) from error
        if error.status in (400, 404):
            raise InputError(f"{error}; ask the federation's admin") from error
        raise
    config = home.config
    return document, verified(document, home.trust().keys, config.federation, config.site, name, nonce)


def standing(home: Home, name: str) -> Delivery:
    """What the server said last of the version that is used here, whether that is good still or not.

    Raises:
        InputError: the model was not pulled.
        IntegrityError: it is not what the server signed.
    """
    path = folder_of(home, name) / STANDING
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: '{name}' is not here; type: consortium client model pull {name}"
        ) from error
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path}: is damaged; pull the model again") from error
    if not isinstance(document, dict):
        raise IntegrityError(f"{path}: is damaged; pull the model again")
    config = home.config
    try:
        return verified(document, home.trust().keys, config.federation, config.site, name)
    except IntegrityError as error:
        raise IntegrityError(f"{path}: {error}; pull the model again") from error


def usable(home: Home, name: str, now: float) -> Path:
    """The folder of the bundle that may be used at this moment.

    Raises:
        IntegrityError: the model was withdrawn.
        RefusedError: the server has not been reached for longer than its last word is good.
        InputError: the model was not pulled.
    """
    said = standing(home, name)
    place = folder_of(home, name) / str(said.version)
    if said.withdrawn:
        raise IntegrityError(f"{place}: this model was withdrawn ({said.withdrawn}); pull another version")
    if now > said.until:
        day = time.strftime("%Y-%m-%d %H:%M", time.gmtime(said.until))
        raise RefusedError(
            f"{name}@{said.version}: the server was not reached since, and its last word was good until {day} UTC; "
            f"start the agent, or type: consortium client model pull {name}"
        )
    if not place.is_dir():
        raise InputError(f"{place}: is missing; type: consortium client model pull {name}")
    return place


def check(home: Home, connection: Connection, note: Note) -> None:
    """Ask the server about every version that is used here, and keep what it says; a withdrawn one is marked so.

    note: writes to the audit log that one was.

    Raises:
        ConsortiumError: the server cannot be reached.
    """
    for path in sorted((home.folder / "models").glob(f"*/{STANDING}")):
        try:
            with alone(path.parent):
                _check(home, connection, path.parent, note)
        except (InputError, IntegrityError) as error:  # it costs this model alone
            _log.error("model %s: %s", path.parent.name, error)


def _check(home: Home, connection: Connection, folder: Path, note: Note) -> None:
    name = folder.name
    before = standing(home, name)
    document, said = _asked(home, connection, name, before.version)
    if (said.version, said.bundle) != (before.version, before.bundle):
        raise IntegrityError(f"the server's version {before.version} is another bundle now")
    if said.withdrawn:
        if not before.withdrawn:
            note("withdrawn", _about(said) | {"why": said.withdrawn[:LONGEST]})
        _withdraw(folder / str(said.version), said)
    write_private(folder / STANDING, json.dumps(document).encode())
    sweep(folder, STANDING, WITHDRAWN)
    if said.withdrawn and not before.withdrawn:
        _log.warning("model %s@%d: was withdrawn: %s", name, said.version, said.withdrawn)


def _withdraw(place: Path, said: Delivery) -> None:
    """Let the bundle itself say so, wherever it is opened."""
    if place.is_dir():
        marker = {"format": 1, "why": said.withdrawn, "at": said.at}
        write_private(place / WITHDRAWN, json.dumps(marker).encode(), place.parent)


def program(*words: object) -> list[str]:
    """The command line of `consortium model ...`: the program that opens bundles, beside this one."""
    main = "from consortium.protocol.cli import main; main()"
    return [sys.executable, "-P", "-c", main, "model", *map(str, words)]
