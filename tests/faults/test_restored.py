"""A server that is lost in mid-run and restored from a backup, and an old copy of it that somebody starts."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from ledger_kills import book_of
from live import COMMAND, Live, hospitals, simulated, study

from consortium.client.control import ask
from consortium.protocol.study import Study
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


@pytest.mark.slow
def test_no_round_is_noised_twice_for_nothing(tmp_path: Path) -> None:
    """The server noised and sent rounds that its backup does not know. Restored, it asks for them again: they are new
    releases, which each site charges, and declines beyond those of the study's own epsilon. So the run ends early with
    its last model, whose statement says that the server's ledger lacks what it published."""
    rounds = 4
    with hospitals(tmp_path, SITES, COMMAND) as federation:
        one = central("again", rounds)
        federation.start(one)
        federation.committed(one.name, 1)
        backup = back_up(tmp_path / "server", tmp_path / "fed.backup").path
        federation.committed(one.name, 3)
        federation.end("server")
        shutil.rmtree(tmp_path / "server")
        epoch = restore(backup, tmp_path / "server").epoch
        federation.start_server()
        shown = federation.over(one.name, 300)
        assert shown["state"] == "finished early", federation.logs()
        assert f"the study's own epsilon is for {rounds} releases" in shown["why"]
        assert 1 <= shown["round"] < rounds
        for site in federation.places:
            (account,) = book_of(federation, site).accounts().values()
            made = [(charge.epoch, charge.question.round) for charge in account.charges]
            assert len(made) == len(set(made)) == rounds, made
            assert (
                {(0, 1), (0, 2), (0, 3)}
                <= set(made)
                <= {(of, round) for of in (0, epoch) for round in range(1, 5)}
            )
        said = json.loads((Path(shown["model"]) / "privacy.json").read_text())
        assert said["ledger"]["restored"] is True


def central(name: str, rounds: int) -> Study:
    """A study whose server noises what its sites clip."""
    text = re.sub(r"\[privacy\][^\[]*", "", study(name, SITES, rounds=rounds, epochs=1, deadline="2m").text)
    text = re.sub(r"\[strategy\][^\[]*", '[strategy]\nname = "fedavg"\nweighted = false\n', text)
    asked = 'unit = "site"\nmechanism = "central-gaussian"\nepsilon = 50.0\ndelta = 1e-5\nclip_norm = 1.0\n'
    return Study.parse(f"{text}\n[privacy]\n{asked}")
