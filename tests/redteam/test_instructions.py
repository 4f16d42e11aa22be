"""A man in the middle before a real agent: he has the server's certificate and key, but not the instruction key.

What a forged, altered, misdirected or stale frame from the right server does is shown in `tests/client/test_agent.py`
(forms, older rounds over a restart, expiry, changed contents and studies, lower trust statements) and a false
certificate at renewal in `tests/client/test_joining.py`. Here the frames are genuine ones of a running federation.
"""

from __future__ import annotations

import json
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from realm import COMMAND, Actor, Frame, Realm, found, wait_for
from site_world import Trivial

from consortium.client.agent import Agent
from consortium.client.home import Home
from consortium.protocol import configuration, credentials, trust, wire
from consortium.protocol.keys import load_ec
from consortium.protocol.messages import canonical, encode
from consortium.protocol.signing import INSTRUCTION, sign
from consortium.server.federation import SERVER
from consortium.server.listener import Caps, Listener, Request, Response, error_response, json_response


@dataclass
class Tap:
    """Answers a site in the server's place.

    frame: what each poll gets, until an answer comes. trust: what is shown as the trust statement. study: the text of
    every study.
    """

    trust: Any
    study: str = ""
    port: int = 0
    frame: bytes = b""
    polls: list[dict[str, Any]] = field(default_factory=list)
    puts: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def handle(self, request: Request) -> Response:
        self.requests.append(request.path)
        if request.path == wire.TRUST:
            return json_response(self.trust)
        if request.path.startswith(wire.ANSWERS):
            self.puts.append(request.path)
            self.frame = b""
            request.read(1 << 30)
            return json_response({"taken": True})
        if request.path.startswith(wire.STUDIES):
            return Response(200, self.study.encode())
        if request.path == wire.POLL:
            self.polls.append(json.loads(request.read(wire.MAX_DOCUMENT)))
            time.sleep(0.02)
            return Response(200, self.frame) if self.frame else Response(204)
        return error_response(404, "there is no such thing")


@pytest.fixture
def tap(siege: Realm) -> Iterator[Tap]:
    """The man in the middle listens."""
    one = Tap(siege.founded.trust(), siege.study)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    credentials.present(context, siege.own / SERVER, siege.lock)
    listener = Listener("127.0.0.1", 0, lambda: context, one.handle, Caps(per_address=64))
    listener.start()
    one.port = listener.port
    yield one
    listener.stop(0.5)


@pytest.fixture(scope="module")
def carol(siege: Realm) -> Actor:
    """A site whose agent is attacked."""
    return siege.join("carol")


@pytest.fixture(scope="module")
def recorded(carol: Actor) -> list[Frame]:
    """Genuine instructions to carol, of two rounds of one run."""
    first = carol.asked()
    while (second := carol.asked()).about.round == first.about.round:
        time.sleep(0.1)
    return [first, second]


def bent(actor: Actor, tap: Tap) -> Home:
    """A site's folder whose way to the server leads to the man in the middle."""
    home = Home(actor.home.folder)
    changed = home.config.model_copy(update={"port": tap.port})
    configuration.write(home.config_file, changed)
    home.seen_file.unlink(missing_ok=True)
    return Home(actor.home.folder)


@pytest.fixture
def agent(carol: Actor, tap: Tap, recorded: list[Frame]) -> Iterator[tuple[Agent, Trivial]]:
    """Carol's agent, connected to the man in the middle, at the time of the recording."""
    work, home = Trivial(), bent(carol, tap)
    now = recorded[1].about.expires - 1.0
    one = Agent(home, home.lock(), work, clock=lambda: now)
    one.start()
    wait_for(lambda: tap.polls, 20, "no poll")
    yield one, work
    one.stop()


def framed(frame: Frame, header: bytes | None = None, key: Ed25519PrivateKey | None = None) -> bytes:
    """A frame as it travels, with another header or signature."""
    header = frame.header if header is None else header
    signature = frame.signature if key is None else sign(key, INSTRUCTION, header)
    return wire.preamble(header, signature) + frame.content


