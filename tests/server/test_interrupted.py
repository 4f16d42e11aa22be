"""An exchange that is interrupted goes on: answers that came count, and only the other sites are asked again."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from sites import World, study_of, tables, world

from consortium.protocol.messages import Instruction
from consortium.server.interrupted import Asked
from consortium.server.standing import Cohort
from consortium.simulations import simulate

QUICK = (
    sys.executable, "-s", "-P", "-B", str(Path(__file__).parents[1] / "support" / "run_quickly.py"),
)  # fmt: skip
STUDY = study_of(study={"rounds": 2})
RUN = "breast-cancer.1"
WAIT = 60.0
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def right() -> bytes:
    """The model of a run that nothing happens to."""
    return simulate(STUDY, sites=tables(), processes=0).outcome.model.tobytes()


class Held:
    """Site c does not answer in one place until it is let; the others do."""

    def __init__(self, one: World, kind: str, round: int) -> None:
        self._place, self._others = (kind, round), set[str]()
        self._two, self._go = threading.Event(), threading.Event()
        one.sites.before, one.sites.after = self._before, self._after

    def _before(self, about: Instruction) -> None:
        if about.site == "c" and (about.kind, about.round) == self._place:
            self._go.wait(WAIT)

    def _after(self, about: Instruction) -> None:
        if about.site != "c" and (about.kind, about.round) == self._place:
            self._others.add(about.site)
            if len(self._others) == 2:
                self._two.set()

    def until_two_answered(self) -> None:
        assert self._two.wait(WAIT)

    def release(self) -> None:
        self._go.set()


def ends(one: World, right: bytes) -> None:
    assert one.until(RUN, "finished", "failed", "finished early") == ("finished", "")
    assert one.model(RUN).tobytes() == right
    rounds = [e for e in one.runs.events(RUN, 0, 0)["events"] if e["kind"] == "round"]
    assert [(e["round"], e["attempt"], [*e["admitted"]]) for e in rounds] == [
        (number, 0, ["a", "b", "c"]) for number in range(3)
    ]
    assert list(one.exchange.spool.iterdir()) == []


def kill(one: World) -> None:
    pid = one.runs.process(RUN)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("kind", "round"),
    [pytest.param("query", 0, marks=SLOW), ("train", 2), pytest.param("evaluate", 2, marks=SLOW)],
)
def test_a_runs_process_that_is_killed_goes_on_with_what_came(
    kind: str, round: int, tmp_path: Path, right: bytes
) -> None:
    """Killed after two of three answers: these sites are not asked again, the third is, and the bits are the same."""
    with world(tmp_path, STUDY, QUICK) as one:
        held = Held(one, kind, round)
        one.sites.join()
        one.start()
        held.until_two_answered()
        kill(one)
        held.release()
        ends(one, right)
        assert [one.sites.asked.count((site, kind, round, 0)) for site in "ab"] == [1, 1]
        assert ("c", kind, round, 0) in one.sites.asked


def gone(folder: Path) -> None:
    (folder / "spool" / f"{RUN}~a").unlink()


def damaged(folder: Path) -> None:
    path = folder / "spool" / f"{RUN}~a"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def anothers(folder: Path) -> None:
    spool = folder / "spool"
    (spool / f"{RUN}~a").write_bytes((spool / f"{RUN}~b").read_bytes())


def torn(folder: Path) -> None:
    path = folder / "spool" / f"{RUN}~a"
    path.write_bytes(path.read_bytes()[:-30])


def unasked(folder: Path) -> None:
    path = folder / "spool" / f"{RUN}~"
    path.write_bytes(path.read_bytes()[:40])


@pytest.mark.parametrize(
    ("harm", "again"),
    [
        (lambda _: None, ""), pytest.param(gone, "a", marks=SLOW), (damaged, "a"),
        pytest.param(anothers, "a", marks=SLOW), pytest.param(torn, "a", marks=SLOW),
        pytest.param(unasked, "ab", marks=SLOW),
    ],
)  # fmt: skip
def test_a_server_that_starts_again_goes_on_with_what_came(
    harm: Callable[[Path], None], again: str, tmp_path: Path, right: bytes
) -> None:
    """The same over a restart of the server, with another process and no memory; what is damaged, another's or gone is
    never used: that site is asked again."""
    with world(tmp_path, STUDY, QUICK) as one:
        held = Held(one, "train", 2)
        one.sites.join()
        one.start()
        held.until_two_answered()
        one.runs.close()
        held.release()
        one.sites.leave()
    assert len(list((tmp_path / "spool").iterdir())) == 3
    harm(tmp_path)
    with world(tmp_path, STUDY, QUICK) as one:
        one.sites.join()
        one.runs.take_up()
        ends(one, right)
        asked = [site for site, kind, round, _ in one.sites.asked if (kind, round) == ("train", 2)]
        assert sorted(asked) == sorted({*again, "c"})


def test_what_is_asked_reads_as_it_was_written() -> None:
    """Over its JSON, with the names of who was set aside; only the last nonces count."""
    one = Asked(3, 1, "train", "m", Cohort(["a", "b"], 1, {"c": "set aside"}), ("1", "2"))
    assert Asked.parse(one.document()) == one
