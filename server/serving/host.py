"""The program that serves: a bundle or a registry behind two doors, until it is told to end.

DIR/tokens.json            who may ask
DIR/server.pem root.pem    its certificate, made where none is given, and the root that callers trust
DIR/records/               audit and feedback
DIR/features/              features of predictions, where they are kept
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.loops.auto import auto_loop_factory

from consortium.protocol import credentials
from consortium.protocol.errors import ConsortiumError, RefusedError
from consortium.protocol.files import private_folder
from consortium.server import seal
from consortium.server.serving import engine, features, listening, registry, rpc, tokens, web
from consortium.server.serving.bounded import BoundedProtocol, cut_off_late
from consortium.server.serving.counters import Counters
from consortium.server.serving.desk import Desk
from consortium.server.serving.engine import Engine, Loaded, Offered
from consortium.server.serving.registry import Registry
from consortium.server.serving.service import Service
from consortium.server.serving.versions import Shelf

LOOK_EVERY = 0.2
"""Seconds between two looks at the registry and the tokens."""
MOST_CONNECTIONS = 512
EXPIRE_EVERY = 60.0
"""Seconds between two looks for features that have had their time."""
_ENDING = 10
"""Seconds that requests under way have, once the program is told to end."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """path: a bundle or a registry. folder: the program's own. A port of 0 takes a free one; grpc_port None opens none.

    certificate: (chain, key) as PEM files, None to make them. client_ca: callers must show a certificate by it.
    roots: fingerprints of federations whose models are served. unsigned: a simulation's model too. keep_features: days
    that the features of predictions are kept, None for not at all.
    """

    path: Path
    folder: Path
    host: str = "127.0.0.1"
    port: int = 8443
    grpc_port: int | None = 8444
    certificate: tuple[Path, Path] | None = None
    client_ca: Path | None = None
    roots: tuple[str, ...] = ()
    unsigned: bool = False
    keep_features: int | None = None


def serve(settings: Settings, ready: Callable[[dict[str, Any]], None]) -> None:
    """Serve until SIGTERM or SIGINT. ready: told where, once the doors are open.

    Raises:
        InputError, IntegrityError, RefusedError: a setting is wrong, or what should be served is refused.
    """
    with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:  # uvloop's where it is installed
        runner.run(_serve(settings, ready))


async def _serve(settings: Settings, ready: Callable[[dict[str, Any]], None]) -> None:
    private_folder(settings.folder)
    watcher = Watcher(settings)
    service = Service(
        Engine(watcher.first()),
        Desk(settings.folder / "records", time.time),
        Counters(),
        tokens.read(settings.folder),
    )
    if not service.callers:
        raise RefusedError(
            f"{settings.folder}: nobody may ask yet; make a token first: consortium model token NAME --dir "
            f"{settings.folder}"
        )
    context, grpc_credentials = listening.tls(
        settings.folder, settings.host, settings.certificate, settings.client_ca
    )
    if settings.keep_features is not None:
        lock = credentials.lock_at(listening.key_file(settings.folder))
        service.features = features.Features(settings.folder, lock, time.time, settings.keep_features)
    config = uvicorn.Config(
        web.app(service), http=BoundedProtocol, ws="none", lifespan="off", log_config=None, access_log=False,
        proxy_headers=False, server_header=False, limit_concurrency=MOST_CONNECTIONS, timeout_keep_alive=30,
        timeout_graceful_shutdown=_ENDING, ssl_context_factory=lambda *_: context,
    )  # fmt: skip
    rest = listening.listen(settings.host, settings.port)
    about = {"rest": f"https://{listening.bracketed(settings.host)}:{rest.getsockname()[1]}", "grpc": None}
    door = None
    if settings.grpc_port is not None:
        address = f"{listening.bracketed(settings.host)}:{settings.grpc_port}"
        door, port = rpc.server(service, address, grpc_credentials, MOST_CONNECTIONS)
        await door.start()
        about["grpc"] = f"{listening.bracketed(settings.host)}:{port}"
    server = _Server(config)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, server.end)
    cutting = asyncio.create_task(cut_off_late(server.server_state.connections))
    watching = asyncio.create_task(_watch(watcher, service, settings.folder))
    expiring = asyncio.create_task(_expire(settings.folder))
    telling = asyncio.create_task(_tell(server, about, service, ready))
    try:
        await server.serve([rest])
    finally:
        for task in (cutting, watching, expiring, telling):
            task.cancel()
        if door is not None:
            await door.stop(_ENDING)
        if service.features is not None:
            service.features.close()


class _Server(uvicorn.Server):
    """uvicorn's, ended by us: its own handlers raise the signal again in the end, and the exit code tells of that."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield

    def end(self) -> None:
        """Answer what is under way, take nothing new."""
        self.should_exit = True