def changed(frame: Frame, **fields: Any) -> bytes:
    """The header with other fields."""
    about = json.loads(frame.header)
    about["fields"].update(fields)
    return canonical(about)


def nothing_done(tap: Tap, work: Trivial, frame: bytes) -> None:
    """Send a frame for some polls, and see that the agent goes on polling, works at nothing and answers nothing."""
    before, tap.frame = len(tap.polls), frame
    wait_for(lambda: len(tap.polls) >= before + 2, 20, "the agent does not poll any more")
    tap.frame = b""
    time.sleep(0.2)  # in which work that had begun would be answered
    assert work.given == []
    assert tap.puts == []


ALTERED: dict[str, Callable[[Frame], bytes]] = {
    "a later round": lambda frame: changed(frame, round=frame.about.round + 1),
    "a later expiry": lambda frame: changed(frame, expires=frame.about.expires + 1e6),
    "another study": lambda frame: changed(frame, study="0" * 64),
    "another kind": lambda frame: changed(frame, kind="evaluate"),
    "another attempt": lambda frame: changed(frame, attempt=1),
    "another nonce": lambda frame: changed(frame, nonce="0" * 64),
    "another run": lambda frame: changed(frame, run="other.1"),
    "spaces": lambda frame: json.dumps(json.loads(frame.header)).encode(),
}


@pytest.mark.parametrize("what", list(ALTERED))
def test_a_genuine_instruction_that_was_altered_is_dropped(
    agent: tuple[Agent, Trivial], tap: Tap, recorded: list[Frame], what: str
) -> None:
    """With the genuine signature, and with the man's own: no work, no answer."""
    header = ALTERED[what](recorded[1])
    nothing_done(tap, agent[1], framed(recorded[1], header))
    nothing_done(tap, agent[1], framed(recorded[1], header, Ed25519PrivateKey.generate()))


def test_an_instruction_to_another_site_is_dropped(
    agent: tuple[Agent, Trivial], tap: Tap, siege: Realm, alba: Actor, recorded: list[Frame]
) -> None:
    """Alba's genuine instruction, as it is and with carol's name: no work, no answer."""
    theirs = alba.asked()
    nothing_done(tap, agent[1], framed(theirs))
    nothing_done(tap, agent[1], framed(theirs, changed(theirs, site="carol")))


def test_another_content_under_a_genuine_header_is_dropped(
    agent: tuple[Agent, Trivial], tap: Tap, recorded: list[Frame]
) -> None:
    """The model of another round, of the same size: no work, no answer."""
    first, second = recorded
    assert len(first.content) == len(second.content)
    assert first.content != second.content
    nothing_done(tap, agent[1], framed(replace(second, content=first.content)))


def test_an_instruction_of_an_earlier_round_is_dropped_once_a_later_one_was_done(
    agent: tuple[Agent, Trivial], tap: Tap, recorded: list[Frame]
) -> None:
    """The later one is genuine, so it is done, once, whoever carries it; the earlier one, recorded, then is nothing."""
    first, second = recorded
    _, work = agent
    tap.frame = framed(second)
    wait_for(lambda: tap.puts, 10, "the genuine instruction is not answered")
    assert [given.about.nonce for given in work.given] == [second.about.nonce]
    work.given.clear()
    tap.puts.clear()
    nothing_done(tap, work, framed(first))


def test_an_expired_instruction_makes_no_work(carol: Actor, tap: Tap, recorded: list[Frame]) -> None:
    """A recording that is played after its expiry: no work; all that is said is that it came too late."""
    work, home = Trivial(), bent(carol, tap)
    late = recorded[1].about.expires + 1.0
    one = Agent(home, home.lock(), work, clock=lambda: late)
    one.start()
    try:
        tap.frame = framed(recorded[1])
        wait_for(lambda: tap.puts, 10, "not declined")
        assert work.given == []
        assert one.status()["runs"][recorded[1].about.run]["state"] == "declined"
    finally:
        one.stop()


