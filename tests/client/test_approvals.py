"""What a site approved, byte for byte, and for whom: anything else is refused, and its log cannot be taken back."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from site_world import SITE, World

from consortium.client.approvals import APPROVED, Approval, Approvals, decided, made
from consortium.client.review import document, page
from consortium.client.work import Given, Release, SiteWork
from consortium.protocol import bundle, chain
from consortium.protocol.bundle import Bundle
from consortium.protocol.chain import Head
from consortium.protocol.chain_writer import Chain
from consortium.protocol.errors import InputError, IntegrityError, RefusedError
from consortium.protocol.messages import Instruction
from consortium.protocol.study import Study
from consortium.server.approvals import Approvals as AtServer

STUDY = """format = 1
[study]
name = "own"
task = "task:Own"
rounds = 5
"""
CODE = {"task.py": b"import numpy\n\nclass Own:\n    pass\n"}
NOW = 1_800_000_000.0


def packed(study: str = STUDY, **files: bytes) -> Bundle:
    code = {**CODE, **{f"{name}.py": text for name, text in files.items()}}
    return bundle.of(Study.parse(study, code=code), code)


class Desk:
    """A site that has joined, its key and its decisions; and the server's side of them."""

    def __init__(self, world: World) -> None:
        self.world, self.home = world, world.home
        self.key = self.home.identity(self.home.lock())
        self.public = self.key.public_key()
        self.approvals = Approvals(self.home)
        self.server = AtServer(world._store, world.roster, "lung", lambda: NOW)

    def approve(self, one: Bundle, rounds: int = 5, days: float = 30, **more: object) -> Head:
        approval = replace(made(self.home, one, "patients", rounds=rounds, days=days, now=NOW), **more)  # type: ignore[arg-type]
        return self.approvals.approve(self.key, one, approval, NOW)

    def send(self) -> None:
        """Give the server what it does not know."""
        after = self.server.head(SITE)
        self.server.take(SITE, [one.decode() for one in chain.lines(self.approvals.path, after.sequence)])
        self.approvals.witnessed = tuple(self.server.heads(SITE))

    def asked(self, one: Bundle, round: int = 1, **fields: object) -> Instruction:
        return self.world.instruction("train", round, study=one.study.digest, **fields)

    def allowed(self, one: Bundle, now: float = NOW, **fields: object) -> Approval | None:
        return self.approvals.allowed(self.public, one, self.asked(one, **fields), now)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    one = World(tmp_path_factory.mktemp("approvals")).with_data()
    yield one
    one.end()


@pytest.fixture
def desk(founded: World) -> Desk:
    (founded.home.folder / "approvals.log").unlink(missing_ok=True)
    with founded._store.transaction() as db:
        db.execute("DELETE FROM approvals")
    return Desk(founded)


def test_just_what_was_approved_is_allowed(desk: Desk) -> None:
    one = packed()
    assert desk.allowed(one) is None
    desk.approve(one)
    approval = desk.allowed(one)
    assert approval is not None
    assert (approval.data, approval.bundle, approval.site, approval.federation) == (
        "patients",
        one.digest,
        SITE,
        "lung",
    )


def test_one_byte_or_one_setting_off_is_another_study(desk: Desk) -> None:
    """Of code, of a setting, of a comment: none of them was approved, and no policy allows a study's own code."""
    desk.approve(packed())
    others = [
        packed(task=b"import numpy\n\nclass Own:\n    pass \n"),
        packed(STUDY.replace("rounds = 5", "rounds = 4")),
        packed(STUDY + "# a comment\n"),
        packed(more=b""),
    ]
    work = SiteWork(
        desk.home,
        desk.home.data_key(desk.home.lock()),
        desk.approvals,
        desk.public,
        lambda *_: lambda _: None,
    )
    for other in others:
        assert desk.allowed(other) is None
        given = Given(b"", desk.asked(other), None, other.study, bundle=other)
        with pytest.raises(RefusedError, match="has not approved it") as error:
            work.answer(given)
        assert error.value.exit_code == 3


def test_what_is_expired_revoked_or_beyond_its_limits_is_refused(desk: Desk) -> None:
    one = packed()
    desk.approve(one, rounds=6, days=2)
    assert desk.allowed(one, NOW + 2 * 86400 - 1, round=6)
    for now, round, says in ((NOW + 2 * 86400, 1, "has expired"), (NOW, 7, "is for 6 rounds, this is 7")):
        with pytest.raises(RefusedError, match=says) as error:
            desk.allowed(one, now, round=round)
        assert error.value.exit_code == 3
    desk.approvals.reject(desk.key, one, "we changed our minds", NOW)
    with pytest.raises(RefusedError, match="was rejected by the site's operator"):
        desk.allowed(one)
    desk.approve(one)
    assert desk.allowed(one)


