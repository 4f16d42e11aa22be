"""The roster over a real database: who is let in, by which code, until when."""

import hashlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from consortium.protocol.errors import InputError, RefusedError
from consortium.server.pki import Issued
from consortium.server.roster import MOST_A_DAY, NO_ENTRY, Joining, Member, Roster
from consortium.server.store import Store

DAY = 86400.0


class World:
    """A roster whose clock stands still, and an authority that counts."""

    def __init__(self, path: Path) -> None:
        self.path, self.now, self.issued = path, 1_000_000.0, 0
        self.store = Store(path)
        self.roster = Roster(self.store, lambda: self.now)

    def issue(self, site: str, now: float) -> Issued:
        self.issued += 1
        der = f"{site} {self.issued}".encode()
        return Issued(f"chain of {der.decode()}", hashlib.sha256(der).hexdigest(), now, now + 90 * DAY)

    def join(self, site: str, secret: str, identity: str = "me", request: str = "r") -> str:
        return self.roster.join(Joining(site, secret, identity, request), self.issue)

    def joined(self, site: str = "a", identity: str = "me") -> bytes:
        """A site that has joined; the DER of its certificate."""
        self.join(site, self.roster.invite(site, 3600)[0], identity)
        return f"{site} {self.issued}".encode()

    def status(self, site: str = "a") -> str:
        return next(str(one["status"]) for one in self.roster.sites() if one["name"] == site)


@pytest.fixture
def one(tmp_path: Path) -> Iterator[World]:
    found = World(tmp_path / "consortium.db")
    yield found
    found.store.close()


def test_a_site_joins_once(one: World) -> None:
    """Invited, joined, let in by its certificate, under the identity that it showed."""
    secret, expires = one.roster.invite("a", 3600)
    assert (len(secret), expires) == (32, one.now + 3600)
    assert one.status() == "invited"
    assert not one.roster.is_member("a")
    assert one.join("a", secret) == "chain of a 1"
    assert one.status() == "joined"
    assert one.roster.admit(b"a 1") == "a"
    assert one.roster.active_site(hashlib.sha256(b"a 1").hexdigest()) == Member("a", "me")
    assert one.roster.identity("a") == "me"
    assert one.roster.admit(b"a 2") is None
    assert one.roster.admit(None) is None
    assert one.roster.admit(b"") is None


def test_every_no_is_the_same(one: World) -> None:
    """Unknown site, wrong secret, used code, expired code, revoked site: one text, and nothing is issued."""
    used, _ = one.roster.invite("used", 3600)
    one.join("used", used)
    late, _ = one.roster.invite("late", 60)
    gone, _ = one.roster.invite("gone", 3600)
    one.roster.revoke("gone")
    wrong, _ = one.roster.invite("wrong", 3600)
    one.now += 60
    said = []
    for site, secret, identity in [
        ("unknown", "00" * 16, "me"), ("wrong", "00" * 16, "me"), ("used", used, "other"), ("late", late, "me"),
        ("gone", gone, "me"), ("late", wrong, "me"),
    ]:  # fmt: skip
        with pytest.raises(RefusedError) as caught:
            one.join(site, secret, identity)
        said.append(str(caught.value))
    assert set(said) == {NO_ENTRY}
    assert one.issued == 1


def test_a_code_is_for_one_request(one: World) -> None:
    """The same request again gets the same chain; another identity, or another key, is refused."""
    secret, _ = one.roster.invite("a", 3600)
    first = one.join("a", secret)
    one.now += 7200
    assert one.join("a", secret) == first
    with pytest.raises(RefusedError):
        one.join("a", secret, identity="other")
    with pytest.raises(RefusedError):
        one.join("a", secret, request="other")
    assert one.issued == 1


