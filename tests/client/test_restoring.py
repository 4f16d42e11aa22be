"""A site's folder is put back from an older copy, and the newest one is lost: what was spent comes back, whole.

Over real TLS and a real database; the site's side is called as its agent and its commands call it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from founded import Doors, open_doors
from pair import SITE, Pair

from consortium.client import joining
from consortium.client.approvals import Approvals, made
from consortium.client.audit import verify_all
from consortium.client.charges import show
from consortium.client.heads import countersigned
from consortium.client.program import held
from consortium.client.restoring import Report, restore
from consortium.privacy.accounting import Release
from consortium.privacy.ledger import Budget, Charge, Question
from consortium.privacy.ledger_copy import BATCH, copy_key, opened, seal
from consortium.protocol import bundle, chain, site_epoch, statement, wire
from consortium.protocol.audit import FOLDER, name_at_server, segments
from consortium.protocol.chain import Head, start_of
from consortium.protocol.connection import StatusError, UnreachableError
from consortium.protocol.errors import IntegrityError
from consortium.protocol.signing import SITE_EPOCH
from consortium.protocol.site_epoch import Restored
from consortium.protocol.study import Study
from consortium.server import audit_check
from consortium.server.approvals import Approvals as AtServer

CODE = {"task.py": b"class Own: ...\n"}
STUDY = 'format = 1\n[study]\nname = "lung-study"\ntask = "task:Own"\nrounds = 5\n'
OWN = bundle.of(Study.parse(STUDY, code=CODE), CODE)
NOW = 1_800_000_000.0


class Site(Pair):
    """A site whose ledger and decisions the server is shown, as an agent shows them."""

    def __init__(self, doors: Doors, folder: Path) -> None:
        super().__init__(doors, folder)
        assert doors.logs is not None
        self.logs, self.server = doors.logs, doors.logs._log
        self.at_server = AtServer(doors.store, doors.roster, "lung")

    def spend(self, rounds: range) -> None:
        for number in rounds:
            question = Question("r.1", number, 0, f"model {number}")
            release = Release(2.0, 0.1, 10)
            self.ledger.charge(Charge("patients", question, "s" * 64, "record", "dp-sgd", release), 999, NOW)
            self.show()

    def show(self, copied: int | None = None) -> int:
        connection = self.home.connection(self.home.lock())
        try:
            return show(self.home, self.ledger, connection, copied)[1]
        finally:
            connection.close()

    def decide(self, days: float) -> None:
        key, mine = self.home.identity(self.home.lock()), Approvals(self.home)
        mine.approve(key, OWN, made(self.home, OWN, "patients", rounds=5, days=days, now=NOW), NOW)
        after = self.at_server.head(SITE).sequence
        self.at_server.take(SITE, [one.decode() for one in chain.lines(mine.path, after)])

    def back_up(self, place: Path) -> None:
        shutil.copytree(self.folder, place)

    def put_back(self, place: Path) -> None:
        """The newest copy is lost."""
        shutil.rmtree(self.folder)
        shutil.copytree(place, self.folder)
        self.start_site()

    def restore(self) -> Report:
        found = restore(self.home, self.home.lock())
        self.start_site()
        return found

    def verified(self) -> None:
        """As `consortium client audit verify`."""
        lock = self.home.lock()
        seen = countersigned(self.home, lock)
        assert seen.asked
        verify_all(self.home, self.home.identity(lock).public_key(), seen.seen, seen.earlier)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with open_doors(tmp_path / "fed", log=True) as doors:
        yield Site(doors, tmp_path / "site")


def test_a_folder_that_was_put_back_goes_on_with_all_that_was_spent(site: Site, tmp_path: Path) -> None:
    """Ledger and decisions come back bit for bit, with what the operator set since after them; the audit log goes on
    in a new epoch that both sides have signed and noted; and the site is trusted again."""
    site.ledger.allow("patients", Budget(3.0, 1e-5, "record"), NOW)
    site.decide(10)
    site.spend(range(1, 3))
    site.work(3)
    site.back_up(tmp_path / "old")
    site.decide(20)
    site.spend(range(3, 6))
    site.work(4)
    ledger, decisions = site.home.ledger_file.read_bytes(), Approvals(site.home).path.read_bytes()
    spent, newest = site.ledger.accounts()["patients"], site.site.head
    site.put_back(tmp_path / "old")
    site.ledger.allow("patients", Budget(2.0, 1e-5, "record"), NOW + 1)
    for _ in range(2):
        with pytest.raises(IntegrityError, match="consortium client restore --dir") as refused:
            site.say(greeting=True)
        assert refused.value.exit_code == 4
    with pytest.raises(IntegrityError, match="consortium client restore --dir"):
        site.show()
    found = site.restore()
    assert (found.ledger, found.decisions) == (3, 1)
    assert found.audit is not None
    assert found.audit.lost == newest
    assert site.home.ledger_file.read_bytes().startswith(ledger)
    assert Approvals(site.home).path.read_bytes() == decisions
    account = site.ledger.accounts()["patients"]
    assert account.charges == spent.charges
    assert account.budget == Budget(2.0, 1e-5, "record")
    assert site.say(greeting=True) == ""
    site.work()
    site.spend(range(6, 8))
    site.verified()
    (told,) = [one for one in site.server.entries() if one.kind == "site restored"]
    assert (told.body["site"], told.body["lost"]) == (SITE, newest.text)
    noted = {one.kind: one.body for one in site.site.entries()}
    trusted = site.home.trust().keys
    assert site_epoch.verified(noted["new epoch"]["countersigned"], trusted, "lung", SITE) == found.audit
    assert noted["folder restored"]["ledger"] == 3
    assert audit_check.check(site.doors.federation).sites[SITE].sequence
    assert site.restore() == Report(0, 0, None)


@pytest.mark.parametrize("grown", [0, 70])
def test_a_second_restore_and_one_that_grew_meanwhile_are_told_apart(
    site: Site, tmp_path: Path, grown: int
) -> None:
    """Heads of the history that was lost do not count any more, however many there were; a roll-back behind the new
    epoch is found as any other."""
    site.spend(range(1, 2))
    site.work(3)
    site.back_up(tmp_path / "old")
    site.work(70)
    for _ in range(2):
        site.put_back(tmp_path / "old")
        for _ in range(grown):
            site.site.note("data added", {})
        with pytest.raises(IntegrityError, match="audit log"):
            site.say(greeting=True)
        assert site.restore().audit is not None
        site.work(3)
        site.verified()


def test_a_ledger_that_is_gone_comes_back_whole(site: Site) -> None:
    """Of more entries than go at once, in a folder whose ledger file is lost alone."""
    site.spend(range(1, 2 * BATCH + 3))
    whole = site.home.ledger_file.read_bytes()
    site.home.ledger_file.unlink()
    site.start_site()
    assert site.restore() == Report(2 * BATCH + 2, 0, None)
    assert site.home.ledger_file.read_bytes() == whole
    assert site.show() == 2 * BATCH + 2


def test_entries_of_a_ledger_from_before_there_were_copies_are_sent_later(site: Site) -> None:
    """A server that has the head of a ledger alone gets all its lines with the next one that is shown."""
    site.spend(range(1, BATCH + 9))
    with site.doors.store.transaction() as db:
        db.execute("DELETE FROM ledger_copies")
    site.home.ledger_file.rename(site.folder / "elsewhere")
    site.start_site()
    with pytest.raises(IntegrityError, match=r"has no copy of all .*\(from entry 1\).*join anew") as found:
        site.restore()
    assert found.value.exit_code == 4
    assert not site.home.ledger_file.exists()
    (site.folder / "elsewhere").rename(site.home.ledger_file)
    site.start_site()
    assert site.show() == BATCH + 8


def test_the_server_cannot_read_its_copy_nor_pass_one_line_for_another(site: Site) -> None:
    """No name of a study, run or data set is in it; a line that was changed, moved or made by another is found, and
    nothing of the site's folder is changed then."""
    site.spend(range(1, 5))
    rows = site.doors.store.rows("SELECT sequence, sealed FROM ledger_copies ORDER BY sequence")
    sealed = [bytes(row["sealed"]) for row in rows]
    assert len({len(one) for one in sealed}) == 1, "sizes tell entries apart"
    assert not any(word in one for one in sealed for word in (b"patients", b"dp-sgd", b"r.1"))
    key, other = copy_key(site.home.identity(site.home.lock())), bytes(32)
    first = site.home.ledger_file.read_bytes().splitlines()[0]
    assert opened(key, site.ledger.name, 1, sealed[0]) == first
    wrong = {
        "another's key": (other, site.ledger.name, 1, sealed[0]),
        "another line": (key, site.ledger.name, 2, sealed[0]),
        "another ledger": (key, "ledger lung b", 1, sealed[0]),
        "a changed byte": (key, site.ledger.name, 1, sealed[0][:-1] + bytes([sealed[0][-1] ^ 1])),
        "nothing": (key, site.ledger.name, 1, b""),
    }
    for what, given in wrong.items():
        with pytest.raises(IntegrityError, match="not what this site gave it"):
            assert opened(*given), what
    with site.doors.store.transaction() as db:
        forged = seal(other, site.ledger.name, 4, first)
        db.execute("UPDATE ledger_copies SET sealed = ? WHERE sequence = 4", (forged,))
    short = b"".join(line + b"\n" for line in site.home.ledger_file.read_bytes().splitlines()[:2])
    site.home.ledger_file.write_bytes(short)
    site.start_site()
    with pytest.raises(IntegrityError, match="copy of entry 4"):
        site.restore()
    assert site.home.ledger_file.read_bytes() == short


