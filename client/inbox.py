"""What comes from the server as an instruction, and whether it is one that this site may act upon.

In this order, and nothing of a message is looked at before the step that makes it safe: size of the frame, signature by
a key of the trust statement, form, federation and site, place in the run (never before the last one, which is durable),
expiry, size of the content, the content's SHA-256 while it goes to a file without a name, and the study's text, which
must have the digest that was signed.

A frame that fails is dropped and never answered. An instruction that is genuine, but cannot be done, is declined.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import BinaryIO, TypeVar

from consortium.client.home import Home
from consortium.client.seen import Place, Seen
from consortium.protocol import endings, epoch, wire
from consortium.protocol.bundle import MAX_BUNDLE, MAX_STUDY, Bundle, of, read
from consortium.protocol.connection import Connection, Reply, StatusError
from consortium.protocol.errors import ConsortiumError, InputError, IntegrityError
from consortium.protocol.files import MEMORY, private_folder, working_file, written_over
from consortium.protocol.messages import Header, Instruction, parse
from consortium.protocol.signing import INSTRUCTION, verify
from consortium.protocol.study import Study
from consortium.protocol.trust import Trust

MAX_CONTENT = 4 << 30
"""Bytes of an instruction's content that a site takes."""
SPARE_DISK = 64 << 20
"""Bytes of the disk that are left free."""
STUDIES = 16
"""Studies that are kept in memory."""

T = TypeVar("T")

_log = logging.getLogger("consortium.agent")


class Dropped(ConsortiumError):  # noqa: N818 - it is what happened, not a mistake
    """The frame is no instruction for this site. nonce: of a genuine one, which need not be offered again; else ""."""

    def __init__(self, reason: str, nonce: str = "") -> None:
        self.nonce = nonce
        super().__init__(reason)


@dataclass(frozen=True)
class Taken:
    """A genuine instruction for this site.

    reason: why it cannot be done, empty where it can; then study is there.
    model: SHA-256 of the model that the content begins with, "" where it does not.
    """

    header: bytes
    about: Instruction
    content: BinaryIO | None = None
    study: Study | None = None
    reason: str = ""
    model: str = ""
    bundle: Bundle | None = None
    signature: bytes = b""


