"""The site door: what a site may ask of the server, and the form in which its answers come in.

Whoever speaks here has shown a certificate of this federation that the roster knows; its name is `request.peer`, never
something that it says. An answer is taken only for an instruction that this very site was given, signed by the identity
key that it joined with, no larger than the study's model allows, and with the content that its header names. Nothing of
it is parsed before its signature is verified.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from consortium.privacy.ledger import ledger_name
from consortium.protocol import delivery, endings, epoch, wire
from consortium.protocol.chain import Head
from consortium.protocol.errors import ConsortiumError, InputError, IntegrityError
from consortium.protocol.heads import APPROVALS, LEDGER, packed, unpacked
from consortium.protocol.messages import Header, parse
from consortium.protocol.signing import ANSWER, public_key, verify
from consortium.protocol.wire import CHUNK
from consortium.server import ledger_heads
from consortium.server.approvals import Approvals
from consortium.server.archive import Archive
from consortium.server.delivery import Deliveries
from consortium.server.endings import news as endings_of
from consortium.server.exchange import Exchange
from consortium.server.federation import Federation
from consortium.server.gating import RUN
from consortium.server.heads import SiteLogs
from consortium.server.listener import PeerGone, Request, Response, error_response, json_response
from consortium.server.offers import Offer, Received, Spooled
from consortium.server.roster import Roster
from consortium.server.serving.acts import Note

MOST_DECIDED = 4 << 20
"""Bytes of a request with a site's decisions."""
MOST_NONCES = 64
"""How many instructions a site can have in hand."""

_log = logging.getLogger(__name__)


