"""What goes over the network between a site and the server, format 1: routes, limits and the signed frame.

A frame is what an instruction or an answer looks like on its way:

    "CSM1" | length of the header, 4 bytes big-endian | Ed25519 signature, 64 bytes | header | content

The signature is over the header, and the header holds the content's SHA-256 (`protocol/messages.py`), so it covers the
whole. It is verified before the header is parsed; the content is hashed while it is written to a file.

    POST /v1/poll             {"format", "have", "paused", "runs", "nonce"}; waits; a frame (200), with the notice
                              "runs" a statement of endings (200; `protocol/endings.py`), or nothing yet (204)
    PUT  /v1/answers/NONCE    a frame; 200 taken (also again), 409 another than before, 410 too late
    GET  /v1/studies/DIGEST   a study's bundle; without code of its own perhaps just the text of its file
    GET  /v1/trust            the keys that sign instructions, signed by the root
    GET  /v1/epoch/SEEN       the server's epoch, signed; SEEN is the latest that the site has seen
    GET  /v1/proposals        the submitted studies, and the last decision of this site that the server knows
    POST /v1/approvals        {"entries"}: this site's decisions that the server does not know yet (client/approvals.py)
    POST /v1/renew            {"csr"}; a new certificate
    POST /v1/ledger           {"head", "copies"} of the site's privacy ledger: its end, and sealed lines; the highest
                              that the server has seen, countersigned, and up to where it has copies
    GET  /v1/copies/LOG/AFTER lines of the site's own ledger (sealed) or approvals after a number
    POST /v1/restored         the site's folder was restored (`protocol/site_epoch.py`); countersigned
    POST /v1/heads            {"heads"} of the site's logs; the server's, and what it knows of the site's (`verify`)
    POST /v1/leave            {}; the site leaves the federation
    POST /v1/models/NAME      {"version", "nonce"}; what a model is and whether it may be used (protocol/delivery.py)
    GET  /v1/models/NAME/VERSION/FILE?from=BYTE    a file of it, from that byte on
    POST /v1/model-approvals  {"name", "version", "signature"}; the site approves the version; all that have

A poll holds a statement of the site's logs ("heads"), an answer and every reply to a poll carry one in the header
`SHOWN` (`protocol/heads.py`). Versions before had none; a site that has seen the server's once goes on with none less.

The enrolment door has GET /v1/root and POST /v1/join. An error is {"error": text} with a 4xx or 5xx.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from consortium.protocol.errors import InputError, IntegrityError
from consortium.protocol.messages import MAX_HEADER
from consortium.protocol.signing import SIGNATURE_BYTES

FORMAT = 1
COPIES, RESTORED = "/v1/copies/", "/v1/restored"
NOT_SOUND = 409
"""The status of a model's version that was withdrawn, or is damaged at the server."""
LEDGER, MODELS, MODEL_APPROVALS, HEADS = "/v1/ledger", "/v1/models/", "/v1/model-approvals", "/v1/heads"
POLL, ANSWERS, STUDIES, TRUST, EPOCH, RENEW, LEAVE, PROPOSALS, APPROVALS = (
    "/v1/poll", "/v1/answers/", "/v1/studies/", "/v1/trust", "/v1/epoch/", "/v1/renew", "/v1/leave", "/v1/proposals",
    "/v1/approvals",
)  # fmt: skip
ROOT, JOIN = "/v1/root", "/v1/join"

POLL_SECONDS = 25.0
"""How long the server lets a poll wait before it says "nothing yet"."""
CHUNK = 1 << 20
"""Bytes of a content that are in memory at once."""
MAX_DOCUMENT = 64 * 1024
"""Bytes of a JSON body, other than frames."""
NOTICE = "consortium-notice"
"""A header of the server's answers to polls: "renew", "trust=SERIAL", "studies=NUMBER", "models=NUMBER" and `RUNS`, by
spaces."""
SHOWN = "consortium-heads"
"""A header with a statement of logs."""
RUNS = "runs"
"""The word of the notice where the body is a statement of endings."""
LATE = "late: "
"""How the reason of a 410 begins where the server knows the answer, and noted that it came too late."""

_MAGIC = b"CSM1"
PREAMBLE = len(_MAGIC) + 4 + SIGNATURE_BYTES

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


def site_name(text: str) -> str:
    """A site's name, as it is.

    Raises:
        InputError: it is not 1 to 63 small letters, digits and inner hyphens (as in a host name).
    """
    if _NAME.fullmatch(text) is None:
        raise InputError(
            f"site name: got {text[:80]!r}; small letters, digits and hyphens would be right, such as hospital-1"
        )
    return text


def preamble(header: bytes, signature: bytes) -> bytes:
    """All of a frame but its content."""
    assert len(signature) == SIGNATURE_BYTES
    return _MAGIC + len(header).to_bytes(4, "big") + signature + header


def read_preamble(read: Callable[[int], bytes]) -> tuple[bytes, bytes]:
    """Header and signature of a frame. read: gives exactly so many bytes, fewer only at the end.

    Raises:
        IntegrityError: it is not a frame of this format, or its header is longer than `MAX_HEADER`.
    """
    start = read(PREAMBLE)
    if len(start) != PREAMBLE or not start.startswith(_MAGIC):
        raise IntegrityError("the message is no frame of format 1; do both sides run the same version?")
    length = int.from_bytes(start[4:8], "big")
    if length > MAX_HEADER:
        raise IntegrityError(f"message: the header has {length} bytes; at most {MAX_HEADER} are read")
    header = read(length)
    if len(header) != length:
        raise IntegrityError("the message ends in its header")
    return header, start[8:]


def pieces(file: int, size: int) -> Iterator[memoryview]:
    """The first `size` bytes of a file (a descriptor), `CHUNK` at a time, all in one buffer: a piece is good until the
    next one is asked for, and 400 MB cost no memory and no fresh pages.

    Raises:
        IntegrityError: the file is shorter.
    """
    buffer, place = memoryview(bytearray(min(CHUNK, size))), 0
    while place < size:
        count = os.preadv(file, [buffer[: size - place]], place)
        if not count:
            raise IntegrityError(f"a content file has {place} bytes where {size} were announced")
        yield buffer[:count]
        place += count


def field(document: Mapping[str, Any], name: str, kind: type[Any]) -> Any:
    """A field of a JSON object from the other side.

    Raises:
        IntegrityError: it is missing or of another type.
    """
    value = document.get(name)
    if type(value) is not kind:
        raise IntegrityError(f"field '{name}': {kind.__name__} was expected")
    return value