async def _tell(
    server: uvicorn.Server, about: dict[str, Any], service: Service, ready: Callable[[dict[str, Any]], None]
) -> None:
    while not server.started:
        await asyncio.sleep(0.01)
    models = {name: one.default and one.default.version for name, one in service.engine.offered.items()}
    ready({**about, "models": models})


async def _watch(watcher: Watcher, service: Service, folder: Path) -> None:
    """Follow the registry and the tokens. What is damaged is told and changes nothing, but a withdrawal counts."""
    _mark(service)
    told = ""
    stamp = _stamp(folder / tokens.FILE)
    while True:
        await asyncio.sleep(LOOK_EVERY)
        try:
            offered = await asyncio.to_thread(watcher.again)
            if offered is not None:
                service.engine.offered = offered
                _mark(service)
            if (now := _stamp(folder / tokens.FILE)) != stamp:
                service.callers, stamp = tokens.read(folder), now
            told = ""
        except (ConsortiumError, OSError) as error:
            if str(error) != told:
                _log.error("%s; what was served before goes on", error)
                told = str(error)


async def _expire(folder: Path) -> None:
    """Delete features that have had their time, those of an earlier start that kept some too."""
    while True:
        try:
            await asyncio.to_thread(features.expire, folder, time.time)
        except ConsortiumError as error:
            _log.error("%s; it is tried again in a minute", error)
        await asyncio.sleep(EXPIRE_EVERY)


def _mark(service: Service) -> None:
    service.counters.live.clear()
    for name, one in service.engine.offered.items():
        if one.default is not None:
            service.counters.live.labels(name, one.default.version, one.default.digest).set(1)
            _log.info("%s: version %s is served, bundle %s", name, one.default.version, one.default.digest)
        else:
            _log.warning("%s: no version is served", name)


class Watcher:
    """What should be served, from a bundle's folder or a registry."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._path = registry.locate(str(settings.path), time.time)
        self._registry = Registry(self._path, time.time) if (self._path / registry.STATE).exists() else None
        self._seen: object = None
        self._loaded: dict[tuple[str, int], Loaded] | None = None

    def first(self) -> dict[str, Offered]:
        """All of it.

        Raises:
            InputError, IntegrityError: it is not there, or refused.
        """
        if self._registry is not None:
            self._seen = _stamp(self._path / registry.STATE)
            return self._offered()
        version = (
            self._path.name if self._path.name.isdecimal() else "1"
        )  # in a folder of versions: its number
        one = engine.load(self._path, "", version, self._settings.roots, self._settings.unsigned)
        name = str(one.contract["study"]["name"])
        one = replace(one, name=name)
        return {name: Offered(one, {one.version: one})}

    def again(self) -> dict[str, Offered] | None:
        """What should be served now, if that may be something else than before."""
        if self._registry is None:
            try:
                seal.refuse_withdrawn(self._path)
            except ConsortiumError:
                name = str(json.loads((self._path / seal.CONTRACT).read_bytes())["study"]["name"])
                return {name: Offered(None, {})}
            return None
        stamp = _stamp(self._path / registry.STATE)
        if stamp == self._seen:
            return None
        found = self._offered()
        self._seen = stamp
        return found

    def _offered(self) -> dict[str, Offered]:
        """By model the champion, and the candidate for whoever names it; versions that are loaded stay."""
        assert self._registry is not None
        found, kept = {}, {}
        for name, shelf in self._registry.state().models.items():
            numbers = [one for one in (shelf.champion, shelf.candidate) if one is not None]
            versions = {}
            for number in numbers:
                try:
                    if number != shelf.champion and not self._approved(name, shelf, number):
                        continue  # a candidate waits for its approvals
                    kept[name, number] = versions[str(number)] = self._version(name, shelf, number)
                except ConsortiumError as error:
                    if self._loaded is None:
                        raise
                    _log.error("%s; it is not served", error)
            found[name] = Offered(versions.get(str(shelf.champion)), versions)
        self._loaded = kept
        return found

    def _approved(self, name: str, shelf: Shelf, number: int) -> bool:
        assert self._registry is not None
        sealed = seal.read(self._registry.bundle(name, shelf, number))
        return len(sealed.approved) >= sealed.required

    def _version(self, name: str, shelf: Shelf, number: int) -> Loaded:
        assert self._registry is not None
        if self._loaded is not None and (name, number) in self._loaded:
            self._registry.refuse_withdrawn(name, shelf, number)  # whatever alias still names it
            return self._loaded[name, number]
        place = self._registry.bundle(name, shelf, number)
        return engine.load(place, name, str(number), self._settings.roots, self._settings.unsigned)


def _stamp(path: Path) -> object:
    with contextlib.suppress(FileNotFoundError):
        about = path.stat()
        return about.st_ino, about.st_mtime_ns, about.st_size
    return None