def _signed_by(key: Any, federation: str, serial: int, mine: Ed25519PrivateKey) -> dict[str, str]:
    return trust.state(key, federation, serial, [mine.public_key()], int(time.time()))


@pytest.mark.parametrize("signer", ["issuing key", "server key", "site's key", "another root"])
def test_no_key_but_the_roots_names_instruction_keys(
    agent: tuple[Agent, Trivial],
    tap: Tap,
    siege: Realm,
    carol: Actor,
    recorded: list[Frame],
    signer: str,
    tmp_path: Path,
) -> None:
    """A trust statement with a higher serial and the man's key, signed by every other key that he may have: it is not
    taken, and what he signs with that key makes no work."""
    mine = Ed25519PrivateKey.generate()
    keys: dict[str, Callable[[], Any]] = {
        "issuing key": lambda: siege.authority.key,
        "server key": lambda: credentials.load(siege.own / SERVER, siege.lock)[0],
        "site's key": lambda: credentials.load(carol.home.tls_file, carol.home.lock())[0],
        "another root": lambda: _other_root(tmp_path),
    }
    one, work = agent
    serial = one.status()["trust_serial"]
    tap.trust = _signed_by(keys[signer](), "lung", serial + 1, mine)
    nothing_done(tap, work, framed(recorded[1], recorded[1].header, mine))
    assert tap.requests.count(wire.TRUST) >= 2
    assert one.status()["trust_serial"] == serial


def _other_root(folder: Path) -> Any:
    other = found(folder / "other")
    return load_ec(other.folder / "root.key", other._lock)


@pytest.mark.parametrize("what", ["another federation", "a second statement"])
def test_the_roots_own_statements_are_not_played_anew(
    agent: tuple[Agent, Trivial], tap: Tap, siege: Realm, carol: Actor, recorded: list[Frame], what: str
) -> None:
    """Genuinely signed by the root, but for another federation, or a second one of the same serial: what is held stays,
    and keys that only they name count for nothing."""
    mine = Ed25519PrivateKey.generate()
    root = load_ec(siege.own / "root.key", siege.lock)
    one, work = agent
    held = carol.home.trust_file.read_bytes()
    serial = one.status()["trust_serial"]
    if what == "another federation":
        tap.trust = _signed_by(root, "heart", serial + 1, mine)
    else:
        tap.trust = _signed_by(root, "lung", serial, mine)
    nothing_done(tap, work, framed(recorded[1], recorded[1].header, mine))
    assert carol.home.trust_file.read_bytes() == held


@pytest.mark.parametrize("shown", ["another root", "a site's certificate"])
def test_a_real_client_sends_nothing_to_another_server(siege: Realm, tmp_path: Path, shown: str) -> None:
    """`consortium client start` towards a perfect copy of the server with a root of its own, or towards one that has a
    site's certificate of this federation: the handshake fails, no request comes, and the log says what is wrong."""
    dora = siege.join("dora" if shown == "another root" else "dorothy")
    other = found(tmp_path / "other")
    context = other.open_context()
    if shown != "another root":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        credentials.present(context, dora.home.tls_file, dora.home.lock())
    fake = Tap(other.trust())
    listener = Listener("127.0.0.1", 0, lambda: context, fake.handle, Caps())
    listener.start()
    fake.port = listener.port
    home = bent(dora, fake)
    program = subprocess.Popen([COMMAND, "client", "start", "--dir", home.folder], stderr=subprocess.DEVNULL)
    said = "is not the server that is trusted"
    try:
        wait_for(lambda: home.log.exists() and said in home.log.read_text(), 20, "the log does not say it")
    finally:
        program.terminate()
        program.wait(10)
        listener.stop(0.5)
    assert fake.requests == []


def test_the_frames_of_these_tests_are_genuine(recorded: list[Frame]) -> None:
    """What was recorded is what the server signed: decoded and encoded again, it has the same header."""
    for frame in recorded:
        assert encode(frame.about)[0] == frame.header
