"""What server and site tell each other of their logs: who was rolled back or forked is found by the other, and named.

Both sides are the real ones, over a real database and real folders; what travels is handed over by the test.
"""

from __future__ import annotations

import json
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from founded import open_doors
from pair import SITE, Pair

from consortium.privacy.ledger import Budget
from consortium.protocol import heads, statement
from consortium.protocol.chain import Head
from consortium.protocol.errors import ConsortiumError, IntegrityError
from consortium.protocol.heads import AUDIT, Shown
from consortium.protocol.signing import HEADS
from consortium.server import audit_check
from consortium.server.audit import restores, verify
from consortium.server.heads import witnessed


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with open_doors(tmp_path / "fed") as doors:
        yield Pair(doors, tmp_path / "site")


def test_heads_are_exchanged_countersigned_and_kept(pair: Pair) -> None:
    """Each side knows, also after a restart, where the other's log ended; and a site's word proves it."""
    pair.work()
    identity = pair.doors.roster.identity(SITE)
    pair.start_site()
    pair.start_server()
    assert pair.mine.server() == pair.server.head
    assert pair.logs.head(SITE, identity) == pair.site.head
    federation = pair.doors.federation
    known = witnessed(pair.doors.store, federation, restores(federation))
    assert known[SITE].sequence >= pair.server.head.sequence - 1
    assert verify(federation, list(known.values())) == pair.server.head
    assert pair.logs.history(SITE, identity)[0] == pair.site.head.text


@pytest.mark.parametrize("grown", [0, 1, 2, 3, 8])
def test_a_site_whose_folder_was_put_back_refuses_and_the_server_says_so(
    pair: Pair, tmp_path: Path, grown: int
) -> None:
    """However far the older copy has grown since: the site names the entry and goes on with nothing, the server notes
    it once; with the newest copy back both go on."""
    pair.work()
    shutil.copytree(pair.folder, tmp_path / "old")
    pair.work(4)
    newest = pair.site.head
    pair.folder.rename(tmp_path / "newest")
    (tmp_path / "old").rename(pair.folder)
    pair.start_site()
    for _ in range(grown):
        pair.site.note("data added", {})
    for _ in range(2):
        with pytest.raises(IntegrityError, match=rf"has seen entry {newest.sequence} of the audit log"):
            pair.say(greeting=True)
    with pytest.raises(IntegrityError, match="older copy of this folder"):
        pair.say()
    assert "audit log" in pair.logs.trouble(SITE, pair.doors.roster.identity(SITE))
    told = [entry for entry in pair.server.entries() if entry.kind == "site distrusted"]
    assert [entry.body["site"] for entry in told] == [SITE] * len(told)
    assert 1 <= len(told) <= 2
    shutil.rmtree(pair.folder)
    (tmp_path / "newest").rename(pair.folder)
    pair.start_site()
    assert pair.say(greeting=True) == ""
    assert pair.say() == ""


def test_a_ledger_that_was_put_back_alone_is_found(pair: Pair, tmp_path: Path) -> None:
    """The site refuses although its audit log is the newest."""
    pair.ledger.allow("d", Budget(1.0, 1e-5, "record"), 1.0)
    kept = pair.home.ledger_file.read_bytes()
    pair.ledger.allow("d", Budget(2.0, 1e-5, "record"), 2.0)
    pair.work()
    pair.home.ledger_file.write_bytes(kept)
    pair.start_site()
    with pytest.raises(IntegrityError, match="entry 2 of the ledger log"):
        pair.say(greeting=True)


@pytest.mark.parametrize("grown", [0, 1, 3, 8])
def test_a_server_whose_folder_was_put_back_is_refused(pair: Pair, tmp_path: Path, grown: int) -> None:
    """Shorter, as long and longer than what the site has seen: the site refuses, and the server knows."""
    pair.work()
    shutil.copytree(pair.server_folder, tmp_path / "old")
    pair.work(4)
    shutil.rmtree(pair.server_folder)
    (tmp_path / "old").rename(pair.server_folder)
    pair.start_server()
    for _ in range(grown):
        pair.server.note("started", {})
    for greeting in (True, False):
        with pytest.raises(IntegrityError, match=r"the server's audit log: .*entry"):
            pair.say(greeting)
    kinds = [entry.kind for entry in pair.site.entries()]
    assert kinds[-1] == "refused to go on"


