"""The agent against a real TLS server, with work that is trivial: what it takes, refuses, sends, and survives."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from site_world import SITE, ConnectProxy, Trivial, World, no_endings, wait_for

from consortium.client.agent import Agent
from consortium.client.home import Home
from consortium.client.joining import renew
from consortium.client.work import Given, Interrupted
from consortium.protocol import configuration, wire
from consortium.protocol.errors import RefusedError
from consortium.protocol.messages import Instruction


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("world"))
    yield world
    world.end()


@pytest.fixture
def world(shared: World) -> World:
    """The world, with nothing asked or seen."""
    shared.home.seen_file.unlink(missing_ok=True)
    for one in (shared.offers, shared.answers, shared.headers, shared.refuse, shared.polls):
        one.clear()
    shared.endings = no_endings
    shared.notice, shared.puts, shared.trusts = "", 0, 0
    shared.reason = "refused by the test"
    return shared


Start = Callable[..., Agent]


@pytest.fixture
def start(world: World) -> Iterator[Start]:
    """Starts agents, which are stopped in the end."""
    agents: list[Agent] = []

    def make(work: Trivial, home: Home | None = None, **more: Any) -> Agent:
        home = home or Home(world.home.folder)
        agent = Agent(home, home.lock(), work, **more)
        agent.start()
        agents.append(agent)
        return agent

    yield make
    for agent in agents:
        agent.stop()


def test_an_instruction_is_answered_signed_and_once(world: World, start: Start) -> None:
    """A signed instruction is done once, and its signed answer arrives; the poll names it while it is in hand."""
    work = Trivial(before=lambda _: time.sleep(0.3))
    start(work)
    instruction = world.instruction()
    answer = world.answer_to(instruction)
    assert (answer.status, answer.weight, answer.site) == ("done", 1.0, SITE)
    assert [given.about.nonce for given in work.given] == [instruction.nonce]
    assert any(instruction.nonce in poll["have"] for poll in world.polls)
    world.quiet()
    assert len(work.given) == 1
    assert world.puts == 1


def altered(frame: bytes) -> bytes:
    return frame.replace(b'"round":1', b'"round":2')


FOREIGN: dict[str, Callable[[World, Instruction], bytes]] = {
    "another key": lambda world, one: world.frame(one, Ed25519PrivateKey.generate()),
    "altered header": lambda world, one: altered(world.frame(one)),
    "another federation": lambda world, one: world.frame(replace(one, federation="heart")),
    "another site": lambda world, one: world.frame(replace(one, site="hospital-2")),
    "no frame": lambda world, one: b"GET / HTTP/1.1\r\n\r\n" + b"x" * 100,
    "endless header": lambda world, one: b"CSM1\xff\xff\xff\xff" + bytes(100),
    "cut short": lambda world, one: world.frame(one)[:-20],
}


@pytest.mark.parametrize("how", list(FOREIGN))
def test_what_is_not_a_genuine_instruction_for_this_site_gets_no_work_and_no_answer(
    world: World, start: Start, how: str
) -> None:
    """Forged, altered, misdirected and malformed frames are dropped; the agent goes on and does the next one."""
    work = Trivial()
    start(work)
    bad = world.instruction()
    world.offer(bad, FOREIGN[how](world, bad))
    world.quiet(2)
    assert work.given == []
    assert world.puts == 0
    del world.offers[bad.nonce]
    assert world.answer_to(world.instruction()).status == "done"


def test_content_that_is_not_what_was_signed_gets_no_work(world: World, start: Start) -> None:
    """One changed bit of the content, and the instruction is dropped."""
    import numpy as np

    from consortium.protocol.messages import Payload

    work = Trivial()
    start(work)
    bad = world.instruction(payload=Payload({"shared": np.ones(100, np.float32)}))
    frame = bytearray(world.frame(bad))
    frame[-1] ^= 1
    world.offer(bad, bytes(frame))
    world.quiet(2)
    assert work.given == []
    world.offer(bad)
    assert world.answer(bad.nonce).status == "done"
    assert len(work.given) == 1


@pytest.mark.parametrize("size", [1, 7, 300_000])
def test_the_model_is_named_by_what_was_received(world: World, start: Start, size: int) -> None:
    """The work is told the digest of the model that came, not the one that the instruction names: they are compared
    there. Statistics after it do not count, and may share a piece with its end."""
    import numpy as np

    from consortium.protocol.layout import digest_of
    from consortium.protocol.messages import Payload

    work = Trivial()
    start(work)
    model = np.arange(size, dtype=np.float32)
    world.answer_to(
        world.instruction(model="f" * 64, payload=Payload({"shared": model}, {"sum": np.ones(3)}))
    )
    world.answer_to(world.instruction(round=2, payload=Payload({}, {"sum": np.ones(3)})))
    assert [given.model for given in work.given] == [digest_of([model]), ""]


def test_an_older_round_gets_no_work_also_after_a_restart(world: World, start: Start) -> None:
    """What stands before the last (round, attempt) of its run is dropped, and that is remembered on disk."""
    work = Trivial()
    agent = start(work)
    world.answer_to(world.instruction(round=2, attempt=1))
    agent.stop()
    start(work)
    for old in (
        world.instruction(round=2),
        world.instruction(round=1, attempt=5),
        world.instruction("query", 0),
    ):
        world.offer(old)
    world.quiet(5)
    assert len(work.given) == 1
    assert world.puts == 1
    assert world.answer_to(world.instruction(round=2, attempt=1)).status == "done"
    other = world.instruction(round=1, run="another")
    assert world.answer_to(other).status == "done"


def test_the_order_of_a_whole_run_is_accepted(world: World, start: Start) -> None:
    """Queries, void attempts, the final evaluation, also of a run that ended early, all count as later."""
    start(Trivial())
    for kind, number, attempt in (
        ("query", 0, 0), ("query", 0, 1), ("train", 1, 0), ("train", 1, 2), ("train", 2, 0), ("train", 2, 2),
        ("evaluate", 1, 3), ("train", 2, 3), ("evaluate", 2, 0),
    ):  # fmt: skip
        assert world.answer_to(world.instruction(kind, number, attempt=attempt)).status == "done"


def test_an_expired_instruction_is_declined_with_a_reason(world: World, start: Start) -> None:
    """It is genuine, so the server learns why nothing was done."""
    work = Trivial()
    start(work)
    answer = world.answer_to(world.instruction(expires=time.time() - 1))
    assert (answer.status, work.given) == ("declined", [])
    assert "expired" in answer.reason


def test_a_refusal_and_a_fault_are_declined_without_the_sites_secrets(world: World, start: Start) -> None:
    """A RefusedError's text is sent; any other error's is not."""

    def fails(given: Given) -> None:
        if given.about.round == 1:
            raise RefusedError("policy: there is no [[allow]] of this task")
        raise ValueError("column geschlecht of /srv/patients.csv holds 'Meier'")

    start(Trivial(before=fails))
    assert world.answer_to(world.instruction()).reason == "policy: there is no [[allow]] of this task"
    reason = world.answer_to(world.instruction(round=2)).reason
    assert "geschlecht" not in reason
    assert "Meier" not in reason
    assert "/srv" not in reason


def test_what_is_no_answer_to_the_very_instruction_is_not_signed(world: World, start: Start) -> None:
    """Work that answers in another site's name, or for another nonce, makes a declined answer."""
    work = Trivial()
    start(work)
    changes: list[dict[str, Any]] = [{"site": "hospital-2"}, {"nonce": "0" * 64}, {"round": 7}]
    for number, changed in enumerate(changes, 1):
        work.changes = changed
        answer = world.answer_to(world.instruction(round=number))
        assert (answer.status, answer.weight) == ("declined", 0.0)


