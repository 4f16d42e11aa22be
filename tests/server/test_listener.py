import contextlib
import hashlib
import http.client
import json
import logging
import os
import queue
import re
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from attacker import closed
from doors import (
    HERE,
    Certificates,
    certificates,
    common_name,
    descriptors,
    plain,
    resident,
    rest,
    secured,
    soon,
    threads,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from consortium.protocol.errors import ConsortiumError, InputError, IntegrityError, RefusedError
from consortium.server.listener import (
    BodyTooLarge,
    Caps,
    Listener,
    PeerGone,
    Request,
    Response,
    error_response,
    json_response,
)
from consortium.server.sockets import counted

SUPPORT = Path(__file__).resolve().parents[1] / "support"
MIB = 1 << 20
BLOCK = bytes(range(256)) * 4096

Handler = Callable[[Request], Response]
Open = Callable[..., Listener]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates(tmp_path_factory.mktemp("certificates"), "a", "b", "stranger")


def admit(der: bytes | None) -> str | None:
    name = common_name(der) if der else None
    return name if name in ("a", "b") else None


@pytest.fixture
def opened(known: Certificates) -> Iterator[Open]:
    """Opens doors; at the end they are closed, and no thread and no descriptor is left."""
    before = threads(), descriptors()
    doors: list[Listener] = []

    def door(
        handler: Handler, caps: Caps | None = None, *, clients: bool = True, host: str = HERE
    ) -> Listener:
        context = known.serving(clients=clients)
        one = Listener(host, 0, lambda: context, handler, caps or Caps(), admit if clients else None)
        one.start()
        doors.append(one)
        return one

    yield door
    for one in doors:
        one.stop(0.5)
        assert one.connections() == 0
    assert soon(lambda: threads() <= before[0] and descriptors() <= before[1]), "a thread or a file is left"


def simple(request: Request) -> Response:
    """What most tests ask: who asks for what, with how long a body of which digest."""
    body = request.read(MIB)
    return json_response(
        {
            "peer": request.peer,
            "address": request.address,
            "method": request.method,
            "path": request.path,
            "query": dict(request.query),
            "length": len(body),
            "sha256": hashlib.sha256(body).hexdigest(),
        }
    )


def caller(door: Listener, known: Certificates, name: str = "a") -> http.client.HTTPSConnection:
    return http.client.HTTPSConnection(HERE, door.port, context=known.calling(name), timeout=10)


def asked(
    connection: http.client.HTTPSConnection, method: str, path: str, body: bytes | None = None
) -> tuple[int, bytes]:
    connection.request(method, path, body)
    answer = connection.getresponse()
    return answer.status, answer.read()


def spoken(door: Listener, known: Certificates, sent: bytes) -> tuple[list[int], bytes]:
    """Send these bytes and no more; the statuses of all answers, and the answers."""
    with secured(door.port, known.calling("a")) as connection:
        try:
            connection.sendall(sent)
            socket.socket.shutdown(connection, socket.SHUT_WR)
        except OSError:
            pass
        got = rest(connection)
    return [int(one) for one in re.findall(rb"HTTP/1\.1 (\d{3}) ", got)], got


def turned_away(door: Listener, address: str) -> bool:
    """Whether a connection from this address is closed at once, without a byte."""
    begun = time.monotonic()
    try:
        with plain(door.port, address) as connection:
            nothing = rest(connection) == b""
    except ConnectionResetError:
        nothing = True
    return nothing and time.monotonic() - begun < 1.0


# Requests


def test_requests_are_answered_on_one_connection(opened: Open, known: Certificates) -> None:
    """Requests with and without bodies follow each other on one connection, under the name in the certificate."""
    door = opened(simple)
    connection = caller(door, known)
    for body in (None, b"", b"x" * 70_000):
        status, content = asked(
            connection, "POST" if body is not None else "GET", "/v1/x%20y?a=1&b=&a=2", body
        )
        assert status == 200
        found = json.loads(content)
        assert (found["peer"], found["address"], found["path"]) == ("a", HERE, "/v1/x y")
        assert found["query"] == {"a": "2", "b": ""}
        assert found["sha256"] == hashlib.sha256(body or b"").hexdigest()
        assert door.connections() == 1
    connection.close()
    assert soon(lambda: door.connections() == 0)


def test_a_body_that_the_handler_leaves_does_not_become_the_next_request(
    opened: Open, known: Certificates
) -> None:
    """A short body that is not read is skipped, a long one ends the connection; neither is read as a request."""
    smuggled = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
    paths: list[str] = []

    def handler(request: Request) -> Response:
        paths.append(request.path)
        return Response(200)

    door = opened(handler)
    short = b"POST /one HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(smuggled) + smuggled
    statuses, _ = spoken(door, known, short + b"GET /two HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (statuses, paths) == ([200, 200], ["/one", "/two"])
    paths.clear()
    long = smuggled * 3000
    head = b"POST /one HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(long)
    statuses, got = spoken(door, known, head + long)
    assert (statuses, paths) == ([200], ["/one"])
    assert b"Connection: close" in got


@pytest.mark.parametrize("cuts", [1, 7, 1000])
def test_pipelined_requests_are_answered_in_order(opened: Open, known: Certificates, cuts: int) -> None:
    """Requests that are sent at once, in pieces of any size, are answered one after the other, bodies included."""
    door = opened(simple)
    parts = []
    for number in range(5):
        body = b"GET / HTTP/1.1\r\n\r\n" * number
        parts.append(
            b"PUT /%d HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (number, len(body)) + body
        )
    sent = b"".join(parts)
    with secured(door.port, known.calling("a")) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(0, len(sent), cuts):
            connection.sendall(sent[at : at + cuts])
        socket.socket.shutdown(connection, socket.SHUT_WR)
        got = rest(connection)
    assert re.findall(rb'"path": "/(\d)"', got) == [b"0", b"1", b"2", b"3", b"4"]
    assert re.findall(rb'"length": (\d+)', got) == [b"0", b"18", b"36", b"54", b"72"]


@pytest.mark.parametrize(
    ("line", "headers", "status"),
    [
        (b"GET /", b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n", 400),
        (b"GET /", b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n", 400),
        (b"POST /", b"Transfer-Encoding: chunked\r\n", 411),
        (b"POST /", b"Transfer-Encoding: gzip, chunked\r\n", 400),
        (b"POST /", b"Content-Length: 3\r\nContent-Length: 3\r\n", 400),
        (b"POST /", b"Content-Length: 3\r\ncontent-length: 4\r\n", 400),
        (b"POST /", b"Content-Length: 3, 3\r\n", 400),
        (b"POST /", b"Content-Length: +3\r\n", 400),
        (b"POST /", b"Content-Length: -3\r\n", 400),
        (b"POST /", b"Content-Length: 0x3\r\n", 400),
        (b"POST /", b"Content-Length : 3\r\n", 400),
        (b"POST /", b"Content-Length:\r\n 3\r\n", 400),
        (b"POST /", b"Content-Length: " + b"9" * 40 + b"\r\n", 400),
        (b"GET /", b"Host: y\r\n", 400),
        (b"GET /", b"Expect: a-miracle\r\n", 417),
        (b"GET /", b"X: a\x00b\r\n", 400),
        (b"GET /", b"X" * 17_000 + b": 1\r\n", 431),
        (b"GET /" + b"x" * 17_000, b"", 431),
        (b"GET /a/../b", b"", 400),
        (b"GET /a/%2e%2E/b", b"", 400),
        (b"GET /a/./b", b"", 400),
        (b"GET /..", b"", 400),
        (b"GET /a%2Fb", b"", 400),
        (b"GET /a%5cb", b"", 400),
        (b"GET /a\\b", b"", 400),
        (b"GET /a%00b", b"", 400),
        (b"GET /a%0d%0ab", b"", 400),
        (b"GET /a%c3%a9", b"", 400),
        (b"GET /a%zz", b"", 400),
        (b"GET /%252e%252e/x", b"", 400),
        (b"GET //x", b"", 400),
        (b"GET /a//b", b"", 400),
        (b"GET http://x/", b"", 400),
        (b"GET x", b"", 400),
        (b"OPTIONS *", b"", 400),
        (b"CONNECT x:1", b"", 405),
        (b"GET /?" + b"a=1&" * 40, b"", 400),
        (b"GET /#x", b"", 400),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(
    opened: Open, known: Certificates, line: bytes, headers: bytes, status: int
) -> None:
    """Ambiguous lengths, paths and headers get an error, the handler never sees them, the connection ends."""
    seen: list[str] = []

    def handler(request: Request) -> Response:
        seen.append(request.path)
        return Response(200)

    door = opened(handler)
    statuses, got = spoken(
        door, known, line + b" HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\nabc" + b"\r\n" * 9
    )
    assert (statuses, seen) == ([status], [])
    assert b"Connection: close" in got
    assert b'{"error": ' in got


def test_old_and_closing_requests_end_the_connection(opened: Open, known: Certificates) -> None:
    """HTTP/1.0, and a peer that says so, get their answer and then the end."""
    door = opened(simple)
    for request in (b"GET / HTTP/1.0\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Close\r\n\r\n"):
        statuses, got = spoken(door, known, request * 2)
        assert statuses == [200]
        assert b"Connection: close" in got


def test_answers_of_every_form(opened: Open, known: Certificates) -> None:
    """Bodies, streams of known and unknown length, HEAD, 204 and headers of the handler's arrive as they were given."""
    closed: list[str] = []

    def pieces() -> Iterator[bytes | memoryview]:
        try:
            yield b"one"
            yield b""
            yield memoryview(BLOCK * 3)
        finally:
            closed.append("closed")

    answers = {
        "/body": Response(201, b"hi", "text/plain", {"X-Y": "z"}),
        "/none": Response(204, headers={"X-Y": "z"}),
        "/json": json_response([1], 202),
        "/error": error_response(404, "no"),
    }

    def handler(request: Request) -> Response:
        if request.path in answers:
            return answers[request.path]
        return Response(200, stream=pieces(), length=3 + 3 * MIB if request.path == "/known" else None)

    door = opened(handler)
    connection = caller(door, known)
    for path, status, body in (
        ("/body", 201, b"hi"),
        ("/none", 204, b""),
        ("/json", 202, b"[1]"),
        ("/error", 404, b'{"error": "no"}'),
        ("/known", 200, b"one" + BLOCK * 3),
        ("/unknown", 200, b"one" + BLOCK * 3),
        ("/body", 201, b"hi"),
    ):
        assert asked(connection, "GET", path) == (status, body)
    assert asked(connection, "HEAD", "/body") == (201, b"")
    assert asked(connection, "HEAD", "/known") == (200, b"")
    connection.request("GET", "/none")
    answer = connection.getresponse()
    assert answer.read() == b""
    assert answer.headers.items() == [("X-Y", "z")]
    assert len(closed) == 2  # that of HEAD was never begun
    assert door.connections() == 1
    connection.close()


def test_errors_of_the_handler_become_statuses(opened: Open, known: Certificates) -> None:
    """Our errors say what was wrong; any other is a 500 without a word of it."""
    errors = {
        "/input": InputError("say it thus"),
        "/integrity": IntegrityError("not what was signed"),
        "/refused": RefusedError("not you"),
        "/other": ConsortiumError("inside"),
        "/bug": KeyError("inside"),
        "/large": BodyTooLarge("too much"),
    }

    def handler(request: Request) -> Response:
        raise errors[request.path]

    door = opened(handler)
    found = {}
    for path in errors:
        connection = caller(door, known)
        status, content = asked(connection, "GET", path)
        found[path] = (status, json.loads(content)["error"])
        connection.close()
    failed = (500, "the server failed; its log says how")
    assert found == {
        "/input": (400, "say it thus"),
        "/integrity": (400, "not what was signed"),
        "/refused": (403, "not you"),
        "/other": failed,
        "/bug": failed,
        "/large": (413, "too much"),
    }


@pytest.mark.parametrize("kind", ["short", "long", "raises", "header", "status"])
def test_an_answer_that_fails_half_way_is_never_taken_for_whole(
    opened: Open, known: Certificates, kind: str
) -> None:
    """A stream of another length than announced, or that raises, breaks the connection; the door goes on."""

    def pieces() -> Iterator[bytes]:
        yield b"12345"
        if kind == "raises":
            raise OSError("the disk")
        if kind == "long":
            yield b"123456"

    def handler(request: Request) -> Response:
        if request.path == "/fine":
            return Response(200)
        if kind == "header":
            return Response(200, headers={"X": "a\r\nY: b"})
        if kind == "status":
            return Response(99)
        return Response(200, stream=pieces(), length=10)

    door = opened(handler)
    connection = caller(door, known)
    with pytest.raises((http.client.HTTPException, ConnectionError, ssl.SSLError)):
        asked(connection, "GET", "/")
    connection.close()
    connection = caller(door, known)
    assert asked(connection, "GET", "/fine")[0] == 200
    connection.close()


def test_too_large_a_body_is_refused_before_it_is_read(opened: Open, known: Certificates) -> None:
    """413 comes on the headers alone, and reaches a peer that goes on sending its body."""
    door = opened(simple)
    head = b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (40 * MIB)
    with secured(door.port, known.calling("a")) as connection:
        connection.sendall(head)
        assert connection.recv(12) == b"HTTP/1.1 413"
    connection = secured(door.port, known.calling("a"))
    connection.sendall(head)
    for _ in range(40):
        connection.sendall(BLOCK)
    assert rest(connection).startswith(b"HTTP/1.1 413")
    connection.close()


def test_expect_continue_is_answered_when_the_body_is_wanted(opened: Open, known: Certificates) -> None:
    """100 Continue comes before a body that is read, and not before one that is refused."""
    door = opened(simple)
    head = b"PUT / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
    with secured(door.port, known.calling("a")) as connection:
        connection.sendall(head % 3)
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"abc")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    with secured(door.port, known.calling("a")) as connection:
        connection.sendall(head % (2 * MIB))
        assert rest(connection).startswith(b"HTTP/1.1 413")


def test_bodies_are_read_in_pieces_of_any_size(opened: Open, known: Certificates) -> None:
    """`read_exactly`, `read_into` and `read` after each other give the body, and nothing beyond its end."""
    pieces: list[bytes] = []

    def handler(request: Request) -> Response:
        buffer = bytearray(10)
        pieces.append(request.read_exactly(5))
        assert request.read_into(memoryview(buffer)) == 10
        pieces.append(bytes(buffer))
        pieces.append(request.read(1000))
        assert request.read_into(memoryview(buffer)) == 0
        assert request.read_exactly(3) == request.read(0) == b""
        return Response(200)

    door = opened(handler)
    connection = caller(door, known)
    assert asked(connection, "PUT", "/", BLOCK[:50])[0] == 200
    assert pieces == [BLOCK[:5], BLOCK[5:15], BLOCK[15:50]]
    assert asked(connection, "PUT", "/", BLOCK[:50])[0] == 200
    connection.close()


def test_a_quarter_of_a_gigabyte_goes_both_ways_at_once(opened: Open, known: Certificates) -> None:
    """256 MB up and 256 MB down, at the same time, arrive bit for bit."""
    count = 256
    sha = hashlib.sha256()
    for _ in range(count):
        sha.update(BLOCK)
    whole = sha.hexdigest()

    def handler(request: Request) -> Response:
        if request.method == "GET":
            return Response(200, stream=(BLOCK for _ in range(count)), length=count * MIB)
        taken, buffer = hashlib.sha256(), memoryview(bytearray(MIB))
        while got := request.read_into(buffer):
            taken.update(buffer[:got])
        return json_response(taken.hexdigest())

    door = opened(handler)

    def up() -> str:
        connection = caller(door, known)
        connection.request("PUT", "/", (BLOCK for _ in range(count)), {"Content-Length": str(count * MIB)})
        found: str = json.loads(connection.getresponse().read())
        connection.close()
        return found

    def down() -> str:
        connection = caller(door, known, "b")
        connection.request("GET", "/")
        answer, taken, buffer = connection.getresponse(), hashlib.sha256(), memoryview(bytearray(MIB))
        while got := answer.readinto(buffer):
            taken.update(buffer[:got])
        connection.close()
        return taken.hexdigest()

    with ThreadPoolExecutor(2) as pool:
        assert [one.result() for one in (pool.submit(up), pool.submit(down))] == [whole, whole]


# Who is let in


def test_only_admitted_certificates_are_heard(opened: Open, known: Certificates) -> None:
    """No certificate, or one that is not admitted: the connection ends before any HTTP is read."""
    seen: list[str] = []

    def handler(request: Request) -> Response:
        seen.append(request.path)
        return Response(200)

    door = opened(handler)
    for name in ("", "stranger"):
        with secured(door.port, known.calling(name)) as unknown:
            with contextlib.suppress(OSError):
                unknown.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert rest(unknown) == b""
    assert seen == []
    assert soon(lambda: door.connections() == 0)
    nobody = opened(simple, clients=False)
    connection = caller(nobody, known, "")
    assert json.loads(asked(connection, "GET", "/")[1])["peer"] is None
    connection.close()


def test_other_protocols_are_turned_away(opened: Open, known: Certificates) -> None:
    """TLS 1.2, HTTP without TLS, and noise end at once; the door goes on."""
    door = opened(simple)
    old = known.calling("a")
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, ConnectionError)):
        secured(door.port, old)
    for noise in (
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x00" * 100,
        os.urandom(5000),
        b"\x16\x03\x01\xff\xff" * 9,
    ):
        with plain(door.port) as noisy:
            with contextlib.suppress(OSError):
                noisy.sendall(noise)
                noisy.shutdown(socket.SHUT_WR)
            assert b"HTTP" not in rest(noisy)
    connection = caller(door, known)
    assert asked(connection, "GET", "/")[0] == 200
    connection.close()
    assert soon(lambda: door.connections() == 0)


def test_an_admission_that_a_cut_overtakes_is_repeated(known: Certificates) -> None:
    """A peer that is revoked and cut while its connection is being admitted does not slip through."""
    answers: list[str | None] = ["a", None]

    def admitting(_: bytes | None) -> str | None:
        answer = answers.pop(0)
        if answer:
            door.cut("a")
        return answer

    context = known.serving()
    door = Listener(HERE, 0, lambda: context, simple, Caps(), admitting)
    door.start()
    with secured(door.port, known.calling("a")) as connection:
        assert rest(connection) == b""
    assert answers == []
    door.stop(0.5)


def test_a_lookup_that_fails_costs_one_connection(known: Certificates) -> None:
    """Where the certificate cannot be looked up, or the TLS settings not be made, nobody comes in; the door goes on."""
    failures: list[Exception] = [
        ConsortiumError("the store is busy"),
        OSError("no such file"),
        ValueError("x"),
    ]
    serving = known.serving()

    def context() -> ssl.SSLContext:
        if failures and not isinstance(failures[-1], ConsortiumError):
            raise failures.pop()
        return serving

    def admitting(der: bytes | None) -> str | None:
        if failures:
            raise failures.pop()
        return admit(der)

    door = Listener(HERE, 0, context, simple, Caps(), admitting)
    door.start()
    for _ in range(3):
        with contextlib.suppress(OSError), secured(door.port, known.calling("a")) as connection:
            assert rest(connection) == b""
    assert failures == []
    fine = caller(door, known)
    assert asked(fine, "GET", "/")[0] == 200
    fine.close()
    door.stop(0.5)


# Time


@pytest.mark.parametrize("phase", ["connect", "hello", "handshake", "headers", "next headers"])
def test_slow_handshakes_and_headers_are_cut_at_the_deadline(
    opened: Open, known: Certificates, phase: str
) -> None:
    """Silence and bytes one by one, before, in and after the handshake, end after `seconds`, not later."""
    door = opened(simple, Caps(seconds=0.6, idle=30.0))
    begun = time.monotonic()
    drip = b""
    if phase in ("connect", "hello"):
        connection: socket.socket = plain(door.port)
        drip = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500) if phase == "hello" else b""
    else:
        connection = secured(door.port, known.calling("a"))
        drip = b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 500 if "headers" in phase else b""
    if phase == "next headers":
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        time.sleep(1.0)  # resting longer than the headers may take is fine
        assert door.connections() == 1
        begun = time.monotonic()
    assert soon(lambda: door.connections() == 1)
    for byte in drip:
        try:
            connection.send(bytes([byte]))
        except OSError:
            break
        time.sleep(0.02)
        if door.connections() == 0:
            break
    assert soon(lambda: door.connections() == 0)
    assert 0.5 < time.monotonic() - begun < 1.5
    connection.close()


@pytest.mark.parametrize("clients", [True, False])
def test_a_connection_that_rests_too_long_ends(opened: Open, known: Certificates, clients: bool) -> None:
    """Between two requests an admitted peer has `idle` seconds; nobody that is not admitted has more than `seconds`."""
    caps = Caps(seconds=5.0, idle=0.4) if clients else Caps(seconds=0.4, idle=30.0, body_seconds=9.0)
    door = opened(simple, caps, clients=clients)
    connection = caller(door, known, "a" if clients else "")
    assert asked(connection, "GET", "/")[0] == 200
    begun = time.monotonic()
    assert soon(lambda: door.connections() == 0)
    assert 0.3 < time.monotonic() - begun < 1.2
    connection.close()


@pytest.mark.parametrize("drip", [False, True])
def test_a_body_that_stalls_ends_the_connection(opened: Open, known: Certificates, drip: bool) -> None:
    """A body that stops, or comes byte by byte, is given `stall` seconds; the handler sees that the peer is gone."""
    outcome: list[str] = []

    def handler(request: Request) -> Response:
        try:
            for _ in range(1000):
                request.read_exactly(1)  # however small the reads are
        except PeerGone as gone:
            outcome.append(str(gone))
            raise
        return Response(200)

    door = opened(handler, Caps(stall=0.5))
    begun = time.monotonic()
    with secured(door.port, known.calling("a")) as connection:
        connection.sendall(b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nx")
        while drip and not outcome:
            try:
                connection.send(b"x")
            except OSError:
                break
            time.sleep(0.05)
        assert rest(connection) == b""
    assert soon(lambda: len(outcome) == 1)
    assert 0.4 < time.monotonic() - begun < 1.3


def test_the_time_of_a_slow_handler_is_not_the_peers(opened: Open, known: Certificates) -> None:
    """A handler that takes longer than `stall` between two reads loses no connection."""

    def handler(request: Request) -> Response:
        for _ in range(4):
            request.read_exactly(25)
            time.sleep(0.8)
        return Response(200)

    door = opened(handler, Caps(stall=0.5))
    connection = caller(door, known)
    assert asked(connection, "PUT", "/", bytes(100))[0] == 200
    connection.close()


def test_a_truncated_body_is_no_body(opened: Open, known: Certificates) -> None:
    """A peer that goes away within a body: the handler sees it, nobody is answered."""
    outcome: list[str] = []

    def handler(request: Request) -> Response:
        try:
            request.read(1000)
        except PeerGone:
            outcome.append("gone")
            raise
        outcome.append("whole")
        return Response(200)

    door = opened(handler)
    statuses, _ = spoken(door, known, b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nshort")
    assert statuses == []
    assert soon(lambda: outcome == ["gone"])


@pytest.mark.parametrize(("rate", "stays"), [(0, False), (10_000, False), (1_000_000, True)])
def test_a_peer_that_does_not_read_is_dropped(
    opened: Open, known: Certificates, rate: int, stays: bool
) -> None:
    """An answer that is not taken, or by less than 64 KiB each `stall`, ends, and its stream is closed."""
    closed = threading.Event()

    def pieces() -> Iterator[bytes]:
        try:
            for _ in range(64):
                yield BLOCK
        finally:
            closed.set()

    door = opened(lambda _: Response(200, stream=pieces(), length=64 * MIB), Caps(stall=1.0))
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 100_000)  # so that the kernel takes little ahead
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1_400)  # as on a network, not as within a machine
    raw.connect((HERE, door.port))
    with known.calling("a").wrap_socket(raw, server_hostname=HERE) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        begun = time.monotonic()
        while not closed.is_set() and time.monotonic() - begun < 2.5:
            time.sleep(0.02)
            if rate:
                connection.recv(rate // 50)
        assert closed.is_set() is not stays
    assert soon(lambda: door.connections() == 0)


def test_a_request_of_nobody_has_its_time(opened: Open, known: Certificates) -> None:
    """A body of a peer without a name is bounded as a whole, however steadily it comes."""
    door = opened(simple, Caps(body_seconds=0.5), clients=False)
    begun = time.monotonic()
    with secured(door.port, known.calling()) as connection:
        connection.sendall(b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        while soon(lambda: door.connections() == 1, 0.5) and time.monotonic() - begun < 5:
            try:
                connection.sendall(bytes(17_000))
            except OSError:
                break
            time.sleep(0.02)
    assert soon(lambda: door.connections() == 0)
    assert 0.4 < time.monotonic() - begun < 1.3


# Numbers


def test_an_address_has_so_many_connections_and_others_are_still_served(
    opened: Open, known: Certificates
) -> None:
    """Connections count from accept on, without a handshake; beyond the cap they are closed at once."""
    door = opened(simple, Caps(per_address=5))
    held = [plain(door.port, "127.0.0.2") for _ in range(5)]
    assert soon(lambda: door.connections() == 5)
    begun = time.monotonic()
    for _ in range(20):
        assert turned_away(door, "127.0.0.2")
    assert time.monotonic() - begun < 1.0
    connection = caller(door, known)
    assert asked(connection, "GET", "/")[0] == 200
    connection.close()
    held.pop().close()
    assert soon(lambda: door.connections() == 4)
    with secured(door.port, known.calling("a"), "127.0.0.2") as again:
        assert again.version() == "TLSv1.3"
    for one in held:
        one.close()


def test_so_many_wait_to_be_admitted_in_all_and_the_admitted_do_not_mind(
    opened: Open, known: Certificates
) -> None:
    """When strangers take every place, a site that is in already works on, and a place that falls free is taken."""
    door = opened(simple, Caps(pending=6, per_address=4))
    inside = caller(door, known)
    assert asked(inside, "GET", "/")[0] == 200
    held = [plain(door.port, f"127.0.0.{2 + number % 2}") for number in range(6)]
    assert soon(lambda: door.connections() == 7)
    assert turned_away(door, HERE)
    assert asked(inside, "GET", "/")[0] == 200
    for one in held:
        one.close()
    assert soon(lambda: door.connections() == 1)
    other = caller(door, known, "b")
    assert asked(other, "GET", "/")[0] == 200
    for site in (inside, other):
        site.close()


def test_sixteen_addresses_cannot_keep_all_places(opened: Open, known: Certificates) -> None:
    """Each of them holds as many connections as it gets, silent, and opens others at once where one ends: a site that
    comes anew is let in within a second, again and again, and one that is in notices nothing."""
    door, ended = opened(simple), threading.Event()
    inside = caller(door, known, "b")
    assert asked(inside, "GET", "/")[0] == 200

    def hold(address: str) -> None:
        held: list[socket.socket] = []
        while not ended.wait(0.05):
            with contextlib.suppress(OSError):
                held += [plain(door.port, address) for _ in range(40)]
            for one in held:
                one.setblocking(False)
            held = [one for one in held if open_still(one)]
        for one in held:
            one.close()

    crowd = [threading.Thread(target=hold, args=(f"127.0.1.{n}",)) for n in range(1, 17)]
    for one in crowd:
        one.start()
    try:
        assert soon(lambda: door.connections() > 400)
        slowest = 0.0
        for _ in range(20):
            begun = time.monotonic()
            with secured(door.port, known.calling("a")) as anew:
                anew.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                assert anew.recv(100).startswith(b"HTTP/1.1 200")
            assert asked(inside, "GET", "/")[0] == 200
            slowest = max(slowest, time.monotonic() - begun)
            time.sleep(0.1)
        assert slowest < 2.0
    finally:
        ended.set()
        for one in crowd:
            one.join(10)
    inside.close()
    assert soon(lambda: door.connections() == 0, 8.0)


def open_still(connection: socket.socket) -> bool:
    """Whether the other side has not closed."""
    try:
        return connection.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def test_an_address_opens_so_many_connections_a_second(opened: Open, known: Certificates) -> None:
    """Of a flood from one address without certificates so many are heard as burst and rate allow; meanwhile a site at
    another address is served, and one at the same address that is admitted may come as often as it likes."""
    door = opened(simple, Caps(rate=5.0, burst=20))
    for _ in range(60):
        with secured(door.port, known.calling("a"), "127.0.0.2") as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
    begun, heard = time.monotonic(), 0
    for _ in range(200):
        try:
            with secured(door.port, known.calling(), "127.0.0.2"):
                heard += 1  # TLS 1.3: what it lacks is said afterwards
        except OSError:
            continue
    allowed = 20 + 5.0 * (time.monotonic() - begun)
    assert 15 <= heard <= allowed + 1
    assert turned_away(door, "127.0.0.2")
    site = caller(door, known)
    assert asked(site, "GET", "/")[0] == 200
    site.close()


def test_an_admitted_connection_frees_its_place(opened: Open, known: Certificates) -> None:
    """Connections of admitted peers do not count against their address (many sites may share one)."""
    door = opened(simple, Caps(per_address=2, pending=2))
    inside = [caller(door, known, name) for name in ("a", "b") * 3]
    for one in inside:
        assert asked(one, "GET", "/")[0] == 200
    assert door.connections() == 6
    for one in inside:
        one.close()


def test_a_peer_has_so_many_connections_and_the_oldest_at_rest_gives_way(
    opened: Open, known: Certificates
) -> None:
    """A site that comes again after its network failed is not kept out by its own dead connections."""
    go, entered = threading.Event(), threading.Semaphore(0)

    def handler(request: Request) -> Response:
        if request.path == "/busy":
            entered.release()
            assert go.wait(10)
        return Response(200)

    door = opened(handler, Caps(per_peer=2))
    first, second, third = (caller(door, known) for _ in range(3))
    for one in (first, second, third):
        assert asked(one, "GET", "/")[0] == 200
    assert soon(lambda: door.connections() == 2)
    assert first.sock.recv(1) == b""
    for one in (second, third):
        one.request("GET", "/busy")
        assert entered.acquire(timeout=5)
    fourth = secured(door.port, known.calling("a"))
    assert rest(fourth) == b""
    fourth.close()
    go.set()
    assert [one.getresponse().status for one in (second, third)] == [200, 200]
    for one in (first, second, third):
        one.close()


def crowd(door: Listener, count: int, seconds: float, *addresses: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        str(SUPPORT / "slow_crowd.py"),
        str(door.port),
        str(count),
        str(seconds),
        *addresses,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def endured(
    door: Listener, known: Certificates, count: int, addresses: list[str]
) -> tuple[int, float, int, float]:
    """Most connections, most bytes of memory, requests answered and the slowest, while a crowd comes slowly."""
    inside = caller(door, known)
    asked(inside, "GET", "/")
    before, most, taken, slowest, served = resident(), 0, 0, 0.0, 0
    slow = crowd(door, count, 2.0, *addresses)
    while slow.poll() is None:
        begun = time.monotonic()
        assert asked(inside, "GET", "/")[0] == 200
        fresh = caller(door, known, "b")
        assert asked(fresh, "GET", "/")[0] == 200
        fresh.close()
        served, slowest = served + 2, max(slowest, time.monotonic() - begun)
        most, taken = max(most, door.connections()), max(taken, resident() - before)
        time.sleep(0.02)
    inside.close()
    with slow:
        assert slow.stdout is not None
        assert slow.stdout.readline() == "open\n"
        print(f"{most} connections, {taken / MIB:.1f} MiB, {served} requests, the slowest {slowest:.2f} s")
    return most, taken / MIB, served, slowest


def test_two_thousand_slow_connections_of_one_address_bother_nobody(
    opened: Open, known: Certificates
) -> None:
    """While they come and drip bytes, others are served, and neither threads nor memory grow beyond the caps."""
    door = opened(simple)
    most, mib, served, slowest = endured(door, known, 2_000, ["127.0.0.3"])
    assert most <= 32 + 3
    assert mib < 50
    assert served >= 20
    assert slowest < 2.0


@pytest.mark.slow
def test_ten_thousand_slow_connections_of_many_addresses_stay_within_the_caps(
    opened: Open, known: Certificates
) -> None:
    """10,000 connections of 15 addresses: at most 480 are kept, in less than 50 MB, and others are served."""
    door = opened(simple)
    most, mib, served, slowest = endured(door, known, 10_000, [f"127.0.1.{n}" for n in range(1, 16)])
    assert 400 <= most <= 15 * 32 + 3
    assert mib < 50
    assert served >= 5
    assert slowest < 3.0


# Ending


def waiting(seconds: float, seen: queue.Queue[str], fd: int) -> Handler:
    """A handler that waits for `fd`, and tells what it saw."""

    def handler(request: Request) -> Response:
        if request.path != "/wait":
            return Response(200)
        request.read(MIB)
        seen.put("waits")
        try:
            found = request.wait(fd, seconds)
        except PeerGone:
            seen.put("gone")
            raise
        seen.put(str(found))
        return Response(200 if found else 204)

    return handler


@pytest.fixture
def news() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def test_wait_ends_when_there_is_news_or_the_time_is_over(
    opened: Open, known: Certificates, news: int
) -> None:
    """A request that waits is answered at once when its descriptor is readable, else after its seconds."""
    seen: queue.Queue[str] = queue.Queue()
    door = opened(waiting(0.5, seen, news))
    connection = caller(door, known)
    begun = time.monotonic()
    assert asked(connection, "POST", "/wait", b"x" * 1000)[0] == 204
    assert 0.45 < time.monotonic() - begun < 1.0
    connection.request("POST", "/wait", b"x")
    assert [seen.get(timeout=5) for _ in range(3)] == ["waits", "False", "waits"]
    begun = time.monotonic()
    os.eventfd_write(news, 1)
    assert connection.getresponse().status == 200
    assert time.monotonic() - begun < 0.3
    connection.close()


@pytest.mark.parametrize("how", ["close", "reset", "notify", "half record, close", "much, close"])
def test_wait_notices_within_a_second_that_the_peer_is_gone(
    opened: Open, known: Certificates, news: int, how: str
) -> None:
    """A peer that closes, breaks off, or says goodbye over TLS, also after further bytes, ends the wait."""
    seen: queue.Queue[str] = queue.Queue()
    door = opened(waiting(20.0, seen, news))
    connection = secured(door.port, known.calling("a"))
    connection.sendall(b"POST /wait HTTP/1.1\r\nHost: x\r\n\r\n")
    assert seen.get(timeout=5) == "waits"
    time.sleep(0.05)
    begun = time.monotonic()
    if how == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if how == "notify":
        connection.settimeout(0.0)
        with contextlib.suppress(OSError):  # the answer is not waited for
            connection.unwrap()
    elif how == "half record, close":
        socket.socket.send(connection, b"\x17\x03\x03\x01\x00half")
    elif how == "much, close":
        connection.sendall(bytes(40_000))
    if how != "notify":
        connection.close()
    assert seen.get(timeout=5) == "gone"
    assert time.monotonic() - begun < 1.0
    connection.close()
    assert soon(lambda: door.connections() == 0)


def test_a_request_that_comes_while_another_waits_is_answered_after_it(
    opened: Open, known: Certificates, news: int
) -> None:
    """Bytes that follow a waiting request neither end the wait nor are lost, and the wait does not spin over them."""
    seen: queue.Queue[str] = queue.Queue()
    door = opened(waiting(20.0, seen, news))
    with secured(door.port, known.calling("a")) as connection:
        connection.sendall(b"POST /wait HTTP/1.1\r\nHost: x\r\n\r\n")
        assert seen.get(timeout=5) == "waits"
        connection.sendall(b"PUT /next HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n" + bytes(60_000))
        spent = time.process_time()
        time.sleep(1.0)
        assert time.process_time() - spent < 0.1
        os.eventfd_write(news, 1)
        got = b""
        while got.count(b"HTTP/1.1 200") < 2:
            got += connection.recv(65536)
    assert seen.get(timeout=5) == "True"


@pytest.mark.parametrize("state", ["rests", "waits", "uploads", "downloads", "works"])
def test_cut_ends_the_connections_of_one_peer_at_once(
    opened: Open, known: Certificates, news: int, state: str
) -> None:
    """Whatever the connections of a peer are doing, they end within milliseconds; others go on."""
    seen: queue.Queue[str] = queue.Queue()
    go = threading.Event()
    wait = waiting(20.0, seen, news)

    def handler(request: Request) -> Response:
        if request.path == "/works":
            assert go.wait(10)
        if request.path == "/downloads":
            return Response(200, stream=(BLOCK for _ in range(1000)), length=1000 * MIB)
        request.read(MIB)
        return wait(request)

    door = opened(handler)
    other = caller(door, known, "b")
    assert asked(other, "GET", "/")[0] == 200
    length = b"Content-Length: 1000\r\n" if state == "uploads" else b""
    with secured(door.port, known.calling("a")) as connection:
        path = b"/wait" if state == "waits" else b"/" + state.encode()
        connection.sendall(b"PUT " + path + b" HTTP/1.1\r\nHost: x\r\n" + length + b"\r\n")
        if state in ("rests", "downloads"):
            assert connection.recv(12) == b"HTTP/1.1 200"
        time.sleep(0.1)
        begun = time.monotonic()
        assert door.cut("a") == 1
        assert time.monotonic() - begun < 0.05
        rest(connection)
        assert time.monotonic() - begun < 0.5
    go.set()
    assert soon(lambda: door.connections() == 1)
    assert asked(other, "GET", "/")[0] == 200
    other.close()


def test_stop_lets_requests_end_and_takes_no_more(opened: Open, known: Certificates, news: int) -> None:
    """Requests under way are answered, those that wait at once; what rests or has not asked is closed."""
    seen: queue.Queue[str] = queue.Queue()
    entered = threading.Event()
    wait = waiting(20.0, seen, news)

    def handler(request: Request) -> Response:
        if request.path == "/slow":
            entered.set()
            time.sleep(0.6)
        return wait(request)

    door = opened(handler)
    resting, slow, waits, silent = (
        caller(door, known),
        caller(door, known),
        caller(door, known),
        plain(door.port),
    )
    assert asked(resting, "GET", "/")[0] == 200
    slow.request("GET", "/slow")
    waits.request("GET", "/wait")
    assert entered.wait(5)
    assert seen.get(timeout=5) == "waits"
    begun = time.monotonic()
    stopping = threading.Thread(target=door.stop, args=(5.0,))
    stopping.start()
    with waits.getresponse() as answer:
        assert (answer.status, answer.headers["Connection"]) == (204, "close")
    assert time.monotonic() - begun < 0.4
    assert resting.sock.recv(1) == rest(silent) == b""
    assert soon(lambda: closed(door.port))
    assert slow.getresponse().status == 200
    for one in (resting, slow, waits, silent):
        one.close()
    stopping.join(5)
    assert time.monotonic() - begun < 1.5
    assert door.connections() == 0


def test_stop_cuts_what_does_not_end(opened: Open, known: Certificates) -> None:
    """A body that does not come keeps nobody waiting beyond the given seconds."""
    door = opened(simple)
    with secured(door.port, known.calling("a")) as connection:
        connection.sendall(b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n")
        time.sleep(0.1)
        begun = time.monotonic()
        door.stop(0.3)
        assert 0.25 < time.monotonic() - begun < 1.0
        assert rest(connection) == b""
    door.stop(0.3)


# The socket


def test_an_address_that_cannot_be_listened_on_is_named(opened: Open) -> None:
    """The error names host and port, what is wrong, and what to do."""
    taken = opened(simple)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for host, port, words in (
        (HERE, taken.port, rf"127\.0\.0\.1:{taken.port}: .*in use; .*another port"),
        ("192.0.2.1", 0, r"192\.0\.2\.1:0: .*no such address; 0\.0\.0\.0 or ::"),
        ("no such host", 1, "no such host:1: is no address"),
        (HERE, 70_000, "127.0.0.1:70000: "),
        ("2001:db8::1", 9, r"\[2001:db8::1\]:9: "),
    ):
        with pytest.raises(InputError, match=words):
            Listener(host, port, lambda: context, simple, Caps()).start()


def test_ports_are_free_again_after_stop(opened: Open, known: Certificates) -> None:
    """Another listener takes the port at once, also where connections were open."""
    door = opened(simple)
    connection = caller(door, known)
    assert asked(connection, "GET", "/")[0] == 200
    door.stop(0.2)
    context = known.serving()
    again = Listener(HERE, door.port, lambda: context, simple, Caps(), admit)
    again.start()
    again.stop(0.2)
    connection.close()


@pytest.mark.parametrize(
    ("host", "called"),
    [("::1", "::1"), ("::", "::1"), ("::", HERE), ("0.0.0.0", HERE)],  # noqa: S104 - that is what is tested
)
def test_ipv4_and_ipv6(opened: Open, known: Certificates, host: str, called: str) -> None:
    """Both families are served, `::` serves both, and an IPv4 address is written as one."""
    try:
        door = opened(simple, host=host)
    except InputError:
        pytest.skip("this machine has no IPv6")
    connection = http.client.HTTPSConnection(called, door.port, context=known.calling("a"), timeout=10)
    assert json.loads(asked(connection, "GET", "/")[1])["address"] == called
    connection.close()


def test_an_ipv6_network_counts_as_one_address() -> None:
    """Whoever has a /64 has one share, not 2^64; addresses of IPv4 in IPv6 clothes are IPv4's."""
    assert counted("2001:db8::1")[1] == counted("2001:db8::ffff:1")[1] != counted("2001:db8:0:1::1")[1]
    assert counted("::ffff:10.0.0.1") == counted("10.0.0.1") == ("10.0.0.1", "10.0.0.1")
    assert counted("fe80::1%lo")[0] == "fe80::1"


def test_accepted_sockets_send_at_once_and_find_dead_peers(known: Certificates) -> None:
    """Nagle's delay is off and keep-alive is on at the sockets of connections."""
    found: list[tuple[int, int, int]] = []

    def looking() -> ssl.SSLContext:
        return context

    class Looking(ssl.SSLContext):
        def wrap_socket(self, sock: socket.socket, *args: object, **kwargs: object) -> ssl.SSLSocket:
            found.append(
                (
                    sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY),
                    sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                    sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
                )
            )
            raise ConnectionResetError("seen enough")

    context = Looking(ssl.PROTOCOL_TLS_SERVER)
    door = Listener(HERE, 0, looking, simple, Caps())
    door.start()
    with plain(door.port) as connection:
        rest(connection)
    door.stop(0.5)
    assert found == [(1, 1, 20)]


STARVED = """
import resource, sys, time
from pathlib import Path
from doors import Certificates
from consortium.server.listener import Caps, Listener, Response
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
context = Certificates(Path(sys.argv[1])).serving(clients=False)
door = Listener("127.0.0.1", 0, lambda: context, lambda request: Response(200), Caps(per_address=1000, seconds=60.0))
door.start()
print(door.port, flush=True)
sys.stdin.readline()
print(time.process_time(), flush=True)
sys.stdin.readline()
print(time.process_time(), flush=True)
sys.stdin.readline()
"""


def test_a_door_without_descriptors_pauses_and_goes_on(known: Certificates) -> None:
    """Where the process may open no more files, the door waits without eating the processor, and recovers."""
    environment = os.environ | {"PYTHONPATH": str(SUPPORT)}
    started = subprocess.Popen(
        [sys.executable, "-c", STARVED, str(known.folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
    )  # fmt: skip
    with started:
        assert started.stdin is not None
        assert started.stdout is not None
        port = int(started.stdout.readline())
        held = [plain(port) for _ in range(60)]
        spent = []
        for _ in range(2):
            time.sleep(1.0)
            started.stdin.write("\n")
            started.stdin.flush()
            spent.append(float(started.stdout.readline()))
        assert spent[1] - spent[0] < 0.3
        for one in held:
            one.close()
        connection = http.client.HTTPSConnection(HERE, port, context=known.calling(), timeout=10)
        assert asked(connection, "GET", "/")[0] == 200
        connection.close()


def test_log_lines_hold_no_query_header_or_body(
    opened: Open, known: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever goes well or wrong: address, peer, method, path and status are logged, nothing else of a request."""
    caplog.set_level(logging.DEBUG)

    def handler(request: Request) -> Response:
        body = request.read(MIB)
        if request.path == "/fails":
            raise ValueError(f"cannot read {body!r} {request.headers} {dict(request.query)}")
        if request.path == "/refuses":
            raise RefusedError("no")
        return Response(200)

    door = opened(handler)
    for path in ("/fine", "/fails", "/refuses", "/../secret"):
        with secured(door.port, known.calling("a")) as connection:
            connection.sendall(
                b"PUT %s?q=secret HTTP/1.1\r\nHost: x\r\nX: secret\r\nContent-Length: 6\r\n"
                b"Connection: close\r\n\r\nsecret" % path.encode()
            )
            rest(connection)
    spoken(door, known, b"PUT / HTTP/1.1\r\nsecret\r\n\r\n")
    assert "secret" not in caplog.text
    assert "127.0.0.1 a PUT /refuses 403" in caplog.text
    assert "PUT /fails: ValueError" in caplog.text
    assert "in handler" in caplog.text


def test_what_strangers_bring_about_does_not_flood_the_log(
    opened: Open, known: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    """A thousand connections beyond a cap make a handful of lines."""
    door = opened(simple, Caps(per_address=0))
    assert all(turned_away(door, HERE) for _ in range(200))
    assert 0 < len(caplog.records) <= 25


# Noise

PIECES = st.sampled_from(
    [
        b"GET / HTTP/1.1\r\n", b"PUT /a HTTP/1.1\r\n", b"POST /a?b=c HTTP/1.0\r\n", b"Host: x\r\n",
        b"Content-Length: 5\r\n", b"Content-Length: 0\r\n", b"Content-Length: 99999999\r\n",
        b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: identity\r\n", b"Connection: close\r\n",
        b"Connection: keep-alive, Upgrade\r\nUpgrade: h2c\r\n", b"Expect: 100-continue\r\n", b" folded\r\n",
        b"\r\n", b"\n", b"\r", b"hello", b"5\r\nhello\r\n0\r\n\r\n", b":", b"\x00", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ]
)  # fmt: skip
REQUEST = b"PUT /a/b?c=d HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """One or two good requests with bytes changed, taken out and put in; or pieces of requests in any order."""
    if draw(st.booleans()):
        return b"".join(draw(st.lists(PIECES, max_size=12)))
    data = bytearray(REQUEST * draw(st.integers(1, 2)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3) | PIECES)
    return bytes(data)


def fuzzed(opened: Open, known: Certificates, examples: int) -> None:
    door = opened(simple, Caps(seconds=2.0, stall=2.0))
    context = known.calling("a")

    @settings(max_examples=examples, deadline=None, database=None)
    @given(data=mutated())
    def noise(data: bytes) -> None:
        with secured(door.port, context) as connection:
            with contextlib.suppress(OSError):
                connection.sendall(data)
                socket.socket.shutdown(connection, socket.SHUT_WR)
            statuses = re.findall(rb"HTTP/1\.1 (\d)\d\d ", rest(connection))
        assert b"5" not in statuses
        assert len(statuses) <= data.count(b"\n") + 1

    noise()
    assert soon(lambda: door.connections() == 0)
    connection = caller(door, known)
    assert asked(connection, "PUT", "/", b"x")[0] == 200
    connection.close()


def test_no_noise_ends_the_door_or_is_the_servers_fault(opened: Open, known: Certificates) -> None:
    """Mutated requests get answers below 500 or none, and the door goes on."""
    fuzzed(opened, known, 200)


@pytest.mark.slow
def test_no_noise_ends_the_door_or_is_the_servers_fault_at_length(opened: Open, known: Certificates) -> None:
    """The same, with many more."""
    fuzzed(opened, known, 3_000)