@pytest.mark.parametrize("field", ["federation", "site", "settings"])
def test_an_approval_for_another_federation_site_or_study_is_refused(desk: Desk, field: str) -> None:
    """Also where the site's own key signed it."""
    one = packed()
    approval = replace(made(desk.home, one, "patients", rounds=5, days=1, now=NOW), **{field: "x" * 64})  # type: ignore[arg-type]
    Chain(desk.approvals.path, desk.approvals.name, desk.key).append(APPROVED, asdict(approval), NOW)
    with pytest.raises(IntegrityError, match="not of this site, federation and study") as error:
        desk.allowed(one)
    assert error.value.exit_code == 4


def test_an_approval_does_not_serve_an_instruction_of_another(desk: Desk) -> None:
    one = packed()
    desk.approve(one)
    for fields in ({"site": "other"}, {"federation": "other"}):
        with pytest.raises(IntegrityError):
            desk.approvals.allowed(desk.public, one, replace(desk.asked(one), **fields), NOW)  # type: ignore[arg-type]


def test_the_log_of_another_site_or_federation_is_not_taken_for_ours(desk: Desk) -> None:
    one = packed()
    other = Ed25519PrivateKey.generate()
    approval = asdict(made(desk.home, one, "patients", rounds=5, days=1, now=NOW))
    for name, key in (
        ("approvals lung other", desk.key),
        ("approvals x " + SITE, desk.key),
        (desk.approvals.name, other),
    ):
        desk.approvals.path.unlink(missing_ok=True)
        Chain(desk.approvals.path, name, key).append(APPROVED, approval, NOW)
        with pytest.raises(IntegrityError, match="entry 1 "):
            desk.allowed(one)


def test_a_thousand_ways_to_change_the_log_are_found_with_the_entry_named(desk: Desk) -> None:
    """Edits by anyone; cuts, old copies and other histories by the holder of the key, once the server has seen it."""
    draw, bundles = random.Random(3), [packed(STUDY.replace("own", f"own-{n}")) for n in range(4)]
    heads = []
    for turn in range(8):
        one = bundles[turn % 4]
        heads.append(desk.approvals.reject(desk.key, one, "no", NOW) if turn % 3 == 1 else desk.approve(one))
        desk.send()
    good = desk.approvals.path.read_bytes()
    lines = good.splitlines(keepends=True)
    assert desk.approvals.entries(desk.public)[-1].head == heads[-1]
    for _ in range(1000):
        place = draw.randrange(8)
        how = draw.choice(["edit", "cut", "fork"])
        if how == "edit":
            at = draw.randrange(len(good) - 1)
            place = good[:at].count(b"\n")
            wrong = good[:at] + bytes([good[at] ^ 1 << draw.randrange(7)]) + good[at + 1 :]
        else:
            wrong = b"".join(lines[:place])
        desk.approvals.path.write_bytes(wrong)
        if how == "fork":
            fork = Chain(desk.approvals.path, desk.approvals.name, desk.key)
            for turn in range(draw.randint(8 - place, 9)):
                fork.append(APPROVED, {"bundle": bundles[0].digest, "n": turn}, NOW)
        with pytest.raises(IntegrityError) as error:
            desk.allowed(bundles[0])
        assert f"entry {place + 1} " in str(error.value), how
    desk.approvals.path.write_bytes(good)
    assert desk.allowed(bundles[2])


def test_the_server_takes_no_decision_that_does_not_follow(desk: Desk) -> None:
    """A replayed one, a forged one, one after a roll-back, one of another site: and names the entry."""
    one = packed()
    desk.approve(one)
    first = chain.lines(desk.approvals.path)[0].decode()
    desk.send()
    assert desk.server.approved(one.digest) == {SITE}
    desk.approvals.reject(desk.key, one, "the code opens files", NOW)
    desk.send()
    assert desk.server.approved(one.digest) == set()
    assert desk.server.missing(one.digest, 1) == (
        f"0 of at least 1 sites have approved it; missing: {SITE} (rejected: the code opens files)"
    )
    with pytest.raises(IntegrityError, match="entry 3 is not as it was written, or not in its place"):
        desk.server.take(SITE, [first])  # the approval again
    kept = desk.approvals.path.read_bytes()
    desk.approvals.path.write_bytes(first.encode() + b"\n")
    desk.approvals.witnessed = ()
    desk.approve(one)
    with pytest.raises(IntegrityError, match="entry 3 "):
        desk.server.take(SITE, [line.decode() for line in chain.lines(desk.approvals.path, 1)])
    desk.approvals.path.write_bytes(kept)
    forged = Path(desk.home.folder / "forged.log")
    forged.write_bytes(kept)
    shutil.copyfile(forged, desk.home.folder / "copy.log")
    with pytest.raises(IntegrityError):
        Chain(forged, desk.approvals.name, Ed25519PrivateKey.generate())
    assert desk.server.approved(one.digest) == set()


