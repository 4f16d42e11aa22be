"""A server that is lost in mid-run and restored from a backup, and an old copy of it that somebody starts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from live import COMMAND, Live, hospitals, simulated, study

from consortium.client.control import ask
from consortium.server.backup import back_up, restore

SITES = 2
ONE = "hospital-1"


def error(federation: Live, site: str) -> str:
    return str(ask(federation.home(site).socket, "status")["error"])


@pytest.mark.slow
def test_a_lost_server_is_restored_and_the_run_goes_on(tmp_path: Path) -> None:
    """A backup after round 2 while the run goes on, the server's folder destroyed two rounds later, restored: the same
    clients, which were not touched, work on without joining anew, and the model has the bytes of `simulate`. Then an
    older copy of the folder is started: the sites refuse it, and say so; the restored one is taken again."""
    with hospitals(tmp_path, SITES, COMMAND) as federation:
        one = study("restored", SITES, rounds=6)
        right = simulated(one, list(federation.places.values()))
        server, clients = tmp_path / "server", dict(federation.pids)
        federation.start(one)
        federation.committed(one.name, 2)
        backup = back_up(server, tmp_path / "fed.backup").path
        federation.committed(one.name, 4)
        federation.end("server")
        shutil.rmtree(server)
        made = restore(backup, server)
        assert made.epoch > 0
        federation.start_server()
        shown = federation.over(one.name)
        assert (shown["state"], shown["run"]) == ("finished", "restored.1")
        assert federation.model(one.name) == right
        assert [one["round"] for one in federation.events(one.name) if not one["void"]] == list(range(7))
        assert clients == {**federation.pids, "server": clients["server"]}

        federation.end("server")
        server.rename(tmp_path / "latest")
        shutil.copytree(tmp_path / "latest", server)
        (server / "epoch.json").unlink()  # as it was before the restore
        federation.start_server()
        federation.until(lambda: "old copy" in error(federation, ONE), 30, "the old server is not refused")
        assert federation.connected() == set()
        assert "an old copy of its folder was started" in (tmp_path / "server.log").read_text()
        federation.end("server")
        shutil.rmtree(server)
        (tmp_path / "latest").rename(server)
        federation.start_server()
        federation.gather()
        assert error(federation, ONE) == ""