class SiteDoor:
    """Answers the requests of sites. logs: what is known of theirs. note: writes to the server's audit log."""

    def __init__(
        self,
        federation: Federation,
        roster: Roster,
        archive: Archive,
        exchange: Exchange,
        approvals: Approvals,
        logs: SiteLogs | None = None,
        note: Note | None = None,
    ) -> None:
        self._logs = logs
        self._federation, self._roster, self._archive = federation, roster, archive
        self._approvals = approvals
        self._exchange = exchange
        self._deliveries = Deliveries(federation, note=note)

    def handle(self, request: Request) -> Response:
        """One request of the site `request.peer`."""
        site = request.peer
        assert site is not None  # the listener lets nobody else in
        if not self._roster.is_member(site):  # not any more: this connection is older than that
            return error_response(403, f"site '{site}' does not belong to the federation")
        methods = []
        for method, path, answer in self._routes():
            if request.path == path or (path.endswith("/") and request.path.startswith(path)):
                if request.method == method:
                    return answer(request, site)
                methods.append(method)
        if methods:
            return error_response(405, f"use {' or '.join(methods)}")
        return error_response(404, "there is no such route on the site door")

    def _routes(self) -> list[tuple[str, str, Callable[[Request, str], Response]]]:
        return [
            ("POST", wire.POLL, self._poll),
            ("PUT", wire.ANSWERS, self._answer),
            ("GET", wire.STUDIES, self._study),
            ("GET", wire.TRUST, self._trust),
            ("GET", wire.EPOCH, self._epoch),
            ("GET", wire.PROPOSALS, self._proposals),
            ("POST", wire.APPROVALS, self._decided),
            ("POST", wire.RENEW, self._renew),
            ("POST", wire.LEDGER, self._ledger),
            ("GET", wire.COPIES, self._copies),
            ("POST", wire.RESTORED, self._restored),
            ("POST", wire.HEADS, self._heads),
            ("POST", wire.LEAVE, self._leave),
            ("POST", wire.MODELS, self._model),
            ("GET", wire.MODELS, self._model_file),
            ("POST", wire.MODEL_APPROVALS, self._model_approved),
        ]

    def _poll(self, request: Request, site: str) -> Response:
        """Wait until there is something for the site to do, and say what."""
        document = _document(request)
        wire.field(document, "paused", bool)
        have = _nonces(document)
        kept, nonce = _kept(document)
        end = time.monotonic() + wire.POLL_SECONDS
        if self._shown(site, document.get("heads")):
            return self._replied(Response(204, headers={wire.NOTICE: self._notice(site)}), site, document)
        return self._replied(self._awaited(request, site, document, have, kept, nonce, end), site, document)

    def _awaited(
        self,
        request: Request,
        site: str,
        document: dict[str, Any],
        have: frozenset[str],
        kept: dict[str, str],
        nonce: str,
        end: float,
    ) -> Response:
        paused, known = bool(document["paused"]), document.get("studies", 0)
        notice = {wire.NOTICE: self._notice(site)}
        try:
            with self._exchange.polling(site, paused) as news:
                while True:
                    offer = None if paused else self._exchange.offer(site, have)
                    if offer is not None:
                        return _frame(offer, notice)
                    ended = endings_of(self._archive, kept) | self._gates_over(kept)
                    if ended:
                        return self._endings(site, nonce, ended)
                    if "studies" in document and self._archive.number() != known:
                        return Response(204, headers={wire.NOTICE: self._notice(site)})
                    if not request.wait(news, max(0.0, end - time.monotonic())):
                        return Response(204, headers=notice)
                    os.eventfd_read(news)
        except PeerGone:
            self._exchange.gone(site)
            raise

    def _gates_over(self, kept: dict[str, str]) -> dict[str, str]:
        """The gates among these runs that ask nothing now, and never will again."""
        return {run: endings.OVER for run in kept if run.startswith(RUN) and not self._exchange.asks(run)}

    def _shown(self, site: str, statement: object) -> str:
        """Take what a site says of its logs; why it is asked nothing more, or ""."""
        if self._logs is None or not isinstance(statement, dict):
            return ""
        return self._logs.take(site, self._roster.identity(site), statement)

    def _replied(self, response: Response, site: str, document: dict[str, Any]) -> Response:
        """A reply to a poll, with what the server says of its log at this moment."""
        nonce = document.get("nonce")
        if self._logs is None or "heads" not in document or not isinstance(nonce, str):
            return response
        said = self._logs.said(site, self._roster.identity(site), nonce)
        return replace(response, headers={**response.headers, wire.SHOWN: packed(said)})

    def _heads(self, request: Request, site: str) -> Response:
        """As a poll, of the logs alone; and the heads that were seen of the site's audit log."""
        document = _document(request)
        if self._logs is None:
            return error_response(404, "there is no such route on the site door")
        self._shown(site, wire.field(document, "heads", dict))
        identity = self._roster.identity(site)
        said = self._logs.said(site, identity, wire.field(document, "nonce", str))
        return json_response({"heads": said, "history": self._logs.history(site, identity)})

    def _endings(self, site: str, nonce: str, ended: dict[str, str]) -> Response:
        """Runs that ask nothing more of the site, signed for its question of now."""
        federation = self._federation
        said = endings.state(federation.instruction_key, federation.config.name, site, nonce, ended)
        body = json.dumps(said).encode()
        return Response(200, body, headers={wire.NOTICE: f"{self._notice(site)} {wire.RUNS}"})

    def _notice(self, site: str) -> str:
        words = [f"trust={self._federation.trust_serial}", f"studies={self._archive.number()}"]
        words.append(f"models={self._deliveries.number()}")
        if self._roster.renewal_due(site):
            words.append("renew")
        return " ".join(words)

    def _answer(self, request: Request, site: str) -> Response:
        """Take one answer; the same bytes again are taken again, others for the same instruction are not."""
        nonce = request.path.removeprefix(wire.ANSWERS)
        header, signature = wire.read_preamble(request.read_exactly)
        before = self._exchange.repeated(nonce, header)
        if before is not None:
            return (
                json_response({"taken": True})
                if before
                else error_response(409, "was answered otherwise before")
            )
        offer = self._exchange.asked(site, nonce)
        if offer is None:
            return self._late(site, nonce, header, signature)
        try:
            about = self._checked(header, signature, offer)
            if wire.SHOWN in request.headers:
                trouble = self._shown(site, unpacked(request.headers[wire.SHOWN]))
                if trouble:
                    raise IntegrityError(trouble)
            if request.left != about.length:  # it may still be sent as a whole
                return error_response(400, "the body is not as long as its header says")
            content = self._content(request, about, offer) if about.length else None
        except IntegrityError as error:
            _log.warning("site %s: its answer is refused: %s", site, error)
            self._exchange.taken(offer, Received(site, header, reason=str(error)))
            return error_response(400, str(error))
        if not self._exchange.taken(offer, Received(site, header, content), signature):
            return self._late(site, nonce, header, signature)
        return json_response({"taken": True})

    def _late(self, site: str, nonce: str, header: bytes, signature: bytes) -> Response:
        """An answer that is not asked for now: noted where it is the site's own to a closed round."""
        found = self._exchange.late(site, nonce)
        if found is None:
            return error_response(410, "is not asked, or not any more")
        closed, first = found
        try:
            verify(public_key(self._roster.identity(site)), ANSWER, header, signature)
        except IntegrityError as error:
            return error_response(400, str(error))
        if first:
            about = {"site": site, "asked": closed.kind, "round": closed.round, "attempt": closed.attempt}
            self._archive.note(closed.run, {"kind": "late", **about})
            _log.info("site %s: its answer to round %d of run %s is late", site, closed.round, closed.run)
        return error_response(
            410, f"{wire.LATE}round {closed.round} was closed before it came; it does not count"
        )

    def _checked(self, header: bytes, signature: bytes, offer: Offer) -> Header:
        """The header of an answer to `offer`, or an IntegrityError that says what it is not."""
        verify(public_key(self._roster.identity(offer.site)), ANSWER, header, signature)
        about = parse(header)
        if (
            about.type != "answer"
            or about.fields["site"] != offer.site
            or about.fields["nonce"] != offer.nonce
        ):
            raise IntegrityError("is not the answer to what this site was asked")
        if about.length > offer.largest:
            raise IntegrityError(
                f"the content has {about.length} bytes; the study's layout allows {offer.largest}"
            )
        return about

    def _content(self, request: Request, about: Header, offer: Offer) -> Spooled:
        """The content of an answer, on disk; its hash is that of the header."""
        content, sha, left = self._exchange.room(offer, about.length), hashlib.sha256(), about.length
        buffer = memoryview(bytearray(min(CHUNK, left)))
        while left:
            count = request.read_into(buffer[: min(len(buffer), left)])
            if not count:
                raise PeerGone("the connection ended within an answer")  # it may be sent again
            sha.update(buffer[:count])
            _write(content.fd, buffer[:count])
            left -= count
        if sha.hexdigest() != about.sha256:
            raise IntegrityError("the content's SHA-256 is not what the header says")
        return content

    def _study(self, request: Request, site: str) -> Response:
        digest = request.path.removeprefix(wire.STUDIES)
        content = self._archive.bundle_of(digest)
        if content is not None:
            return Response(200, content, "application/octet-stream")
        text = self._archive.text_of(digest)  # of a run that an earlier version began
        if text is None:
            return error_response(404, "there is no study of that digest")
        return Response(200, text.encode(), "application/toml; charset=utf-8")

    def _proposals(self, request: Request, site: str) -> Response:
        number, studies = self._archive.proposals()
        known = [head.text for head in self._approvals.heads(site)]
        return json_response({"number": number, "studies": studies, "approvals": known})

    def _decided(self, request: Request, site: str) -> Response:
        """Take decisions of a site about studies."""
        lines = wire.field(_document(request, MOST_DECIDED), "entries", list)
        if any(type(one) is not str for one in lines):
            raise InputError("field 'entries': lines of a log were expected")
        try:
            head = self._approvals.take(site, lines)
        except IntegrityError as error:
            _log.error("site %s: its decisions are not taken: %s", site, error)
            raise
        return json_response({"head": head.text})

    def _trust(self, request: Request, site: str) -> Response:
        return json_response(self._federation.trust())

    def _epoch(self, request: Request, site: str) -> Response:
        """The epoch, signed for the site, which says what it has seen: more than this, and this is an old copy."""
        seen, own = request.path.removeprefix(wire.EPOCH), self._federation.epoch
        if not seen.isdecimal() or len(seen) > 15:
            raise InputError("the latest epoch that the site has seen would be right")
        if int(seen) > own:
            _log.error(
                "site %s: has seen epoch %s, this server is of epoch %d: an old copy of its folder was started, and "
                "the site refuses it. Start the latest one, or restore the latest backup: consortium server restore",
                *(site, seen, own),
            )
        key, name = self._federation.instruction_key, self._federation.config.name
        return json_response(epoch.state(key, name, site, own))

    def _renew(self, request: Request, site: str) -> Response:
        csr = wire.field(_document(request), "csr", str)
        chain = self._federation.issue(self._roster, site, csr)
        _log.info("site %s: its certificate is renewed", site)
        return json_response({"chain": chain})

    def _ledger(self, request: Request, site: str) -> Response:
        """Keep the head of the site's privacy ledger; the highest that it ever showed, countersigned."""
        document = _document(request)
        head = Head.parse(wire.field(document, "head", str))
        federation, identity = self._federation, public_key(self._roster.identity(site))
        name = ledger_name(federation.config.name, site, identity)
        store, lines = self._archive.store, ledger_heads.sent(document)
        witness = ledger_heads.countersigned(store, federation.instruction_key, name, head, lines)
        said = {"head": witness.head.text, "signature": witness.signature}
        return json_response({**said, "copied": ledger_heads.copied(store, name)})

    def _copies(self, request: Request, site: str) -> Response:
        """Lines of the site's own logs, for one whose folder was restored."""
        log, _, after = request.path.removeprefix(wire.COPIES).partition("/")
        if log not in (LEDGER, APPROVALS) or not after.isdecimal() or len(after) > 15:
            raise InputError("ledger/NUMBER or approvals/NUMBER would be right")
        if log == APPROVALS:
            return json_response({"lines": self._approvals.lines_of(site, int(after))})
        identity = public_key(self._roster.identity(site))
        name = ledger_name(self._federation.config.name, site, identity)
        return json_response(ledger_heads.copies(self._archive.store, name, int(after)))

    def _restored(self, request: Request, site: str) -> Response:
        """The site's folder was restored: its audit log goes on in a new epoch."""
        if self._logs is None:
            return error_response(404, "there is no such route on the site door")
        said = wire.field(_document(request), "restored", dict)
        return json_response(self._logs.restored(site, self._roster.identity(site), said))

    def _model(self, request: Request, site: str) -> Response:
        """What a version of a model is, or that it was withdrawn; signed for this site's question."""
        document = _document(request)
        number, nonce = wire.field(document, "version", int), wire.field(document, "nonce", str)
        if len(nonce) != 64 or number < -1:
            raise InputError("a version from -1 and a nonce of 64 characters were expected")
        try:
            said = self._deliveries.said(request.path.removeprefix(wire.MODELS), number)
        except IntegrityError as error:
            return error_response(wire.NOT_SOUND, str(error))
        key, name = self._federation.instruction_key, self._federation.config.name
        return json_response(delivery.state(key, name, site, nonce, said))

    def _model_approved(self, request: Request, site: str) -> Response:
        """Keep a site's approval of a version, signed with the identity key that it joined with."""
        document = _document(request)
        name, number = wire.field(document, "name", str), wire.field(document, "version", int)
        signature, identity = wire.field(document, "signature", str), self._roster.identity(site)
        approved = self._deliveries.approve(name, number, site, identity, signature)
        _log.info("site %s: approves model %s@%d", site, name, number)
        return json_response({"approved": list(approved)})

    def _model_file(self, request: Request, site: str) -> Response:
        """A file of a version, from a byte on."""
        name, _, rest = request.path.removeprefix(wire.MODELS).partition("/")
        number, _, file = rest.partition("/")
        start = request.query.get("from", "0")
        if not all(one.isascii() and one.isdecimal() and len(one) < 16 for one in (number, start)):
            raise InputError("MODEL/VERSION/FILE?from=BYTE would be right")
        try:
            pieces, length = self._deliveries.file(name, int(number), file, int(start))
        except IntegrityError as error:
            return error_response(wire.NOT_SOUND, str(error))
        if not int(start):
            _log.info("site %s: gets %s of %s@%s", site, file, name, number)
        return Response(200, b"", "application/octet-stream", {}, pieces, length)

    def _leave(self, request: Request, site: str) -> Response:
        self._roster.leave(site)
        self._exchange.drop(site, "has left the federation")
        _log.info("site %s: has left the federation", site)
        return json_response({"left": True})


