"""A clock that was set back makes nothing hold longer: refused, with the reason and what to type."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from site_world import World

from consortium.client.approvals import APPROVED, Approvals, made
from consortium.client.charges import ledger_in
from consortium.client.clock import BACK, why_not
from consortium.client.seen import Place, Seen
from consortium.privacy.ledger import Budget
from consortium.protocol import bundle
from consortium.protocol.errors import RefusedError
from consortium.protocol.study import Study

STUDY = 'format = 1\n[study]\nname = "own"\ntask = "task:Own"\nrounds = 5\n'
CODE = {"task.py": b"class Own: ...\n"}
OWN = bundle.of(Study.parse(STUDY, code=CODE), CODE)
NOW, DAY = 1_800_000_000.0, 86400.0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    one = World(tmp_path_factory.mktemp("clock")).with_data()
    yield one
    one.end()


def test_an_expired_approval_does_not_hold_again_by_a_clock_set_back(world: World) -> None:
    """Whatever the site has acted at since, by instructions or decisions, says that the clock is wrong; the operator,
    who says that it was ahead, is believed, for times up to that."""
    key, approvals = world.home.identity(world.home.lock()), Approvals(world.home)
    one = made(world.home, OWN, "patients", rounds=5, days=2, now=NOW)
    approvals.approve(key, OWN, one, NOW)
    about = world.instruction("train", 1, study=OWN.study.digest)

    def allowed(now: float, latest: float) -> bool:
        return approvals.allowed(key.public_key(), OWN, about, now, latest) is not None

    assert allowed(NOW + DAY, NOW + DAY + BACK - 1)
    with pytest.raises(RefusedError, match="has expired"):
        allowed(NOW + 3 * DAY, NOW + 3 * DAY)
    with pytest.raises(RefusedError, match="was set back, so that of study 'own' does not hold") as found:
        allowed(NOW + DAY, NOW + 3 * DAY)
    assert found.value.exit_code == 3
    with pytest.raises(RefusedError, match="was set back"):
        allowed(NOW - DAY, 0.0)  # before the decision itself
    approvals.approve(key, OWN, replace(one, clock=NOW + 3 * DAY), NOW)
    assert allowed(NOW + DAY, NOW + 3 * DAY)
    with pytest.raises(RefusedError, match="was set back"):
        allowed(NOW + DAY, NOW + 4 * DAY)
    kinds = [(entry.kind, "clock" in entry.body) for entry in approvals.entries(key.public_key())]
    assert kinds == [(APPROVED, False), (APPROVED, True)]
    approvals.path.unlink()


def test_what_was_seen_is_never_taken_back(tmp_path: Path) -> None:
    """The latest time stays, over restarts, although the same run goes on by an earlier clock."""
    path = tmp_path / "seen.json"
    for at, attempt in ((NOW, 0), (NOW - DAY, 1)):
        assert Seen(path, lambda at=at: at).accept("r.1", Place(2, attempt))  # type: ignore[misc]
        assert Seen(path, lambda: NOW - DAY).latest == NOW


def test_a_clock_may_be_a_little_fast() -> None:
    """An hour; what goes back further is told with both times."""
    assert why_not(NOW - BACK, NOW) == ""
    assert why_not(NOW, 0.0) == ""
    assert time.strftime("%Y-%m-%d", time.localtime(NOW)) in why_not(NOW - BACK - 1, NOW)


@pytest.mark.parametrize("what", ["budget", "approve"])
def test_a_command_that_depends_on_time_is_refused_by_a_clock_set_back(what: str, world: World) -> None:
    """`ledger budget` and `approve`: exit code 3, what the clock says, and what to type; nothing is written. Whoever
    says that the clock was ahead is believed."""
    home = world.home
    book = ledger_in(home, home.lock())
    if what == "budget":
        book.allow("patients", Budget(3.0, 1e-5, "record"), time.time() + 2 * DAY)
        words = ["ledger", "budget", "patients", "--epsilon", "9"]
    else:
        seen = Seen(home.seen_file, lambda: time.time() + 2 * DAY)
        assert seen.accept("later.1", Place(0, 0))
        words = ["approve", "nosuch"]

    def typed(*more: str) -> subprocess.CompletedProcess[str]:
        program = str(Path(sys.executable).with_name("consortium"))
        command = [program, "client", *words, *more, "--dir", str(home.folder)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    before = book.head
    done = typed()
    assert done.returncode == 3, done
    assert "it was set back. Set the clock right" in done.stderr
    assert "--clock-was-ahead" in done.stderr
    assert ledger_in(home, home.lock()).head == before
    done = typed("--clock-was-ahead")
    if what == "budget":
        assert done.returncode == 0, done
        shown = ledger_in(home, home.lock()).accounts()["patients"].budget
        assert shown == Budget(9.0, 1e-5, "record")
    else:
        assert "was set back" not in done.stderr, done
        assert done.returncode == 1, "the server of this test has no studies"
        home.seen_file.write_text(json.dumps({"format": 1, "epoch": 0, "runs": {}}))
