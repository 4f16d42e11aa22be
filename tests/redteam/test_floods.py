"""Too much of everything at a running server: bodies, slowness, connections; while an honest site is at work."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from attacker import Line, Said, blind, head, resident
from heaps import heaps
from realm import Actor, Honest, Realm, answer, realm

from consortium.protocol import wire
from consortium.protocol.messages import canonical
from consortium.protocol.signing import ANSWER, sign

GIB = 1 << 30
GROWTH = 100 << 20
"""Bytes that the server may grow by under any of this."""
CROWD = Path(__file__).parents[1] / "support" / "slow_crowd.py"


@pytest.fixture(scope="module")
def harbour(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Realm]:
    """A federation of its own, so that its memory is that of these tests."""
    with realm(tmp_path_factory.mktemp("harbour")) as one:
        site = Honest(one.join("alba"))
        one.begin("storm", min_sites=1)
        one.goes_on(30)
        yield one
        site.stop()
        assert site.problems == []


@pytest.fixture(scope="module")
def pirate(harbour: Realm) -> Actor:
    """A site that has joined, and floods."""
    return harbour.join("pirate")


@dataclass
class Watch:
    """What the server and the honest site were like meanwhile. grown: bytes at most; slowest: seconds of one request
    over a new connection, and over an open one."""

    grown: int = 0
    slowest: float = 0.0
    failed: list[str] = field(default_factory=list)


@contextmanager
def watched(harbour: Realm) -> Iterator[Watch]:
    """Watch while the block lasts, then see that it was bearable."""
    watch, ended = Watch(), threading.Event()
    alba = harbour.actor("alba")
    idle, rounds = resident(harbour.server.pid), harbour.latest()

    def look() -> None:
        with alba.line() as old:
            while not ended.wait(0.1):
                for line in (old, alba.line()):
                    begun = time.monotonic()
                    said = line.ask("GET", wire.TRUST)
                    watch.slowest = max(watch.slowest, time.monotonic() - begun)
                    if said.status != 200:
                        watch.failed.append(str(said))
                    if line is not old:
                        line.close()
                watch.grown = max(watch.grown, resident(harbour.server.pid) - idle)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        ended.set()
        thread.join(20)
    assert watch.failed == []
    assert watch.grown < GROWTH
    assert watch.slowest < 1.0
    assert harbour.server.poll() is None
    harbour.goes_on()
    assert harbour.latest() > rounds


def gigabyte(line: Line, start: bytes, length: int) -> Said:
    """Announce so many bytes, and send them for as long as somebody takes them."""
    with line:
        line.send(start)
        line.flood(length)
        return line.reply()


def _bodies(harbour: Realm, pirate: Actor, length: int) -> dict[str, Callable[[], Said]]:
    config = harbour.founded.config
    token = {"Authorization": f"Bearer {harbour.token}"}

    def at_site(method: str, path: str) -> Callable[[], Said]:
        return lambda: gigabyte(pirate.line(), head(method, path, length), length)

    def elsewhere(port: int, path: str, headers: dict[str, str]) -> Callable[[], Said]:
        return lambda: gigabyte(Line(port, blind()), head("POST", path, length, headers), length)

    return {
        "a poll": at_site("POST", wire.POLL),
        "a renewal": at_site("POST", wire.RENEW),
        "a GET": at_site("GET", wire.TRUST),
        "no answer at all": at_site("PUT", wire.ANSWERS + "0" * 64),
        "nothing": at_site("POST", "/v1/nothing"),
        "joining": elsewhere(config.enrol_port, wire.JOIN, {}),
        "a study": elsewhere(config.admin_port, "/v1/studies", token),
        "a study without a token": elsewhere(config.admin_port, "/v1/studies", {}),
    }


QUICK = ("a poll", "joining", "a study")


@pytest.mark.parametrize("some", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["some", "others"])
def test_a_gigabyte_is_refused_by_its_length_wherever_it_is_sent(
    harbour: Realm, pirate: Actor, some: bool
) -> None:
    """Announced, and sent until nobody takes it any more: an error status or the end, no more memory, no more waiting
    for the honest site."""
    harbour.invited("absent")
    with watched(harbour):
        for name, send in _bodies(harbour, pirate, GIB).items():
            if (name in QUICK) is some:
                begun = time.monotonic()
                assert send().status in ((0, 200) if name == "a GET" else (0, 400, 401, 404, 410, 413)), name
                assert time.monotonic() - begun < 15, name


@pytest.mark.parametrize(
    "kind", ["announced", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("behind", "header"))]
)
def test_a_gigabyte_of_an_answer_is_not_taken(harbour: Realm, pirate: Actor, kind: str) -> None:
    """A true header with a gigabyte behind it, a header that announces a gigabyte, a gigabyte of header: nothing of it
    is kept, in memory or on disk, where the honest site's small answer may be."""
    with watched(harbour):
        frame = pirate.asked()
        header, content = answer(frame)
        if kind == "announced":
            about = json.loads(header)
            about["parts"][0]["shape"] = [GIB // 4]
            header, content = canonical(about), b""
        body = wire.preamble(header, sign(pirate.identity, ANSWER, header)) + content
        if kind == "header":
            body = b"CSM1" + (0xFFFFFFFF).to_bytes(4, "big") + bytes(64)
        length = GIB if kind == "announced" else GIB + len(content)
        start = head("PUT", wire.ANSWERS + frame.about.nonce, len(body) + length)
        assert gigabyte(pirate.line(), start + body, length).status in (0, 400)
        assert harbour.spooled() < 1 << 20


def test_slow_bodies_of_a_site_hold_its_own_places_alone(harbour: Realm, pirate: Actor) -> None:
    """A site that sends 20 answers and polls at a byte a second: the honest site notices nothing."""
    with watched(harbour):
        frame = pirate.asked()
        header, content = answer(frame)
        body = wire.preamble(header, sign(pirate.identity, ANSWER, header)) + content
        lines = []
        for number in range(20):
            line = pirate.line()
            path = wire.ANSWERS + frame.about.nonce if number % 2 else wire.POLL
            line.send(head("PUT" if number % 2 else "POST", path, len(body)) + body[:100])
            lines.append(line)
        for at in range(100, 104):
            for line in lines:
                line.send(body[at : at + 1])
            time.sleep(0.5)
        for line in lines:
            line.close()


@pytest.mark.slow
def test_slow_bodies_of_strangers_end(harbour: Realm) -> None:
    """At the enrolment door, a body that comes byte by byte is cut within its 10 s, whoever keeps sending."""
    harbour.invited("absent")
    begun = time.monotonic()
    with watched(harbour), Line(harbour.founded.config.enrol_port, blind()) as line:
        line.send(head("POST", wire.JOIN, 10_000))
        while line.send(b"x") and time.monotonic() - begun < 20:
            time.sleep(0.2)
        assert time.monotonic() - begun < 13


def test_answers_that_nobody_reads_hold_no_memory(harbour: Realm, pirate: Actor) -> None:
    """A site that asks for a hundred documents over each of its connections and reads none: no memory, no waiting."""
    with watched(harbour):
        lines = [pirate.line() for _ in range(8)]
        for line in lines:
            line.send(head("GET", wire.TRUST) * 100)
        time.sleep(2)
        assert heaps(harbour.server.pid) == 1, "what one connection's thread has freed is no use to another's"
        for line in lines:
            line.close()


def _crowd(port: int, count: int, seconds: float) -> subprocess.Popen[str]:
    program = subprocess.Popen(
        [sys.executable, CROWD, str(port), str(count), str(seconds), "127.0.0.2", "127.0.0.3"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert program.stdout is not None
    assert program.stdout.readline() == "open\n"
    return program


def _besieged(harbour: Realm, count: int, seconds: float, **ports: Any) -> None:
    with watched(harbour):
        programs = [_crowd(port, count, seconds) for port in ports.values()]
        left = [program.communicate(timeout=seconds + 60)[0] for program in programs]
    # Of each address a door keeps its cap of connections at most, and those for 5 s.
    assert [int(text) <= 2 * 64 for text in left] == [True] * len(left)


def test_a_thousand_slow_connections_at_every_door_cost_nothing(harbour: Realm) -> None:
    """From two other addresses, a byte now and then, at all three doors at once."""
    harbour.invited("absent")
    config = harbour.founded.config
    ports = {"site": config.port, "admin": config.admin_port, "enrolment": config.enrol_port}
    _besieged(harbour, 1000, 4.0, **ports)


@pytest.mark.slow
@pytest.mark.parametrize("door", ["port", "admin_port", "enrol_port"])
def test_ten_thousand_slow_connections_cost_nothing(harbour: Realm, door: str) -> None:
    """The same with 10,000 at one door, for 15 s."""
    harbour.invited("absent")
    _besieged(harbour, 10_000, 15.0, door=getattr(harbour.founded.config, door))


def test_handshakes_that_are_never_ended_end(harbour: Realm) -> None:
    """Connections that complete TCP, or TLS without a certificate, and then say nothing, are ended within 6 s."""
    with watched(harbour):
        config = harbour.founded.config
        silent = [Line(config.port, None), Line(config.admin_port, None), Line(config.admin_port, blind())]
        begun = time.monotonic()
        assert [line.ended(7) for line in silent] == [True] * 3
        assert time.monotonic() - begun < 6.5
        for line in silent:
            line.close()