def test_an_unknown_study_and_a_changed_one_are_declined(world: World, start: Start) -> None:
    """A study that the server does not have, or whose text has another digest than was signed."""
    work = Trivial()
    start(work)
    answer = world.answer_to(world.instruction(study="0" * 64))
    assert (answer.status, work.given) == ("declined", [])
    changed = "1" * 64
    world.studies[changed] = world.study.text
    answer = world.answer_to(world.instruction(study=changed, round=2))
    assert (answer.status, work.given) == ("declined", [])


def test_an_answer_is_sent_until_it_is_taken_and_not_after_it_was_refused_for_good(
    world: World, start: Start
) -> None:
    """500 and 429 pass; 410 ends it, and the instruction is not done again while the server still offers it."""
    work = Trivial()
    start(work)
    one = world.instruction()
    world.refuse[one.nonce] = 500
    world.offer(one)
    wait_for(lambda: world.puts >= 2, 10, "not tried again")
    world.refuse[one.nonce] = 429
    before = world.puts
    wait_for(lambda: world.puts > before, 20, "not tried again")
    del world.refuse[one.nonce]
    assert world.answer(one.nonce).status == "done"
    two = world.instruction(round=2)
    world.refuse[two.nonce] = 410
    world.offer(two)
    before = world.puts
    wait_for(lambda: world.puts > before, 20, "not sent")
    world.quiet(4)
    assert world.puts == before + 1
    assert len(work.given) == 2


