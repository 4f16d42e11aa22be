"""HTTP/1.1 over one stream: a request is parsed by h11, its body read past h11, its answer written.

Bodies have a Content-Length; there is no chunked upload, no upgrade, no trailer. Every request is parsed by a parser of
its own, which is given at most `MAX_HEAD` bytes; what follows the header block goes back to the stream and is the body,
then the next request.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from types import MappingProxyType
from typing import Any
from urllib.parse import parse_qsl, unquote_to_bytes

import h11

from consortium.server.stream import PIECE, PeerGone, Stream

MAX_HEAD = 16 * 1024
"""Bytes of a request line with its headers."""
MAX_SKIPPED = 64 * 1024
"""Bytes of a body that are read and thrown away to keep a connection; beyond, it is closed."""
MAX_FIELDS = 32

_RAW_PATH = re.compile(rb"/[A-Za-z0-9\-._~!$&'()*+,;=:@/%]*")
_PATH = re.compile(r"/[A-Za-z0-9\-._~!$&'()*+,;=:@/ ]*")
_LENGTHS = re.compile(rb"^content-length[ \t]*:[ \t]*([^\r\n]*)", re.IGNORECASE | re.MULTILINE)


class BodyTooLarge(Exception):  # noqa: N818 - the peer's fault, answered with 413
    """A body is longer than what is read of it."""


class BadRequest(Exception):  # noqa: N818 - the peer's fault, answered with `status`
    """What came is no request that is answered."""

    def __init__(self, status: int, text: str) -> None:
        self.status = status
        super().__init__(text)


@dataclass(frozen=True)
class Response:
    """An answer. body: whole; or stream: its pieces, of `length` bytes in all where that is known."""

    status: int
    body: bytes = b""
    content_type: str = "application/octet-stream"
    headers: Mapping[str, str] = field(default_factory=dict)
    stream: Iterable[bytes | memoryview] | None = None
    length: int | None = None


def json_response(document: Any, status: int = 200) -> Response:
    """A JSON document."""
    return Response(status, json.dumps(document).encode(), "application/json")


def error_response(status: int, text: str) -> Response:
    """What was wrong, as {"error": text}."""
    return json_response({"error": text}, status)


@dataclass(frozen=True)
class Head:
    """A parsed request line with its headers (lower-case names). keep: the peer allows another request after it."""

    parser: h11.Connection
    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    length: int
    keep: bool
    expects: bool


class Request:
    """One request, for the handler.

    path: decoded, without "." or ".." or empty segments. query: its fields, the last of a name. headers: names in
    lower case. peer: the name that `admit` gave, or None. address: the peer's. length: bytes of the body.
    """

    def __init__(self, head: Head, stream: Stream, ending: int) -> None:
        self.method, self.path, self.query = head.method, head.path, head.query
        self.headers, self.length = head.headers, head.length
        self.peer, self.address = stream.peer, stream.address
        self._stream, self._ending = stream, ending
        self._left = head.length
        self._expects = head.expects

    def read(self, limit: int) -> bytes:
        """The rest of the body, whole.

        Raises:
            BodyTooLarge: it has more than `limit` bytes; none of it is read.
            PeerGone: it did not come, or not in time.
        """
        if self._left > limit:
            raise BodyTooLarge(f"the body has {self._left} bytes; at most {limit} are read")
        return self.read_exactly(self._left)

    def read_exactly(self, count: int) -> bytes:
        """So many bytes of the body, fewer only at its end. Raises PeerGone as `read`."""
        data = bytearray(min(count, self._left))
        self.read_into(memoryview(data))
        return bytes(data)

    def read_into(self, view: memoryview) -> int:
        """Fill `view` (bytes, writable) from the body; how many bytes, fewer than its length only at the body's end.

        Raises:
            PeerGone: the body ended early, or did not come in time.
        """
        count = min(len(view), self._left)
        if count:
            if self._expects:
                self._expects = False
                self._stream.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._stream.fill(view[:count])
            self._left -= count
        return count

    def wait(self, fd: int, seconds: float) -> bool:
        """Wait until `fd` is readable: True. False when the time is over, or the listener is to stop.

        Raises:
            PeerGone: the peer closed the connection meanwhile.
        """
        return self._stream.wait(fd, seconds, self._ending)

    @property
    def skippable(self) -> bool:
        """Whether what is left of the body may be read to no purpose, to keep the connection."""
        return self._left <= (0 if self._expects else MAX_SKIPPED)

    @property
    def left(self) -> int:
        """Bytes of the body that were not read."""
        return self._left

    def skip(self) -> None:
        """Read what is left of the body to no purpose. Raises PeerGone as `read`."""
        if self._left:
            self.read_exactly(self._left)


def read_head(stream: Stream, seconds: float | None) -> Head | None:
    """The next request, or None where the peer closed before one.

    seconds: for the whole header block, from its first byte on; None where the stream's own limit stands.

    Raises:
        BadRequest: what came is no request that is answered.
        PeerGone: the connection broke.
    """
    parser = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
    fed = bytearray()
    while True:
        event = _next(parser)
        if event is h11.NEED_DATA:
            if len(fed) >= MAX_HEAD:
                raise BadRequest(431, f"the headers have more than {MAX_HEAD} bytes")
            data = stream.some(MAX_HEAD - len(fed))
            if not data:
                if fed:
                    raise PeerGone("the peer closed the connection within a request")
                return None
            if not fed and seconds is not None:
                stream.allow(seconds)
            fed += data
            parser.receive_data(data)
        elif isinstance(event, h11.Request):
            rest = parser.trailing_data[0]
            stream.unread(rest)
            return _head(parser, event, bytes(fed[: len(fed) - len(rest)]))
        else:
            raise BadRequest(400, "is no request")


def _next(parser: h11.Connection) -> Any:
    try:
        return parser.next_event()
    except h11.ProtocolError as error:
        status = error.error_status_hint
        raise BadRequest(status if 400 <= status < 500 else 400, "is no HTTP/1.1 request") from error


def _head(parser: h11.Connection, event: h11.Request, raw: bytes) -> Head:
    headers: dict[str, str] = {}
    for name, value in event.headers:
        key, text = name.decode("ascii"), value.decode("latin-1")
        headers[key] = f"{headers[key]}, {text}" if key in headers else text
    if event.method == b"CONNECT":
        raise BadRequest(405, "is no proxy")
    path, query = _target(event.target)
    expects = headers.get("expect", "").lower()
    if expects not in ("", "100-continue"):
        raise BadRequest(417, "expects what is not offered")
    new = event.http_version == b"1.1"
    tokens = {one.strip().lower() for one in headers.get("connection", "").split(",")}
    length = _length(headers, raw)
    keep, awaits = new and "close" not in tokens, new and bool(expects) and length > 0
    return Head(parser, event.method.decode("ascii"), path, query, headers, length, keep, awaits)


def _length(headers: Mapping[str, str], raw: bytes) -> int:
    """Bytes of the body. h11 lets equal lengths pass when they stand there twice; here they do not."""
    lengths = _LENGTHS.findall(raw)
    if "transfer-encoding" in headers:
        if lengths:
            raise BadRequest(400, "has both a Content-Length and a Transfer-Encoding")
        raise BadRequest(411, "a Content-Length is needed")
    if len(lengths) > 1 or (lengths and not lengths[0].strip().isdigit()):
        raise BadRequest(400, "Content-Length: one number would be right")
    return int(headers.get("content-length", "0"))


def _target(target: bytes) -> tuple[str, Mapping[str, str]]:
    """Path and query of a request's target; a path that could be read in two ways is refused."""
    raw, _, query = target.partition(b"?")
    decoded = unquote_to_bytes(raw)
    path = decoded.decode("latin-1")
    segments = path.split("/")
    if (
        _RAW_PATH.fullmatch(raw) is None
        or _PATH.fullmatch(path) is None
        or b"%2f" in raw.lower()
        or any(one in (".", "..") for one in segments)
        or "" in segments[1:-1]
    ):
        raise BadRequest(400, "the path is not one that is served")
    try:
        fields = parse_qsl(query.decode("ascii"), keep_blank_values=True, max_num_fields=MAX_FIELDS)
    except ValueError as error:
        raise BadRequest(400, "the query is not one that is read") from error
    return path, MappingProxyType(dict(fields))


