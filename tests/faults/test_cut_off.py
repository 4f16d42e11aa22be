"""A site whose network drops everything in silence, in mid-training: it comes back by itself, and the run ends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from live import COMMAND, SHORT_POLLS, Live, counted, live, simulated, study
from tcp_proxy import TcpProxy

from consortium.client.control import ask
from consortium.simulations.hospitals import write_hospitals

ONE, TWO = "hospital-1", "hospital-2"


@contextmanager
def behind_a_proxy(folder: Path, command: tuple[str | Path, ...]) -> Iterator[tuple[Live, TcpProxy]]:
    """Two hospitals; the first reaches the server through a proxy."""
    with ExitStack() as stack:
        one = stack.enter_context(live(folder, command))
        between: list[TcpProxy] = []

        def proxy(port: int) -> TcpProxy:
            between.append(TcpProxy(port))
            stack.callback(between[0].close)
            return between[0]

        places = write_hospitals(folder / "sites", 2)
        one.join(ONE, places[ONE], proxy=proxy)
        one.join(TWO, places[TWO])
        one.gather()
        yield one, between[0]


def cut_off(federation: Live, proxy: TcpProxy, name: str, seconds: float) -> None:
    """Cut the first site off in round 2 of a study, for so long; both ends notice by themselves."""
    federation.at_work(ONE, name, 2)
    proxy.cut()
    end = time.monotonic() + seconds
    federation.until(lambda: federation.connected() == {TWO}, seconds, "the server takes it for connected")
    federation.until(lambda: not status(federation)["connected"], seconds, "it takes itself for connected")
    assert federation.show(name)["round"] == 1
    time.sleep(end - time.monotonic())
    proxy.mend()


def status(federation: Live) -> dict[str, Any]:
    """What the site behind the proxy says of itself."""
    return ask(federation.home(ONE).socket, "status")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_cut_off_within_the_deadline_a_site_loses_nothing(tmp_path: Path) -> None:
    """Ten seconds, several polls (of two seconds here): its answer comes late but in time, and every round counts."""
    name, one = "short", study("short", 2, rounds=3)
    with behind_a_proxy(tmp_path, SHORT_POLLS) as (federation, proxy):
        federation.start(one)
        cut_off(federation, proxy, name, 10)
        shown = federation.over(name)
        assert (shown["state"], shown["why"]) == ("finished", "")
        assert [(e["left_out"], e["void"]) for e in federation.events(name)] == [({}, "")] * 4
        assert federation.model(name) == simulated(one, list(federation.places.values()))
        federation.quiet()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_cut_off_beyond_the_deadline_a_site_is_waited_for(tmp_path: Path) -> None:
    """90 seconds, with the polls of real life and a deadline of 20: rounds without it are void and named so, the run
    waits for it, and ends with both sites and the same model."""
    name, one = "long", study("long", 2, rounds=3, deadline="20s")
    with behind_a_proxy(tmp_path, COMMAND) as (federation, proxy):
        federation.start(one)
        cut_off(federation, proxy, name, 90)
        waiting = federation.show(name)
        shown = federation.over(name)
        assert (waiting["state"], shown["state"]) == ("waiting for sites", "finished"), (waiting, shown)
        assert "deadline" in waiting["sites"][ONE]["last_error"]
        assert counted(shown) == dict.fromkeys((ONE, TWO), (3, None))
        assert federation.connected() == {ONE, TWO}
        assert federation.model(name) == simulated(one, list(federation.places.values()))
        federation.quiet()
