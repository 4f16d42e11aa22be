"""What people do to a run under way: pause, resume and stop it, from the server's side and from a site's."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from live import COMMAND, Live, children, counted, hospitals, simulated, study

ONE, TWO = "hospital-1", "hospital-2"
LONG = 1500
"""Epochs of a round that is longer than a command takes to start."""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with hospitals(tmp_path_factory.mktemp("live"), 2) as one:
        yield one


@pytest.fixture(scope="module")
def right(federation: Live) -> bytes:
    """The model of the tests' study without any of what they do; its bytes do not depend on the study's name."""
    return simulated(study("any", 2, rounds=3, epochs=LONG), list(federation.places.values()))


def type_in(folder: Path, *words: str) -> str:
    """One command at a terminal."""
    done = subprocess.run(
        [*COMMAND, *words, "--dir", folder], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_study_is_paused_and_goes_on_over_a_restart_of_the_server(federation: Live, right: bytes) -> None:
    """Paused, at most the round under way is committed; it stays so when the server starts anew; resumed it ends with
    the bytes of `simulate`."""
    name, server = "paused", federation.folder / "server"
    one = study(name, 2, rounds=3, epochs=LONG)
    federation.start(one)
    federation.at_work(ONE, name, 2)
    assert "paused" in type_in(server, "study", "pause", name)
    federation.end("server")
    federation.start_server()
    federation.gather()
    before = federation.show(name)
    assert before["state"] == "paused"
    assert before["round"] <= 2
    time.sleep(3)
    assert federation.show(name) == before
    assert "running" in type_in(server, "study", "resume", name)
    assert federation.over(name)["state"] == "finished"
    assert federation.model(name) == right
    federation.quiet()


def test_a_site_is_paused_in_mid_training_and_takes_part_again(federation: Live, right: bytes) -> None:
    """Its worker ends at once, the run waits and says for whom; when it takes part again the run ends, same bytes."""
    name, site = "site-paused", federation.home(ONE).folder
    one = study(name, 2, rounds=3, epochs=LONG)
    federation.start(one)
    federation.at_work(ONE, name, 2)
    type_in(site, "client", "pause")
    federation.until(lambda: not children(federation.pids[ONE]), 5, "the worker is not ended")
    federation.until(
        lambda: federation.show(name)["state"] == "waiting for sites", 60, "the run does not wait"
    )
    shown = federation.show(name)
    assert TWO in shown["why"] or ONE in shown["why"], shown
    assert "paused" in str(shown["sites"][ONE]["last_error"])
    assert "paused" in type_in(federation.folder / "server", "server", "sites")
    type_in(site, "client", "resume")
    shown = federation.over(name)
    assert (shown["state"], counted(shown)[ONE]) == ("finished", (3, None))
    assert federation.model(name) == right
    federation.quiet()


def test_a_study_is_stopped_in_mid_training_and_begun_anew(federation: Live, right: bytes) -> None:
    """Its process is gone when the command returns; what was committed is shown; the next run is another, and ends."""
    name, server = "stopped", federation.folder / "server"
    one = study(name, 2, rounds=3, epochs=LONG)
    federation.start(one)
    federation.at_work(ONE, name, 2)
    assert "stopped" in type_in(server, "study", "stop", name)
    assert children(federation.pids["server"]) == []
    federation.quiet(5)  # the sites were told: worker, copy of the data and state are gone
    shown = federation.show(name)
    assert shown["state"] == "stopped"
    assert shown["round"] in (1, 2)  # the command takes a moment to start
    federation.start(one)
    shown = federation.over(name)
    assert (shown["state"], shown["run"]) == ("finished", f"{name}.2")
    assert federation.model(name) == right


def test_a_site_that_was_away_hears_of_the_end_when_it_is_back(federation: Live, right: bytes) -> None:
    """Its run is stopped while its client is killed: what the client left goes as soon as it runs again, at both sites,
    and the study's next run is none the worse for it."""
    name = "away"
    one = study(name, 2, rounds=3, epochs=LONG)
    federation.start(one)
    federation.at_work(ONE, name, 2)
    federation.end(ONE)
    assert list(federation.home(ONE).spool.iterdir())
    type_in(federation.folder / "server", "study", "stop", name)
    assert list(federation.home(ONE).state.iterdir())
    federation.start_client(ONE)
    federation.gather()
    federation.quiet(5)
    federation.start(one)
    assert federation.over(name)["state"] == "finished"
    assert federation.model(name) == right