def write_response(stream: Stream, head: Head | None, response: Response, *, keep: bool) -> None:
    """Send an answer. head: of the request, None where there was none.

    Raises:
        PeerGone: the peer is gone or takes nothing.
        ValueError: the answer is not of the length that it says, or its headers are none.
    """
    parser = head.parser if head else h11.Connection(h11.SERVER)
    bare = (head is not None and head.method == "HEAD") or response.status in (204, 304)
    length = len(response.body) if response.stream is None else response.length
    names = {"Content-Type": response.content_type} if length != 0 else {}
    names |= response.headers
    if length is not None and response.status not in (204, 304):
        names["Content-Length"] = str(length)
    if not keep:
        names["Connection"] = "close"
    try:
        start = parser.send(_start(response.status, names)) or b""
    except h11.LocalProtocolError as error:
        raise ValueError("the answer's headers are not such") from error
    if response.stream is None and not bare and len(response.body) <= 16 * MAX_HEAD:
        stream.send(start + response.body)
        return
    stream.send(start)
    if bare:
        return
    if response.stream is None:
        stream.send(response.body)
    elif length is None:
        _send_chunks(stream, parser, response.stream)
    else:
        _send_pieces(stream, response.stream, length)


def _start(status: int, names: Mapping[str, str]) -> h11.Response:
    try:
        reason = HTTPStatus(status).phrase
    except ValueError:
        reason = ""
    headers = [(name.encode("ascii"), value.encode("ascii")) for name, value in names.items()]
    return h11.Response(status_code=status, headers=headers, reason=reason.encode("ascii"))


def _send_pieces(stream: Stream, pieces: Iterable[bytes | memoryview], length: int) -> None:
    left = length
    for piece in pieces:
        left -= memoryview(piece).nbytes
        if left < 0:
            break
        stream.send(piece)
    if left:
        raise ValueError(f"the answer is not of the {length} bytes that it says")


def _send_chunks(stream: Stream, parser: h11.Connection, pieces: Iterable[bytes | memoryview]) -> None:
    for piece in pieces:
        view = memoryview(piece).cast("B")
        for at in range(0, len(view), PIECE):
            stream.send(parser.send(h11.Data(data=bytes(view[at : at + PIECE]))) or b"")
    stream.send(parser.send(h11.EndOfMessage()) or b"")