def test_many_at_once_join_once(one: World) -> None:
    """Of many that use one code at the same moment exactly one gets in."""
    secret, _ = one.roster.invite("a", 3600)
    got: list[str] = []

    def attempt(name: str) -> None:
        try:
            got.append(one.join("a", secret, identity=name))
        except RefusedError:
            got.append("")

    threads = [threading.Thread(target=attempt, args=(str(i),)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got)[-2:] == ["", "chain of a 1"]
    assert one.issued == 1


def test_what_fails_in_between_leaves_the_code_unused(one: World) -> None:
    """Where no certificate can be issued, nothing has happened, and the same code works later."""
    secret, _ = one.roster.invite("a", 3600)

    def fails(site: str, now: float) -> Issued:
        raise OSError("no disk")

    with pytest.raises(OSError, match="no disk"):
        one.roster.join(Joining("a", secret, "me", "r"), fails)
    assert one.status() == "invited"
    assert one.join("a", secret)


def test_a_joined_site_is_not_invited(one: World) -> None:
    """It is first revoked; the message says how."""
    one.joined()
    with pytest.raises(RefusedError, match="consortium server revoke a"):
        one.roster.invite("a", 3600)


def test_a_new_code_replaces_the_old(one: World) -> None:
    """Inviting an invited site again makes the code before worthless."""
    old, _ = one.roster.invite("a", 3600)
    new, _ = one.roster.invite("a", 3600)
    with pytest.raises(RefusedError):
        one.join("a", old)
    assert one.join("a", new)


@pytest.mark.parametrize("name", ["", "A", "a b", "-a", "a-", "a/b", "a" * 64, "é", "a\n"])
def test_names_of_sites(one: World, name: str) -> None:
    """What is no name is not invited."""
    with pytest.raises(InputError):
        one.roster.invite(name, 3600)


def test_leave_and_come_back(one: World) -> None:
    """A site that left is out at once, and may come back under the same identity and a new certificate."""
    before = one.joined()
    one.roster.leave("a")
    one.roster.leave("a")
    assert one.status() == "left"
    assert one.roster.admit(before) is None
    after = one.joined()
    assert one.roster.admit(after) == "a"
    assert one.roster.admit(before) is None
    assert one.roster.identity("a") == "me"


def test_revoke(one: World) -> None:
    """All certificates of a revoked site end, also for a server that starts anew, until it is invited again."""
    before = one.joined()
    one.roster.renew("a", one.issue)
    one.roster.revoke("a")
    one.roster.revoke("a")
    other = Roster(Store(one.path), lambda: one.now)
    assert [other.admit(before), other.admit(b"a 2")] == [None, None]
    assert not other.is_member("a")
    with pytest.raises(RefusedError):
        other.renew("a", one.issue)
    with pytest.raises(InputError, match="server sites"):
        other.revoke("b")
    one.roster.invite("a", 3600)
    assert one.roster.admit(before) is None, "an invitation alone lets nobody in"


def test_a_revoked_site_cannot_call_itself_left(one: World) -> None:
    """A request to leave that arrives after the revocation changes nothing."""
    one.joined()
    one.roster.revoke("a")
    one.roster.leave("a")
    assert one.status() == "revoked"


def test_revoking_an_invited_site_ends_its_code(one: World) -> None:
    """The open invitation goes with it."""
    secret, _ = one.roster.invite("a", 3600)
    one.roster.revoke("a")
    assert not one.roster.outstanding()
    with pytest.raises(RefusedError):
        one.join("a", secret)


def test_renewal_overlaps(one: World) -> None:
    """Old and new certificate are both good until the old one expires."""
    first = one.joined()
    assert not one.roster.renewal_due("a")
    one.now += 60 * DAY
    assert one.roster.renewal_due("a")
    assert one.roster.renew("a", one.issue) == "chain of a 2"
    assert not one.roster.renewal_due("a")
    assert [one.roster.admit(first), one.roster.admit(b"a 2")] == ["a", "a"]
    one.now += 30 * DAY
    assert [one.roster.admit(first), one.roster.admit(b"a 2")] == [None, "a"]
    assert one.roster.expired() == []
    one.now += 60 * DAY
    assert one.roster.expired() == ["a"]
    assert one.roster.admit(b"a 2") is None


def test_a_site_does_not_come_back_under_another_name(one: World) -> None:
    """With the identity key that it had: who was revoked, or is left out of a run, by its name would be in it again."""
    one.joined("a", "key")
    for end in (one.roster.revoke, lambda site: None):
        end("a")
        secret = one.roster.invite("b", 3600)[0]
        with pytest.raises(RefusedError, match="the identity key is that of site 'a'"):
            one.join("b", secret, "key")
    one.join("b", secret, "new")
    assert one.status("b") == "joined"


def test_the_admin_can_ask_for_renewal(one: World) -> None:
    """Until each site has a newer certificate."""
    one.joined("a")
    one.joined("b", "another")
    one.roster.revoke("b")
    one.now += 1
    assert one.roster.ask_renewal() == ["a"]
    assert one.roster.renewal_due("a")
    one.now += 1
    one.roster.renew("a", one.issue)
    assert not one.roster.renewal_due("a")
    assert not one.roster.renewal_due("nobody")


def test_a_site_cannot_fill_the_database(one: World) -> None:
    """So many certificates a day, and no more; expired ones are forgotten."""
    one.joined()
    for _ in range(MOST_A_DAY - 1):
        one.roster.renew("a", one.issue)
    with pytest.raises(RefusedError, match="tomorrow"):
        one.roster.renew("a", one.issue)
    one.now += 121 * DAY
    one.roster.renew("a", one.issue)
    assert len(one.store.rows("SELECT 1 FROM certificates")) == 1


def test_outstanding(one: World) -> None:
    """A code counts until it expires, or the site that used it is let in with what it was given."""
    assert not one.roster.outstanding()
    one.roster.invite("a", 60)
    assert one.roster.outstanding()
    one.now += 60
    assert not one.roster.outstanding()
    secret, _ = one.roster.invite("a", 60)
    one.join("a", secret)
    assert one.roster.outstanding(), "the answer may have been lost"
    assert one.roster.admit(b"a 1") == "a"
    assert not one.roster.outstanding()


def test_sites_are_listed(one: World) -> None:
    """In name order, with status and the end of the newest certificate."""
    one.joined("b", "bob")
    one.roster.invite("a", 60)
    found = one.roster.sites()
    assert [(s["name"], s["status"], s["identity"]) for s in found] == [
        ("a", "invited", ""), ("b", "joined", "bob"),
    ]  # fmt: skip
    assert [s["certificate_expires"] for s in found] == [None, one.now + 90 * DAY]


def test_tokens(one: World) -> None:
    """A token names its holder and role; it is stored by digest alone, and replaced by the next of that name."""
    old = one.roster.new_token("alice", "viewer")
    bob = one.roster.new_token("bob", "admin")
    assert one.roster.role_of(old) == ("alice", "viewer")
    new = one.roster.new_token("alice", "researcher")
    assert one.roster.role_of(old) is None
    assert one.roster.role_of(new) == ("alice", "researcher")
    assert one.roster.role_of(bob) == ("bob", "admin")
    for wrong in ("", "x", new[:-1], new + "x", "\ud800"):
        assert one.roster.role_of(wrong) is None


def test_no_secret_is_in_the_database(one: World) -> None:
    """Neither a code's secret nor a token lies in any file of the database."""
    secret, _ = one.roster.invite("a", 60)
    token = one.roster.new_token("alice", "admin")
    content = b"".join(file.read_bytes() for file in one.path.parent.glob("consortium.db*"))
    assert b"alice" in content
    assert secret.encode() not in content
    assert bytes.fromhex(secret) not in content
    assert token.encode() not in content


def test_joining_is_durable(one: World) -> None:
    """Another process sees the site as joined as soon as its chain is returned."""
    one.joined()
    with sqlite3.connect(one.path) as db:
        assert db.execute("SELECT status FROM sites").fetchone() == ("joined",)