def test_an_approval_that_expires_counts_no_more_at_the_server(desk: Desk) -> None:
    one = packed()
    desk.approve(one, expires=NOW + 10)
    desk.send()
    assert desk.server.approved(one.digest) == {SITE}
    later = AtServer(desk.world._store, desk.world.roster, "lung", lambda: NOW + 10)
    assert later.approved(one.digest) == set()
    assert "(expired)" in later.missing(one.digest, 1)


def test_limits_that_are_none_are_refused(desk: Desk) -> None:
    for rounds, days, says in ((4, 30, "has 5"), (0, 30, "--rounds"), (5, 0, "--days"), (5, 500, "--days")):
        with pytest.raises(InputError, match=says):
            made(desk.home, packed(), "patients", rounds=rounds, days=days, now=NOW)


PRIVATE = STUDY + '[privacy]\nmechanism = "dp-sgd"\nepsilon = 3.0\ndelta = 1e-5\nclip_norm = 1.0\n'


def test_an_approvals_epsilon_reaches_the_ledger_before_anything_is_computed(desk: Desk) -> None:
    """No worker is started: there is none in this world, and the charge comes first."""
    one, told = packed(PRIVATE), list[float | None]()

    def charge(about: object, study: object, data: str, most: float | None, epoch: int) -> Release:
        told.append(most)
        raise RefusedError("privacy budget: spent")

    work = SiteWork(desk.home, desk.home.data_key(desk.home.lock()), desk.approvals, desk.public, charge)
    approval = made(desk.home, one, "patients", rounds=5, days=1, now=time.time(), epsilon=4.0)
    desk.approvals.approve(desk.key, one, approval, time.time())
    with pytest.raises(RefusedError, match="spent"):
        work.answer(Given(b"", desk.asked(one), None, one.study, bundle=one))
    assert told == [4.0]
    assert "epsilon 4" in decided(desk.approvals.last(desk.public, one.digest))


@pytest.mark.parametrize(
    ("study", "epsilon", "says"),
    [(STUDY, 3.0, "no differential privacy"), (PRIVATE, 2.9, "asks for 3"), (PRIVATE, 0.0, "asks for 3")],
)
def test_an_epsilon_that_the_study_cannot_keep_is_not_approved(
    desk: Desk, study: str, epsilon: float, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        made(desk.home, packed(study), "patients", rounds=5, days=1, now=NOW, epsilon=epsilon)


def test_a_review_shows_code_imports_reaches_and_what_is_new(desk: Desk) -> None:
    """And no control character of the study reaches the terminal."""
    code = (
        b"import os, socket\nfrom . import more\nx = open('/etc/passwd')\nos.system('id')\ny = ().__class__\n"
    )
    code += b"# \x1b[2J\n"
    one, next_one = packed(task=code, more=b""), packed(task=code + b"z = eval('1')\n", more=b"")
    said = document(one, None, "patients", {}, "Landlock")
    assert said["imports"] == ["task.py, line 1: os", "task.py, line 1: socket"]
    for reach in ("line 3: open('/etc/passwd')", "line 4: os.system", "line 5: ().__class__"):
        assert f"task.py, {reach}" in said["touches"]
    shown = page(said, "not decided")
    assert "\x1b" not in shown
    assert "    3 x = open('/etc/passwd')" in shown
    desk.approve(one)
    before = desk.approvals.before(desk.public, next_one)
    assert before == one
    new = page(document(next_one, before, "patients", {}, "Landlock"), "not decided")
    assert "+z = eval('1')" in new
    assert "open('/etc/passwd')" not in new.split("What is new")[1].split("@@")[0]


def test_a_log_that_was_edited_refuses_with_exit_code_4(desk: Desk) -> None:
    one = packed()
    desk.approve(one)
    desk.approvals.path.write_bytes(desk.approvals.path.read_bytes().replace(b'"rounds":5', b'"rounds":9'))
    with pytest.raises(IntegrityError, match="entry 1 ") as error:
        desk.allowed(one)
    assert error.value.exit_code == 4