def test_a_large_answer_that_is_too_late_is_not_sent_again_and_again(world: World, start: Start) -> None:
    """The server says 410 before it has read the body of 40 MB: the site understands, and gives it up."""
    agent = start(Trivial(size=10_000_000))
    one = world.instruction()
    world.late.add(one.nonce)
    world.offer(one)
    wait_for(lambda: agent.status()["runs"].get("r", {}).get("state") == "not taken", 20, "not given up")
    assert world.puts == 1


def test_polls_go_on_while_work_and_sending_go_on(world: World, start: Start) -> None:
    """Work of 4 s: the server hears from the site all the time."""
    start(Trivial(before=lambda _: time.sleep(4)))
    nonce = world.offer(world.instruction())
    wait_for(lambda: any(nonce in poll["have"] for poll in world.polls), 10, "not taken")
    before = len(world.polls)
    time.sleep(3.5)
    assert nonce not in world.answers
    assert len(world.polls) - before >= 3
    world.answer(nonce)


def test_a_server_that_is_away_is_found_again(
    world: World, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """Away for 3 s while an answer is made: it arrives within seconds of the return, with a line a change."""
    caplog.set_level("INFO")
    agent = start(Trivial(before=lambda _: time.sleep(1)))
    nonce = world.offer(world.instruction())
    wait_for(lambda: any(nonce in poll["have"] for poll in world.polls), 10, "not taken")
    world.close()
    time.sleep(3)
    assert agent.status()["connected"] is False
    assert "cannot be reached" in agent.status()["error"]
    world.open()
    back = time.monotonic()
    world.answer(nonce, 12)
    assert time.monotonic() - back < 8
    wait_for(lambda: agent.link.up, 10, "not connected")
    assert sum("no connection" in line for line in caplog.messages) == 1
    assert sum("connected to" in line for line in caplog.messages) == 2


def test_a_site_that_is_shut_out_says_so_and_tries_slowly(world: World, start: Start, tmp_path: Path) -> None:
    """A certificate that the roster knows no more: closed at once, so the status says it, and tries become rare."""
    agent = start(Trivial())
    wait_for(lambda: agent.link.up, 10, "not connected")
    admit = world.roster.admit
    world.close()
    world.roster.admit = lambda der: None  # type: ignore[method-assign]
    world.open()
    try:
        wait_for(lambda: bool(agent.status()["refused"]), 20, "not noticed")
        assert "revoked" in agent.status()["error"]
    finally:
        world.close()
        world.roster.admit = admit  # type: ignore[method-assign]
        world.open()


def test_pause_ends_work_and_resume_takes_part_again(world: World, start: Start) -> None:
    """Paused: work under way is ended and declined, the server is told at once, nothing is begun, also anew."""
    work = Trivial()

    def slow(given: Given) -> None:
        end = time.monotonic() + 20
        while not work.interrupts and time.monotonic() < end:
            time.sleep(0.01)
        if work.interrupts:
            raise Interrupted("ended")

    work.before = slow
    agent = start(work)
    nonce = world.offer(world.instruction())
    wait_for(lambda: len(work.given) == 1, 10, "not begun")
    agent.pause()
    answer = world.answer(nonce, 5)
    assert (answer.status, answer.reason) == ("declined", "the site is paused by its operator")
    wait_for(lambda: world.polls[-1]["paused"], 3, "the server is not told")
    agent.stop()
    work.before = lambda _: None
    agent = start(work)
    later = world.offer(world.instruction(round=2))
    world.quiet(2)
    assert agent.status()["paused"] is True
    assert later not in world.answers
    agent.resume()
    assert world.answer(later, 5).status == "done"


def test_a_newer_trust_statement_is_fetched_and_an_older_one_is_not_accepted(
    world: World, start: Start
) -> None:
    """An instruction by the successor key is done after the statement was fetched once."""
    work = Trivial()
    agent = start(work)
    wait_for(lambda: agent.link.up, 10, "not connected")
    serial, old = agent.status()["trust_serial"], world.federation.trust()
    world.federation.rotate(time.time())
    world.key = world.federation.instruction_key
    before = world.trusts
    assert world.answer_to(world.instruction()).status == "done"
    assert world.trusts == before + 1
    assert agent.status()["trust_serial"] > serial
    trust = world.federation.trust
    world.federation.trust = lambda: old  # type: ignore[method-assign]
    try:
        bad = world.instruction(round=2)
        world.offer(bad, world.frame(bad, Ed25519PrivateKey.generate()))
        world.quiet(2)
        assert agent.status()["trust_serial"] > serial
        assert len(work.given) == 1
    finally:
        world.federation.trust = trust  # type: ignore[method-assign]


def test_the_certificate_is_renewed_on_notice(world: World, start: Start) -> None:
    """The server says "renew": a new certificate is there, and the connection goes on under it."""
    home = Home(world.home.folder)
    before = home.certificate.serial_number
    world.notice = "renew"
    start(Trivial(), renew=renew)
    wait_for(lambda: home.certificate.serial_number != before, 10, "not renewed")
    world.notice = ""
    assert world.answer_to(world.instruction()).status == "done"


def test_everything_goes_through_an_http_proxy(world: World, start: Start) -> None:
    """With `proxy` in client.toml, every connection is a CONNECT to the server's address."""
    proxy = ConnectProxy()
    config = world.home.config
    changed = config.model_copy(update={"proxy": f"http://127.0.0.1:{proxy.port}"})
    configuration.write(world.home.config_file, changed)
    try:
        start(Trivial(), home=Home(world.home.folder))
        assert world.answer_to(world.instruction()).status == "done"
        assert {line.rpartition(" ")[0] for line in proxy.seen} == {f"CONNECT 127.0.0.1:{world.port}"}
    finally:
        configuration.write(world.home.config_file, config)
        proxy.close()


def test_an_answer_that_came_too_late_is_known_to_be_late(world: World, start: Start) -> None:
    """The server notes it and says so; the operator sees it, and it is not sent again."""
    agent = start(Trivial())
    one = world.instruction()
    world.refuse[one.nonce] = 410
    world.reason = f"{wire.LATE}round 1 was closed before it came; it does not count"
    world.offer(one)
    wait_for(lambda: agent.status()["runs"].get("r", {}).get("state") == "late", 20, "not known")
    assert agent.status()["runs"]["r"]["why"] == "round 1 was closed before it came; it does not count"
    world.quiet(1)
    assert world.puts == 1


def test_an_agent_stops_at_once_while_it_works(world: World, start: Start) -> None:
    """`stop` does not wait for the open poll."""
    agent = start(Trivial())
    wait_for(lambda: agent.link.up, 10, "not connected")
    started = time.monotonic()
    agent.stop()
    assert time.monotonic() - started < 2
