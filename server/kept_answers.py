"""Answers that came, and what was asked, kept until the round is committed: a run that goes on after its process or the
server was killed counts what is here, and asks only the others again, under the same attempt.

    asked       what a run asks now, as its process said it (`server/interrupted.py`)
    answer      length of the header, 4 bytes big-endian | header | signature | content

each encrypted under the run's own key (`protocol/sealed.py`). An answer gets its name when it is whole, before its site
is told that it was taken. It counts only where the site's signature, the question that it answers and the SHA-256 of
its content are found in order again.

Nothing here is forced to the disk: what the machine loses with its power is asked again, and the site sends the very
same bytes. Answers of more than `MEMORY` are not kept: their sites are asked again, and compute nothing anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from consortium.protocol.errors import ConsortiumError, IntegrityError
from consortium.protocol.files import MEMORY, write_early
from consortium.protocol.messages import Header, parse
from consortium.protocol.sealed import DataKey, Piece, Sealed, read, sealing
from consortium.protocol.signing import ANSWER, SIGNATURE_BYTES, public_key, verify
from consortium.server.offers import Offer, Received, Spooled

FORMAT = 1
MOST_ASKED = 8 << 20
"""Bytes of what is kept of a question."""

_LENGTH = 4
_SAME = ("run", "round", "attempt", "kind", "model", "site")
"""What an answer repeats of its question, beside the nonce."""

_log = logging.getLogger(__name__)


class KeptAnswers:
    """In one folder, for any number of runs and threads; one file a run and site, and one a run.

    key_of: the key of a run. identity: the public key (hex) that a site joined with.
    """

    def __init__(
        self, folder: Path, key_of: Callable[[str], DataKey], identity: Callable[[str], str]
    ) -> None:
        self._folder, self._key_of, self._identity = folder, key_of, identity

    def sweep(self, runs: Collection[str]) -> None:
        """Remove all but what is kept of these runs."""
        for path in self._folder.iterdir():
            if path.name.startswith(".") or path.name.rpartition("~")[0] not in runs:
                path.unlink(missing_ok=True)

    def begin(self, run: str, asked: dict[str, Any]) -> None:
        """Keep what a run asks now, in place of what it asked before.

        Raises:
            ConsortiumError: the disk is full, and the like.
        """
        content = json.dumps({"format": FORMAT, "asked": asked}, separators=(",", ":")).encode()
        if len(content) > MOST_ASKED:
            raise IntegrityError(f"run '{run}': asks in {len(content)} bytes; at most {MOST_ASKED} are kept")
        self._write(run, "", [content])

    def asked(self, run: str) -> dict[str, Any] | None:
        """What the run asked last and did not commit; None where nothing is kept, or it is not whole."""
        path = self._path(run, "")
        if not path.exists():
            return None
        try:
            found = json.loads(read(path, self._key_of(run)))
            asked = found["asked"] if found["format"] == FORMAT else None
            return dict(asked) if asked is not None else None
        except (ConsortiumError, OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("run %s: what it asked cannot be read (%s); it asks anew", run, error)
            self.forget(run)
            return None

    def keep(self, offer: Offer, signature: bytes, received: Received) -> None:
        """Keep an answer to `offer` that was found in order.

        Raises:
            ConsortiumError: the disk is full, and the like; then it may be sent again.
        """
        content = received.content
        about = parse(received.header)
        if about.length > MEMORY or about.fields["status"] != "done":
            return
        start = [len(received.header).to_bytes(_LENGTH, "big"), received.header, signature]
        pieces = content.pieces(about.length) if content is not None else ()
        self._write(offer.run, offer.site, chain(start, pieces))

    def answers(self, run: str, headers: dict[str, bytes], largest: int) -> dict[str, Received]:
        """The answers that are kept to what the run asks again, by site; those that are none any more are removed.

        headers: of the instructions, by site.
        """
        found = {}
        for site, header in headers.items():
            path = self._path(run, site)
            if not path.exists():
                continue
            try:
                found[site] = self._answer(path, self._key_of(run), parse(header), largest)
            except (ConsortiumError, OSError, ValueError, KeyError) as error:
                _log.warning("run %s: the answer of site %s that was kept is not used: %s", run, site, error)
                path.unlink(missing_ok=True)
        if found:
            _log.info(
                "run %s: goes on with the answers of %s, which came before", run, ", ".join(sorted(found))
            )
        return found

    def drop(self, run: str, site: str) -> None:
        """Remove a site's answer."""
        self._path(run, site).unlink(missing_ok=True)

    def forget(self, run: str) -> None:
        """Remove all that is kept of a run: its exchange is over. What cannot be removed now is never used."""
        with suppress(OSError):
            for path in self._folder.glob(f"{run}~*"):
                path.unlink(missing_ok=True)

    def _answer(self, path: Path, key: DataKey, asked: Header, largest: int) -> Received:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            sealed = Sealed(fd, key, str(path))
            length = int.from_bytes(_part(sealed, 0, _LENGTH), "big")
            after = _LENGTH + length + SIGNATURE_BYTES
            start = _part(sealed, 0, after)
            header, signature = start[_LENGTH : _LENGTH + length], start[_LENGTH + length :]
            site = str(asked.fields["site"])
            verify(public_key(self._identity(site)), ANSWER, header, signature)
            about = parse(header)
            if about.type != "answer" or any(about.fields[name] != asked.fields[name] for name in _SAME):
                raise IntegrityError("it answers another question")
            if sealed.size != after + about.length or about.length > largest:
                raise IntegrityError("its content is not as long as its header says")
            if not about.length:
                return Received(site, header)
            content, sha, place = Spooled.new(self._folder, about.length), hashlib.sha256(), 0
            for piece in sealed.pieces(after):
                sha.update(piece)
                place = write_early(content.fd, [piece], place)
            if sha.hexdigest() != about.sha256:
                raise IntegrityError("its content's SHA-256 is not what its header says")
            return Received(site, header, content)
        finally:
            os.close(fd)

    def _path(self, run: str, site: str) -> Path:
        return self._folder / f"{run}~{site}"  # neither has a "~" or a "/" in its name

    def _write(self, run: str, site: str, pieces: Iterable[Piece]) -> None:
        """Put a sealed file in place of what was there, whole or not at all."""
        path = self._path(run, site)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                write_early(fd, sealing(pieces, self._key_of(run)))
            finally:
                os.close(fd)
            os.replace(partial, path)  # noqa: PTH105 - as the tests of power cuts see it
        except OSError as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise ConsortiumError(
                f"{path}: cannot be written ({error.strerror}); is the disk full?"
            ) from error


def _part(sealed: Sealed, start: int, stop: int) -> bytes:
    return b"".join(map(bytes, sealed.pieces(start, stop)))
