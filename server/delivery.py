"""Models for the sites: the versions of the federation's registry, as the site door hands them out."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from consortium.protocol.delivery import GOOD_FOR, Delivery, File
from consortium.protocol.errors import InputError, IntegrityError
from consortium.protocol.signing import MEMBER
from consortium.protocol.wire import CHUNK
from consortium.server import seal, vouching
from consortium.server.federation import Federation
from consortium.server.serving import gate_file
from consortium.server.serving.acts import Note
from consortium.server.serving.registry import Registry
from consortium.server.serving.versions import Shelf

_log = logging.getLogger(__name__)


class Deliveries:
    """Over a federation's registry; for any number of threads. clock: seconds since the epoch. note: writes to the
    server's audit log."""

    def __init__(
        self, federation: Federation, clock: Callable[[], float] = time.time, note: Note | None = None
    ) -> None:
        self._federation, self._clock = federation, clock
        self._registry = Registry(federation.folder / gate_file.MODELS, clock, "the site door", note)

    def number(self) -> int:
        """Another after every act on the registry; 0 where there is none."""
        try:
            return self._registry.stamp()
        except OSError:
            return 0

    def said(self, name: str, number: int) -> Delivery:
        """What is to be said of a version, of the champion for 0, of the candidate for -1.

        Raises:
            InputError: there is none such.
        """
        shelf = self._shelf(name)
        number = {0: shelf.champion or 0, -1: shelf.candidate or 0}.get(number, number)
        version = shelf.version(number)
        if version is None:
            raise InputError(f"model '{name}' has no such version, or none in that place now")
        now = self._clock()
        if version.withdrawn:
            return Delivery(name, number, version.bundle, now, now, withdrawn=version.why)
        files = _files(self._place(name, shelf, number))
        return Delivery(name, number, version.bundle, now, now + GOOD_FOR, files)

    def approve(self, name: str, number: int, site: str, identity: str, signature: str) -> tuple[str, ...]:
        """Keep a site's approval of a version; the sites that have approved it then. identity: its key (hex).

        Raises:
            InputError, IntegrityError: there is no such version, or the approval does not hold.
        """
        text = vouching.member_text(self._federation.config.name, site, identity)
        member = self._federation.seal(text, MEMBER)

        def change(content: bytes) -> bytes:
            return seal.with_approval(content, site, identity, signature, member)

        return self._registry.approve(name, number, site, change)

    def file(self, name: str, number: int, file: str, start: int) -> tuple[Iterator[bytes], int]:
        """The bytes of a version's file from `start` on, in pieces, and how many they are.

        Raises:
            InputError: there is none such; IntegrityError: the version was withdrawn, or is damaged.
        """
        shelf = self._shelf(name)
        version = shelf.version(number)
        if version is None:
            raise InputError(f"model '{name}' has no version {number}")
        if version.withdrawn:
            raise IntegrityError(f"{name}@{number}: was withdrawn ({version.why})")
        place = self._place(name, shelf, number)
        known = {*seal.read(place).files, seal.MANIFEST, seal.SIGNATURE}
        path = place / file
        if file not in known or not path.is_file():
            raise InputError(f"{name}@{number} has no file of that name")
        size = path.stat().st_size
        if start > size:
            raise InputError(f"{name}@{number}: {file} has {size} bytes")
        return _pieces(path, start), size - start

    def _place(self, name: str, shelf: Shelf, number: int) -> Path:
        try:
            return self._registry.bundle(name, shelf, number)
        except IntegrityError as error:  # it names files of the server's, which are not the site's to know
            _log.error("%s", error)
            raise IntegrityError(f"{name}@{number}: is damaged at the server; tell its admin") from error

    def _shelf(self, name: str) -> Shelf:
        try:
            models = self._registry.state().models
        except InputError:
            models = {}
        if name not in models:
            raise InputError(f"there is no model '{name[:80]}' in the federation's registry")
        return models[name]


def _files(place: Path) -> dict[str, File]:
    """A bundle's files by the digests that were checked when it was registered, so that no question has a model read;
    and what vouches for them, as it is."""
    sealed = seal.read(place)
    hashes = {**sealed.files, seal.MANIFEST: sealed.digest}
    if sealed.signer is not None:
        hashes[seal.SIGNATURE] = hashlib.sha256((place / seal.SIGNATURE).read_bytes()).hexdigest()
    return {name: File((place / name).stat().st_size, one) for name, one in sorted(hashes.items())}


def _pieces(path: Path, start: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while piece := file.read(CHUNK):
            yield piece
