"""The federation's models at a site: pulled from the site door, kept in the site's folder, used while that is right.

    models/NAME/2/              a bundle, as the server has it
    models/NAME/standing.json   what the server said last of the version that is used here (`protocol/delivery.py`)
    models/NAME/.2.part/        a pull that was interrupted; the next one goes on from there

Nothing of a bundle is parsed here: every byte is compared with the server's signed statement. Whoever opens a bundle
then (`consortium model ...`, a program of its own) verifies its own signature. What is pulled, approved, and heard to
be withdrawn is in the site's audit log before it counts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from consortium.client.audit import LONGEST, Note
from consortium.client.home import Home
from consortium.protocol import wire
from consortium.protocol.connection import Connection, StatusError
from consortium.protocol.delivery import MODEL_NAME, Delivery, File, approval, verified
from consortium.protocol.errors import ConsortiumError, InputError, IntegrityError, RefusedError
from consortium.protocol.exclusive import alone
from consortium.protocol.files import private_folder, sync_folder, write_private
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
    _fetch_missing(connection, folder, said, progress)
    with alone(folder):
        # While it was fetched, which may be long, it may have been withdrawn.
        document, now = _asked(home, connection, name, said.version)
        _refuse_withdrawn(now)
        _put(folder, said)
        note("pulled", _about(now))
        write_private(folder / STANDING, json.dumps(document).encode())
    return now


def _about(said: Delivery) -> dict[str, Any]:
    return {"model": said.model, "version": said.version, "bundle": said.bundle}


def fetch(home: Home, connection: Connection, name: str, version: int) -> tuple[Path, Delivery]:
    """Fetch a version to look at, -1 for the candidate, without using it: its folder, and what the server says of it.

    Raises: as `pull`.
    """
    folder, said = _meant(home, connection, name, version)
    _fetch_missing(connection, folder, said, lambda *_: None)
    with alone(folder):
        return _put(folder, said), said


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
        if error.status in (400, 404):
            raise InputError(f"{error}; ask the federation's admin") from error
        raise
    config = home.config
    return document, verified(document, home.trust().keys, config.federation, config.site, name, nonce)


def _part(folder: Path, said: Delivery) -> Path:
    return folder / f".{said.version}.part"


def _missing(place: Path, said: Delivery) -> dict[str, File]:
    """The files that are not in a folder as they should be."""
    return {
        name: one
        for name, one in said.files.items()
        if not (place / name).is_file() or _digest(place / name) != one.sha256
    }


def _fetch_missing(
    connection: Connection, folder: Path, said: Delivery, progress: Callable[[int, int], None]
) -> None:
    """Fetch what is not here of a version, beside it."""
    missing, part = _missing(folder / str(said.version), said), private_folder(_part(folder, said))
    whole = sum(one.size for one in missing.values())
    disk = os.statvfs(part)
    if whole > disk.f_bavail * disk.f_frsize:
        raise InputError(f"{part}: there is no room for {whole} bytes on this disk")
    for path in part.iterdir():
        if path.name not in missing:
            path.unlink()
    done = 0
    for name, one in missing.items():
        route = f"{wire.MODELS}{quote(said.model)}/{said.version}/{name}"
        for count in _fetch(connection, route, one, part / name):
            done += count
            progress(done, whole)


def _put(folder: Path, said: Delivery) -> Path:
    """Put what was fetched into the version's folder, file by file: whoever uses that finds it at every moment."""
    place, part = folder / str(said.version), _part(folder, said)
    if not place.is_dir():
        sync_folder(part)
        part.rename(place)
    else:
        for path in part.iterdir():
            path.replace(place / path.name)
        part.rmdir()
        for path in place.iterdir():
            if path.name not in said.files:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        sync_folder(place)
    sync_folder(folder)
    return place


def _fetch(connection: Connection, route: str, one: File, path: Path) -> Iterator[int]:
    """Fetch what is missing of a file; gives how many bytes came, those that were here first."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "r+b") as file:
        sha, held = hashlib.sha256(), 0
        while piece := file.read(min(wire.CHUNK, one.size - held)):
            sha.update(piece)
            held += len(piece)
        yield held
        file.truncate(held)
        if held < one.size:
            reply = connection.request("GET", f"{route}?from={held}")
            while held < one.size and (piece := reply.read(min(wire.CHUNK, one.size - held))):
                file.write(piece)
                sha.update(piece)
                held += len(piece)
                yield len(piece)
            reply.close()
        file.flush()
        os.fsync(file.fileno())
    if held < one.size:
        raise ConsortiumError(f"{path.name}: the connection broke after {held} bytes; type the same again")
    if sha.hexdigest() != one.sha256:
        path.unlink()
        raise IntegrityError(f"{path}: is not what the server signed (SHA-256 differs); pull it again")


def _digest(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(wire.CHUNK):
            sha.update(piece)
    return sha.hexdigest()


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
