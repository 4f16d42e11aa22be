"""kill -9 of the server in the middle of a round: the answers that came count, and their sites are not asked again."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from live import COMMAND, Live, hospitals, simulated, study

from consortium.client.control import ask

SITES = 3
SLOW_ONE = "hospital-3"


def state(federation: Live, site: str, run: str) -> tuple[str, int]:
    about = ask(federation.home(site).socket, "status")["runs"].get(run, {"state": "", "round": 0})
    return about["state"], about["round"]


def answers(federation: Live, site: str, round: int) -> int:
    """How often a site says that it answered in a round."""
    log = (federation.folder / f"client-{site}.log").read_text()
    return log.count(f"train of round {round}: answered")


@pytest.mark.slow
def test_kill_9_of_the_server_after_two_of_three_answers(tmp_path: Path) -> None:
    """The third site's worker is stopped, the server killed once the others have answered, and started again: the two
    are not asked again, only the third is, and the model has the bytes of `simulate`."""
    with hospitals(tmp_path, SITES, COMMAND) as federation:
        one = study("cut", SITES, rounds=3, epochs=1500, deadline="5m")
        right = simulated(one, list(federation.places.values()))
        federation.start(one)
        federation.committed(one.name, 1)
        federation.until(lambda: federation.training(SLOW_ONE, one.name, 2), 90, "no round 2", 0.01)
        worker = federation.worker(SLOW_ONE)
        os.kill(worker, signal.SIGSTOP)
        others = [site for site in federation.places if site != SLOW_ONE]
        run = f"{one.name}.1"
        federation.until(
            lambda: all(state(federation, site, run) == ("answered", 2) for site in others), 90, "no answers"
        )
        assert federation.show(one.name)["round"] == 1, "a round is too short for this test"
        federation.end("server")
        federation.start_server()
        os.kill(worker, signal.SIGCONT)
        assert federation.over(one.name)["state"] == "finished"
        assert federation.model(one.name) == right
        assert [answers(federation, site, 2) for site in others] == [1, 1]
        rounds = [(event["round"], event["attempt"]) for event in federation.events(one.name)]
        assert rounds == [(0, 0), (1, 0), (2, 0), (3, 0)]
        assert "goes on with the answers of hospital-1, hospital-2" in (tmp_path / "server.log").read_text()
        federation.quiet()