def test_a_new_epoch_is_a_restore_that_the_site_was_told_of(pair: Pair, tmp_path: Path) -> None:
    """What was seen in an epoch before counts no more, and a site's word of then counts up to the restore."""
    pair.work()
    shutil.copytree(pair.server_folder, tmp_path / "old")
    pair.work(4)
    shutil.rmtree(pair.server_folder)
    (tmp_path / "old").rename(pair.server_folder)
    pair.doors.federation.epoch = pair.epoch = 1000
    pair.start_server()
    pair.server.note("restored", {"epoch": 1000})
    federation = pair.doors.federation
    known = witnessed(pair.doors.store, federation, restores(federation))
    verify(federation, list(known.values()))
    assert pair.say(greeting=True) == ""
    pair.work()


def test_an_answer_that_was_overtaken_is_no_roll_back(pair: Pair) -> None:
    """Two statements of a site over two connections may arrive in the other order."""
    pair.work()
    identity = pair.doors.roster.identity(SITE)
    first = pair.mine.show("0" * 64)
    pair.site.note("answered", {})
    second = pair.mine.show("1" * 64)
    assert pair.logs.take(SITE, identity, second) == ""
    assert pair.logs.take(SITE, identity, first) == ""
    assert pair.logs.head(SITE, identity) == pair.site.head


def test_a_site_that_signs_a_lower_head_later_is_found_by_the_server_alone(pair: Pair) -> None:
    """Whatever the site's program says of itself: its own signed statements tell."""
    pair.work()
    pair.mine._logs["audit"] = _Log(Head(2, "0" * 64))
    identity = pair.doors.roster.identity(SITE)
    assert "rolled back" in pair.logs.take(SITE, identity, pair.mine.show("0" * 64))
    pair.mine._logs["audit"] = _Log(Head(pair.site.head.sequence, "0" * 64))
    assert "forked" in pair.logs.take(SITE, identity, pair.mine.show("0" * 64))


class _Log:
    def __init__(self, head: Head) -> None:
        self.head = head

    def contains(self, head: Head) -> bool:
        return True


def test_a_statement_of_another_site_request_or_key_is_not_taken(pair: Pair) -> None:
    """Each is for one site, one request and one side."""
    pair.work()
    identity = pair.doors.roster.identity(SITE)
    said = pair.logs.said(SITE, identity, "0" * 64)
    shown = pair.mine.read(said, pair.home.trust())
    with pytest.raises(IntegrityError, match="for this request"):
        pair.mine.take(said, shown, "1" * 64, None)
    with pytest.raises(IntegrityError, match="another site"):
        pair.mine.read(pair.logs.said("bari", identity, "0" * 64), pair.home.trust())
    own = pair.mine.show("0" * 64)
    with pytest.raises(IntegrityError, match="not signed"):
        pair.mine.read(own, pair.home.trust())
    bad: dict[str, Any] = {**own, "statement": own["statement"].replace('"at"', '"au"')}
    with pytest.raises(IntegrityError, match="not signed"):
        pair.logs.take(SITE, identity, bad)


def test_a_server_that_says_nothing_any_more_is_refused(pair: Pair) -> None:
    """Once it has said where its log ends, it cannot pass for an older version."""
    pair.mine.take({}, None, "0" * 64, pair.mine.server())
    pair.work()
    with pytest.raises(IntegrityError, match="does not say any more"):
        pair.mine.take({}, None, "0" * 64, pair.mine.server())