def _document(request: Request, most: int = wire.MAX_DOCUMENT) -> dict[str, Any]:
    try:
        document = json.loads(request.read(most))
    except (ValueError, RecursionError) as error:
        raise InputError("the request is not JSON") from error
    if not isinstance(document, dict) or document.get("format") != wire.FORMAT:
        raise InputError(f"the request is not a JSON object of format {wire.FORMAT}")
    return document


def _nonces(document: dict[str, Any]) -> frozenset[str]:
    have = wire.field(document, "have", list)
    if len(have) > MOST_NONCES or any(type(one) is not str or len(one) > 64 for one in have):
        raise InputError(f"field 'have': at most {MOST_NONCES} nonces were expected")
    return frozenset(have)


def _kept(document: dict[str, Any]) -> tuple[dict[str, str], str]:
    """The runs that a site keeps something of, what it was told of each, and its nonce; a poll may leave both out."""
    if "runs" not in document:
        return {}, ""
    kept, nonce = wire.field(document, "runs", dict), wire.field(document, "nonce", str)
    sound = len(kept) <= endings.MOST_RUNS and all(len(run) <= endings.LONGEST_NAME for run in kept)
    if not sound or any(word not in ("", endings.FAILED) for word in kept.values()) or len(nonce) != 64:
        raise InputError(f"field 'runs': at most {endings.MOST_RUNS} runs, and a nonce, were expected")
    return kept, nonce


def _frame(offer: Offer, notice: dict[str, str]) -> Response:
    start = wire.preamble(offer.header, offer.signature)
    length = len(start) + offer.length
    return Response(200, b"", "application/octet-stream", notice, _pieces(start, offer), length)


def _pieces(start: bytes, offer: Offer) -> Iterator[bytes | memoryview]:
    yield start
    left = offer.length
    if left:
        assert offer.content is not None
        for piece in offer.content.pieces(left):
            yield piece
            left -= len(piece)
    if left:
        raise ConsortiumError("the content file is shorter than its header says")


def _write(fd: int, piece: memoryview) -> None:
    while piece:
        piece = piece[os.write(fd, piece) :]
