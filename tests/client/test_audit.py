"""The site's audit log: every instruction and every answer, in order, and what the operator did."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from site_world import Trivial, World, wait_for
from typer.testing import CliRunner

from consortium.client.agent import Agent
from consortium.client.audit import site_audit, verify
from consortium.client.cli import client as commands
from consortium.client.home import Home
from consortium.protocol.audit import segments
from consortium.protocol.chain import Head
from consortium.protocol.errors import IntegrityError, RefusedError
from consortium.protocol.signing import ANSWER, INSTRUCTION
from consortium.protocol.signing import verify as signed_by


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    one = World(tmp_path_factory.mktemp("audited"))
    yield one
    one.end()


class Three:
    """A ledger of three entries."""

    head = Head(3, "0" * 64)

    def contains(self, head: Head) -> bool:
        return head == self.head


def entries(world: World, after: int = 0) -> list[tuple[str, dict[str, Any]]]:
    key = world.home.identity(world.home.lock())
    return [(one.kind, dict(one.body)) for one in site_audit(world.home, key).entries(after)]


def test_what_is_asked_and_what_is_answered_stand_there_as_they_were_signed(world: World) -> None:
    """Accepted and refused instructions, answers with their ledger entry, start and end; all of it verifies."""
    work, home = Trivial(), Home(world.home.folder)
    agent = Agent(home, home.lock(), work, others={"ledger": Three()})
    before = len(entries(world))
    agent.start()
    try:
        assert world.answer_to(world.instruction()).status == "done"

        def refuse(given: object) -> None:
            raise RefusedError("policy: not today")

        work.before = refuse
        assert world.answer_to(world.instruction(round=2)).status == "declined"
        old = world.instruction(round=1)
        world.offer(old)
        wait_for(lambda: any(kind == "dropped" for kind, _ in entries(world)), 20, "is not noted")
    finally:
        agent.stop()
    found = entries(world, before)
    told = [kind for kind, _ in found if kind != "dropped"]
    assert told == ["started", "instruction", "answered", "instruction", "answered", "stopped"]
    identity, server = home.identity(home.lock()), home.trust().keys[0]
    for kind, body in found:
        if kind == "instruction":
            signed_by(server, INSTRUCTION, body["header"].encode(), bytes.fromhex(body["signature"]))
        if kind == "answered":
            signed_by(
                identity.public_key(), ANSWER, body["header"].encode(), bytes.fromhex(body["signature"])
            )
            assert body["ledger"] == f"3:{'0' * 64}"
    assert "older than what was seen" in next(body["why"] for kind, body in found if kind == "dropped")
    last = [body for kind, body in found if kind == "answered"][-1]
    assert json.loads(last["header"])["fields"]["reason"] == "policy: not today"
    assert verify(home, identity.public_key()).sequence == before + len(found)


def test_nothing_is_done_or_sent_that_cannot_be_noted(world: World) -> None:
    """Where the log cannot be written no work begins and no answer leaves; afterwards the site goes on."""
    world.offers.clear()  # an old one would be dropped, and noted, when the log is gone
    work, home = Trivial(), Home(world.home.folder)
    agent = Agent(home, home.lock(), work)
    agent.start()
    gone = home.audit.with_name("gone")
    try:
        wait_for(lambda: agent.link.up, 20, "does not connect")
        home.audit.rename(gone)
        puts = world.puts
        first = world.instruction(round=3)
        world.offer(first)
        wait_for(lambda: agent.status()["runs"].get("r", {}).get("state") == "failed", 20, "is not given up")
        assert (work.given, world.puts) == ([], puts)
        world.offers.clear()
        world.offer(world.instruction(site="other"))  # is dropped, which cannot be noted either
        wait_for(lambda: agent._poller._dropped > 0, 20, "is not dropped")
        world.offers.clear()
        gone.rename(home.audit)
        assert world.answer_to(world.instruction(round=4)).status == "done"
    finally:
        if gone.exists():
            gone.rename(home.audit)
        agent.stop()


def test_what_the_operator_does_is_noted_and_shown(world: World, tmp_path: Path) -> None:
    """Joining, data and budgets stand there; `audit show`, `verify` and `export`; a changed byte is exit code 4."""
    home, run = world.home, CliRunner().invoke
    place = ["--dir", str(home.folder)]
    table = tmp_path / "t.csv"
    table.write_text("a,b\n1,2\n")
    assert run(commands, ["data", "add", "one", "--source", str(table), *place]).exit_code == 0
    assert run(commands, ["ledger", "budget", "one", "--epsilon", "2", *place]).exit_code == 0
    assert run(commands, ["data", "remove", "one", *place]).exit_code == 0
    assert [kind for kind, _ in entries(world)][:2] == ["begun", "joined"]
    shown = run(commands, ["audit", "show", "--json", "--limit", "3", *place]).output.splitlines()
    assert [json.loads(line)["kind"] for line in shown] == ["data added", "budget", "data removed"]
    assert "data=one" in run(commands, ["audit", "show", "--kind", "budget", *place]).output
    assert run(commands, ["audit", "verify", *place]).output.startswith("sound: ")
    out = tmp_path / "out.jsonl"
    assert run(commands, ["audit", "export", "--out", str(out), *place]).exit_code == 0
    (path,) = segments(home.audit)
    assert out.read_bytes() == path.read_bytes()
    path.write_bytes(out.read_bytes().replace(b'"epsilon":2', b'"epsilon":9'))
    failed = run(commands, ["audit", "verify", *place])
    assert isinstance(failed.exception, IntegrityError)
    assert f"entry {len(entries_of(out)) - 1} " in str(failed.exception)
    path.write_bytes(out.read_bytes())


def entries_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines()
