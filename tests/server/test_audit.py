"""The server's audit log: what is noted of what happens, and that it keeps up with the database."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from breast_cancer import study_text
from founded import found
from typer.testing import CliRunner

from consortium.protocol.audit import FOLDER, segments
from consortium.protocol.errors import ConsortiumError, IntegrityError, RefusedError
from consortium.protocol.messages import Instruction, canonical, encode
from consortium.protocol.signing import INSTRUCTION, verify
from consortium.protocol.study import Study
from consortium.server import audit
from consortium.server.audit import Keeper
from consortium.server.cli import server as commands
from consortium.server.federation import Federation
from consortium.server.offers import Offer
from consortium.server.serve import Server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    one = Server(found(tmp_path / "fed"))
    one.audit.start()
    try:
        yield one
    finally:
        one.stop()


def kinds(server: Server) -> list[str]:
    return [entry.kind for entry in server.audit.log.entries()]


def bodies(server: Server, kind: str) -> list[dict[str, Any]]:
    return [dict(entry.body) for entry in server.audit.log.entries() if entry.kind == kind]


def begun(server: Server) -> str:
    """A run, as the database has it; nothing of it works."""
    server.archive.submit(Study.parse(study_text(4, study={"name": "one"})))
    run = server.archive.propose("one").name
    server.archive.move(run, "running")
    return run


def test_what_people_do_is_noted_and_the_log_verifies_over_rotations(server: Server) -> None:
    """Invitations, tokens, revocations and new keys stand in it, without secrets, in the order in which they were."""
    secret, _ = server.roster.invite("alba", 60.0)
    token = server.roster.new_token("ann", "viewer")
    for _ in range(2):
        server.rotate(sites=False)
    server.roster.revoke("alba")
    assert kinds(server) == ["begun", "started", "invited", "token", "keys", "keys", "revoked"]
    text = b"".join(path.read_bytes() for path in segments(server.federation.folder / FOLDER)).decode()
    assert secret not in text
    assert token not in text
    assert audit.verify(server.federation) == server.audit.log.head


def test_nothing_is_done_that_cannot_be_noted(server: Server) -> None:
    """Where the log cannot be written, a site is neither invited nor revoked, and nothing is asked."""
    server.roster.invite("alba", 60.0)
    folder = server.federation.folder / FOLDER
    folder.rename(folder.with_name("gone"))
    try:
        for act in (lambda: server.roster.invite("bari", 60.0), lambda: server.roster.revoke("alba")):
            with pytest.raises(ConsortiumError, match="audit log"):
                act()
        with pytest.raises(ConsortiumError, match="audit log"):
            server.exchange._note_asked("one.1", [_offer(server, "alba")])
    finally:
        folder.with_name("gone").rename(folder)
    assert [one["status"] for one in server.roster.sites()] == ["invited"]


def test_what_a_refused_request_would_have_done_is_not_noted(server: Server) -> None:
    """An entry tells of what was done."""
    with pytest.raises(RefusedError):
        server.roster.renew("alba", lambda site, at: (_ for _ in ()).throw(AssertionError))
    assert kinds(server) == ["begun", "started"]


def test_events_are_taken_over_once_also_after_a_crash_between(tmp_path: Path) -> None:
    """Every event of the database stands in the log once, whatever moment the server was killed at."""
    one = Server(found(tmp_path / "fed"))
    run = begun(one)
    one.archive.told = lambda: None  # killed after the database had it, before the log
    one.archive.note(run, {"kind": "late", "site": "alba", "round": 1})
    one.store.close()
    other = Server(Federation.open(tmp_path / "fed"))
    other.audit.start()
    other.archive.note(run, {"kind": "late", "site": "bari", "round": 1})
    try:
        assert [one.get("site", one.get("state")) for one in (*bodies(other, "state"), *bodies(other, "late"))] == [
            "running", "alba", "bari",
        ]  # fmt: skip
        events = [entry.body["event"] for entry in other.audit.log.entries() if entry.kind != "started"
                  and "event" in entry.body]  # fmt: skip
        assert events == sorted(set(events))
        assert len(events) == 3
        assert audit.verify(other.federation).sequence
    finally:
        other.stop()


def _offer(server: Server, site: str) -> Offer:
    one = Instruction("lung", "one.1", 1, 0, "train", "s" * 64, "", "l" * 64, "n" * 64, 2e9).to(site)
    header, _ = encode(one)
    return Offer("one.1", site, one.nonce, header, server._sign(header), None, 0, 10)


def test_signed_instructions_can_be_made_of_the_log_again(server: Server) -> None:
    """What was asked of each site stands there with its signature, which verifies over the header that it gives."""
    offers = [_offer(server, site) for site in ("alba", "bari")]
    server.audit.asked("one.1", offers)
    (body,) = bodies(server, "asked")
    for offer in offers:
        nonce, admitted, signature = body["sites"][offer.site]
        fields = body["instruction"]["fields"] | {"site": offer.site, "nonce": nonce, "admitted": admitted}
        header = canonical(body["instruction"] | {"fields": fields})
        assert header == offer.header
        key = server.federation.instruction_key.public_key()
        verify(key, INSTRUCTION, header, bytes.fromhex(signature))


def test_what_was_asked_is_on_the_disk_before_a_commit(server: Server) -> None:
    """The archive waits for the log, so nothing counts of what nobody can show."""
    server.audit._ended = True  # no thread flushes
    server.audit.asked("one.1", [_offer(server, "alba")])
    waiting = [entry.head for entry in server.audit.log.entries()][-1]
    server.archive.recorded()
    assert server.audit.log.head == waiting


def test_refusals_are_counted_so_that_nobody_can_fill_the_log(server: Server) -> None:
    """A thousand wrong tokens are one entry, a thousand reasons at most some."""
    for number in range(1000):
        server.refused("admin", "no such token")
        server.refused("site", f"reason {number}")
    server.audit.count()
    found = bodies(server, "refused")
    assert len(found) <= audit.MOST_REASONS + 1
    assert next(one["times"] for one in found if one["door"] == "admin") == 1000
    assert sum(one["times"] for one in found) == 2000


def test_a_restored_server_says_so_and_goes_on(tmp_path: Path) -> None:
    """A new epoch is an entry, and events that its database gives anew are taken over."""
    one = Server(found(tmp_path / "fed"))
    one.audit.start()
    one.stop()
    (tmp_path / "fed" / "epoch.json").write_text(json.dumps({"format": 1, "epoch": 1000}))
    other = Server(Federation.open(tmp_path / "fed"))
    try:
        assert kinds(other)[-1] == "restored"
        assert bodies(other, "restored")[0]["epoch"] == 1000
    finally:
        other.stop()
    again = Server(Federation.open(tmp_path / "fed"))
    assert kinds(again).count("restored") == 1
    again.stop()


def test_a_log_that_lacks_the_keys_of_now_was_cut(server: Server) -> None:
    """Cut before a rotation, it does not verify: the root's own statement says that keys came later."""
    Keeper.keys(server.audit)
    server.rotate(sites=False)
    (path,) = segments(server.federation.folder / FOLDER)
    content = path.read_bytes()
    path.write_bytes(b"".join(content.splitlines(keepends=True)[:2]))
    with pytest.raises(IntegrityError, match=r"entry [23] "):
        audit.verify(server.federation)
    path.write_bytes(content)


def test_the_commands_show_check_and_export(server: Server, tmp_path: Path) -> None:
    """`server audit` over the folder of a server that runs: lines for people, JSON lines, and exit code 4."""
    server.roster.invite("alba", 60.0)
    place, run = ["--dir", str(server.federation.folder)], CliRunner().invoke
    shown = run(commands, ["audit", "show", *place, "--kind", "invited"])
    assert shown.exit_code == 0
    assert re.search(r"3 .* invited .*site=alba", shown.output)
    lines = run(commands, ["audit", "show", *place, "--json", "--limit", "2"]).output.splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["started", "invited"]
    said = run(commands, ["audit", "verify", *place, "--json"])
    assert json.loads(said.output)["entries"] == 3
    out = tmp_path / "out.jsonl"
    assert run(commands, ["audit", "export", *place, "--out", str(out)]).exit_code == 0
    (path,) = segments(server.federation.folder / FOLDER)
    assert out.read_bytes() == path.read_bytes()
    path.write_bytes(path.read_bytes().replace(b"alba", b"aiba"))
    failed = run(commands, ["audit", "verify", *place])
    assert isinstance(failed.exception, IntegrityError)
    assert "entry 3 " in str(failed.exception)
    path.write_bytes(out.read_bytes())
