"""`consortium study watch` over a server that is killed and started again, or that stays away."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from doors import HERE
from realm import COMMAND, Honest, Realm, realm, wait_for

from consortium.protocol.connection import Connection, UnreachableError, trusting
from consortium.server.admin_client import AWAY, LONGEST_WAIT, Admin


@pytest.fixture
def lung(tmp_path: Path) -> Iterator[Realm]:
    with realm(tmp_path / "lung") as one:
        yield one


def restart(lung: Realm) -> None:
    """Kill the server, and start it over the same folder."""
    lung.server.kill()
    lung.server.wait(10)
    time.sleep(1)
    with (lung.folder / "server.log").open("ab") as log:
        lung.server = subprocess.Popen(
            [COMMAND, "server", "start", "--dir", lung.own],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


@pytest.mark.slow
def test_watching_goes_on_where_it_was_when_the_server_is_back(lung: Realm, tmp_path: Path) -> None:
    """It says that the server is away, and that it is back; no event is shown twice and none is left out, up to the
    run's end."""
    sites = [lung.join(name) for name in ("alba", "bern")]
    honest = [Honest(one) for one in sites]
    run = lung.begin("watched")
    lung.goes_on(30)
    with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
        watching = subprocess.Popen(
            [COMMAND, "study", "watch", "watched", "--json", "--dir", lung.own], stdout=out, stderr=err
        )
    try:
        said = tmp_path / "err"
        wait_for(lambda: len((tmp_path / "out").read_text().splitlines()) > 4, 30, "nothing is shown")
        for one in honest:
            one.stop()
        restart(lung)
        wait_for(lambda: "the server is back" in said.read_text(), 40, "the server is not found again")
        honest = [Honest(one) for one in sites]
        lung.goes_on(30)
        assert lung.admin("POST", f"/v1/studies/{run}/stop").status == 200
        assert watching.wait(20) == 0, said.read_text()
    finally:
        watching.kill()
        for one in honest:
            one.stop()
    shown = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    kept: list[dict[str, Any]] = []
    while found := lung.admin(
        "GET", f"/v1/studies/{run}/events?after={kept[-1]['id'] if kept else 0}"
    ).document["events"]:
        kept += found
    assert shown == kept[: len(shown)]  # a round that was being committed may come after the stop
    assert "stopped" in [one.get("state") for one in shown]
    assert [line.partition(" (")[0] for line in said.read_text().splitlines()] == [
        "lost the server",
        "the server is back",
    ]


def test_a_server_that_stays_away_is_given_up(tmp_path: Path) -> None:
    """After ten minutes, by tries that are at most ten seconds apart; one that was never there, at once."""
    root = tmp_path / "root.pem"
    with realm(tmp_path / "gone") as gone:
        root.write_bytes((gone.own / "root.pem").read_bytes())
        admin = Admin(Connection(HERE, gone.founded.config.admin_port, trusting(root)), gone.token, "")
        gone.begin("s")
        said: list[str] = []
        waits: list[float] = []
        events: Iterator[dict[str, Any]] = admin.events("s", said.append, waits.append)
        next(events)
    with pytest.raises(UnreachableError):
        list(events)
    assert len(said) == 1
    assert AWAY <= sum(waits) < AWAY + LONGEST_WAIT
    assert max(waits) == LONGEST_WAIT
    with pytest.raises(UnreachableError):
        next(admin.events("s", said.append, waits.append))
