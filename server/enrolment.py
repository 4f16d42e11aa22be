"""The enrolment door: an invited site fetches the root and joins. Open to anybody, so it says as little as it can.

Every field is measured and typed before it is used. Key and signatures are checked before the invitation is looked
at, and every reason for a "no" then takes the same path to the same text.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from consortium.protocol import wire
from consortium.protocol.errors import ConsortiumError, InputError, IntegrityError, RefusedError
from consortium.protocol.joincode import SECRET_BYTES, proof_content
from consortium.protocol.signing import JOIN, public_key, verify
from consortium.server import pki
from consortium.server.federation import Federation
from consortium.server.listener import Request, Response, error_response, json_response
from consortium.server.roster import Joining, Roster

MOST_FAILURES = 20
"""Failed attempts within `WINDOW` seconds, by whomever; beyond, only the secret of an invitation that
can be used is listened to for a while, so that nobody who guesses can shut out whoever was invited."""
WINDOW = 60.0
MAX_REQUEST = 16 * 1024
"""Bytes of a request to join."""

_FIELDS = {"format": int, "site": str, "secret": str, "identity": str, "csr": str, "proof": str}
_HEX = {"secret": SECRET_BYTES * 2, "identity": 64, "proof": 128}
_log = logging.getLogger(__name__)


class Enrolment:
    """Answers whoever knocks. changed: called when a site has joined. clock: seconds, for the limit alone. refused:
    counts whom the door refuses."""

    def __init__(
        self,
        federation: Federation,
        roster: Roster,
        changed: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        refused: Callable[[str, str], None] = lambda door, why: None,
    ) -> None:
        self._federation, self._roster, self._changed, self._refused = federation, roster, changed, refused
        self._attempts = _Attempts(clock)

    def handle(self, request: Request) -> Response:
        """One request: GET /v1/root or POST /v1/join."""
        methods = {wire.ROOT: "GET", wire.JOIN: "POST"}
        wanted = methods.get(request.path)
        if wanted is None:
            return error_response(404, "there is no such route on the enrolment door")
        if request.method != wanted:
            return error_response(405, f"use {wanted}")
        if wanted == "GET":
            return json_response({"root": self._federation.root_pem.decode()})
        return self._attempt(request)

    def _attempt(self, request: Request) -> Response:
        ticket = self._attempts.begin()
        try:
            fields = _fields(request.read(MAX_REQUEST))
            if ticket is None and not self._roster.invited(fields["site"], fields["secret"]):
                self._refused("enrolment", "too many attempts")
                return error_response(429, "too many attempts failed; try again in a minute")
            answer = self._join(fields)
        except (InputError, IntegrityError) as error:
            self._refused("enrolment", "malformed, or not signed as it should be")
            return error_response(400, str(error))
        except RefusedError as error:
            self._refused("enrolment", "no such invitation")
            _log.warning("an attempt to join from %s was refused", request.address)
            return error_response(403, str(error))
        except ConsortiumError:
            self._attempts.forget(ticket)  # ours, not theirs: a full disk, an authority that has expired
            raise
        self._attempts.forget(ticket)
        self._changed()
        return json_response(answer)

    def _join(self, fields: dict[str, Any]) -> dict[str, Any]:
        site, csr, identity = fields["site"], fields["csr"], fields["identity"]
        issue = self._federation.issuer_for(csr)
        proved = proof_content(csr, self._federation.config.name, site)
        verify(public_key(identity), JOIN, proved, bytes.fromhex(fields["proof"]))
        chain = self._roster.join(Joining(site, fields["secret"], identity, _request(identity, csr)), issue)
        _log.info("site %s: joined, with the identity key %s", site, identity)
        config = self._federation.config
        return {"chain": chain, "trust": self._federation.trust(), "host": config.host, "port": config.port}


def _fields(content: bytes) -> dict[str, Any]:
    """The fields of a request to join, each of its type and size.

    Raises:
        InputError, IntegrityError: they are not.
    """
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError("the request is not JSON") from error
    if not isinstance(document, dict) or set(document) != set(_FIELDS):
        raise InputError(f"the request is not a JSON object with the fields {', '.join(_FIELDS)}")
    fields = {name: wire.field(document, name, kind) for name, kind in _FIELDS.items()}
    if fields["format"] != wire.FORMAT:
        raise InputError(f"the request is not of format {wire.FORMAT}; do both sides run the same version?")
    wire.site_name(fields["site"])
    for name, length in _HEX.items():
        if re.fullmatch(f"[0-9a-f]{{{length}}}", fields[name]) is None:
            raise InputError(f"field '{name}': {length} hex digits were expected")
    if not fields["csr"].isascii():
        raise InputError("field 'csr': PEM was expected")
    return fields


def _request(identity: str, csr: str) -> str:
    """What makes two requests the same: the identity and the key of the certificate. Signatures vary."""
    key = pki.requested_key(csr).public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(f"{identity}|".encode() + key).hexdigest()


class _Attempts:
    """Counts attempts within the window: each counts as failed from its beginning until it has succeeded, so that
    many at once get no further than one after the other."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._begun: deque[tuple[float, object]] = deque()

    def begin(self) -> object | None:
        """A ticket, or None where too many have failed."""
        now, ticket = self._clock(), object()
        with self._lock:
            while self._begun and self._begun[0][0] <= now - WINDOW:
                self._begun.popleft()
            if len(self._begun) >= MOST_FAILURES:
                return None
            self._begun.append((now, ticket))
        return ticket

    def forget(self, ticket: object) -> None:
        """The attempt did not fail."""
        with self._lock:
            self._begun = deque(one for one in self._begun if one[1] is not ticket)
