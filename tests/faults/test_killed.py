"""Processes of a live federation that die in mid-training: the run goes on by itself, and the model is the same."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from live import Live, counted, hospitals, simulated, study

SITES = 2
ONE, TWO = "hospital-1", "hospital-2"
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with hospitals(tmp_path_factory.mktemp("live"), SITES) as one:
        yield one


@pytest.fixture(scope="module")
def right(federation: Live) -> bytes:
    """The model of the study without any fault."""
    return simulated(study("any", SITES), list(federation.places.values()))


@pytest.mark.slow
def test_worker_run_process_and_agent_are_killed_in_mid_training(federation: Live, right: bytes) -> None:
    """kill -9 of a worker in round 1, of the run's process in round 2, of an agent, which is started again, in round 3:
    every round counts both sites, the model has the bytes of `simulate`, and nothing is left."""
    name = "killed"
    federation.start(study(name, SITES))
    federation.at_work(ONE, name, 1)
    federation.kill(federation.worker(ONE))
    federation.at_work(TWO, name, 2)
    federation.kill(federation.run_process())
    federation.at_work(ONE, name, 3)
    worker = federation.worker(ONE)
    federation.end(ONE)
    federation.until(lambda: not Path(f"/proc/{worker}").exists(), 5, "the worker outlives its agent")
    federation.start_client(ONE)
    shown = federation.over(name)
    assert (shown["state"], shown["why"]) == ("finished", "")
    assert counted(shown) == dict.fromkeys((ONE, TWO), (4, None))
    assert [(one["round"], one["left_out"], one["void"]) for one in federation.events(name)] == [
        (number, {}, "") for number in range(5)
    ]
    assert federation.model(name) == right
    federation.quiet()


def gone(place: Path) -> bool:
    """Whether a process has ended, by its folder under /proc."""
    return not place.exists()


@pytest.mark.slow
def test_the_server_is_ended_within_and_between_rounds(federation: Live, right: bytes) -> None:
    """SIGKILL in round 1, SIGTERM just after round 2 was committed, SIGTERM in round 4: started again, the same run
    goes on, the agents come back by themselves, and the model has the bytes of `simulate`."""
    name = "server-ended"
    clients = {site: federation.pids[site] for site in (ONE, TWO)}
    federation.start(study(name, SITES))
    federation.at_work(ONE, name, 1)
    end_and_start(federation, signal.SIGKILL)
    federation.committed(name, 2)
    end_and_start(federation, signal.SIGTERM)
    federation.at_work(ONE, name, 4)
    end_and_start(federation, signal.SIGTERM)
    shown = federation.over(name)
    assert (shown["state"], shown["run"]) == ("finished", f"{name}.1")
    assert all(not one["left_out"] and not one["void"] for one in federation.events(name))
    assert federation.model(name) == right
    assert clients == {site: federation.pids[site] for site in (ONE, TWO)}
    federation.gather()
    federation.quiet()


def end_and_start(federation: Live, number: signal.Signals) -> None:
    """End the server by a signal, see that the run's process ends with it, and start it again."""
    process = federation.run_process()
    federation.end("server", number)
    federation.until(
        lambda: not Path(f"/proc/{process}").exists(), 5, "the run's process outlives its server"
    )
    federation.start_server()


@pytest.mark.slow
def test_nothing_adds_up_over_runs(federation: Live) -> None:
    """After another run, server and clients have no more sockets and pipes open than after the first, once those over
    which answers went have rested for a while."""
    counts: dict[str, int] = {}
    for number in range(2):
        one = study(f"again-{number}", SITES, rounds=2, epochs=1)
        federation.start(one)
        assert federation.over(one.name)["state"] == "finished"
        federation.quiet()
        counts = counts or {name: federation.sockets(name) for name in federation.pids}
    federation.until(
        lambda: all(federation.sockets(name) <= counts[name] for name in federation.pids),
        40,
        f"more sockets than the {counts} of before",
    )