def test_a_site_that_states_ever_higher_heads_fills_no_disk(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest are kept, however many are stated; the newest of all is among them."""
    monkeypatch.setattr("consortium.server.heads.MOST_KEPT", 5)
    identity, name = pair.doors.roster.identity(SITE), pair.doors.federation.config.name
    for number in range(1, 40):
        head = Head(number * 64, f"{number:064x}")
        shown = Shown("site", name, SITE, "0" * 64, float(number), 0, {AUDIT: head}, {})
        assert pair.logs.take(SITE, identity, heads.state(pair.home.identity(pair.home.lock()), shown)) == ""
        pair.logs.keep()
    kept = pair.logs.history(SITE, identity)
    assert kept[0] == f"{39 * 64}:{39:064x}"
    assert len(set(kept)) <= 6


def test_a_commit_and_a_poll_do_not_wait_for_each_other(pair: Pair) -> None:
    """A poll that comes in the middle of a commit, which keeps heads too: both end."""
    pair.work()
    pair.site.note("answered", {})
    shown, identity = pair.mine.show(secrets.token_hex(32)), pair.doors.roster.identity(SITE)
    inside = threading.Event()

    def commit() -> None:
        with pair.doors.store.transaction() as db:
            inside.set()
            time.sleep(0.5)  # the poll begins
            pair.logs.keep_with(db)

    threads = [
        threading.Thread(target=commit, daemon=True),
        threading.Thread(target=lambda: pair.logs.take(SITE, identity, shown), daemon=True),
    ]
    for one in threads:
        one.start()
        assert inside.wait(10)
    for one in threads:
        one.join(20)
    assert not any(one.is_alive() for one in threads)


def test_a_head_outlives_a_commit_that_fails(pair: Pair) -> None:
    """What its transaction did not bring to the disk, the next one does."""
    pair.work()
    pair.site.note("answered", {})
    identity = pair.doors.roster.identity(SITE)
    pair.logs.take(SITE, identity, pair.mine.show(secrets.token_hex(32)))

    def fails() -> None:
        with pair.doors.store.transaction() as db:
            pair.logs.keep_with(db)
            raise ConsortiumError("the disk is full")

    with pytest.raises(ConsortiumError, match="full"):
        fails()
    pair.logs.keep()
    pair.start_server()
    assert pair.logs.head(SITE, identity) == pair.site.head


@pytest.mark.parametrize("at", [10**400, float("inf"), float("nan"), "soon"])
def test_a_malformed_statement_is_refused(pair: Pair, at: object) -> None:
    """Whatever number it holds: a refusal in words."""
    identity, name = pair.doors.roster.identity(SITE), pair.doors.federation.config.name
    about = {
        "format": 1, "by": "site", "federation": name, "site": SITE, "nonce": "0" * 64, "at": at, "epoch": 0,
        "heads": {}, "seen": {}, "lacks": [],
    }  # fmt: skip
    key = pair.home.identity(pair.home.lock())
    with pytest.raises(IntegrityError, match="malformed"):
        pair.logs.take(SITE, identity, statement.signed(key, HEADS, json.dumps(about).encode()))


@pytest.mark.parametrize(
    "text", ["{}", "[", '{"epoch":0,"at":1,"heads":{}}', '{"epoch":0,"at":1,"heads":{"audit":"x"}}']
)
def test_a_damaged_file_of_heads_is_named(pair: Pair, text: str) -> None:
    """Whatever is wrong with it."""
    pair.work()
    pair.home.heads_file.write_text(json.dumps({"statement": text, "signature": ""}))
    with pytest.raises(IntegrityError, match=r"heads\.json: is damaged"):
        pair.start_site()


def test_a_decision_that_is_noted_before_it_is_committed_is_waited_for(pair: Pair) -> None:
    """`verify` beside a running server gives no false alarm; one that never comes is named, with what to do."""
    pair.work()
    row = (SITE, pair.doors.roster.identity(SITE), 1, "0" * 64)
    pair.server.note("decided", {"site": SITE, "sequence": 1, "hash": "0" * 64})
    with pytest.raises(IntegrityError, match=r"decision 1 of site 'alba'.*says it again when it connects"):
        audit_check.check(pair.doors.federation)

    def committed() -> None:
        time.sleep(0.3)
        with pair.doors.store.transaction() as db:
            db.execute("INSERT INTO approvals VALUES (?, ?, ?, ?, 'approved', '', 0.0, '', '')", row)

    thread = threading.Thread(target=committed)
    thread.start()
    try:
        with pytest.raises(IntegrityError, match="approvals"):  # it came, and this one is signed by nobody
            audit_check.check(pair.doors.federation)
    finally:
        thread.join()