class Inbox:
    """For one thread.

    aside: a connection to the server beside the one that a frame comes over; it is closed after use.
    has: whether a nonce is in hand.
    """

    def __init__(
        self,
        home: Home,
        seen: Seen,
        aside: Callable[[], Connection],
        has: Callable[[str], bool],
        clock: Callable[[], float] = time.time,
        max_content: int = MAX_CONTENT,
    ) -> None:
        self._home, self._seen, self._aside, self._has = home, seen, aside, has
        self._clock, self._max_content = clock, max_content
        self._trust: Trust = home.trust()
        self._bundles: dict[str, Bundle] = {}
        self._spare: list[
            BinaryIO
        ] = []  # at most one; a list, since threads may take from it and add to it at once
        private_folder(home.spool)

    @property
    def serial(self) -> int:
        """Of the trust statement that is held."""
        return self._trust.serial

    def reuse(self, file: BinaryIO) -> None:
        """Write the next large content over this file, which nobody reads any more; for any thread."""
        if os.fstat(file.fileno()).st_size > MEMORY:
            self._spare[:] = [file]

    def forget(self) -> None:
        """Keep no file for the next content; for any thread."""
        self._spare.clear()

    def room(self, size: int) -> BinaryIO:
        """A file for a content; it closes by itself. Raises OSError: the disk is full, and the like."""
        if size > MEMORY:
            with contextlib.suppress(IndexError):
                file = self._spare.pop()
                written_over(file.fileno(), size)
                return file
        return os.fdopen(working_file(self._home.spool, size), "w+b", buffering=0)

    def refresh_trust(self, connection: Connection) -> None:
        """Get the trust statement of now; one that is older than the one held is refused.

        Raises:
            ConsortiumError: the server cannot be reached, or shows one that is not to be trusted.
        """
        self._trust = self._home.accept_trust(connection.request("GET", wire.TRUST).document())

    def refresh_epoch(self, connection: Connection) -> None:
        """Get the server's epoch: a later one begins here, an earlier one is that of an old copy.

        Raises:
            IntegrityError: the server is of an earlier epoch than was seen, or does not say it as it should.
            ConsortiumError: the server cannot be reached.
        """
        try:
            said = connection.request("GET", f"{wire.EPOCH}{self._seen.epoch}").document()
            now = epoch.verified(said, self._trust.keys, self._home.config.federation, self._home.config.site)
        except StatusError as error:
            if error.status != 404:
                raise
            now = 0  # a server of a version that knows no epochs was never restored
        if now < self._seen.epoch:
            raise IntegrityError(
                f"the server is of epoch {now}, this site has seen epoch {self._seen.epoch}: an old copy of its folder "
                "was started, and its memory was rolled back; nothing is done for it. Ask its admin"
            )
        if now > self._seen.epoch:
            first = not self._seen.epoch and not self._seen.runs()
            self._seen.begin_epoch(now)
            if not first:
                _log.warning(
                    "the server was restored from a backup (epoch %d): rounds since then may be asked for again",
                    now,
                )

    def take(self, reply: Reply) -> Taken:
        """The instruction in a reply.

        Raises:
            Dropped: it is none for this site.
            ConsortiumError: the connection broke, and the like; it will be offered again.
            OSError: what must be durable cannot be written.
        """
        try:
            header, signature = wire.read_preamble(reply.read)
            self._verify(header, signature)
            parsed = parse(header)
            about = _instruction(parsed)
            self._check_for_us(about)
        except (IntegrityError, Dropped) as error:
            reply.close()
            raise error if isinstance(error, Dropped) else Dropped(str(error)) from error
        reason = self._unfit(parsed, about, reply)
        content, model = None, ""
        if not reason:
            self._seen.accept(about.run, Place.of(about))
            content, model, reason = self._spooled(parsed, reply)
        if reason:
            reply.close()
            return Taken(header, about, reason=reason, signature=signature)
        bundle, reason = self._bundle(about.study)
        study = bundle.study if bundle is not None else None
        return Taken(header, about, content, study, reason, model, bundle, signature)

    def endings(self, reply: Reply, nonce: str, asked: Collection[str]) -> dict[str, str]:
        """What a reply says of runs that the poll with this nonce asked about: `endings.OVER` or `FAILED`.

        Raises:
            Dropped: it is no statement of the server's for this site and poll.
            ConsortiumError: the connection broke, and the like.
        """
        config = self._home.config
        try:
            document = reply.document()
            content = self.trusted(lambda trust: endings.signed(document, trust.keys))
            return endings.said(content, config.federation, config.site, nonce, asked)
        except IntegrityError as error:
            reply.close()
            raise Dropped(str(error)) from error

    def _verify(self, header: bytes, signature: bytes) -> None:
        """Raises IntegrityError where no trusted key signed."""
        self.trusted(lambda trust: _signed(trust, header, signature))

    def trusted(self, check: Callable[[Trust], T]) -> T:
        """What `check` gives for the statement of keys; a key may be newer than the one that is held."""
        try:
            return check(self._trust)
        except IntegrityError:
            before, aside = self._trust.serial, self._aside()
            try:
                self.refresh_trust(aside)
            finally:
                aside.close()
            if self._trust.serial == before:
                raise
            return check(self._trust)

    def _check_for_us(self, about: Instruction) -> None:
        config = self._home.config
        if about.federation != config.federation:
            raise Dropped("the instruction is for another federation", about.nonce)
        if about.site != config.site:
            raise Dropped("the instruction is for another site", about.nonce)
        if about.run in self._seen.over():
            raise Dropped(f"the instruction is of run {about.run}, which has ended", about.nonce)
        last = self._seen.last(about.run)
        if last is not None and Place.of(about) < last:
            raise Dropped(
                f"the instruction (run {about.run}, round {about.round}, attempt {about.attempt}) is older "
                "than what was seen of its run",
                about.nonce,
            )
        if self._has(about.nonce):
            raise Dropped("the instruction is in hand already")

    def _unfit(self, parsed: Header, about: Instruction, reply: Reply) -> str:
        """Why a genuine instruction cannot be done; its content is not read yet."""
        if self._clock() > about.expires:
            return "the instruction has expired; if the clocks agree, the site was too slow"
        if parsed.length > self._max_content:
            return f"the content has {parsed.length} bytes; this site takes at most {self._max_content}"
        disk = os.statvfs(self._home.spool)
        if parsed.length > disk.f_bavail * disk.f_frsize - SPARE_DISK:
            return (
                f"this site's disk is too full: the content has {parsed.length} bytes, and {SPARE_DISK >> 20} MiB are "
                "to stay free"
            )
        return ""

    def _spooled(self, parsed: Header, reply: Reply) -> tuple[BinaryIO | None, str, str]:
        """The content in a file without a name, the digest of the model in it, and why that cannot be."""
        if not parsed.length:
            return None, "", ""
        first, model = parsed.parts[0], ""
        of_model = first.nbytes if (first.place, first.name) == ("vector", "shared") else 0
        sha, left = hashlib.sha256(), parsed.length
        buffer = memoryview(bytearray(min(wire.CHUNK, left)))
        try:
            file = self.room(left)
            while left:
                # No piece holds the end of the model within it, so that one pass gives both digests.
                most = min(len(buffer), left, of_model or left)
                count = reply.read_into(buffer[:most])
                if not count:
                    reply.close()
                    raise Dropped("the frame ends within its content")
                sha.update(buffer[:count])
                piece = buffer[:count]
                while piece:
                    piece = piece[file.write(piece) :]
                left -= count
                if of_model:
                    of_model -= count
                    model = model if of_model else sha.copy().hexdigest()
        except OSError as error:
            _log.error(
                "%s: an instruction's content cannot be written (%s)", self._home.spool, error.strerror
            )
            return None, "", "the site's disk could not take the content"
        if sha.hexdigest() != parsed.sha256:
            raise Dropped("the content's SHA-256 is not what the header says")
        return file, model, ""

    def _bundle(self, digest: str) -> tuple[Bundle | None, str]:
        """The bundle of the study of a digest, and why there is none."""
        if digest in self._bundles:
            return self._bundles[digest], ""
        aside = self._aside()
        try:
            content = aside.request("GET", wire.STUDIES + digest).read(MAX_BUNDLE + 1)
            if not content.startswith(b"PK") and len(content) > MAX_STUDY:
                return None, f"the study has more than {MAX_STUDY} bytes"
            found = read(content) if content.startswith(b"PK") else of(Study.parse(content.decode()))
        except StatusError as error:
            return None, f"the study cannot be had ({error.status})"
        except IntegrityError as error:
            _log.error("study %s: %s", digest[:12], error)
            return None, "the study's bundle is not in the form that it must have"
        except (InputError, UnicodeDecodeError) as error:
            _log.error("study %s: %s", digest[:12], error)
            return None, "the study has mistakes, as this site's version reads it"
        finally:
            aside.close()
        if found.study.digest != digest:
            return (
                None,
                "the study is not the one that the instruction names, as this site's version reads it",
            )
        while len(self._bundles) >= STUDIES:
            del self._bundles[next(iter(self._bundles))]
        self._bundles[digest] = found
        return found, ""


def _signed(trust: Trust, header: bytes, signature: bytes) -> None:
    for key in trust.keys:
        with contextlib.suppress(IntegrityError):
            verify(key, INSTRUCTION, header, signature)
            return
    raise IntegrityError("the instruction is not signed by a key of the trust statement")


def _instruction(parsed: Header) -> Instruction:
    """The fields of an instruction, without its content."""
    if parsed.type != "instruction":
        raise IntegrityError("an instruction was expected")
    fields = dict(parsed.fields)
    about = Instruction(**fields)  # type: ignore[arg-type]
    if about.round < 0 or about.attempt < 0 or (about.kind == "train" and not about.round):
        raise IntegrityError("the instruction has no sound round and attempt")
    if not 0 < len(about.run) <= 200 or not about.run.isprintable():
        raise IntegrityError("the instruction has no sound name of a run")
    if not 0 < len(about.nonce) <= 64 or not about.nonce.isalnum():
        raise IntegrityError("the instruction has no sound nonce")
    if len(about.study) != 64 or not about.study.isalnum():
        raise IntegrityError("the instruction names no study")
    return about