def test_another_history_of_a_ledger_leaves_no_copy(site: Site, tmp_path: Path) -> None:
    """An older ledger that went on by itself, and is shown, takes nothing away from what the server keeps."""
    site.spend(range(1, 3))
    site.back_up(tmp_path / "old")
    site.spend(range(3, 5))
    kept = site.doors.store.rows("SELECT * FROM ledger_copies ORDER BY sequence")
    site.put_back(tmp_path / "old")
    for number in range(2):
        site.ledger.allow("patients", Budget(50.0 + number, 1e-5, "record"), NOW)
    for copied in (None, 2):  # with the other lines, too
        with pytest.raises(IntegrityError, match="not in this ledger"):
            site.show(copied)
    found = site.doors.store.rows("SELECT * FROM ledger_copies ORDER BY sequence")
    assert [tuple(row) for row in found] == [tuple(row) for row in kept]
    site.restore()
    assert len(site.ledger.accounts()["patients"].charges) == 4


def test_a_statement_of_a_restore_counts_once_and_for_what_was_lost_alone(site: Site, tmp_path: Path) -> None:
    """A replay, one that names another entry, one after an entry that nobody saw, and another site's are refused; what
    the server knows stays."""
    site.work(3)
    site.back_up(tmp_path / "old")
    site.work(3)
    site.put_back(tmp_path / "old")
    lock = site.home.lock()
    key, seen = site.home.identity(lock), countersigned(site.home, lock)
    shared = [one for one in seen.earlier if site.site.contains(one)]
    kept = max(shared, default=start_of(site.site.name))
    right = Restored("lung", SITE, NOW, seen.seen["audit"], kept, site.site.head)
    odd = Head(right.lost.sequence, "f" * 64)
    other = joining.join(site.doors.code("bari"), tmp_path / "bari", proxy="").home
    wrong = {
        "is said to be lost": site_epoch.state(key, replace(right, lost=odd)),
        "has not seen the entry": site_epoch.state(key, replace(right, kept=Head(1, "f" * 64))),
        "not signed": site_epoch.state(other.identity(other.lock()), right),
        "of another site": site_epoch.state(key, replace(right, site="bari")),
        "malformed": statement.signed(key, SITE_EPOCH, b'{"format":1,"federation":"lung","site":"alba"}'),
    }
    connection = site.home.connection(lock)

    def post(said: dict[str, str]) -> None:
        connection.request("POST", wire.RESTORED, {"format": wire.FORMAT, "restored": said}).document()

    for why, said in wrong.items():
        with pytest.raises(StatusError, match=why):
            post(said)
    with pytest.raises(IntegrityError):
        site.say(greeting=True)
    post(site_epoch.state(key, right))
    with pytest.raises(StatusError, match="is said to be lost"):
        post(site_epoch.state(key, right))
    connection.close()
    site.start_site()
    assert site.say(greeting=True) == ""
    name = name_at_server("lung", site.doors.federation.root_fingerprint)
    kinds = [one.kind for one in chain.entries(segments(site.doors.federation.folder / FOLDER), name)]
    assert kinds.count("site restored") == 1


def test_restore_is_refused_while_the_agent_runs_and_where_the_server_cannot_be_asked(
    site: Site, tmp_path: Path
) -> None:
    """By its command: exit code 2 and what runs; exit code 1, and nothing is changed."""
    site.spend(range(1, 2))
    command = [Path(sys.executable).with_name("consortium"), "client", "restore", "--dir", site.folder]

    def typed() -> subprocess.CompletedProcess[str]:
        return subprocess.run([*map(str, command), "--json"], capture_output=True, text=True, check=False)

    with held(site.home):
        done = typed()
    assert (done.returncode, "an agent runs here already" in done.stderr) == (2, True), done
    done = typed()
    assert (done.returncode, done.stdout) == (0, '{"ledger": 0, "decisions": 0, "lost_audit": null}\n'), done
    site.doors.site.stop(1.0)
    site.home.ledger_file.unlink()
    with pytest.raises(UnreachableError, match="known there alone"):
        restore(site.home, site.home.lock())
    assert not site.home.ledger_file.exists()
