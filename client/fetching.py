"""The files of a model's version, fetched from the site door: resumed, compared byte for byte, put in place."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from urllib.parse import quote

from consortium.protocol import wire
from consortium.protocol.connection import Connection, Reply, StatusError
from consortium.protocol.delivery import Delivery, File
from consortium.protocol.errors import ConsortiumError, InputError, IntegrityError
from consortium.protocol.files import private_folder, sync_folder


def _part(folder: Path, said: Delivery) -> Path:
    return folder / f".{said.version}.part"


def _missing(place: Path, said: Delivery) -> dict[str, File]:
    """The files that are not in a folder as they should be."""
    return {
        name: one
        for name, one in said.files.items()
        if not (place / name).is_file() or _digest(place / name) != one.sha256
    }


def fetch_missing(
    connection: Connection, folder: Path, said: Delivery, progress: Callable[[int, int], None]
) -> None:
    """Fetch what is not here of a version, beside it. progress: is told how many bytes of how many are here.

    Raises:
        InputError: there is no room. IntegrityError: what came is not what the server signed. ConsortiumError: the
            connection broke; what came is kept.
    """
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


def put(folder: Path, said: Delivery) -> Path:
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
    """Fetch what is missing of a file; gives how many bytes came, those that were here first. What was here may be no
    part of it, as a disk may have kept a file's length and not its bytes: then all of it is fetched."""
    held, right = yield from _continued(connection, route, one, path)
    if not right and held:
        yield -one.size
        _, right = yield from _continued(connection, route, one, path)
    if not right:
        raise IntegrityError(f"{path}: is not what the server signed (SHA-256 differs); pull it again")


def _continued(
    connection: Connection, route: str, one: File, path: Path
) -> Generator[int, None, tuple[int, bool]]:
    """As `_fetch`, from what is here on: how many bytes were here, and whether the file is right; else it is gone."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "r+b") as file:
        sha, held = hashlib.sha256(), 0
        while piece := file.read(min(wire.CHUNK, one.size - held)):
            sha.update(piece)
            held += len(piece)
        before = held
        yield held
        file.truncate(held)
        if held < one.size:
            reply = _opened(connection, f"{route}?from={held}")
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
    right = sha.hexdigest() == one.sha256
    if not right:
        path.unlink()
    return before, right


def _opened(connection: Connection, route: str) -> Reply:
    try:
        return connection.request("GET", route)
    except StatusError as error:
        if error.status == wire.NOT_SOUND:  # it was withdrawn meanwhile, or damaged
            raise IntegrityError(str(error)) from error
        raise


def _digest(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(wire.CHUNK):
            sha.update(piece)
    return sha.hexdigest()
