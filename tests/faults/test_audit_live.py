"""The logs of a federation that runs: exchanged with every answer, compared, and refused where one was put back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator

import pytest
from live import COMMAND, Live, hospitals, study
from typer.testing import CliRunner

from consortium.client.cli import client
from consortium.client.control import ask
from consortium.protocol.chain import Head
from consortium.server.cli import server

ONE, TWO = "hospital-1", "hospital-2"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Two sites, and a run of two rounds that has ended."""
    with hospitals(tmp_path_factory.mktemp("audited"), 2, COMMAND) as one:
        one.start(study("audited", 2, rounds=2, epochs=1))
        assert one.over("audited")["state"] == "finished"
        one.quiet()
        yield one


def place(federation: Live, name: str) -> list[str]:
    folder = federation.folder / "server" if name == "server" else federation.home(name).folder
    return ["--dir", str(folder)]


def shown(federation: Live, name: str, *filters: str) -> list[dict[str, object]]:
    commands = server if name == "server" else client
    said = CliRunner().invoke(commands, ["audit", "show", "--json", *filters, *place(federation, name)])
    return [json.loads(line)["body"] for line in said.output.splitlines()]


def test_every_round_stands_at_both_sides_and_both_verify(federation: Live) -> None:
    """What was asked, answered and committed, with the site's head in each round; each side's log has what the other
    countersigned."""
    rounds = shown(federation, "server", "--run", "audited", "--kind", "round")
    assert [one["round"] for one in rounds] == [0, 1, 2][-len(rounds) :]
    heads = rounds[-1]["heads"]
    assert isinstance(heads, dict)
    assert all(Head.parse(heads[site]).sequence > 5 for site in (ONE, TWO))
    for site in (ONE, TWO):
        asked = shown(federation, site, "--run", "audited", "--kind", "instruction")
        answered = shown(federation, site, "--run", "audited", "--kind", "answered")
        assert len(asked) == len(answered) >= 3
        assert all(isinstance(one["server"], dict) for one in asked)
        said = CliRunner().invoke(client, ["audit", "verify", "--json", *place(federation, site)])
        assert json.loads(said.output)["server_asked"] is True
    said = CliRunner().invoke(server, ["audit", "verify", "--json", *place(federation, "server")])
    assert set(json.loads(said.output)["countersigned"]) == {ONE, TWO}


def test_an_older_copy_of_a_sites_folder_is_refused_until_the_newest_is_back(federation: Live) -> None:
    """The site names what it lacks and takes no part, the admin reads it, and nothing has to be mended afterwards."""
    folder, away = federation.home(ONE).folder, federation.folder / "away"
    shutil.copytree(folder, federation.folder / "old", ignore=shutil.ignore_patterns("agent.sock"))
    federation.start(study("later", 2, rounds=1, epochs=1))
    assert federation.over("later")["state"] == "finished"
    federation.end(ONE)
    folder.rename(away)
    (federation.folder / "old").rename(folder)
    federation.start_client(ONE)

    def error() -> str:
        try:
            return str(ask(federation.home(ONE).socket, "status")["error"])
        except Exception:  # noqa: BLE001 - it is starting
            return ""

    federation.until(lambda: "older copy of this folder" in error(), 60, "is not refused")
    federation.until(
        lambda: "older copy" in str(federation.admin.get("/v1/sites")["sites"][0]["last_error"]),
        60,
        "the admin is not told",
    )
    said = CliRunner().invoke(client, ["audit", "verify", *place(federation, ONE)])
    assert getattr(said.exception, "exit_code", 0) == 4
    federation.end(ONE)
    shutil.rmtree(folder)
    away.rename(folder)
    federation.start_client(ONE)
    federation.gather()
    assert error() == ""
